"""What a lens has in hand while it reads the head, in bytes: known before the run, as its tiles are."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from tracelens.ir.abstract import bind
from tracelens.ir.dims import Sizes
from tracelens.ir.layout import OwnType
from tracelens.ir.ops import Call, Ref
from tracelens.ir.rules_lens import DISTANCE, LENS, PART, TARGETS, asks_of, wide_dtype, widths
from tracelens.ir.types import TensorType
from tracelens.readout_tiles import (
    WORKSPACE,
    costs_of_distance,
    costs_of_lens,
    extent,
    rows_of_targets,
    tiles_of,
)

_NAMES = {
    LENS: "state weight bias reference targets asks * scale softcap workspace",
    PART: "state weight bias reference own targets asks starts * scale softcap workspace",
    TARGETS: "state weight bias targets starts * scale softcap workspace",
    DISTANCE: "state weight bias reference total other_total kind * scale softcap workspace",
}


def workspace_of(op: Call, local: Callable[[int], TensorType | OwnType], sizes: Sizes) -> int:
    """The most that a call holds beside its operands while it runs; 0 for what is no lens.

    ``local``: the type of a value as one rank has it.
    """
    if op.function not in _NAMES:
        return 0
    given = bind(_NAMES[op.function], op.args, op.kwargs)

    def shape(name: str) -> tuple[int, ...] | None:
        ref = given.get(name)
        return local(ref.id).sizes(sizes) if isinstance(ref, Ref) else None

    state, weight, reference = shape("state"), shape("weight"), shape("reference")
    assert state is not None
    assert weight is not None
    ref = given["state"]
    assert isinstance(ref, Ref)
    dtype = local(ref.id).dtype
    width, itemsize, wide = state[-1], dtype.itemsize, wide_dtype(dtype).itemsize
    limit = given.get("workspace")
    workspace = limit if isinstance(limit, int) else WORKSPACE
    rows = prod(state[:-1])
    layers, columns = extent(state[:-1], None if reference is None else reference[:-1])
    if op.function == DISTANCE:
        form = costs_of_distance(width, itemsize, wide, str(given["kind"]))
        return form.of_tiles(layers, tiles_of(layers, columns, weight[0], workspace, form)) + rows * wide
    targets = given["targets"]
    several = len(targets) if isinstance(targets, tuple) else 0
    some, each = rows_of_targets(width, itemsize, wide, workspace)
    aimed = min(rows, some) * each if several else 0
    kept = several * rows * (8 + wide)
    if op.function == TARGETS:
        return aimed + kept
    asks = asks_of(given["asks"], several)
    floats, integers = widths(asks, several)
    form = costs_of_lens(
        width,
        itemsize,
        wide,
        floats=floats,
        integers=integers,
        k=max((number for name, number in asks if name == "topk"), default=0),
        divergence=any(name == "kl" for name, _ in asks),
    )
    in_tiles = form.of_tiles(layers, tiles_of(layers, columns, weight[0], workspace, form))
    # What it has found is kept, and in the end put together to answers.
    found = rows * (floats * wide + integers * 8)
    answers = sum(local(out).nbytes(sizes) for out in op.outs) if op.function == LENS else 0
    return kept + max(aimed, found + max(in_tiles, answers))
