"""Heads by number, against the sites that they are parts of and models edited by hand."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tracelens as tl
from tests.errors import GPT2, IDS, LLAMA, refused
from tests.support.batches import EVEN, RAGGED, batch, random_rows
from tests.support.families import FAMILIES, HEAD_DIM, HEADS, KV_HEADS, LAYERS
from tests.support.hand_forward import hand_forward
from tests.support.plain import edited, plain_logits, untouched
from tracelens.errors import (
    AbsentSiteError,
    HeadRangeError,
    LayerMappingError,
    LostUpdateError,
    SharedHeadError,
    StaleValueError,
    UnknownSiteError,
    WriteTargetError,
)
from tracelens.ir.sites import Site

HF = {name: family.build() for name, family in FAMILIES.items()}
MODELS = {name: tl.wrap(hf) for name, hf in HF.items()}
ROWS, RAGGED_ROWS = random_rows(EVEN), random_rows(RAGGED)
V = 0.5 * torch.randn(HEAD_DIM, generator=torch.Generator().manual_seed(1))
X = torch.randn(HEAD_DIM, generator=torch.Generator().manual_seed(2))
every_family = pytest.mark.parametrize("family", FAMILIES)
model = LLAMA.model


def kv_heads(family: str) -> int:
    return HEADS if family == "gpt2" else KV_HEADS


# --- reading ---------------------------------------------------------------------------------------------------------


@every_family
def test_a_head_is_its_part_of_the_site(family: str) -> None:
    names = ["q", "k", "v", "z", "scores", "pattern"] + ([] if family == "gpt2" else ["q_rot", "k_rot"])
    names += ["q_normed", "k_normed"] if family in ("qwen3", "qwen3_moe", "gemma3") else []
    shared = HEADS // kv_heads(family)
    chosen: list[Any] = [0, 3, -2, [1, 3], [0, 1, 2], [3, 0], (2,), range(1, 4)]
    m = MODELS[family]
    with untouched(m.hf), m.trace(ROWS) as t:
        for name in names:
            getattr(m.layers[1], name).save(name)
            for number, heads in enumerate(chosen):
                getattr(m.layers[1].head(heads), name).save(f"{name} {number}")
    for name in names:
        axis = 1 if name in ("scores", "pattern") else 2
        served = shared if name[0] in "kv" else 1
        for number, heads in enumerate(chosen):
            numbers = [heads] if isinstance(heads, int) else list(heads)
            index = torch.tensor([(head % HEADS) // served for head in numbers])
            wanted = t[name].index_select(axis, index)
            wanted = wanted.squeeze(axis) if isinstance(heads, int) else wanted
            assert torch.equal(t[f"{name} {number}"], wanted), (name, heads)


@every_family
def test_heads_of_several_layers_are_mapped(family: str) -> None:
    m = MODELS[family]
    with m.trace(ROWS) as t:
        m.layers[:].z.save("z")
        m.layers[:].head(1).z.save("one")
        m.layers[[2, 0]].head([0, 2]).pattern[:, :, -1].save("two")
        m.layers[:].pattern.save("pattern")
    assert torch.equal(t["one"], t["z"][:, :, :, 1])
    assert torch.equal(t["two"], t["pattern"][[2, 0]][:, :, [0, 2], -1])


@every_family
def test_heads_of_prompts_of_different_lengths(family: str) -> None:
    m = MODELS[family]
    with m.trace(RAGGED_ROWS) as t:
        m.layers[1].head([3, 0]).z.save("z")
        m.layers[1].head(2).pattern.save("pattern")
        m.layers[1].head(2).pattern.tok[-1].save("last")
        m.layers[1].head(1).head_out.save("out")
    for number, row in enumerate(RAGGED_ROWS):
        with m.trace([row]) as alone:
            m.layers[1].z.save("z")
            m.layers[1].pattern.save("pattern")
            m.layers[1].head_out.save("out")
        torch.testing.assert_close(t["z"][number], alone["z"][:, :, [3, 0]], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(t["pattern"][number], alone["pattern"][:, 2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(t["last"][number], alone["pattern"][:, 2, -1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(t["out"][number], alone["out"][:, :, 1], rtol=1e-5, atol=1e-5)


@every_family
def test_what_the_heads_add_is_what_attention_gives(family: str) -> None:
    m, path = (
        MODELS[family],
        "transformer.h.{}.attn.c_proj" if family == "gpt2" else "model.layers.{}.self_attn.o_proj",
    )
    with untouched(m.hf), m.trace(ROWS) as t:
        m.layers[:].head_out.save("all")
        m.layers[:].attn_out.save("attn_out")
        m.layers[1].z.save("z")
        m.layers[1].head(-1).head_out.save("last")
        m.layers[1].head([2, 0]).head_out.save("two")
        m.layers[0:2].head(3).head_out.save("mapped")
    projections = [m.hf.get_submodule(path.format(layer)) for layer in range(LAYERS)]
    biases = torch.stack([p.bias if p.bias is not None else torch.zeros(48) for p in projections])
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(t["all"].sum(3) + biases.detach()[:, None, None], t["attn_out"], **close)
    weight = projections[1].weight.detach() if family == "gpt2" else projections[1].weight.detach().T
    for head in range(HEADS):
        wanted = t["z"][:, :, head] @ weight[head * HEAD_DIM : (head + 1) * HEAD_DIM]
        torch.testing.assert_close(t["all"][1, :, :, head], wanted, **close)
    torch.testing.assert_close(t["last"], t["all"][1, :, :, -1], **close)
    torch.testing.assert_close(t["two"], t["all"][1][:, :, [2, 0]], **close)
    torch.testing.assert_close(t["mapped"], t["all"][:2, :, :, 3], **close)


def test_only_the_matrix_of_the_head_is_used() -> None:
    with model.record() as r:
        model.layers[1].head(2).head_out.save()
    assert f"[:, {2 * HEAD_DIM}:{3 * HEAD_DIM}]" in r.graph.text()
    assert f"f32[B,P,{HEAD_DIM}]" in r.graph.text()


# --- writing ---------------------------------------------------------------------------------------------------------


def _head(
    numbers: Any, change: Callable[[Tensor], Tensor], *, axis: int = 2
) -> Callable[[Tensor, Tensor], Tensor]:
    def edit(tensor: Tensor, mask: Tensor) -> Tensor:
        new = tensor.clone()
        place = (slice(None),) * axis + (numbers,)
        new[place] = change(new[place])
        return new

    return edit


def _last(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda part: torch.cat((part[:, :-1], change(part[:, -1:])), dim=1)


WRITES: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "L.head(3).z = 0": ("z", _head(3, lambda z: 0 * z)),
    "L.head(-1).z += v": ("z", _head(3, lambda z: z + V)),
    "L.head(0).z = L.head(0).z * 2 + v": ("z", _head(0, lambda z: z * 2 + V)),
    "L.head(3).z[:, -1] = 0": ("z", _head(3, _last(lambda z: 0 * z))),
    "L.head(2).z[:, -1] += v": ("z", _head(2, _last(lambda z: z + V))),
    "h = L.head(1).z; h += v; L.head(1).z = h": ("z", _head(1, lambda z: z + V)),
    "h = L.head(1).z; h[:, -1] = x": ("z", _head(1, _last(lambda z: X.expand_as(z)))),
    "L.head([1, 3]).z = x": ("z", _head([1, 3], lambda z: X.expand_as(z))),
    "L.head([3, 0]).z *= 0.5": ("z", _head([3, 0], lambda z: 0.5 * z)),
    "L.head([3, 0]).z[:, -1] = x": ("z", _head([3, 0], _last(lambda z: X.expand_as(z)))),
    "L.head([0, 1, 2]).z[:, -1] += v": ("z", _head([0, 1, 2], _last(lambda z: z + V))),
    "L.head(1).q *= 2": ("q", _head(1, lambda q: 2 * q)),
    "L.head(2).q[..., :5] = 0": ("q", _head(2, lambda q: torch.cat((0 * q[..., :5], q[..., 5:]), -1))),
    "L.head(2).pattern *= 0.5": ("pattern", _head(2, lambda p: 0.5 * p, axis=1)),
    "L.head(2).pattern[:, -1] = 0": ("pattern", _head(2, _last(lambda p: 0 * p), axis=1)),
    "L.head([3, 1]).scores *= 0.5": ("scores", _head([3, 1], lambda s: 0.5 * s, axis=1)),
}  # fmt: skip


@pytest.mark.parametrize("rows", [ROWS, RAGGED_ROWS], ids=["even", "ragged"])
@pytest.mark.parametrize("code", WRITES)
@every_family
def test_writes_through_heads(family: str, code: str, rows: list[list[int]]) -> None:
    m, prompt = MODELS[family], batch(rows)
    name, edit = WRITES[code]

    def intercept(site: Site, tensor: Tensor) -> Tensor:
        return edit(tensor, prompt.mask) if site == Site(name, 1) else tensor

    with torch.no_grad():
        wanted, plain = hand_forward(m.hf, *prompt, intercept), hand_forward(m.hf, *prompt)
    # QK-norm forgets the length of a query.
    forgets = family in ("qwen3", "qwen3_moe", "gemma3") and code == "L.head(1).q *= 2"
    assert forgets or (wanted - plain)[prompt.mask].abs().max() > 1e-4
    with untouched(m.hf), m.trace(rows) as t:
        exec(code, {"L": m.layers[1], "v": V, "x": X})
        m.logits.save("logits")
    found = t["logits"] if rows is ROWS else [part[0] for part in t["logits"]]
    for row, mask in enumerate(prompt.mask):
        actual = found[row] if rows is RAGGED_ROWS else found[row][mask]
        torch.testing.assert_close(actual, wanted[row][mask], rtol=1e-5, atol=1e-5)


@every_family
def test_heads_of_several_layers_are_written_as_one(family: str) -> None:
    m, prompt = MODELS[family], batch(ROWS)
    rows = torch.randn(2, HEAD_DIM, generator=torch.Generator().manual_seed(5))

    def intercept(site: Site, tensor: Tensor) -> Tensor:
        if site.name != "z":
            return tensor
        new = tensor.clone()
        if site.layer in (0, 1):
            new[:, :, 3] = 0
            new[:, -1, 1] += V
        if site.layer in (1, 2):
            new[:, :, 0] += rows[site.layer - 1]
        return new

    with torch.no_grad():
        wanted = hand_forward(m.hf, *prompt, intercept)
    with m.trace(ROWS) as t:
        m.layers[0:2].head(3).z = 0
        m.layers[0:2].head(1).z[:, -1] += V
        m.layers[1:3].head(0).z += tl.per_layer(rows)
        m.logits.save("logits")
    torch.testing.assert_close(t["logits"], wanted, rtol=1e-5, atol=1e-5)


@every_family
def test_an_ablated_head_is_one_without_its_part_of_the_output_projection(family: str) -> None:
    m, path = (
        MODELS[family],
        "transformer.h.1.attn.c_proj" if family == "gpt2" else "model.layers.1.self_attn.o_proj",
    )
    edited_by_hand = FAMILIES[family].build()
    weight = edited_by_hand.get_submodule(path).weight.data
    (weight if family == "gpt2" else weight.T)[2 * HEAD_DIM : 3 * HEAD_DIM] = 0
    prompt = batch(ROWS)
    with torch.no_grad():
        wanted, plain = plain_logits(edited_by_hand, prompt), plain_logits(m.hf, prompt)
    assert (wanted - plain).abs().max() > 1e-3
    with m.trace(ROWS) as t:
        m.layers[1].head(2).z = 0
        m.logits.save("logits")
    torch.testing.assert_close(t["logits"], wanted, rtol=1e-5, atol=1e-5)


@every_family
def test_a_head_patched_from_another_prompt(family: str) -> None:
    m, (here, there) = MODELS[family], (ROWS[:1], ROWS[1:2])
    with m.trace(there):
        source = m.layers[1].head(2).z.save()
    with m.trace(here) as t:
        m.layers[1].head(2).z = source
        m.logits.save("logits")

    def patch(z: Tensor) -> Tensor:
        return torch.cat((z[:, :, :2], source.value[:, :, None], z[:, :, 3:]), dim=2)

    with torch.no_grad():
        plain = plain_logits(m.hf, batch(here))
        with edited(m.hf, Site("z", 1), patch):
            wanted = plain_logits(m.hf, batch(here))
    assert (wanted - plain).abs().max() > 1e-3
    torch.testing.assert_close(t["logits"], wanted, rtol=1e-5, atol=1e-5)


def test_where_each_head_has_keys_of_its_own_they_are_written_like_the_rest() -> None:
    m, prompt = MODELS["gpt2"], batch(ROWS)

    def intercept(site: Site, tensor: Tensor) -> Tensor:
        return _head(2, lambda v: v + V)(tensor, prompt.mask) if site == Site("v", 1) else tensor

    with torch.no_grad():
        wanted = hand_forward(m.hf, *prompt, intercept)
    with m.trace(ROWS) as t:
        m.layers[1].head(2).v += V
        m.logits.save("logits")
    torch.testing.assert_close(t["logits"], wanted, rtol=1e-5, atol=1e-5)


# --- the rules of the language hold through heads --------------------------------------------------------------------


def test_a_read_before_a_write_is_the_version_before_it() -> None:
    with model.trace(IDS) as t:
        model.layers[1].head(1).z.save("before")
        model.layers[1].head(1).z += 1.0
        model.layers[1].head(2).z.save("beside")
        model.layers[1].head(1).z.save("after")
        model.layers[1].z.save("all")
    assert torch.equal(t["after"], t["before"] + 1.0)
    assert torch.equal(t["after"], t["all"][:, :, 1])
    assert torch.equal(t["beside"], t["all"][:, :, 2])


@pytest.mark.parametrize("heads", [2, [1, 3], [3, 0]])
def test_updates_that_are_not_handed_back(heads: Any) -> None:
    with refused(LostUpdateError, "layers.1.z", instead="model.layers[1].z += v"), model.trace(IDS):
        h = model.layers[1].head(heads).z
        h += 1.0  # <-
        model.logits.save()


def test_views_are_stale_after_a_write_through_them() -> None:
    with refused(StaleValueError, "written through", instead="read the site again"), model.trace(IDS):
        h = model.layers[1].head(2).z
        h[:, -1] = 0
        h.save()  # <-
    with refused(StaleValueError, "would undo that write", instead="read the site again"), model.trace(IDS):
        h = model.layers[1].head(2).z
        model.layers[1].head(3).z = 0
        h[:, -1] = 0  # <-


# --- shared keys and values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "L.head(3).k = 0",
        "L.head(3).v += 1.0",
        "L.head(3).k_rot[:, -1] = 0",
        "L.head(3).k[:, -1][:, :2] = 0",
        "L.head(3).v.tok[1] = 0",
        "L.head([3]).k *= 2",
        "h = L.head(3).v; h[..., 0] = 1",
    ],
)
def test_a_shared_head_is_not_written_through_one_of_those_that_share_it(code: str) -> None:
    name = f"<{code}>"
    linecache.cache[name] = (len(code), None, [code], name)
    with pytest.raises(SharedHeadError, match="serves heads 2, 3") as failure, model.trace(IDS):
        exec(compile(code, name, "exec"), {"L": model.layers[1]})
    assert failure.value.at is not None
    assert (failure.value.at.filename, failure.value.at.line) == (name, 1)
    assert failure.value.instead is not None
    assert failure.value.instead.endswith("[:, :, 1] = value, which changes heads 2, 3")


def test_whole_groups_of_heads_are_told_that_they_share_one() -> None:
    L = model.layers[1]
    for heads, groups, served in (([2, 3], "1", "2, 3"), ([0, 1, 2, 3], "[0, 1]", "0, 1, 2, 3")):
        with pytest.raises(SharedHeadError, match=f"serves? heads {served}\n") as failure, model.trace(IDS):
            L.head(heads).k = 0
        assert "would change" not in failure.value.problem
        assert "no tensor of head([" in failure.value.problem
        assert str(failure.value.instead).startswith(f"model.layers[1].k[:, :, {groups}] = value")
        with model.trace(IDS):
            exec(f"L.k[:, :, {groups}] = 0", {"L": L})
            z = L.head(heads).k.save()
        assert not z.value.any()
    with pytest.raises(SharedHeadError, match="would change heads 1, 3 too") as failure, model.trace(IDS):
        L.head([0, 2]).v = 0


def test_an_update_of_a_shared_head_that_is_dropped_is_noticed() -> None:
    with refused(LostUpdateError, "layers.1.k", instead="model.layers[1].k += v"), model.trace(IDS):
        h = model.layers[1].head(0).k
        h += 1.0  # <-
        model.logits.save()


def test_writing_the_shared_head_itself_changes_both() -> None:
    with model.trace(IDS) as t:
        model.layers[1].v[:, :, 1] = 0
        model.layers[1].z.save("z")
    assert torch.equal(t["z"][:, :, 2:], torch.zeros_like(t["z"][:, :, 2:]))
    assert t["z"][:, :, :2].abs().min() > 0


# --- what is refused -------------------------------------------------------------------------------------------------


def test_heads_that_there_are_not() -> None:
    layer = model.layers[1]
    with refused(HeadRangeError, "no head 4", "4 heads, 0 to 3", instead="head(-1)"), model.trace(IDS):
        layer.head(4).z.save()  # <-
    with refused(HeadRangeError, "no head -5", instead="head(-1)"), model.trace(IDS):
        layer.head([0, -5])  # <-
    with refused(HeadRangeError, "names a head twice", instead="each head once"), model.trace(IDS):
        layer.head([1, -3])  # <-
    with refused(HeadRangeError, "chooses no head", instead="each head once"), model.trace(IDS):
        layer.head([])  # <-
    for key in (True, 1.0, "3", slice(0, 2), None):
        with refused(HeadRangeError, "chosen with a number", instead="several"), model.trace(IDS):
            layer.head(key)  # <-
    with refused(HeadRangeError, "no head 9", instead="head(-1)"), model.trace(IDS):
        model.layers[0:2].head(9).z = 0  # <-


def test_sites_without_heads() -> None:
    with refused(UnknownSiteError, "'mlp_out'", "whole layer", instead="one of q"), model.trace(IDS):
        model.layers[1].head(0).mlp_out  # <-
    with refused(UnknownSiteError, "'paten'", instead="pattern"), model.trace(IDS):
        model.layers[1].head(0).paten = 0  # <-
    with refused(AbsentSiteError, "'q_normed'", instead="model.sites()"), model.trace(IDS):
        model.layers[1].head(0).q_normed.save()  # <-
    with (
        refused(AbsentSiteError, "nothing is rotated", instead="model.sites()", on=GPT2),
        GPT2.model.trace(IDS),
    ):
        GPT2.model.layers[1].head(0).q_rot.save()  # <-


def test_what_a_head_adds_is_not_written() -> None:
    with refused(WriteTargetError, "head_out", "computed from z", instead="z = value"), model.trace(IDS):
        model.layers[1].head(0).head_out = 0  # <-
    with refused(WriteTargetError, "head_out", "computed from z", instead="z = value"), model.trace(IDS):
        model.layers[1].head_out = 0  # <-
    with refused(WriteTargetError, "head_out", "computed from z", instead="z = value"), model.trace(IDS):
        model.layers[0:2].head_out += 1.0  # <-
    with refused(WriteTargetError, "was computed", instead="assign to the site"), model.trace(IDS):
        model.layers[1].head_out[:, -1] = 0  # <-


def test_a_mapped_value_does_not_fit_one_layer() -> None:
    with refused(LayerMappingError, "one thing per layer", instead="on the other side"), model.trace(IDS):
        model.layers[1].head(0).z = model.layers[0:2].head(0).z  # <-


def test_outside_a_block() -> None:
    with pytest.raises(tl.errors.NoTraceError):
        model.layers[1].head(0).z
    with pytest.raises(tl.errors.NoTraceError):
        model.layers[1].head_out


def test_what_can_be_completed() -> None:
    assert dir(model.layers[1].head(0)) == sorted(
        ["q", "k", "v", "q_rot", "k_rot", "scores", "pattern", "z", "head_out"]
    )
    assert {"head", "head_out", "pattern"} <= set(dir(model.layers[1]))
    assert repr(model.layers[1].head([0, 2])) == "model.layers[1].head([0, 2])"
