"""Models that accelerate has spread over devices: where their parts are, and blocks on each of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from torch import Tensor
from transformers import PreTrainedModel

import tracelens as tl
from tests.support.families import EVERY, FAMILIES, LAYERS, MOST
from tests.support.plain import untouched
from tests.support.pretend import Pretend, device_map, pretend
from tracelens.backends.places import placement
from tracelens.errors import ModelMovedError, SeveralDevicesError
from tracelens.ir.sites import KINDS, TEXT, Scope, Site

__all__ = ["pretend"]

P = [f"pretend:{index}" for index in range(5)]
IDS = [[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]]
ROWS = [[5, 6, 7, 8, 9], [11, 12]]

SPREADS: dict[str, dict[str, Any]] = {
    "two": {"layers": [P[0], P[0], P[1]]},
    "five": {"layers": P[1:4], "embedding": P[0], "norm": P[4]},
    "back and forth": {"layers": [P[0], P[1], P[0]], "embedding": P[1], "norm": P[1], "head": P[0]},
    "offloaded": {"layers": [P[0], "cpu", P[1]], "norm": "cpu"},
    "disk": {"layers": ["disk", "cpu", P[1]], "embedding": P[1], "head": "disk"},
}


def build(family: str, name: str, folder: Path, **settings: Any) -> PreTrainedModel:
    model = EVERY[family].build(**settings)
    parts = dict(SPREADS[name])
    if model.config.tie_word_embeddings:
        parts.pop("head", None)
    return accelerate.dispatch_model(
        model, device_map(model, **parts), main_device=torch.device(P[0]), offload_dir=str(folder)
    )


def _equal(found: Any, wanted: Any, what: object) -> None:
    if isinstance(wanted, list):
        for one, other in zip(found, wanted, strict=True):
            _equal(one, other, what)
    else:
        assert torch.equal(found, wanted), what


# --- where things are ----------------------------------------------------------------------------------------------


def test_places_are_where_the_modules_compute(pretend: Pretend, tmp_path: Path) -> None:
    hf = build("llama", "back and forth", tmp_path)
    anatomy = tl.wrap(hf).anatomy
    seen: dict[str, str] = {}

    def look(path: str, _: Any, __: Any, out: Any) -> None:
        out = out[0] if isinstance(out, tuple) else out
        if isinstance(out, Tensor):
            seen.setdefault(path, str(out.device))

    for path, module in hf.named_modules():
        module.register_forward_hook(partial(look, path))
    with torch.no_grad():
        hf(torch.tensor(IDS))
    spread = anatomy.spread
    assert len(seen) > 40
    assert {path: str(spread.device_of(path)) for path in seen} == seen
    assert [str(device) for device in spread.devices] == [P[1], P[0]]
    assert str(spread.inputs) == P[0], "where the head is: the logits need not travel"
    where = placement(anatomy)
    assert [place.device for place in where.places] == [P[1], P[0]]
    assert where.layers == (1, 0, 1)
    assert {name: where.places[index].device for name, index in where.ends.items()} == {
        "token_mask": P[0], "token_ids": P[0], "positions": P[0], "next_tokens": P[0],
            "embed": P[1], "final_norm": P[1], "lm_head": P[0], "logits": P[0],
    }  # fmt: skip
    assert where.place_of(Site("resid_post", 1)).device == P[1]
    assert where.places[where.of_path("model.layers.2.mlp.up_proj.weight")].device == P[0]
    assert where.apart == {}


def test_a_norm_may_be_elsewhere_than_its_layer(pretend: Pretend) -> None:
    hf = FAMILIES["llama"].build()
    places = device_map(hf, layers=[P[0], P[0], P[0]])
    del places["model.layers.1"]
    for name, _ in hf.model.layers[1].named_children():
        places[f"model.layers.1.{name}"] = P[1] if name == "post_attention_layernorm" else P[0]
    accelerate.dispatch_model(hf, places, main_device=torch.device(P[0]))
    plain = tl.wrap(FAMILIES["llama"].build())
    model = tl.wrap(hf)
    where = placement(model.anatomy)
    assert {site: where.places[index].device for site, index in where.apart.items()} == {
        ("resid_mid", 1): P[1],
        ("mlp_norm", 1): P[1],
    }
    for name in ("resid_mid", "mlp_norm", "mlp_in", "resid_post"):
        found = []
        for each in (plain, model):
            with each.trace(IDS):
                found.append(getattr(each.layers[1], name).save())
        assert torch.equal(found[0].value, found[1].value), name


def test_an_offloaded_part_runs_on_the_main_device(pretend: Pretend, tmp_path: Path) -> None:
    model = tl.wrap(build("llama", "disk", tmp_path))
    spread = model.anatomy.spread
    assert str(spread.device_of("model.layers.0.mlp")) == P[0]
    assert str(spread.device_of("model.layers.1")) == P[0]
    assert str(spread.device_of("model.layers.2.mlp")) == P[1]
    assert spread.offloaded("model.layers.0")
    assert not spread.offloaded("model.layers.2")
    assert spread.offloaded("lm_head.weight")
    assert f"on {P[1]} and {P[0]}, " in model.describe()
    assert "weights offloaded" in model.describe()


def test_a_head_with_the_embedding_on_the_first_device(pretend: Pretend, tmp_path: Path) -> None:
    hf = build("llama_tied", "five", tmp_path)
    model = tl.wrap(hf)
    assert str(model.anatomy.spread.device_of("lm_head")) == P[0]
    assert str(model.anatomy.device) == P[0]
    with model.trace(IDS):
        logits = model.logits.save(device="keep")
    assert str(logits.device) == P[0]


# --- blocks on one device ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("family", ["llama_tied", "qwen3", "gpt2"])
def test_every_site_reads_and_writes_the_same_bits(
    pretend: Pretend, family: str, spread: str, tmp_path: Path
) -> None:
    plain = tl.wrap(EVERY[family].build(attn="eager"))
    hf = build(family, spread, tmp_path, attn="eager")
    model = tl.wrap(hf)
    vector = torch.linspace(-1, 1, 48)
    with untouched(hf):
        for kind in KINDS:
            if kind.scope in TEXT or not plain.anatomy.has(Site(kind.name)):
                continue
            for layer in range(LAYERS) if kind.scope is Scope.LAYER else (None,):
                found: list[Any] = []
                for each in (plain, model):
                    holder: Any = each if layer is None else each.layers[layer]
                    with each.trace(ROWS):
                        value = getattr(holder, kind.name)
                        first = value.save()
                        if value.shape[-1] == 48:
                            setattr(holder, kind.name, value + vector)
                        else:
                            setattr(holder, kind.name, value * 1.5)
                        # At the same site: what is written there, in whatever memory it is.
                        second = getattr(holder, kind.name).save()
                    found.append((first.value, second.value))
                _equal(found[1][0], found[0][0], (kind.name, layer))
                _equal(found[1][1], found[0][1], (kind.name, layer))


@pytest.mark.parametrize("family", MOST)
@pytest.mark.parametrize("spread", ["five", "back and forth", "offloaded"])
def test_reading_a_site_leaves_the_rest_of_the_pass_as_it_is(
    pretend: Pretend, family: str, spread: str, tmp_path: Path
) -> None:
    """The pass goes on after what is only read: to the logits, which are those of one device."""
    plain = tl.wrap(FAMILIES[family].build(attn="eager"))
    hf = build(family, spread, tmp_path, attn="eager")
    model = tl.wrap(hf)
    with plain.trace(ROWS):
        wanted = plain.logits.save()
    for kind in KINDS:
        if kind.scope is Scope.INPUT or not plain.anatomy.has(Site(kind.name)):
            continue
        found: list[Any] = []
        for each in (plain, model):
            holder: Any = each.layers[:] if kind.scope is Scope.LAYER else each
            with each.trace(ROWS):
                value = getattr(holder, kind.name).save()
                logits = each.logits.save("logits")
            found.append((value.value, logits.value))
        _equal(found[1][0], found[0][0], kind.name)
        _equal(found[1][1], wanted.value, kind.name)


def test_heads_are_read_across_devices(pretend: Pretend, tmp_path: Path) -> None:
    plain = tl.wrap(FAMILIES["qwen3"].build())
    found: list[Any] = []
    for model in (plain, tl.wrap(build("qwen3", "five", tmp_path))):
        with model.trace(IDS) as t:
            model.layers[:].head([1, 3]).z.save("z")
            model.layers[:].head(2).head_out.save("out")
            model.layers[2].head(0).z = model.layers[0].head(0).z
            model.logits.save("logits")
        found.append(t.results)
    for name, wanted in found[0].items():
        torch.testing.assert_close(found[1][name], wanted, rtol=1e-5, atol=1e-6)


def test_reading_where_no_hook_of_accelerate_stands_moves_nothing_of_the_models(pretend: Pretend) -> None:
    """The first norm of each layer is elsewhere, and the layer itself has no hook: its input stays where it is."""
    hf = FAMILIES["gpt2"].build()
    parts = device_map(hf, [P[0]] * 3)
    for index in range(3):
        path = f"transformer.h.{index}"
        del parts[path]
        children = hf.transformer.h[index].named_children()
        parts |= {f"{path}.{name}": P[1] if name == "ln_1" else P[0] for name, _ in children}
    accelerate.dispatch_model(hf, parts, main_device=torch.device(P[0]))
    plain, model = tl.wrap(FAMILIES["gpt2"].build()), tl.wrap(hf)
    found: list[Any] = []
    for each in (plain, model):
        with each.trace(IDS) as t:
            each.layers[1].resid_pre.save("pre")
            each.layers[1].resid_mid.save("mid")
            each.layers[1].resid_post.save("post")
            each.logits.save("logits")
        found.append(t.results)
    for name, wanted in found[0].items():
        assert torch.equal(found[1][name], wanted), name


def test_a_programs_constants_lie_on_every_device_that_uses_them(pretend: Pretend, tmp_path: Path) -> None:
    vector = torch.linspace(-1, 1, 48)
    found: list[Any] = []
    for model in (tl.wrap(FAMILIES["llama"].build()), tl.wrap(build("llama", "five", tmp_path))):
        with model.record() as r:
            model.layers[:].resid_post += vector
            model.logits.save("logits")
        program = model.compile(r)
        found += [program(IDS)["logits"], program(IDS)["logits"]]
    assert all(torch.equal(found[0], one) for one in found)


def test_changes_of_the_users_tensors_are_seen_however_they_are_made(pretend: Pretend) -> None:
    """``.data`` and numpy leave no trace on a tensor, so nothing but a program's own copy is kept on a device."""
    plain, model = tl.wrap(FAMILIES["llama"].build()), tl.wrap(FAMILIES["llama"].build().to(P[0]))
    probe, array = torch.nn.Linear(48, 48, bias=False), np.ones(48, np.float32)
    shared = torch.from_numpy(array)

    def check() -> None:
        found: list[Any] = []
        for each in (plain, model):
            with each.trace(IDS) as t:
                (probe(each.layers[1].mlp_out) + shared).save("x")
            found.append(t["x"])
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)

    check()
    probe.weight.data = torch.zeros(48, 48)
    check()
    probe.weight.data.add_(1.0)
    check()
    array[:] = 7.0
    check()
    with model.record() as r:
        model.layers[1].resid_post += shared
        model.logits[:, -1].save("l")
    program = model.compile(r)
    with pretend.watched() as seen:
        results = [program(IDS)["l"] for _ in range(3)]
    assert torch.equal(results[0], results[2])
    constants = [copy for copy in seen.copies if copy.shape == (48,)]
    assert len(constants) == 1, "a program's own constants are moved once"


