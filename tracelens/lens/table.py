"""A lens result as a table, one row per component, layer and position, and back again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tracelens.extras import required
from tracelens.lens.statistics import STORED

if TYPE_CHECKING:
    import pandas

    from tracelens.lens.result import LensResult

Columns = dict[str, np.ndarray]
"""Arrays of one length. Texts are objects, ``None`` where there is none; ids and ranks are -1 where there is none."""

NEVER_NEGATIVE = ("next_token_id", "rank")
"""Columns of whole numbers in which -1 says that there is none."""


def columns(result: LensResult) -> Columns:
    """Everything that varies between the cells."""
    C, L, T = len(result.components), len(result.layers), len(result.positions)
    positions = np.asarray(result.positions)

    def along(values: np.ndarray, axis: int) -> np.ndarray:
        shape = [1, 1, 1]
        shape[axis] = -1
        return np.broadcast_to(values.reshape(shape), (C, L, T)).reshape(-1)

    texts = _texts(result.text_of)
    table: Columns = {
        "component": along(np.asarray(result.components, dtype=object), 0),
        "layer": along(np.asarray(result.layers), 1),
        "position": along(positions, 2),
        "token": along(texts(result.token_ids.numpy()), 2),
        "token_id": along(result.token_ids.numpy(), 2),
        "next_token": along(texts(result.next_ids.numpy()), 2),
        "next_token_id": along(result.next_ids.numpy(), 2),
        "generated": along(positions >= result.n_prompt, 2),
    }
    table |= {
        name: result.statistics[name].reshape(-1).numpy() for name in STORED if name in result.statistics
    }
    ids, log_probs = (
        part.reshape(-1, result.top_k).numpy() for part in (result.top_ids, result.top_log_probs)
    )
    for at in range(result.top_k):
        table[f"top_{at + 1}"] = texts(ids[:, at])
        table[f"top_{at + 1}_id"] = ids[:, at]
        table[f"top_{at + 1}_log_prob"] = log_probs[:, at]
    for at, token in enumerate(result.tracked):
        assert result.tracked_log_probs is not None
        assert result.tracked_ranks is not None
        table[f"log_prob: {token}"] = result.tracked_log_probs[..., at].reshape(-1).numpy()
        table[f"rank: {token}"] = result.tracked_ranks[..., at].reshape(-1).numpy()
    return table


def whole(result: LensResult) -> Columns:
    """The table with columns for what is the same in all cells, so that nothing is missing."""
    table = columns(result)
    rows = len(table["layer"])
    same: dict[str, Any] = {"model": result.model, "lens": result.lens, "n_prompt": result.n_prompt}
    same |= {f"tracked_id: {token}": id for token, id in result.tracked.items()}
    return table | {
        name: np.full(rows, value, dtype=object if isinstance(value, str) else np.int64)
        for name, value in same.items()
    }


def _texts(text_of: Mapping[int, str]) -> Any:
    def texts(ids: np.ndarray) -> np.ndarray:
        distinct, places = np.unique(ids, return_inverse=True)
        spelt = np.empty(len(distinct), dtype=object)
        spelt[:] = [text_of.get(token) for token in distinct.tolist()]
        return spelt[places.reshape(ids.shape)]

    return texts


def to_pandas(result: LensResult) -> pandas.DataFrame:
    """The table as a data frame; whole numbers that may be missing are ``Int64``."""
    pandas: Any = required("pandas", extra="pandas", what="lens.to_pandas()")
    frame = pandas.DataFrame(columns(result))
    for name in NEVER_NEGATIVE:
        if name in frame:
            frame[name] = frame[name].astype("Int64").mask(frame[name] < 0)
    frame.attrs = {"model": result.model, "lens": result.lens, "n_prompt": result.n_prompt}
    return frame


# --- back ------------------------------------------------------------------------------------------------------------


def result_of(table: Mapping[str, Any]) -> LensResult:
    """The result whose :func:`whole` table this is. Raises ``KeyError`` or ``ValueError`` where it is of none."""
    from tracelens.lens.result import LensResult

    components, layers, positions = (list(dict.fromkeys(np.asarray(table[name]).tolist())) for name in _AXES)
    shape = (len(components), len(layers), len(positions))
    expected = [
        (component, layer, position) for component in components for layer in layers for position in positions
    ]
    if list(zip(*(np.asarray(table[name]).tolist() for name in _AXES), strict=True)) != expected:
        raise ValueError("it has not each component, layer and position once and in order")

    def cells(names: list[str], dtype: type) -> torch.Tensor:
        stacked = np.stack([np.asarray(table[name], dtype=dtype) for name in names], axis=-1)
        return torch.from_numpy(stacked.reshape(*shape, len(names)))

    top = [name.removesuffix("_id") for name in table if name.startswith("top_") and name.endswith("_id")]
    tracked = [name.removeprefix("tracked_id: ") for name in table if name.startswith("tracked_id: ")]
    text_of = {int(table[f"tracked_id: {token}"][0]): token for token in tracked}
    for name in ("token", "next_token", *top):
        text_of |= dict(zip(np.asarray(table[f"{name}_id"]).tolist(), table[name], strict=True))
    text_of.pop(-1, None)
    of_positions = slice(0, len(positions))
    return LensResult(
        components=tuple(components),
        layers=tuple(layers),
        positions=tuple(positions),
        token_ids=torch.from_numpy(np.array(table["token_id"][of_positions], dtype=np.int64)),
        next_ids=torch.from_numpy(np.array(table["next_token_id"][of_positions], dtype=np.int64)),
        n_prompt=int(table["n_prompt"][0]),
        top_ids=cells([f"{name}_id" for name in top], np.int64),
        top_log_probs=cells([f"{name}_log_prob" for name in top], np.float32),
        statistics={
            name: cells([name], np.int64 if name == "rank" else np.float32)[..., 0]
            for name in STORED
            if name in table
        },
        text_of=text_of,
        model=str(table["model"][0]),
        lens=str(table["lens"][0]),
        tracked={token: int(table[f"tracked_id: {token}"][0]) for token in tracked},
        tracked_log_probs=cells([f"log_prob: {token}" for token in tracked], np.float32) if tracked else None,
        tracked_ranks=cells([f"rank: {token}" for token in tracked], np.int64) if tracked else None,
    )


_AXES = ("component", "layer", "position")
