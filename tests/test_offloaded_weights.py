"""Offloaded weights as values: loaded where they are needed, counted before the run and after it, let go of again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

import tracelens as tl
from tests.support.families import FAMILIES
from tests.support.offloading import WAYS
from tests.support.pretend import Pretend, Seen, device_map, pretend
from tests.test_memory import ROWS
from tracelens.backends.spread import lent_to
from tracelens.errors import ExtraMemoryError

__all__ = ["pretend"]

P = ["pretend:0", "pretend:1"]
HEAD = 97 * 48 * 4
"""The bytes of the unembedding."""
O_PROJ = 48 * 48 * 4
"""The bytes of the output projection of a layer's attention."""
Block = Callable[[Any], None]


def lens_by_hand(model: Any) -> None:
    (model.layers[1].resid_post[:, -1] @ model.unembed.T).save("by hand")


def lens_by_modules(model: Any) -> None:
    h = model.layers[1].resid_post[:, -1]
    model.hf.lm_head(model.hf.model.norm(h)).save("by modules")


def one_of_every_layer(model: Any) -> None:
    for number, layer in enumerate(model.layers):
        (layer.resid_post[:, -1] @ model.param(f"model.layers.{number}.self_attn.o_proj.weight").T).save()


def a_row(model: Any) -> None:
    model.layers[1].resid_post[:, -1] += model.unembed[7]
    model.layers[2].resid_post[:, -1].save("steered")


def of_weights_alone(model: Any) -> None:
    (
        model.param("model.layers.1.mlp.up_proj.weight") @ model.param("model.layers.0.mlp.down_proj.weight")
    ).save("w")


def the_weight_itself(model: Any) -> None:
    model.param("lm_head.weight").save("w", device="keep")


BLOCKS = (lens_by_hand, lens_by_modules, one_of_every_layer, a_row, of_weights_alone, the_weight_itself)


def offloaded(way: str, folder: Path) -> tl.Model:
    return tl.wrap(WAYS[way](FAMILIES["llama"].build(), folder, P[0]))


def programs(model: tl.Model, block: Block | None) -> tl.Program:
    with model.record() as r:
        if block is not None:
            block(model)
        model.logits[:, -1, :1].save("end")
    return model.compile(r)


@contextmanager
def peaks(hf: Any, seen: Seen, *, without: tuple[str, ...] = ()) -> Iterator[list[int]]:
    """The most bytes alive on the first device between any module's beginning or end and the next such moment."""
    found: list[int] = []

    def look(*_: Any) -> None:
        found.append(seen.peak(P[0]))
        seen.reset_peak()

    modules = [module for path, module in hf.named_modules() if path not in without]
    handles = [module.register_forward_hook(look) for module in modules]
    handles += [module.register_forward_pre_hook(look) for module in modules]
    gc.collect()
    gc.disable()  # what other tests have left behind must not be freed meanwhile
    seen.reset_peak()
    yield found
    gc.enable()
    for handle in handles:
        handle.remove()


def predicted(model: tl.Model, program: tl.Program) -> int:
    compiled = model._compiler.compile(program.graph)
    (extra,) = compiled.held(program.graph, model.prepare(ROWS).sizes)
    assert extra.place.device == P[0]
    return extra.bytes


def measured(
    pretend: Pretend, model: tl.Model, block: Block, *, without: tuple[str, ...] = ()
) -> tuple[int, dict[tuple[str, str], int]]:
    """What a block holds at most beyond what the same run holds without it, and the bytes that travel for it."""
    found: list[list[int]] = []
    moved: list[dict[tuple[str, str], int]] = []
    for each in (None, block):
        program = programs(model, each)
        with pretend.watched() as seen:
            with peaks(model.hf, seen, without=without) as passing:
                results = program(ROWS)
            found.append([*passing, seen.alive(P[0])])
            moved.append(seen.moved())
        del results
    bare, own = found
    assert len(bare) == len(own)
    extra = {pair: size - moved[0].get(pair, 0) for pair, size in moved[1].items()}
    return max(one - other for one, other in zip(own, bare, strict=True)), extra


@pytest.mark.parametrize("way", ["memory", "disk", "layers at once"])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_what_is_predicted_is_measured(pretend: Pretend, block: Block, way: str, tmp_path: Path) -> None:
    model = offloaded(way, tmp_path)
    held, _ = measured(pretend, model, block)
    assert predicted(model, programs(model, block)) == pytest.approx(held, rel=0.05, abs=512)


def test_the_weights_are_most_of_what_is_predicted(pretend: Pretend, tmp_path: Path) -> None:
    """What is measured above would not be, without them; and a model that is there as a whole has no such memory."""
    model = offloaded("memory", tmp_path)
    for block, weights in (
        (lens_by_hand, HEAD),
        (lens_by_modules, HEAD),
        (one_of_every_layer, O_PROJ),
        (the_weight_itself, HEAD),
    ):
        assert 0 <= predicted(model, programs(model, block)) - weights < weights, block.__name__
    whole = tl.wrap(FAMILIES["llama"].build().to(P[0]))
    assert predicted(whole, programs(whole, lens_by_hand)) < 0.2 * HEAD
    # Of a weight that stays where it is, what is saved to be kept there is a copy.
    assert predicted(whole, programs(whole, the_weight_itself)) == HEAD + 16


