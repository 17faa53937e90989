"""Modules on tensor-parallel ranks: how their tensors lie is seen when the model is loaded, and never guessed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tracelens as tl
from tests.support.families import FAMILIES, LAYERS
from tests.support.ranks import PoolOf
from tracelens.backends.probing import check_named, lying
from tracelens.errors import LayoutError
from tracelens.ir.layout import Partial, Shard
from tracelens.model import Model
from tracelens.placement import InParts, Place, Placement, Probed

ROWS = [[5, 6, 7, 8], [9, 10, 11, 12]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, ranks_of: PoolOf) -> Iterator[tuple[Model, Model]]:
    """A model in one process, and on two ranks."""
    folder: Path = tmp_path_factory.mktemp("qwen3")
    hf = FAMILIES["qwen3"].build()
    hf.save_pretrained(folder)
    with tl.load(str(folder), tp=2, ranks=ranks_of(2)) as spread:
        yield tl.wrap(hf), spread


def _readable(model: Model, layer: str) -> dict[str, Any]:
    """The tensors at the modules of a layer, and at those around the layers, each as its name and how it is read."""
    found: dict[str, Any] = {}
    for path, calls in model.anatomy.sides.survey().calls.items():
        if ".layers." in path and layer not in path:
            continue
        for call in calls:
            for leaf in (*call.inputs.values(), *call.outputs.values()):
                if leaf.type is not None and len(calls) == 1:
                    found[leaf.site.name] = leaf.site
    return found


def _read(model: Model, site: Any) -> Any:
    handle = model.module(site.path)
    if site.side == "input":
        found = handle.inputs
        for part in site.key:
            found = found[part]
        return found
    found = handle.output
    for part in site.key:
        found = found[part]
    return found


def test_every_tensor_at_a_module_is_read_as_in_one_process(both: tuple[Model, Model]) -> None:
    one, spread = both
    sites = _readable(one, ".layers.1")
    assert len(sites) > 40
    placement = spread.anatomy.elsewhere
    assert placement is not None
    probed = placement.probed
    assert probed is not None
    assert not probed.unclear
    inside = {name for name in probed.parts if ".layers.1." in name}
    assert 'module("model.layers.1.mlp.act_fn").output' in inside
    assert 'module("model.layers.1.self_attn.q_norm").output' in inside
    assert inside <= sites.keys()
    found: list[Any] = []
    for model in both:
        with model.trace(ROWS) as t:
            for name, site in sites.items():
                _read(model, site).save(name)
        found.append(t)
    for name in sites:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-5, atol=1e-5)


EDITS = {
    "neurons after their function": 'model.module("model.layers.1.mlp.act_fn").output[..., 35:60] = 0',
    "neurons by number": 'model.module("model.layers.1.mlp.act_fn").output[..., 70] += 3.0',
    "neurons before the last matrix": 'model.module("model.layers.1.mlp.down_proj").input *= 0.5',
    "one head's normed queries": 'model.module("model.layers.1.self_attn.q_norm").output[:, :, 3] = 0.5',
    "a vector for all neurons": 'model.module("model.layers.1.mlp.up_proj").output += v',
    "a whole tensor for all neurons": (
        'model.module("model.layers.1.mlp.up_proj").output = model.layers[0].mlp_act * 2'
    ),
    "what is whole": 'model.module("model.layers.1.mlp").output += 1.0',
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_at_a_module_is_that_of_one_process(both: tuple[Model, Model], name: str) -> None:
    v = torch.randn(80, generator=torch.Generator().manual_seed(3))
    found: list[torch.Tensor] = []
    for model in both:
        with model.trace(ROWS):
            exec(EDITS[name], {"model": model, "v": v})
            logits = model.logits.save()
        found.append(logits.value)
    with both[0].trace(ROWS):
        clean = both[0].logits.save()
    assert (found[0] - clean.value).abs().max() > 1e-3, "the edit does not matter"
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_the_plan_says_which_modules_are_in_parts(both: tuple[Model, Model]) -> None:
    with both[1].trace(ROWS) as t:
        both[1].module("model.layers.1.mlp.act_fn").output.mean(-1).save("m")
    lines = t.explain().splitlines()
    assert '  module("model.layers.1.mlp.act_fn").output lies in parts of axis 2 on 2 ranks' in lines
    assert any(line.startswith("  averages 'm' on the first of 2 ranks") for line in lines)


def test_what_is_not_clear_is_refused_where_it_is_used(both: tuple[Model, Model]) -> None:
    anatomy = both[1].anatomy
    before = anatomy.elsewhere
    assert before is not None
    assert before.probed is not None
    name = 'module("model.layers.1.mlp").output'
    for probed, words in (
        (replace(before.probed, unclear={name: "is partial"}), "mlp.*output is partial"),
        (None, "has not been looked at"),
    ):
        try:
            anatomy.elsewhere = replace(before, probed=probed)
            with pytest.raises(LayoutError, match=words) as caught, both[1].trace(ROWS):
                both[1].module("model.layers.1.mlp").output.save()
        finally:
            anatomy.elsewhere = before
        assert caught.value.at is not None
        assert caught.value.at.filename == __file__


WHOLE = (2, 3, 8)


@pytest.mark.parametrize(
    ("shapes", "digests", "wanted"),
    [
        (((2, 3, 8), (2, 3, 8)), "aa", None),
        (((2, 3, 4), (2, 3, 4)), "ab", InParts(2, 3)),
        (((2, 3, 4), (2, 3, 4)), "aa", InParts(2, 3)),
        (((1, 3, 8), (1, 3, 8)), "ab", InParts(0, 3)),
        (((2, 3, 8), (2, 3, 8)), "ab", "other numbers on each"),
        (((2, 3, 5), (2, 3, 3)), "ab", "other shapes on other ranks"),
        (((2, 3, 5), (2, 3, 5)), "ab", "where the whole is"),
        (((1, 3, 4), (1, 3, 4)), "ab", "where the whole is"),
        (((6, 4), (6, 4)), "ab", "where the whole is"),
        (((2, 2, 8), (2, 1, 8)), "ab", InParts(1, 3)),
        (((2, 1, 8), (2, 2, 8)), "ab", "other shapes on other ranks"),
        (((2, 2, 4), (2, 1, 4)), "ab", "other shapes on other ranks"),
    ],
)
def test_only_one_shorter_axis_makes_parts(shapes: Any, digests: str, wanted: Any) -> None:
    _lies([[list(shape), digest, None] for shape, digest in zip(shapes, digests, strict=True)], wanted)


def _lies(seen: Any, wanted: Any) -> None:
    """What two ranks have seen of a tensor is taken for ``wanted``: a layout, or words of the reason why it is not."""
    found = lying(WHOLE, seen, 2)
    if isinstance(wanted, str):
        assert isinstance(found, str)
        assert wanted in found
    else:
        assert found == wanted


@pytest.mark.parametrize(
    ("words", "shape", "digests", "wanted"),
    [
        ([[], []], WHOLE, "aa", None),
        ([[], []], WHOLE, "ab", "says that it is whole on every rank, and has other numbers on each"),
        ([[1], [1]], WHOLE, "ab", InParts(1, 3)),
        ([["sum"], ["sum"]], WHOLE, "ab", Partial()),
        ([["sum"], []], WHOLE, "ab", "otherwise than on others"),
        ([[1], None], WHOLE, "ab", "otherwise than on others"),
        ([[2], [2]], (2, 3, 4), "ab", "says that the whole is"),
        (["lies in stripes", "lies in stripes"], WHOLE, "aa", "lies in stripes"),
    ],
)
def test_what_says_how_it_lies_is_held_to_it(words: Any, shape: Any, digests: str, wanted: Any) -> None:
    _lies([[list(shape), digest, word] for digest, word in zip(digests, words, strict=True)], wanted)


def test_what_a_rank_does_not_see_is_not_clear() -> None:
    assert "not there" in str(lying(WHOLE, [[list(WHOLE), "a", None], None], 2))
    assert "not there" in str(lying(WHOLE, [], 2))


def _site(name: str) -> str:
    return f'module("model.layers.1.{name}'


DOWN, OUT = _site('mlp.down_proj").inputs[0]'), _site('mlp").output')


@pytest.mark.parametrize(
    ("parts", "unclear", "words"),
    [
        ([DOWN], {}, None),
        ([], {}, "'mlp_act'.* is whole on its ranks, where in parts was expected"),
        ([DOWN, OUT], {}, "'mlp_add'.* is in parts on its ranks, where whole was expected"),
        ([DOWN], {OUT: "is partial"}, "'mlp_add'.* is partial"),
    ],
)
def test_named_sites_are_held_to_what_was_seen(
    parts: list[str], unclear: dict[str, str], words: str | None
) -> None:
    anatomy = tl.wrap(FAMILIES["llama"].build()).anatomy
    names = {
        leaf.site.name: (1,)
        for calls in anatomy.sides.survey().calls.values()
        for call in calls
        for leaf in (*call.inputs.values(), *call.outputs.values())
        if "layers.1" in leaf.site.name
    }
    assert {DOWN, OUT} <= names.keys()
    placement = Placement((Place(0, "cpu", 2),), (0,) * LAYERS, layouts={"mlp_act": Shard(2)})
    probed = Probed({name: InParts(2, 3) for name in parts}, unclear)
    if words is None:
        check_named(anatomy, placement, probed, names)
        return
    with pytest.raises(LayoutError, match=words):
        check_named(anatomy, placement, probed, names)
