"""Draws which tokens each spelling selects, by writing there: nothing is drawn that the library did not do.

A site is set to zero, the spelling is written to as it stands in the picture, the site is saved, and what it held is
put back, so that the text is that of the model left alone. Cells are coloured where the saved number is not zero.
"""

from __future__ import annotations

import re
from html import escape
from typing import Any

import torch

import tracelens as tl
from tracelens.viz.drawing import BLUE, opening, short, text

PROMPTS = ["Now, Paris is in France", "Here Paris lies in the north of France"]
NEW = 4

IN_A_TRACE = (
    "site",
    "site[:, -1]",
    "site.tok[0]",
    "site.tok[-1]",
    "site.tok[1:4]",
    "site.tok[[0, -2]]",
    'site.tok["Paris"]',
    "site.tok[tl.token_id(281)]",
    "site.tok[tl.chars(5, 10)]",
    "site.tok[mask]",
    "site.tok[real & ~mask]",
    "t.prompts[1].site",
    "t.prompts[1].site[:, 2:4]",
)
IN_A_GENERATION = (
    "site",
    "t.prefill.site",
    "t.prefill.site.tok[-1]",
    "site.tok[1:4]",
    'site.tok["Paris"]',
    "t.prefill.site.tok[mask]",
    "t.prompts[1].site",
    "site[:, -1]",
    "site.tok[-1]",
    "t.decode.site",
    "t.steps[2:4].site",
    "site.tok[model.positions >= 5]",
    "site.tok[model.token_ids == 28]",
    "site.tok[~(model.token_ids == 28)]",
    "t.decode.site.tok[model.positions < 9]",
    "t.prefill.site.tok[t.prefill.positions >= 5]",
    "site.tok[(model.positions >= 2) & (model.positions < 6)]",
)
# The tokens for which the spelling that says `mask` is true.
_NAMES = (" Paris", " France")

_CELL = (74, 20)
_LEFT, _TOP, _PANEL = 12, 66, 68


def mask(model: tl.Model) -> torch.Tensor:
    """[rows, positions]: the tokens that are names, of prompts padded on the left."""
    return _padded([[word in _NAMES for word in row] for row in prompts(model)])


def real(model: tl.Model) -> torch.Tensor:
    """[rows, positions]: the tokens that are no padding."""
    return _padded([[True] * len(row) for row in prompts(model)])


def _padded(rows: list[list[bool]]) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[False] * (width - len(row)) + row for row in rows])


def selected(model: tl.Model, spelling: str, *, generating: bool, **options: Any) -> list[list[bool]]:
    """For each prompt, which tokens of its text the spelling selects; without padding."""
    code = re.sub(r"(?<!\.)\bsite\b", "model.site", spelling).replace(".site", ".layers[9].resid_post")
    opened: Any = (
        model.generate(PROMPTS, max_new_tokens=NEW, **options) if generating else model.trace(PROMPTS)
    )
    with opened as t:
        before = model.layers[9].resid_post
        model.layers[9].resid_post = 0.0
        exec(f"{code} += 1.0", {"model": model, "t": t, "tl": tl, "mask": mask(model), "real": real(model)})
        marks = model.layers[9].resid_post[..., 0].save()
        model.layers[9].resid_post = before
        if not generating:
            model.logits[:, -1].save()
    return [(row[0] != 0).tolist() for row in marks.value]


def prompts(model: tl.Model) -> list[list[str]]:
    """The tokens of the prompts, as they are spelt."""
    assert model.tokenizer is not None
    return [[str(model.tokenizer.decode([token.id])) for token in row] for row in model.tokens(PROMPTS)]


def texts(model: tl.Model, *, generating: bool) -> list[list[str]]:
    """The tokens of each row that the model is given: those of the prompt, and all but the last of the new ones."""
    rows = prompts(model)
    if generating:
        assert model.tokenizer is not None
        with model.generate(PROMPTS, max_new_tokens=NEW) as t:
            pass
        for row, new in zip(rows, t.tokens, strict=True):
            row += [str(model.tokenizer.decode([token])) for token in new[:-1]]
    return rows


def grids(model: tl.Model, *, generating: bool) -> str:
    """One grid a spelling, rows x columns, as SVG."""
    spellings = IN_A_GENERATION if generating else IN_A_TRACE
    rows = texts(model, generating=generating)
    prompt = [len(row) for row in prompts(model)]
    columns = max(map(len, rows))
    width = _LEFT + _CELL[0] * columns + 12
    height = _TOP + _PANEL * len(spellings) + 4
    where = "a generation" if generating else "a trace"
    parts = [
        *opening(width, height),
        text(12, 20, f"What each spelling selects in {where} of two prompts", size=13, bold=True),
        text(12, 40, "site: model.layers[i].resid_post, or another site with positions", colour="#555"),
    ]
    for panel, spelling in enumerate(spellings):
        top = _TOP + panel * _PANEL
        parts.append(text(_LEFT, top + 8, spelling, bold=True))
        chosen = selected(model, spelling, generating=generating)
        for row, words in enumerate(rows):
            y = top + 14 + row * (_CELL[1] + 1)
            start = columns - len(words)
            for column in range(start):
                parts.append(_cell(column, y, "", False, "padding", dashed=True))
            for place, word in enumerate(words):
                on = chosen[row][place]
                kind = "prompt" if place < prompt[row] else "generated"
                state = "selected" if on else "not selected"
                said = f"{spelling}, row {row}, {kind} {short(word)} ({place}): {state}"
                parts.append(_cell(start + place, y, word, on, said, new=kind == "generated"))
        if generating:
            x = _LEFT + _CELL[0] * (columns - NEW + 1) - 1
            parts.append(f'<line x1="{x}" y1="{top + 11}" x2="{x}" y2="{top + 57}" stroke="#111"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cell(
    column: int, y: int, word: str, on: bool, said: str, *, new: bool = False, dashed: bool = False
) -> str:
    x = _LEFT + column * _CELL[0]
    look = f'fill="{BLUE}"' if on else 'fill="#f1f1ee"'
    if dashed:
        look = 'fill="none" stroke="#ccc" stroke-dasharray="3 3"'
    colour = "white" if on else BLUE if new else "#111"
    return (
        f'<rect x="{x}" y="{y}" width="{_CELL[0] - 2}" height="{_CELL[1]}" {look}><title>{escape(said)}</title></rect>'
        + (text(x + _CELL[0] // 2 - 1, y + 14, short(word), anchor="middle", colour=colour) if word else "")
    )
