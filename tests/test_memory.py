"""Memory beside the model is known before the run: what is predicted is what is measured on the pretend devices."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import accelerate
import pytest
import torch

import tracelens as tl
from tests.support.families import FAMILIES
from tests.support.pretend import Pretend, Seen, device_map, pretend, watched
from tracelens.errors import ExtraMemoryError, OptionError
from tracelens.memory import bytes_of

__all__ = ["pretend"]

P = [f"pretend:{index}" for index in range(3)]
ROWS = torch.randint(2, 90, (4, 48), generator=torch.Generator().manual_seed(0)).tolist()
WEIGHT = torch.randn(48, 48, generator=torch.Generator().manual_seed(1))


def every_stream(model: Any) -> None:
    model.layers[:].resid_post.save()


def every_neuron_in_half(model: Any) -> None:
    model.layers[:].mlp_act.save(dtype=torch.bfloat16)


def norms(model: Any) -> None:
    model.layers[:].resid_post.norm(dim=-1).save()


def last_positions(model: Any) -> None:
    model.layers[:].mlp_act[:, -1].save()


def last_positions_that_stay(model: Any) -> None:
    model.layers[:].mlp_act[:, -2:].save(device="keep")
    model.layers[2].resid_post[:, -1].save(device="keep")


def last_positions_in_half(model: Any) -> None:
    model.layers[:].resid_mid[:, -2:].save(dtype=torch.bfloat16)
    model.layers[:2].mlp_act[:, -3:].save(dtype=torch.float64)


def every_stream_that_stays(model: Any) -> None:
    model.layers[:].resid_post.save(device="keep")


def every_stream_in_half_that_stays(model: Any) -> None:
    model.layers[:].resid_post.save(dtype=torch.bfloat16, device="keep")


def two_stacks_of_one_site(model: Any) -> None:
    h = model.layers[:].resid_post
    h[:, -1].save()
    h.reshape(-1, 48)[::7].save(dtype=torch.float16)


def a_stack_of_one_layer(model: Any) -> None:
    h = model.layers[1].mlp_act
    torch.stack([h[:, place] for place in range(8)]).save()
    model.layers[1:2].resid_post[:, :4].save()


def out_of_a_function_of_ones_own(model: Any) -> None:
    h = model.layers[:].mlp_act
    tl.apply(lambda x: x[:, -1], h, like=h[:, -1]).save()


def across(model: Any) -> None:
    model.layers[2].resid_post += model.layers[0].resid_post
    model.layers[1].resid_post += model.layers[0].resid_post
    model.logits[:, -1].save()


def kept_for_later(model: Any) -> None:
    early = [model.layers[0].mlp_up, model.layers[0].mlp_pre, model.layers[0].resid_mid]
    difference = (model.layers[2].mlp_pre - early[0]) * early[1]
    difference.sum(-1).save()
    (early[2] + model.layers[2].resid_mid).save()


def a_part_for_later(model: Any) -> None:
    (model.layers[1].mlp_pre[:, -1, :48] + model.layers[1].resid_post[:, -1]).save()


def constants(model: Any) -> None:
    moved = model.layers[:].resid_mid @ WEIGHT
    moved.save()


def a_weight_that_comes_to_the_layers(model: Any) -> None:
    weight = model.param("model.layers.0.self_attn.q_proj.weight")
    (model.layers[:].resid_mid @ weight).save()
    (model.layers[:].resid_post[:, -1] @ weight).save()  # until then it is held


def a_lens_on_every_layer(model: Any) -> None:
    lens = model.lens(model.layers[:].resid_post, workspace=100_000)
    lens.topk(3).save()
    lens.kl().save()
    lens.rank(7).save()


def a_lens_in_a_layer(model: Any) -> None:
    model.layers[1].resid_post *= model.lens(model.layers[0].resid_post, workspace=200_000).max_prob()[
        ..., None
    ]


def distances_of_every_layer(model: Any) -> None:
    lens = model.lens(model.layers[:].resid_post, workspace=100_000)
    lens.js().save()
    lens.tv().save()


def steered(model: Any) -> None:
    for layer in range(3):
        model.layers[layer].resid_post += torch.ones(4, 48, 48)
    model.layers[2].resid_mid.save(device="keep")


BLOCKS = (
    every_stream,
    every_neuron_in_half,
    norms,
    last_positions,
    last_positions_that_stay,
    last_positions_in_half,
    every_stream_that_stays,
    every_stream_in_half_that_stays,
    two_stacks_of_one_site,
    a_stack_of_one_layer,
    out_of_a_function_of_ones_own,
    across,
    kept_for_later,
    a_part_for_later,
    constants,
    a_weight_that_comes_to_the_layers,
    a_lens_on_every_layer,
    a_lens_in_a_layer,
    distances_of_every_layer,
    steered,
)


def spread(family: str = "llama", devices: int = 3) -> tuple[Any, tl.Model]:
    hf = FAMILIES[family].build(attn="eager")
    where = P if devices == 3 else [P[0]] * 3
    hf = accelerate.dispatch_model(hf, device_map(hf, where), main_device=torch.device(P[0]))
    return hf, tl.wrap(hf)


@contextmanager
def peaks(hf: Any, seen: Seen) -> Iterator[list[dict[str, int]]]:
    """The most bytes alive on each device between any module's beginning or end and the next such moment."""
    found: list[dict[str, int]] = []

    def look(*_: Any) -> None:
        found.append({device: seen.peak(device) for device in P})
        seen.reset_peak()

    handles = [module.register_forward_hook(look) for module in hf.modules()]
    handles += [module.register_forward_pre_hook(look) for module in hf.modules()]
    gc.collect()
    gc.disable()  # what other tests have left behind must not be freed meanwhile
    yield found
    gc.enable()
    for handle in handles:
        handle.remove()


