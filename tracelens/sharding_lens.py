"""What states say about the next token, where every rank has a part of the vocabulary.

No logits travel, and no states: every rank reads its own part of the unembedding, and what it says of a row is a few
numbers. First the logits of the tokens that are asked for, of which one rank has each, so that all can count what lies
above them; then the rest, which is merged as chunks of a vocabulary are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tracelens.ir.abstract import Defer, bind
from tracelens.ir.layout import WHOLE_EVERYWHERE, Joined, Layout, Partial, Shard, owned
from tracelens.ir.ops import Arg, Call, Ref, operands
from tracelens.ir.rules_lens import DISTANCE, JOINED, PART, TARGETS, asks_of, wide_dtype, widths
from tracelens.ir.types import DType, TensorType
from tracelens.sharding_rules import Choice

_NAMES = "state weight bias reference targets asks * scale softcap workspace"


def lens_in_steps(
    op: Call,
    layouts: Mapping[int, object],
    types: Mapping[int, TensorType],
    ranks: int,
    new: Callable[[], int],
) -> list[Call] | None:
    """The steps of a lens on a head whose vocabulary is in parts; ``None`` for one that is whole."""
    try:
        bound = bind(_NAMES, op.args, op.kwargs)
    except Defer:
        return None
    state, weight, targets = bound["state"], bound["weight"], bound["targets"]
    if not isinstance(state, Ref) or not isinstance(weight, Ref) or not isinstance(targets, tuple):
        return None
    vocabulary = types[weight.id].shape[0]
    if layouts[weight.id] != Shard(0) or not isinstance(vocabulary, int):
        return None
    starts = tuple(owned(vocabulary, ranks, rank)[0] for rank in range(ranks))
    if owned(vocabulary, ranks, ranks - 1)[0] == vocabulary:
        return None  # a rank has nothing
    lead, wide = types[state.id].shape[:-1], wide_dtype(types[state.id].dtype)
    steps: list[Call] = []
    own: Ref | None = None
    if targets:
        own = Ref(new())
        type_ = TensorType(wide, (len(targets), *lead))
        args: tuple[Arg, ...] = (state, weight, bound["bias"], targets, starts)
        steps.append(Call((own.id,), (type_,), TARGETS, args, op.kwargs))
    asks = asks_of(bound["asks"], len(targets))
    numbers, integers = widths(asks, len(targets))
    outs = (new(), new())
    said = (
        TensorType(wide, (ranks, numbers, *lead)),
        TensorType(DType.INT64, (ranks, integers, *lead)),
    )
    args = (state, weight, bound["bias"], bound["reference"], own, targets, bound["asks"], starts)
    steps.append(Call(outs, said, PART, args, op.kwargs))
    args = (Ref(outs[0]), Ref(outs[1]), len(targets), bound["asks"], starts)
    steps.append(Call(op.outs, op.types, JOINED, args))
    return steps


def of_a_part(op: Call, layouts: Mapping[int, Layout]) -> Choice | None:
    """How the steps lie: the head in parts of the vocabulary, all else whole."""
    if op.function not in (TARGETS, PART, DISTANCE):
        return None
    _, weight, bias, *_ = op.args
    assert isinstance(weight, Ref)
    if op.function == DISTANCE and layouts[weight.id] != Shard(0):
        return None
    if layouts[weight.id] != Shard(0):
        raise AssertionError("of a whole vocabulary there are no parts")
    needs: dict[int, Layout] = {**dict.fromkeys(operands(op), WHOLE_EVERYWHERE), weight.id: Shard(0)}
    if isinstance(bias, Ref):
        needs[bias.id] = Shard(0)
    match op.function:
        case "tracelens.lens_targets":
            return Choice(needs, (Partial(Joined.MAX),))
        case "tracelens.lens_distance":
            return Choice(needs, (Partial(Joined.SUM),))  # every token adds something on its own
        case _:
            return Choice(needs, (Shard(0), Shard(0)))