@pytest.mark.parametrize("spread", SPREADS)
def test_an_edit_at_a_layers_input_lands_on_the_layers_device(
    pretend: Pretend, spread: str, tmp_path: Path
) -> None:
    """Hooks of PyTorch come before accelerate moves the input: what is added has to meet it on one device."""
    plain = tl.wrap(FAMILIES["llama"].build())
    model = tl.wrap(build("llama", spread, tmp_path))
    vector = torch.linspace(-1, 1, 48)
    for layer in range(LAYERS):
        for edited in (
            lambda each: each.layers[layer].resid_pre,  # noqa: B023
            lambda each: each.module(f"model.layers.{layer}").input,  # noqa: B023
        ):
            found: list[Tensor] = []
            for each in (plain, model):
                with each.trace(IDS):
                    before = each.layers[layer].resid_post.save()
                with each.trace(IDS):
                    h = edited(each)
                    h[:, -1] += vector
                    after = each.layers[layer].resid_post.save()
                assert not torch.allclose(before.value, after.value, atol=1e-2)
                found.append(after.value)
            assert torch.equal(*found)


def test_an_edit_reaches_the_layers_on_the_other_devices(pretend: Pretend, tmp_path: Path) -> None:
    """A generation, whose writes of one device are seen by all that follow."""
    found = []
    for hf in (FAMILIES["llama"].build(), build("llama", "five", tmp_path)):
        model = tl.wrap(hf)
        with model.generate(ROWS, max_new_tokens=6, eos_token_id=[]) as plain:
            model.layers[0].resid_post *= 1.0
        with model.generate(ROWS, max_new_tokens=6, eos_token_id=[]) as t:
            model.layers[0].resid_pre *= -3.0
        assert plain.tokens != t.tokens
        found.append((plain.tokens, t.tokens))
    assert found[0] == found[1]


