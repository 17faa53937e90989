"""A lens as a page: a heat map to scroll and point at, in one HTML file that asks for nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib import resources
from typing import Any

import numpy as np
import torch

from tracelens.lens.comparison import LensComparison
from tracelens.lens.result import LensResult
from tracelens.lens.statistics import DIFFERENCE, OF_TOKENS, STORED, Kind, Statistic
from tracelens.lens.terminal import title
from tracelens.token_texts import visible
from tracelens.viz.scales import BLUE, RED, scale_of

STEP = 1 / 2048
"""Log-probabilities of likely tokens are kept to this many nats, in 16 bits; what is below -31.9 is there as -32."""
_MANTISSA = 12
"""So many bits of a float32's mantissa are dropped: four digits stay, and the rest would not compress."""
MOST_CELLS = 40_000
"""A notebook keeps what it shows: of more cells, the last positions are in it."""
_HEIGHT = 560


@dataclass(frozen=True)
class Shown:
    """One thing that a page can show: a run, or two beside each other."""

    label: str
    runs: tuple[LensResult, ...]
    names: tuple[str, ...] = ("",)
    both: LensComparison | None = None


def shown(thing: LensResult | LensComparison, label: str = "") -> Shown:
    """A run or a comparison, as a page takes it."""
    if isinstance(thing, LensComparison):
        return Shown(label, (thing.first, thing.second), thing.names, thing)
    return Shown(label, (thing,))


def page(views: Sequence[Shown], note: str = "") -> str:
    """The page. ``note``: a line below the map, such as what was left out."""
    blob = _Blob()
    content = {
        "views": [_view(view, blob) for view in views],
        "step": STEP,
        "note": note,
        "colours": {"high": BLUE, "low": RED},
    }
    content["data"] = base64.b64encode(zlib.compress(bytes(blob.data), 1)).decode()
    # A "<" in a text could end the element that the data stand in.
    data = json.dumps(content, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    files = resources.files("tracelens.viz")
    script, style = (
        files.joinpath(name).read_text(encoding="utf-8") for name in ("lens_page.js", "lens_page.css")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Nothing may be loaded, and no script may run but this one.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    first = views[0].runs[0]
    heading = title(first) if len(views) == 1 else f"{len(views)} prompts"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(heading)}</title>\n<style>\n{style}</style></head>\n"
        '<body><div id="lens"><noscript>This map needs JavaScript; lens.save("lens.csv") has the numbers.</noscript>'
        "</div>\n"
        f'<script type="application/json" id="data">{data}</script>\n<script>{script}</script>\n</body></html>\n'
    )


