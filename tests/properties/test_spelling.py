"""Spelling does not matter, the place of the code does not, and the surrounding grad mode does not: promise 8."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tracelens as tl
from tests.support.batches import random_rows
from tests.support.families import FAMILIES
from tests.support.plain import untouched

ROWS = random_rows((7, 7))
HF = FAMILIES["qwen3"].build()
MODEL = tl.wrap(HF)
V = 0.5 * torch.randn(48, generator=torch.Generator().manual_seed(3))

# Each group says one thing in several ways.
GROUPS: dict[str, tuple[str, ...]] = {
    "add": (
        "SITE += v",
        "SITE = SITE + v",
        "SITE = v + SITE",
        "h = SITE; h += v; SITE = h",
        "h = SITE; h = h + v; SITE = h",
        "SITE[:] += v",
        "SITE[...] += v",
        "SITE[:, :, :] += v",
        "SITE = torch.add(SITE, v)",
        "SITE = SITE.add(v)",
        "h = SITE; h[...] = h + v",
        "SITE += v[None]",
        "SITE.tok[:] += v",
    ),
    "last token": (
        "SITE[:, -1] += v",
        "SITE[:, -1] = SITE[:, -1] + v",
        "SITE[:, -1:] += v",
        "SITE[:, 6] += v",
        "SITE[:, 6, :] += v",
        "SITE[..., -1, :] += v",
        "SITE.tok[-1] += v",
        "SITE.tok[6] += v",
        "SITE.tok[-1:] += v",
        "SITE.tok[[6]] += v",
        "h = SITE; h[:, -1] += v",
        "h = SITE[:, -1]; h += v; SITE[:, -1] = h",
        "h = SITE; p = h[:, -1]; p[...] = p + v",
        "SITE[:, 3:][:, -1] += v",
        "SITE = torch.cat([SITE[:, :-1], SITE[:, -1:] + v], 1)",
        "SITE = tl.where((torch.arange(7) == 6)[None, :, None], SITE + v, SITE)",
    ),
    "zero": (
        "SITE = 0",
        "SITE = 0.0",
        "SITE[:] = 0",
        "SITE = torch.zeros(48)",
        "SITE = torch.zeros(1, 1, 1)",
        "SITE = torch.zeros_like(SITE)",
        "SITE = np.zeros(48, dtype=np.float32)",
        "SITE += 1; SITE = 0",
    ),
    "half": (
        "SITE *= 0.5",
        "SITE = SITE * 0.5",
        "SITE = 0.5 * SITE",
        "SITE /= 2",
        "SITE = SITE.div(2)",
        "SITE -= SITE / 2",
    ),
    "neurons": (
        "SITE[..., :7] = 0",
        "SITE[:, :, :7] = 0",
        "SITE[:, :, 0:7] = torch.zeros(7)",
        "SITE[..., [0, 1, 2, 3, 4, 5, 6]] = 0",
        "SITE[..., torch.arange(7)] = 0",
        "SITE[..., np.arange(7)] = 0",
        "SITE[..., torch.arange(48) < 7] = 0",
        "SITE[..., :20][..., :7] = 0",
        "SITE *= (torch.arange(48) >= 7).float()",
    ),
    "two layers": (
        "model.layers[0:2].attn_out += v",
        "model.layers[[0, 1]].attn_out += v",
        "model.layers[:2].attn_out = model.layers[:2].attn_out + v",
        "model.layers[0:2].attn_out += tl.per_layer(torch.stack([v, v]))",
        "model.layers[0].attn_out += v; model.layers[1].attn_out += v",
        "model.layers[1].attn_out += v; model.layers[0].attn_out += v",
        "for layer in (0, 1): model.layers[layer].attn_out += v",
        "for layer in model.layers[:2]: layer.attn_out += v",
    ),
}  # fmt: skip
SITES = [
    "model.layers[1].resid_post",
    "model.layers[0].attn_out",
    "model.layers[2].mlp_in",
    "model.layers[1].resid_mid",
]


def run(code: str) -> Tensor:
    names = {"model": MODEL, "v": V, "torch": torch, "tl": tl, "np": np}
    with MODEL.trace(ROWS):
        exec(code, names)
        logits = MODEL.logits.save()
    return logits.value


def wanted(group: str, site: str) -> Tensor:
    return run(GROUPS[group][0].replace("SITE", site))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(
    ("group", "spelling"), [(g, s) for g, all_of_it in GROUPS.items() for s in all_of_it[1:]]
)
def test_every_spelling_says_the_same(group, spelling, site):
    result = run(spelling.replace("SITE", site))
    torch.testing.assert_close(result, wanted(group, site), rtol=0, atol=0)
    assert not torch.equal(result, run("pass"))


GRAD_MODES: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("inside", [False, True], ids=["around", "in the block"])
@pytest.mark.parametrize("mode", GRAD_MODES)
@given(group=st.sampled_from(list(GROUPS)), data=st.data())
def test_every_grad_mode_says_the_same(mode, inside, group, data):
    code = data.draw(st.sampled_from(GROUPS[group])).replace("SITE", SITES[0])
    if inside:
        code = f"with torch.{mode}():\n" + textwrap.indent(code.replace("; ", "\n"), "    ")
        result = run(code)
    else:
        with GRAD_MODES[mode]():
            result = run(code)
    assert torch.equal(result, wanted(group, SITES[0]))
    # Whatever the mode was, a saved tensor can be used in the user's own training.
    weight = torch.ones(97, requires_grad=True)
    (result * weight).sum().backward()
    assert weight.grad is not None


def test_a_constant_that_requires_grad_is_used_for_its_numbers():
    v = V.clone().requires_grad_()
    with MODEL.trace(ROWS):
        MODEL.layers[1].resid_post += v
        logits = MODEL.logits.save()
    assert not logits.value.requires_grad
    assert torch.equal(logits.value, wanted("add", SITES[0]))
    assert v.grad is None


@contextlib.contextmanager
def _steered() -> Iterator[tl.Trace]:
    with MODEL.trace(ROWS) as trace:
        MODEL.layers[1].resid_post += V
        yield trace
        MODEL.logits.save("l")


class _Keeper:
    def save(self) -> object:
        with MODEL.trace(ROWS) as trace:
            MODEL.layers[1].resid_post += V
            return (MODEL.logits.save("l"), trace)[1]


def _in_a_context_manager() -> tl.Trace:
    with _steered() as trace:
        pass
    return trace


def _in_one_line() -> tl.Trace:
    trace = MODEL.trace(ROWS)
    with trace: MODEL.layers[1].resid_post += V; MODEL.logits.save("l")  # noqa: E701, E702  # fmt: skip
    return trace


def _in_a_comprehension() -> tl.Trace:
    with MODEL.trace(ROWS) as trace:
        [setattr(layer, "resid_post", layer.resid_post + V) for layer in model_layers(1)]
        {name: getattr(MODEL, "logits").save(name) for name in "l"}  # noqa: B009
    return trace


def model_layers(*which: int) -> list[object]:
    return [MODEL.layers[index] for index in which]


def _in_eval_and_exec() -> tl.Trace:
    names: dict[str, object] = {"model": MODEL, "v": V, "rows": ROWS}
    exec(
        "with model.trace(rows) as t:\n    model.layers[1].resid_post += v\n    model.logits.save('l')", names
    )
    return names["t"]


def _with_an_exit_stack() -> tl.Trace:
    with contextlib.ExitStack() as stack:
        trace = stack.enter_context(MODEL.trace(ROWS))
        MODEL.layers[1].resid_post += V
        MODEL.logits.save("l")
    return trace


def _by_hand() -> tl.Trace:
    trace = MODEL.trace(ROWS)
    trace.__enter__()
    MODEL.layers[1].resid_post += V
    MODEL.logits.save("l")
    trace.__exit__(None, None, None)
    return trace


@pytest.mark.parametrize(
    "place",
    [
        _in_a_context_manager, _in_one_line, _in_a_comprehension, _in_eval_and_exec, _with_an_exit_stack, _by_hand,
        lambda: _Keeper().save(),
    ],
)  # fmt: skip
def test_the_place_of_the_code_does_not_matter(place):
    with untouched(HF):
        trace = place()
    assert torch.equal(trace["l"], wanted("add", SITES[0]))
