"""The types of what states say about the next token (:mod:`tracelens.readout` has the functions)."""

from __future__ import annotations

from typing import cast

from tracelens.errors import DtypeError, ShapeError, UnsupportedFunctionError
from tracelens.ir.abstract import AbstractArg, AbstractKwargs, Defer, Inferred, Sizing, broadcast, is_integer
from tracelens.ir.dims import Dim
from tracelens.ir.rules_pointwise import Rule
from tracelens.ir.types import DType, TensorType

LENS, TARGETS, PART, JOINED = (
    f"tracelens.{name}" for name in ("lens", "lens_targets", "lens_part", "lens_joined")
)
DISTANCE = "tracelens.lens_distance"
LENSES = frozenset((LENS, DISTANCE))
"""The functions that read the whole head."""
KNOWS_RANK = frozenset((TARGETS, PART))
"""Functions that are told which rank they run on."""
OF_TARGETS = ("log_prob", "rank", "logit")
NUMBERS = ("entropy", "logsumexp", "kl")
DISTANCES = ("js", "tv")

Args = tuple[AbstractArg, ...]
Asks = tuple[tuple[str, int], ...]


def asks_of(arg: object, targets: int) -> Asks:
    """The asks of a call, each with its number: of elements for ``topk``, of the target; 0 where it has none."""
    found: list[tuple[str, int]] = []
    for ask in cast("tuple[object, ...]", arg) if isinstance(arg, tuple) else ():
        match ask:
            case ("topk", int() as k) if k > 0:
                found.append(("topk", k))
            case (str() as name, int() as target) if name in OF_TARGETS and 0 <= target < targets:
                found.append((name, target))
            case (str() as name,) if name in NUMBERS:
                found.append((name, 0))
            case _:
                raise UnsupportedFunctionError(f"{ask!r} is nothing that a lens can say")
    if not found:
        raise UnsupportedFunctionError("a lens has to be asked for something")
    return tuple(found)


def widths(asks: Asks, targets: int) -> tuple[int, int]:
    """How many numbers and whole numbers a part of the vocabulary adds for each row, as ``readout.Asked`` counts."""
    names = {name for name, _ in asks}
    k = max((number for name, number in asks if name == "topk"), default=0)
    return 2 + ("entropy" in names) + 3 * ("kl" in names) + k + targets, k + targets


def answer_types(asks: Asks, lead: tuple[Dim, ...], wide: DType) -> tuple[TensorType, ...]:
    """What comes back, in order."""
    found: list[TensorType] = []
    for name, number in asks:
        if name == "topk":
            found += [TensorType(wide, (*lead, number)), TensorType(DType.INT64, (*lead, number))]
        else:
            found.append(TensorType(DType.INT64 if name == "rank" else wide, lead))
    return tuple(found)


def wide_dtype(dtype: DType) -> DType:
    return DType.FLOAT64 if dtype is DType.FLOAT64 else DType.FLOAT32