def predicted(model: tl.Model, graph: tl.Graph) -> dict[str, int]:
    compiled = model._compiler.compile(graph)
    found = compiled.held(graph, model.prepare(ROWS).sizes)
    return {extra.place.device: extra.bytes for extra in found}


def measured(hf: Any, model: tl.Model, block: Callable[[Any], None]) -> tuple[dict[str, int], tl.Graph]:
    """By device, the most bytes beyond those of a run without the block, at one moment of the run."""

    def watch(body: Callable[[Any], None] | None) -> tuple[list[dict[str, int]], Any]:
        with watched() as seen, peaks(hf, seen) as found:
            with model.trace(ROWS) as t:
                if body is not None:
                    body(model)
                model.logits[:, -1, :1].save("end")
            at_the_end = {device: seen.peak(device) for device in P}
        return [*found, at_the_end], t

    bare, _ = watch(None)
    found, t = watch(block)
    assert len(found) == len(bare) > 80
    most = {
        device: max(one[device] - other[device] for one, other in zip(found, bare, strict=True))
        for device in P
    }
    return most, t.graph


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_what_is_predicted_is_measured(pretend: Pretend, block: Callable[[Any], None], devices: int) -> None:
    hf, model = spread(devices=devices)
    found, graph = measured(hf, model, block)
    said = predicted(model, graph)
    for device in P[:devices]:
        assert said[device] == pytest.approx(found[device], rel=0.05, abs=256), device
    assert sum(said.values()) > 4 * 48 * 4


