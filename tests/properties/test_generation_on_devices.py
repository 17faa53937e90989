"""Generations on models that accelerate spread over pretend devices: what one gives by hand, and what travels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import accelerate
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tracelens as tl
from tests.properties.generations import by_hand, cases, end_of, require_by_hand, subject
from tests.support import hand_generation as hand
from tests.support.families import D_MODEL, FAMILIES, LAYERS
from tests.support.pretend import Pretend, Seen, device_map, pretend, pretend_throughout
from tracelens.backends.gathering import _Series

__all__ = ["pretend", "pretend_throughout"]

P = [f"pretend:{index}" for index in range(3)]
IDS = [3, 14, 15, 9, 2, 6]
ROWS = [[3, 14, 15, 9, 2, 6], [20, 21], [5, 6, 7, 8]]
V = 2 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(7))
MOVING = "tracelens/backends/transfer.py"


def spread(family: str, layers: list[str], **parts: str) -> tl.Model:
    hf = FAMILIES[family].build()
    if hf.config.tie_word_embeddings:
        parts.pop("head", None)
    return tl.wrap(
        accelerate.dispatch_model(hf, device_map(hf, layers, **parts), main_device=torch.device(P[0]))
    )


@st.composite
def maps(draw: st.DrawFn) -> tuple[list[str], dict[str, str]]:
    """Over 1, 2 or 3 devices, in runs or back and forth, the ends anywhere."""
    devices = st.sampled_from(P[: draw(st.integers(1, 3))])
    layers = draw(st.lists(devices, min_size=LAYERS, max_size=LAYERS))
    return layers, {"embedding": draw(devices), "norm": draw(devices), "head": draw(devices)}


def copies(seen: Seen, part: str) -> Counter[tuple[str, str, tuple[int, ...]]]:
    """The activations that the code in a file moved from device to device."""
    return Counter(
        (one.source, one.target, one.shape)
        for one in seen.copies
        if part in one.line and one.dtype.is_floating_point
    )


@pytest.mark.usefixtures("pretend_throughout")
@settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
@given(cases(), st.booleans(), maps())
def test_generation_on_devices_equals_one_by_hand(case: Any, some: bool, where: Any) -> None:
    case = (*case[:-1], end_of(case) if some else None)
    layers, parts = where
    require_by_hand(spread(case[0], layers, **parts), case, by_hand(*case))


@pytest.mark.usefixtures("pretend_throughout")
@settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
@given(
    maps(),
    st.lists(st.lists(st.integers(3, 90), min_size=1, max_size=7), min_size=1, max_size=3),
    st.integers(1, 9),
    st.integers(1, 8),
    st.booleans(),
)
def test_files_and_kept_tensors_are_what_is_saved(
    where: Any, prompts: list[list[int]], count: int, collected: int, ends: bool
) -> None:
    """The steps that are collected on a device before they go to the file are few, so that many pieces go there."""
    layers, parts = where
    model = spread("llama", layers, **parts)
    end = hand.generate(subject("llama")[0], "llama", prompts[0], count, [])[-1] if ends else None
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as temporary:
        folder = Path(temporary)
        patch.setattr(_Series, "COLLECTED", collected)
        with model.generate(prompts, max_new_tokens=count, eos_token_id=end) as t:
            scopes: dict[str, Any] = {"model": model, "decode": t.decode}
            for name, scope in scopes.items():
                saved = {
                    "stream": scope.layers[2].resid_post,
                    "stack": scope.layers[:].resid_post,
                    "stacked newest": scope.layers[1:].resid_post[:, -1],
                }
                for what, value in saved.items():
                    value.save(f"{name} {what}")
                    value.save(f"{name} {what} kept", device="keep")
                    value.save(f"{name} {what} filed", to=folder / f"{name}.safetensors")
        for name in scopes:
            for what in saved:
                plain, kept, filed = (t[f"{name} {what}{end}"] for end in ("", " kept", " filed"))
                rows = plain if isinstance(plain, list) else [plain]
                for others, device in ((kept, "pretend"), (filed, "cpu")):
                    others = others if isinstance(others, list) else [others]
                    assert all(other.device.type == device or not other.numel() for other in others)
                    for one, other in zip(rows, others, strict=True):
                        torch.testing.assert_close(other.cpu(), one, rtol=0, atol=0, equal_nan=True)
        assert sorted(one.name for one in folder.iterdir()) == sorted(
            f"{name}.safetensors" for name in scopes
        )


@pytest.mark.parametrize("rows", [[IDS], ROWS])
def test_what_is_held_goes_once_to_each_device_that_needs_it(rows: list[list[int]], pretend: Pretend) -> None:
    """However many steps there are; what steps share within themselves travels in each of them."""
    model = spread("llama", P)
    steps = 8
    for _ in range(2):  # constants and programs are there the second time
        with pretend.watched() as seen, model.generate(rows, max_new_tokens=steps, eos_token_id=None) as t:
            late = t.prefill.layers[2].resid_post.tok[-1]
            t.decode.layers[0].resid_post[:, -1] += 0.7 * late
            t.decode.layers[1].resid_post[:, -1] -= 0.2 * late
            t.steps[5:].layers[1].resid_post[:, -1] += t.steps[4].layers[0].resid_post[:, -1]
            t.decode.layers[2].resid_post += model.layers[1].mlp_out
    batch = len(rows)
    expected = {
        (P[2], P[0], (batch, D_MODEL)): 1,
        (P[2], P[1], (batch, D_MODEL)): 1,
        (P[0], P[1], (batch, D_MODEL)): 1,
        (P[1], P[2], (batch, 1, D_MODEL)): steps - 1,
    }
    assert copies(seen, MOVING) == Counter(expected)
    one = tl.wrap(FAMILIES["llama"].build())
    with one.generate(rows, max_new_tokens=steps, eos_token_id=None) as other:
        late = other.prefill.layers[2].resid_post.tok[-1]
        other.decode.layers[0].resid_post[:, -1] += 0.7 * late
        other.decode.layers[1].resid_post[:, -1] -= 0.2 * late
        other.steps[5:].layers[1].resid_post[:, -1] += other.steps[4].layers[0].resid_post[:, -1]
        other.decode.layers[2].resid_post += one.layers[1].mlp_out
    assert t.tokens == other.tokens


@pytest.mark.parametrize("rows", [[IDS], ROWS])
def test_reads_and_writes_add_no_host_synchronisation_to_a_step(
    rows: list[list[int]], pretend: Pretend
) -> None:
    model = spread("llama", P)

    def counted(steps: int, block: bool) -> tuple[Counter[tuple[str, str]], Seen]:
        for _ in range(2):
            with (
                pretend.watched() as seen,
                model.generate(rows, max_new_tokens=steps, eos_token_id=None) as t,
            ):
                if block:
                    model.layers[:].resid_post.save()
                    t.steps[:].logits[:, -1].argmax(-1).save()
                    model.layers[1].resid_post.norm(dim=-1).save(to=None)
                    model.layers[0].resid_post.tok[model.positions >= 5] += V
                    model.layers[2].resid_post.tok[model.token_ids % 3 == 0] *= 0.5
                    t.decode.layers[0].resid_post += 0.1 * t.prefill.layers[2].resid_post.tok[-1][:, None]
        return Counter((read.kind, read.device) for read in seen.reads), seen

    for steps in (4, 9):
        plain, _ = counted(steps, False)
        ours, seen = counted(steps, True)
        # What was saved is waited for once, in the end: the parts of the stack, the picks, the norms.
        assert ours - plain == Counter({("copy", P[0]): 1, ("copy", P[1]): 2, ("copy", P[2]): 2})
        assert not plain - ours
        # The logits are made where they are chosen from.
        assert not [one for one in seen.copies if one.shape[-1:] == (97,) and one.target != one.source]