def test_what_travels_is_reported(pretend: Pretend, tmp_path: Path) -> None:
    for way in ("memory", "disk"):
        model = offloaded(way, tmp_path / way)
        for block, copies, size in (
            (lens_by_hand, 1, HEAD),
            (lens_by_modules, 2, HEAD + 48 * 4),
            (one_of_every_layer, 3, 3 * O_PROJ),
        ):
            _, moved = measured(pretend, model, block)
            with model.trace(ROWS) as t:
                block(model)
            (found,) = (one for one in t.report.moved if one.what == "weights")
            assert (found.source, found.target, found.copies, found.bytes) == ("cpu", P[0], copies, size)
            # The inputs are the same in both runs. What was measured saves a number of each row beside the block.
            assert moved["cpu", P[0]] == size
            assert t.report.held[0].bytes >= size / copies


def test_on_the_host_weights_in_memory_need_no_more(tmp_path: Path) -> None:
    found: dict[str, tuple[int, bool]] = {}
    for way in ("memory", "disk"):
        model = tl.wrap(WAYS[way](FAMILIES["llama"].build(), tmp_path / way))
        with model.trace(ROWS) as t:
            lens_by_hand(model)
        assert t.report.moved == ()
        found[way] = t.report.held[0].bytes, "loads lm_head.weight" in t.explain()
    assert found["memory"][1] is False
    assert found["disk"][1] is True
    assert found["disk"][0] - found["memory"][0] == HEAD


def test_weights_are_loaded_where_they_are_needed_first(pretend: Pretend, tmp_path: Path) -> None:
    """One of each layer, one after the other: more layers need no more memory."""
    model = offloaded("memory", tmp_path)
    held: list[int] = []
    for layers in (1, 2, 3):
        with model.record() as r:
            for number in range(layers):
                weight = model.param(f"model.layers.{number}.self_attn.o_proj.weight")
                (model.layers[number].resid_post[:, -1, :1] * weight[0, 0]).save()
        held.append(predicted(model, model.compile(r)) - layers * 16)
    assert held[0] == held[1] == held[2] >= O_PROJ
    said = r.plan().explain()
    for layer in range(3):
        path = f"model.layers.{layer}.self_attn.o_proj.weight"
        assert f"loads {path} f32[48,48] for place 0 at layers.{layer}.resid_post\n" in said
    with model.trace(ROWS) as t:
        lens_by_hand(model)
        the_weight_itself(model)
    # What is saved by itself is there from the beginning.
    assert "loads lm_head.weight f32[97,48] for place 0 before the pass, 18.2 KiB" in t.explain()


def test_too_much_is_refused_and_the_weight_is_named(pretend: Pretend, tmp_path: Path) -> None:
    model = offloaded("memory", tmp_path)
    calls: list[int] = []
    model.hf.model.layers[0].register_forward_hook(lambda *_: calls.append(1))

    def traced(most: str) -> None:
        with model.trace(ROWS, max_extra_memory=most):
            h = model.layers[1].resid_post[:, -1]
            (h @ model.unembed.T).argmax(-1).save("lens")

    with pytest.raises(
        ExtraMemoryError, match=r'on pretend:0 .*18\.2 KiB for `%\d+ = param "lm_head\.weight"'
    ) as caught:
        traced("16KiB")
    assert "model.unembed" in str(caught.value.at and caught.value.at.text)
    assert "model.logits" in str(caught.value.instead)
    assert not calls
    traced("32KiB")
    assert calls
    program = programs(model, lens_by_hand)
    limited = model.compile(program.graph, max_extra_memory="16KiB")
    with pytest.raises(ExtraMemoryError, match="lm_head"):
        limited(ROWS)


# --- modules that accelerate loads -----------------------------------------------------------------------------------


def test_a_module_that_is_applied_is_counted_while_it_is_called(pretend: Pretend, tmp_path: Path) -> None:
    for way in ("memory", "disk"):
        model = offloaded(way, tmp_path / way)

        def head(model: Any) -> None:
            h = model.layers[1].resid_post[:, -1]
            tl.apply(model.hf.lm_head, h, like=torch.empty(4, 97))[:, :1].save("applied")

        held, _ = measured(pretend, model, head, without=("lm_head",))
        said = predicted(model, programs(model, head))
        assert said == pytest.approx(held, rel=0.05, abs=512)
        assert said > HEAD
        with model.trace(ROWS) as t:
            head(model)
        line = "for which accelerate loads at most 18.2 KiB on pretend:0"
        assert f"  applies lm_head ({t.graph.locations[2].short}), {line}\n" in t.explain()
        # What accelerate moves is its own.
        assert not [one for one in t.report.moved if one.what == "weights"]
        with (
            pytest.raises(ExtraMemoryError, match="`the weights of lm_head`"),
            model.trace(ROWS, max_extra_memory="16KiB"),
        ):
            head(model)


