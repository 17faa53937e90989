"""Generations as they are drawn: prompts, writes in some steps, and ends; and what each of them has to give."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st

import tracelens as tl
from tests.support import hand_generation as hand
from tests.support.families import D_MODEL, FAMILIES, LAYERS, VOCABULARY
from tests.support.hand_generation import Edit, steps_of

CLOSE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-5}
NAMES = ("llama", "qwen3", "gemma3", "gpt2")

Expected = list[tuple[list[int], torch.Tensor, torch.Tensor]]


@cache
def subject(family: str) -> tuple[Any, tl.Model]:
    hf = FAMILIES[family].build()
    return hf, tl.wrap(hf)


@dataclass(frozen=True)
class Change:
    """A write as it is drawn: where, in which steps, to which positions, and what."""

    layer: int
    window: tuple[int, int | None]
    where: str
    number: int
    scale: float
    seed: int

    @property
    def vector(self) -> torch.Tensor:
        return 2 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(self.seed))

    def change(self, h: torch.Tensor) -> torch.Tensor:
        return h * self.scale + self.vector

    def chosen(self, text: torch.Tensor, prompt: int) -> torch.Tensor:
        steps, places = steps_of(len(text), prompt), torch.arange(len(text))
        start, stop = self.window
        found = (steps >= start) & (steps < (stop if stop is not None else 1 << 30))
        match self.where:
            case "newest":
                return found & (places >= prompt - 1)
            case "token":
                return found & (places == self.number) & (steps == 0)
            case "last of the prompt":
                return found & (places == prompt - 1)
            case "ids":
                return found & (text % 3 == self.number % 3)
            case "from":
                return found & (places >= self.number)
            case _:
                return found

    def edit(self) -> Edit:
        return Edit(self.layer, self.chosen, self.change)

    def write(self, model: tl.Model, t: tl.Generation) -> None:
        start, stop = self.window
        scope: Any = model if (start, stop) == (0, None) else t.steps[start:stop]
        layer = scope.layers[self.layer]
        match self.where:
            case "newest":
                layer.resid_post[:, -1] = self.change_of(layer.resid_post[:, -1])
            case "token":
                layer.resid_post.tok[self.number] = self.change_of(layer.resid_post.tok[self.number])
            case "last of the prompt":
                layer = t.prefill.layers[self.layer]
                layer.resid_post.tok[-1] = self.change_of(layer.resid_post.tok[-1])
            case "ids":
                mask = scope.token_ids % 3 == self.number % 3
                layer.resid_post.tok[mask] = self.change_of(layer.resid_post)
            case "from":
                layer.resid_post.tok[scope.positions >= self.number] *= self.scale
                layer.resid_post.tok[scope.positions >= self.number] += self.vector
            case _:
                layer.resid_post = self.change_of(layer.resid_post)

    def change_of(self, value: Any) -> Any:
        return value * self.scale + self.vector


@st.composite
def changes(draw: st.DrawFn, shortest: int) -> Change:
    start = draw(st.integers(0, 4))
    window = draw(
        st.sampled_from([(0, None), (1, None), (start, start + draw(st.integers(1, 3))), (start, None)])
    )
    kinds = ["all", "newest", "ids", "from"]
    if window[0] == 0:
        kinds += ["token", "last of the prompt"]
    where = draw(st.sampled_from(kinds))
    number = draw(st.integers(0, shortest - 1 if where == "token" else 9))
    scale = draw(st.sampled_from([1.0, 0.5]))
    return Change(draw(st.integers(0, LAYERS - 1)), window, where, number, scale, draw(st.integers(0, 99)))


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, list[list[int]], int, list[Change], int | None]:
    prompts = draw(
        st.lists(st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=7), min_size=1, max_size=3)
    )
    shortest = min(map(len, prompts))
    edits = draw(st.lists(changes(shortest), max_size=3))
    return draw(st.sampled_from(NAMES)), prompts, draw(st.integers(1, 6)), edits, draw(st.integers(0, 9))


def by_hand(
    family: str, prompts: list[list[int]], count: int, edits: list[Change], end: int | None
) -> Expected:
    """For each row its new tokens, the logits of all its positions and the streams [L, T, D] that a generation sees."""
    hf, _ = subject(family)
    found: Expected = []
    plain = [change.edit() for change in edits]
    for prompt in prompts:
        new = hand.generate(hf, family, prompt, count, plain, end)
        logits, streams = hand.forward(hf, family, [*prompt, *new[:-1]], len(prompt), plain)
        # A choice between two tokens that are as good as each other is no question of the library.
        best = logits[len(prompt) - 1 :].topk(2).values
        assume(bool((best[:, 0] - best[:, 1] > 1e-3).all()))
        found.append((new, logits, streams))
    return found


def end_of(case: Any) -> int:
    """The token that the first row's text comes to at last: one that other rows may come to earlier."""
    family, prompts, count, edits, _ = case
    return hand.generate(subject(family)[0], family, prompts[0], count, [e.edit() for e in edits])[-1]


def require_by_hand(model: tl.Model, case: Any, expected: Expected, **options: Any) -> None:
    """Has a model generate, with all kinds of saves, and compares with what was made by hand."""
    _, prompts, count, edits, end = case
    with model.generate(prompts, max_new_tokens=count, eos_token_id=end, **options) as t:
        for change in edits:
            change.write(model, t)
        model.layers[:].resid_post.save("streams")
        model.layers[1].resid_post.norm(dim=-1).save("norms")
        model.layers[2].resid_post[:, -1].save("newest")
        t.decode.layers[0].resid_post.save("decode")
        t.prefill.layers[0].resid_post.tok[-1].save("last")
        t.steps[1:3].layers[1].resid_post[:, -1].save("window")
        t.steps[:].logits[:, -1].argmax(-1).save("picks")
    assert t.tokens == [new for new, _, _ in expected]
    longest = max(len(new) for new, _, _ in expected)
    assert t.valid.tolist() == [[step < len(new) for new, _, _ in expected] for step in range(longest)]
    ragged = len({len(new) + len(prompt) for (new, _, _), prompt in zip(expected, prompts, strict=True)}) > 1
    ragged = ragged or len(set(map(len, prompts))) > 1
    assert isinstance(t["streams"], list) is ragged
    for row, (new, logits, streams) in enumerate(expected):
        length = len(prompts[row])
        own = t["streams"][row][:, 0] if ragged else t["streams"][:, row]
        torch.testing.assert_close(own, streams, **CLOSE)
        norms = t["norms"][row][0] if ragged else t["norms"][row]
        torch.testing.assert_close(norms, streams[1].norm(dim=-1), **CLOSE)
        decode = t["decode"][row][0] if isinstance(t["decode"], list) else t["decode"][row]
        torch.testing.assert_close(decode, streams[0, length:], **CLOSE)
        torch.testing.assert_close(t["last"][row], streams[0, length - 1], **CLOSE)
        torch.testing.assert_close(t["newest"][: len(new), row], streams[2, length - 1 :], **CLOSE)
        assert t["newest"][len(new) :, row].isnan().all()
        in_window = streams[1, length : length + 2]
        torch.testing.assert_close(t["window"][: len(in_window), row], in_window, **CLOSE)
        assert t["window"][len(in_window) :, row].isnan().all()
        assert t["picks"][: len(new), row].tolist() == logits[length - 1 :].argmax(-1).tolist()
        assert (t["picks"][len(new) :, row] == -1).all()