def embedded(views: Sequence[Shown]) -> str:
    """The page in a frame of its own, for notebooks: nothing of it can meet what stands around it."""
    views, note = zip(*(_within(view, MOST_CELLS // len(views)) for view in views), strict=True)
    whole = page(views, " ".join(dict.fromkeys(filter(None, note))))
    return (
        f'<iframe srcdoc="{escape(whole)}" sandbox="allow-scripts" title="lens" '
        f'style="width:100%;height:{_HEIGHT}px;border:0"></iframe>'
    )


def _within(view: Shown, most: int) -> tuple[Shown, str]:
    """As many of the last positions as have not more than so many cells, and what to say of that."""
    first = view.runs[0]
    positions = max(most // (len(view.runs) * len(first.components) * len(first.layers)), 1)
    if positions >= len(first.positions):
        return view, ""
    runs = tuple(run.at(positions=slice(-positions, None)) for run in view.runs)
    both = None if view.both is None else LensComparison(runs[0], runs[1], view.both.names)
    note = f"Here: the last {positions} of {len(first.positions)} positions; to_html(path) has all."
    return Shown(view.label, runs, view.names, both), note


# --- data ------------------------------------------------------------------------------------------------------------


class _Blob:
    """All arrays of a page, one after the other; each begins at a multiple of 4 bytes."""

    def __init__(self) -> None:
        self.data = bytearray()

    def add(self, array: np.ndarray) -> dict[str, Any]:
        start = len(self.data)
        self.data += np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()
        self.data += b"\0" * (-len(self.data) % 4)
        return {"type": array.dtype.name, "start": start, "length": array.size}


def _view(view: Shown, blob: _Blob) -> dict[str, Any]:
    first = view.runs[0]
    return {
        "label": view.label,
        "title": title(first),
        "names": view.names,
        "components": first.components,
        "layers": first.layers,
        "positions": first.positions,
        "prompt": first.n_prompt,
        "statistics": [_statistic(view, *words) for words in _all_words(view)],
        "runs": [_run(run, blob) for run in view.runs],
    }


def _all_words(view: Shown) -> list[tuple[str, ...]]:
    """The words of every statistic that all runs of the view have."""
    names = [name for name in view.runs[0].names if all(name in run.names for run in view.runs)]
    tracked = [token for token in view.runs[0].tracked if all(token in run.tracked for run in view.runs)]
    words: list[tuple[str, ...]] = [(name,) for name in names]
    words += [(name, token) for token in tracked for name in OF_TOKENS]
    words += [(DIFFERENCE, first, second) for first in tracked for second in tracked if first < second][:6]
    return words


def _statistic(view: Shown, *words: str) -> dict[str, Any]:
    known = view.runs[0].described(*words)
    entry = _entry(known, view, words)
    entry["scale"] = asdict(scale_of(known.kind, *(run.statistic(*words) for run in view.runs)))
    if view.both is not None:
        entry["change"] = asdict(scale_of(Kind.SIGNED, view.both.statistic(*words)))
    return entry


def _entry(known: Statistic, view: Shown, words: tuple[str, ...]) -> dict[str, Any]:
    """How a page makes the numbers from the arrays that it has: which ones, and what is done with them."""
    name, *tokens = words
    entry: dict[str, Any] = {
        "name": " ".join(words),
        "label": known.label,
        "kind": known.kind.value,
        "next": name in OF_TOKENS and not tokens,
    }
    if name == DIFFERENCE:
        return entry | {"from": [f"tracked log_prob {token}" for token in tokens], "how": "difference"}
    how = {"prob": "exp", "top_prob": "exp", "cross_entropy": "minus"}.get(name, "same")
    base = "rank" if name == "rank" else "log_prob" if name in OF_TOKENS else name
    if name.startswith("top_"):
        base = "top"
    return entry | {"from": [f"tracked {base} {tokens[0]}" if tokens else base], "how": how}


def _run(run: LensResult, blob: _Blob) -> dict[str, Any]:
    ids = torch.cat([run.top_ids.reshape(-1), run.token_ids, run.next_ids.clamp(min=0)])
    distinct, places = ids.unique(return_inverse=True)
    narrow = np.uint16 if len(distinct) <= 1 << 16 else np.uint32
    cells = run.top_ids.numel()
    T = len(run.positions)
    following = places[cells + T :].clone()
    following[run.next_ids < 0] = -1
    top = (run.top_log_probs.double().clamp(min=-32, max=0) / -STEP).round().clamp(max=65535)
    arrays = {
        "top ids": blob.add(places[:cells].numpy().astype(narrow)),
        "top log_probs": blob.add(top.numpy().astype(np.uint16)),
    }
    for name in STORED:
        if name in run.statistics:
            arrays[name] = blob.add(_numbers(run.statistics[name]))
    for at, token in enumerate(run.tracked):
        assert run.tracked_log_probs is not None
        assert run.tracked_ranks is not None
        arrays[f"tracked log_prob {token}"] = blob.add(_numbers(run.tracked_log_probs[..., at]))
        arrays[f"tracked rank {token}"] = blob.add(_numbers(run.tracked_ranks[..., at]))
    numbers = distinct.tolist()
    return {
        "k": run.top_k,
        "ids": numbers,
        "texts": [visible(run.text_of.get(token, "-")) for token in numbers],
        "tokens": places[cells : cells + T].tolist(),
        "next": following.tolist(),
        "arrays": arrays,
    }


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    array = tensor.contiguous().numpy()
    if array.dtype.kind == "i":
        return array.astype(np.int32)
    bits = array.astype(np.float32).view(np.uint32)
    half = np.uint32(1 << (_MANTISSA - 1))
    rounded = (bits + half) & np.uint32(0xFFFFFFFF << _MANTISSA & 0xFFFFFFFF)
    return np.where(np.isfinite(array), rounded.view(np.float32), array).astype(np.float32)