@pytest.mark.parametrize("keep", ["cpu", "keep"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_stack_of_parts_grows_by_the_parts_alone(pretend: Pretend, keep: str, dtype: Any) -> None:
    """What each layer adds is what is saved of it; the whole streams of earlier layers are not held."""
    hf, model = spread(devices=1)
    found: list[int] = []
    for layers in (1, 2, 3):

        def block(model: Any, layers: int = layers) -> None:
            model.layers[:layers].resid_post[:, -4:].save(dtype=dtype, device=keep)

        most, graph = measured(hf, model, block)
        found.append(most[P[0]])
        assert predicted(model, graph)[P[0]] == pytest.approx(most[P[0]], rel=0.05, abs=64)
    part = 4 * 4 * 48 * (dtype or torch.float32).itemsize
    assert found[1] - found[0] == found[2] - found[1] == part
    assert found[2] < 4 * 48 * 48 * 4 // 2


def test_a_stack_of_casts_grows_by_the_casts_alone(pretend: Pretend) -> None:
    hf, model = spread(devices=1)
    found: list[int] = []
    for layers in (1, 2, 3):

        def block(model: Any, layers: int = layers) -> None:
            model.layers[:layers].mlp_act.save(dtype=torch.bfloat16)

        most, _ = measured(hf, model, block)
        found.append(most[P[0]])
    assert found[1] - found[0] == found[2] - found[1] == 4 * 48 * 80 * 2


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("site", ["q", "k", "v"])
def test_one_of_three_that_share_a_tensor_does_not_keep_the_others(
    pretend: Pretend, site: str, devices: int
) -> None:
    """GPT-2 makes queries, keys and values in one tensor."""
    hf, model = spread("gpt2", devices)
    found, graph = measured(hf, model, lambda model: getattr(model.layers[:], site).save())
    said = predicted(model, graph)
    for device in P[:devices]:
        assert said[device] == pytest.approx(found[device], rel=0.05, abs=256)
    assert sum(said.values()) == pytest.approx(3 * 4 * 48 * 48 * 4, rel=0.01)


def bytes_on_the_host() -> int:
    """The memory of all tensors of the processor that are alive."""
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            # What other tests left may be sparse, or a tensor of vmap: these have no memory of this kind.
            with suppress(NotImplementedError):
                storage = thing.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


STREAM = 4 * 48 * 48 * 4


@pytest.mark.parametrize(
    ("save", "low", "high"),
    [
        (lambda h: h.save(), 0.99 * STREAM, 1.01 * STREAM),
        (lambda h: h[:, -1].save(), 2 / 48 * STREAM, 0.1 * STREAM),
        (lambda h: h[:, -2:].save(dtype=torch.bfloat16), 2 / 48 * STREAM, 0.1 * STREAM),
        (lambda h: h.save(dtype=torch.bfloat16), 0.99 * STREAM, 1.01 * STREAM),
        (lambda h: tl.apply(lambda x: x[:, -1], h, like=h[:, -1]).save(), 2 / 48 * STREAM, 0.1 * STREAM),
        (lambda h: tl.apply(lambda x: x * 2, h).norm().save(), 8, 0.01 * STREAM),
    ],
    ids=["whole", "parts", "parts in half", "in half", "parts of ones own", "reduced"],
)
def test_on_the_processor_too_the_whole_is_let_go_of(
    save: Callable[[Any], Any], low: float, high: float
) -> None:
    """After two layers, beyond what a run holds that saves the end alone: the model itself still has the second one."""
    hf = FAMILIES["llama"].build()
    model = tl.wrap(hf)
    found: list[int] = []
    handle = hf.model.layers[2].register_forward_pre_hook(lambda *_: found.append(bytes_on_the_host()))
    for body in (lambda h: None, save):
        gc.collect()
        with model.trace(ROWS):
            body(model.layers[:].resid_post)
            model.logits[:, -1, :1].save("end")
    handle.remove()
    assert low <= found[1] - found[0] <= high


def test_reducing_in_every_layer_takes_no_more_with_more_layers(pretend: Pretend) -> None:
    """A layer's own tensor is let go of before the next one is there."""
    hf = FAMILIES["llama"].build()
    hf = accelerate.dispatch_model(hf, device_map(hf, [P[0]] * 3, norm=P[1]), main_device=torch.device(P[0]))
    model = tl.wrap(hf)
    found: list[int] = []
    for layers in (1, 2, 3):
        with model.record() as r:
            (model.layers[:layers].mlp_act * 2).norm(dim=-1).save()
        found.append(predicted(model, r.graph)[P[0]] - layers * 4 * 48 * 4)
    assert found[0] == found[1] == found[2] > 4 * 48 * 4 * 48


def test_too_much_is_refused_before_the_run_and_the_largest_are_named(pretend: Pretend) -> None:
    hf, model = spread()
    calls: list[int] = []
    handle = hf.model.layers[0].register_forward_hook(lambda *_: calls.append(1))

    def saving(most: int | str) -> None:
        with model.trace(ROWS, max_extra_memory=most):
            model.layers[1].resid_post.norm(dim=-1).save("norms")
            model.layers[1].mlp_act.save("neurons")
            model.layers[1].resid_post.save("stream")

    with pytest.raises(
        ExtraMemoryError, match=r"on pretend:1 .*layers\.1\.mlp_act.*layers\.1\.resid_post"
    ) as caught:
        saving("8KiB")
    assert caught.value.at is not None
    assert "mlp_act" in caught.value.at.text
    assert not calls
    saving("1MiB")
    assert calls
    handle.remove()
    with model.record() as r:
        model.layers[1].mlp_act.save("neurons")
    program = model.compile(r, max_extra_memory="20KiB")
    assert program(ROWS[:1])["neurons"].shape[:2] == (1, 48)
    with pytest.raises(ExtraMemoryError):
        program(ROWS)


def test_sizes_are_numbers_or_texts() -> None:
    assert [bytes_of(size) for size in (5, "7 B", "2GiB", "1.5 MiB", "3KB")] == [5, 7, 2**31, 3 * 2**19, 3000]
    for size in ("2", "GiB", -1, 2.5, True):
        with pytest.raises(OptionError, match="is not a size"):
            bytes_of(size)


def test_explain_says_what_is_held(pretend: Pretend) -> None:
    _, model = spread()
    with model.trace(ROWS) as t:
        model.layers[1].mlp_act.save()
    assert "holds at most" in t.explain()
    assert "on pretend:1 beside the model" in t.explain()