def test_looking_moves_nothing_more(pretend: Pretend, tmp_path: Path) -> None:
    """A read at a layer's input takes over the copy that accelerate would make."""
    hf = build("llama", "five", tmp_path)
    model = tl.wrap(hf)

    def crossings(name: str, layer: int) -> list[tuple[str, str]]:
        with pretend.watched() as seen, model.trace(IDS):
            getattr(model.layers[layer], name).save(device="keep")
            model.layers[layer].mlp_act.save(device="keep")  # the pass goes on
        stream = [copy for copy in seen.copies if copy.shape == (2, 5, 48)]
        return [(copy.source, copy.target) for copy in stream]

    for _ in range(2):  # constants and programs are there the second time
        assert crossings("resid_pre", 2) == [(P[0], P[1]), (P[1], P[2]), (P[2], P[3])]
    assert crossings("resid_post", 1) == [(P[0], P[1]), (P[1], P[2])]


def test_modules_are_left_out_and_replaced(pretend: Pretend, tmp_path: Path) -> None:
    found = []
    for hf in (FAMILIES["llama"].build(), build("llama", "five", tmp_path)):
        model = tl.wrap(hf)
        outputs = []
        with untouched(hf):
            with model.trace(IDS):
                model.layers[1].replace(mlp_add=torch.linspace(0, 1, 48))
                outputs.append(model.layers[1].resid_post.save())
            with model.trace(IDS):
                model.layers[2].skip()
                outputs.append(model.layers[2].resid_post.save())
            with model.trace(IDS):
                model.module("model.layers.1.self_attn.o_proj").replace(0.25)
                outputs.append(model.layers[1].attn_out.save())
        found.append([out.value for out in outputs])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_parameters_and_gradients_on_one_device(pretend: Pretend, tmp_path: Path) -> None:
    for spread in ("five", "offloaded"):
        found = []
        for hf in (FAMILIES["llama"].build(), build("llama", spread, tmp_path)):
            model = tl.wrap(hf)
            with untouched(hf):
                with model.trace(IDS):
                    lens = (model.final_norm @ model.unembed.T).save() if spread == "offloaded" else None
                    down = (
                        (
                            model.layers[1].mlp_act @ model.param("model.layers.1.mlp.down_proj.weight").T
                        ).save()
                        if lens is None
                        else None
                    )
                with model.trace(IDS):
                    h = model.layers[1].resid_post
                    gradient = tl.grad(h.pow(2).sum(), model.layers[1].mlp_act).save()
            found.append([(lens if down is None else down).value, gradient.value])
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other), spread