def test_modules_inside_one_that_is_applied_are_loaded_one_after_the_other(
    pretend: Pretend, tmp_path: Path
) -> None:
    each, once = offloaded("memory", tmp_path / "each"), offloaded("layers at once", tmp_path / "once")
    layers = [model.hf.model.layers[1] for model in (each, once)]
    up = layers[0].mlp.up_proj.weight.nbytes
    whole = sum(parameter.nbytes for parameter in layers[1].parameters())
    for function in (layers[0].mlp, layers[0].mlp.forward):
        ((mlp,),) = lent_to(each.anatomy.keepers, [print, function]).values()
        assert (mlp.module, mlp.device, mlp.bytes) == ("model.layers.1.mlp", P[0], up)
    ((layer,),) = lent_to(each.anatomy.keepers, [layers[0]]).values()
    assert (layer.module, layer.bytes) == ("model.layers.1", up)
    ((layer,),) = lent_to(once.anatomy.keepers, [layers[1]]).values()
    assert (layer.module, layer.bytes) == ("model.layers.1", whole)
    assert lent_to(once.anatomy.keepers, [torch.nn.Linear(3, 4), print, torch.ones(3).sum]) == {}
    assert lent_to((), layers) == {}


# --- whose memory it is ----------------------------------------------------------------------------------------------


def test_a_saved_weight_is_nobody_elses(pretend: Pretend, tmp_path: Path) -> None:
    """Not what accelerate keeps, nor what it has loaded for the moment."""
    for way, on in (("memory", "cpu"), ("disk", "cpu"), ("memory", P[0])):
        hf = WAYS[way](FAMILIES["llama"].build(), tmp_path / way, on)
        model = tl.wrap(hf)
        for aligned in (False, True):
            with accelerate.utils.align_module_device(hf.lm_head) if aligned else torch.no_grad():
                with model.trace(ROWS):
                    saved = model.param("lm_head.weight").save(device="keep")
                before = saved.value.cpu().clone()
                with torch.no_grad():
                    saved.value.zero_()
                with model.trace(ROWS):
                    again = model.param("lm_head.weight").save()
            assert torch.equal(again.value, before), (way, on, aligned)
            assert before.any()


def test_a_weight_that_the_model_has_loaded_at_that_moment_is_not_held_longer(
    pretend: Pretend, tmp_path: Path
) -> None:
    """Inside a layer that loads all of its weights at once they are there already, and go when the layer has run."""
    model = offloaded("layers at once", tmp_path)

    def inside(model: Any) -> None:
        for number in range(3):
            path = f"model.layers.{number}.self_attn.o_proj.weight"
            (model.layers[number].mlp_out[:, -1] @ model.param(path).T).save()

    held, moved = measured(pretend, model, inside)
    assert predicted(model, programs(model, inside)) == pytest.approx(held, rel=0.05, abs=512)
    assert held < 2 * O_PROJ
    assert moved["cpu", P[0]] == 0


def test_weights_of_several_places(pretend: Pretend, tmp_path: Path) -> None:
    """The stream of a layer on another device goes to the weight, which is loaded where its module computes."""
    hf = FAMILIES["llama"].build()
    parts: Any = device_map(hf, [P[0], "cpu", P[1]], embedding=P[0], norm=P[1], head="cpu")
    model = tl.wrap(
        accelerate.dispatch_model(hf, parts, main_device=torch.device(P[0]), offload_dir=tmp_path)
    )
    plain = tl.wrap(FAMILIES["llama"].build())
    found: list[dict[str, torch.Tensor]] = []
    for each in (plain, model):
        with each.trace(ROWS) as t:
            (each.layers[2].resid_post[:, -1] @ each.unembed.T).save("lens")
            each.layers[1].resid_post += each.param("model.layers.1.mlp.down_proj.weight").sum(-1)
            each.layers[2].resid_post.norm(dim=-1).save("norms")
        found.append(dict(t.results))
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-5, atol=1e-5)
    weights = {one.target: one.bytes for one in t.report.moved if one.what == "weights"}
    assert weights == {P[0]: HEAD + 48 * 80 * 4}
    said = t.explain()
    assert "loads model.layers.1.mlp.down_proj.weight f32[48,80] for place 0 at layers.1.resid_post" in said
    assert "place 0 (pretend:0)" in said


def test_a_module_that_is_called_on_a_value_is_loaded_while_recording_too(tmp_path: Path) -> None:
    """By accelerate's hook, before it comes to the value; the parameter by its path is not."""
    hf = WAYS["memory"](FAMILIES["llama"].build(), tmp_path)
    model = tl.wrap(hf)
    own, seen = hf.lm_head._hf_hook.weights_map, []

    class Counted(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            seen.append(name)
            return own[name]

    hf.lm_head._hf_hook.weights_map = Counted()
    found = []
    for module, loads in ((True, ["weight"]), (False, [])):
        with model.trace(ROWS):
            h = model.layers[1].resid_post[:, -1]
            found.append((hf.lm_head(h) if module else h @ model.unembed.T).save())
            assert seen == loads
        assert seen == [*loads, "weight"]
        seen.clear()
    torch.testing.assert_close(found[0].value, found[1].value)