def lens(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    """``tracelens.lens(state, weight, bias, reference, targets, asks)``: [..., D] to an answer [...] for each ask."""
    if len(args) != 6:
        raise UnsupportedFunctionError("a lens takes a state, a head, a reference, targets and asks")
    *head, targets, given = args
    state = _on_a_head(sizing, *head[:3])
    several = targets if isinstance(targets, tuple) else ()
    asks = asks_of(given, len(several))
    mixes = _compared(sizing, state, head[3], any(ask == "kl" for ask, _ in asks))
    mixes = _aimed(sizing, state, several) or mixes
    types = answer_types(asks, state.shape[:-1], wide_dtype(state.dtype))
    return sizing.done(types, mixes, None if len(types) == 1 else ())


def distance(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    """``tracelens.lens_distance(state, weight, bias, reference, total, other_total, kind)``: [..., D] to [...]."""
    if len(args) != 7 or args[6] not in DISTANCES or args[3] is None:
        raise UnsupportedFunctionError(
            "a distance takes a state, a head, a reference, the logsumexp of both and which distance"
        )
    reference, total, other_total = args[3:6]
    state = _on_a_head(sizing, *args[:3])
    mixes = _compared(sizing, state, reference, True)
    assert isinstance(reference, TensorType)
    wide = wide_dtype(state.dtype)
    for one, lead in ((total, state.shape[:-1]), (other_total, reference.shape[:-1])):
        fits = isinstance(one, TensorType) and one.dtype is wide and one.ndim == len(lead)
        if not fits or not all(map(sizing.equal, cast("TensorType", one).shape, lead)):
            raise ShapeError(f"the logsumexp must be {TensorType(wide, lead)}, and this is {one}")
    return sizing.done(TensorType(wide, state.shape[:-1]), mixes)


def _on_a_head(sizing: Sizing, state: object, weight: object, bias: object) -> TensorType:
    if not isinstance(state, TensorType) or not isinstance(weight, TensorType) or state.ndim < 1:
        raise UnsupportedFunctionError("a lens takes a state [..., D] and an unembedding [V, D]")
    problem = f"lens({state}, {weight})"
    if not state.dtype.is_floating or state.dtype is not weight.dtype:
        raise DtypeError(f"{problem}: both must have one floating dtype", instead="value.to(model.dtype)")
    if weight.ndim != 2 or not sizing.equal(state.shape[-1], weight.shape[1]):
        raise ShapeError(f"{problem}: the last axis of the state must be d_model")
    if bias is not None and (not isinstance(bias, TensorType) or bias.shape != weight.shape[:1]):
        raise ShapeError(f"{problem}: the bias must be one number for each token")
    return state


def _compared(sizing: Sizing, state: TensorType, reference: object, needed: bool) -> bool:
    if not isinstance(reference, TensorType):
        if needed or reference is not None:
            raise UnsupportedFunctionError("a divergence is from a reference, and there is none")
        return False
    own = state.shape[state.ndim - reference.ndim :] if reference.ndim <= state.ndim else ()
    fits = len(own) == reference.ndim and reference.dtype is state.dtype
    if not fits or not all(map(sizing.equal, own, reference.shape)):
        raise ShapeError(
            f"a lens on {state} cannot be compared with {reference}: the last axes must be the same",
            instead="the same index on both: model.lens(h[:, -1]).kl(model.lens(model.final_norm[:, -1], norm=False))",
        )
    return broadcast(sizing, [state, reference])[1]


def _aimed(sizing: Sizing, state: TensorType, targets: tuple[object, ...]) -> bool:
    mixes = False
    lead = TensorType(DType.INT64, state.shape[:-1])
    for target in targets:
        if isinstance(target, TensorType):
            if not is_integer(target.dtype):
                raise DtypeError(f"{target} are no tokens: ids are whole numbers")
            shape, mixed = broadcast(sizing, [lead, target])
            if shape != lead.shape:
                raise ShapeError(
                    f"the tokens {target} do not fit a lens on {state}: they must broadcast to [{_text(lead.shape)}]"
                )
            mixes = mixes or mixed
        elif not isinstance(target, int) or isinstance(target, bool):
            raise UnsupportedFunctionError(f"{target!r} is no token")
    return mixes


def _text(shape: tuple[Dim, ...]) -> str:
    return ", ".join(map(str, shape))


# --- the steps on ranks, each with a part of the vocabulary -----------------------------------------------------------


def targets(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    """``tracelens.lens_targets(state, weight, bias, targets, starts)``: [t, ...]."""
    state, several = args[0], args[3]
    if not isinstance(state, TensorType) or not isinstance(several, tuple):
        raise Defer
    return sizing.done(TensorType(wide_dtype(state.dtype), (len(several), *state.shape[:-1])), False)


def part(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    """``tracelens.lens_part(state, weight, bias, reference, own, targets, asks, starts)``: [ranks, n, ...] twice."""
    state, several, given, starts = args[0], args[5], args[6], args[7]
    if not isinstance(state, TensorType) or not isinstance(several, tuple) or not isinstance(starts, tuple):
        raise Defer
    numbers, integers = widths(asks_of(given, len(several)), len(several))
    lead = state.shape[:-1]
    types = (
        TensorType(wide_dtype(state.dtype), (len(starts), numbers, *lead)),
        TensorType(DType.INT64, (len(starts), integers, *lead)),
    )
    return sizing.done(types, False, ())


def joined(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    """``tracelens.lens_joined(numbers, integers, targets, asks, starts)``."""
    numbers, several, given = args[0], args[2], args[3]
    if not isinstance(numbers, TensorType) or not isinstance(several, int):
        raise Defer
    types = answer_types(asks_of(given, several), numbers.shape[2:], numbers.dtype)
    return sizing.done(types, False, None if len(types) == 1 else ())


RULES: dict[str, Rule] = {LENS: lens, DISTANCE: distance, TARGETS: targets, PART: part, JOINED: joined}