# --- what does not go yet, and moving ------------------------------------------------------------------------------


def test_a_program_for_another_spread_is_refused(pretend: Pretend, tmp_path: Path) -> None:
    hf = FAMILIES["llama"].build()
    model = tl.wrap(hf)
    with model.record() as r:
        model.layers[1].resid_post.save("h")
    program = model.compile(r)
    wanted = program(IDS)["h"]
    hf.to(P[1])
    with pytest.raises(ModelMovedError, match=f"on {P[1]} now"):
        program(IDS)
    assert torch.equal(model.compile(r)(IDS)["h"], wanted)
    accelerate.dispatch_model(hf, device_map(hf, layers=P[1:4]), main_device=torch.device(P[1]))
    program = model.compile(r)
    assert torch.equal(program(IDS)["h"], wanted)
    remove_hook_from_submodules(hf)
    accelerate.dispatch_model(hf, device_map(hf, layers=[P[2], P[2], P[0]]), main_device=torch.device(P[2]))
    with pytest.raises(ModelMovedError, match=f"on {P[2]} and {P[0]} now"):
        program(IDS)
    with model.trace(IDS):
        h = model.layers[1].resid_post.save(device="keep")
    assert str(h.device) == P[2]
    assert torch.equal(h.value.cpu(), wanted)


def test_parts_that_nothing_connects_are_refused(pretend: Pretend) -> None:
    hf = FAMILIES["llama"].build()
    hf.model.layers[2].to(P[1])
    with pytest.raises(SeveralDevicesError, match=f"cpu, {P[1]}"):
        tl.wrap(hf)


def test_a_saved_model_is_loaded_onto_the_devices(pretend: Pretend, tmp_path: Path) -> None:
    hf = FAMILIES["llama"].build()
    hf.save_pretrained(tmp_path)
    plain = tl.wrap(hf)
    model = tl.load(tmp_path, device_map=device_map(hf, layers=[P[0], P[1], P[1]]))
    assert model.describe().endswith(f"on {P[0]} and {P[1]}, float32")
    assert str(tl.load(tmp_path, device_map=P[2]).anatomy.spread) == P[2]
    with plain.trace(IDS), model.trace(IDS):
        wanted, found = plain.layers[2].mlp_act.save(), model.layers[2].mlp_act.save()
    assert torch.equal(found.value, wanted.value)


def test_a_plain_module_on_two_devices(pretend: Pretend) -> None:
    def build() -> torch.nn.Sequential:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

    found = []
    for module in (
        build(),
        accelerate.dispatch_model(build(), {"0": P[1], "1": P[1], "2": P[0]}, main_device=torch.device(P[0])),
    ):
        model = tl.wrap(module)
        outputs = []
        with model.trace(torch.ones(3, 4)):
            model.module("2").input[:, 0] = 2.0
            outputs.append(model.module("2").output.save())
        with model.trace(torch.ones(3, 4)):
            outputs.append(model.module("0").output.save())
        with model.trace(torch.ones(3, 4)):
            outputs.append(model.module("").output.save())
        found.append([out.value for out in outputs])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_hooks_without_one_on_the_whole_model(pretend: Pretend) -> None:
    """Nobody brings the logits back, so they are where the head is, and the inputs where the embedding is."""
    hf = FAMILIES["llama"].build()
    parts = device_map(hf, layers=[P[0], P[0], P[1]])
    for path, device in parts.items():
        hook = AlignDevicesHook(torch.device(device), io_same_device=False, place_submodules=True)
        add_hook_to_module(hf.get_submodule(path), hook)
    plain, model = tl.wrap(FAMILIES["llama"].build()), tl.wrap(hf)
    assert str(model.anatomy.device) == P[0]
    assert placement(model.anatomy).place_of(Site("logits")).device == P[1]
    with plain.trace(IDS), model.trace(IDS):
        wanted, found = plain.logits.save(), model.logits.save()
    assert torch.equal(found.value, wanted.value)


def test_tokens_of_rows_of_different_lengths(pretend: Pretend, tmp_path: Path) -> None:
    """Which positions these are is known on the host; they are chosen where the tensor is."""
    found = []
    for hf in (FAMILIES["llama"].build(), build("llama", "offloaded", tmp_path)):
        model = tl.wrap(hf)
        with model.trace(ROWS) as t:
            model.layers[0].resid_post.tok[0] = torch.linspace(-1, 1, 48)
            model.layers[2].mlp_act.tok[1] *= 2.0
            model.layers[2].resid_post.tok[-1] += model.layers[0].resid_post.tok[1]
            model.layers[2].resid_post.tok[:2].save("first two")
            model.layers[2].scores.save("scores")
            model.logits.tok[-1].save("logits")
        found.append(t.results)
    for name, wanted in found[0].items():
        _equal(found[1][name], wanted, name)
