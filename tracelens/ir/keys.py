"""Which operations let keys meet where keys that are padding would count.

:class:`Keys` follows a graph operation by operation, says of each value what it holds at padding
(:mod:`tracelens.ir.padding`), and of each operation that reduces keys or works along them whether that is the same as
without padding. It is asked only where rows may differ in length, and after the typing rules, which refuse every
operation that positions of different rows do not allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import inf, isnan, prod

from tracelens.ir.bounds import (
    AND,
    EXTREMES,
    FILLED,
    FINITE,
    KEEPS_ZERO,
    LINEAR,
    LOG_SOFTMAX,
    LOG_SUMS,
    OR,
    PRODUCTS,
    SELECTS,
    SMOOTH,
    SOFTMAX,
    SUMS,
    WITH_INDICES,
    XLOGY,
    is_positive,
    is_product,
    moves,
    reach_of,
)
from tracelens.ir.contracted import contracted
from tracelens.ir.functions import FUNCTIONS, Kind
from tracelens.ir.infer import Element, on_elements
from tracelens.ir.ops import (
    Apply,
    Arg,
    Call,
    Const,
    Grad,
    Hold,
    Index,
    IndexPut,
    Op,
    Param,
    Read,
    Redistribute,
    Ref,
    Save,
    Scalar,
    Special,
    Transfer,
    Write,
    operands,
    refs,
    results,
)
from tracelens.ir.padding import (
    PATTERN,
    UNKNOWN,
    Held,
    Number,
    distinct,
    has_keys,
    key_axes,
    of_number,
    plain,
    scores,
    shifted,
    union,
)
from tracelens.ir.sites import Site
from tracelens.ir.types import DType, TensorType

_MOST = 27

Padding = tuple[tuple[Number, ...], bool]
# Of either sign: what is divided by it may be infinite in two ways.
ZERO: tuple[Number, ...] = (0.0, -0.0)


class Keys:
    """What the values of a graph hold at keys that are padding, in the order of its operations."""

    def __init__(self) -> None:
        self._types: dict[int, TensorType] = {}
        self._held: dict[int, Held] = {}
        self._written: dict[tuple[Site, int], Ref | Scalar] = {}
        self._smooth = True

    def counts_padding(self, op: Op) -> bool:
        """Does the operation let keys meet so that padding changes what it gives?"""
        if not isinstance(op, Call) or not self._with_keys(op):
            return False
        first = operands(op)[0]
        kept = min((len(key_axes(type_)) for type_ in op.types), default=0)
        name = op.function
        held = self._held[first]
        if name in SOFTMAX or name in LOG_SOFTMAX:
            return self._along(op) and not held.lowest
        if len(key_axes(self._types[first])) > kept:
            if name in SUMS:
                numbers = held.padding
                return numbers is None or not all(
                    number == 0 or (name == "torch.nansum" and isnan(number)) for number in numbers
                )
            if name in EXTREMES:
                return not held.never_largest
            if name in LOG_SUMS:
                return not held.lowest
            if name == "torch.any":
                return not held.zero
        if is_product(name):
            return any(not self._adds_nothing(members) for members in contracted(op, self._types))
        # Whatever else loses keys is known to mix positions by its rule, except for taking the newest key.
        return False

    def add(self, op: Op) -> None:
        """Takes note of what the operation makes."""
        if isinstance(op, Write):
            self._written[op.site, op.version] = op.value
        made = results(op)
        held = self._made(op)
        for (value, type_), one in zip(made, held, strict=True):
            self._types[value] = type_
            self._held[value] = one

    # --- what operations make ------------------------------------------------------------------------------------

    def _made(self, op: Op) -> Sequence[Held]:
        match op:
            case Read():
                return (self._read(op),)
            case Const() | Param():
                return (Held(),)
            case Index():
                base = self._held[op.base]
                return (base if has_keys([op.type]) else self._without(base),)
            case IndexPut():
                return (union([self._held[op.base], self._argument(op.value)]),)
            case Transfer() | Redistribute():
                return (self._held[op.value],)
            case Apply():
                # The function is called for each row without its padding, where zero is put.
                looked = has_keys(self._types[ref] for arg in op.args for ref in refs(arg))
                zero = Held((0,), finite=False, reach=inf)
                return [zero if looked and has_keys([type_]) else UNKNOWN for type_ in op.types]
            case Grad():
                return [Held(None, finite=self._smooth, reach=inf)] * len(op.outs)
            case Call():
                found = self._call(op)
                if self._with_keys(op) and op.function not in SMOOTH and not moves(op.function):
                    self._smooth = False
                return found
            case Write() | Save() | Hold():
                return ()

    def _read(self, op: Read) -> Held:
        if op.version:
            # Padding goes out of sight after the last write, and this is read before.
            value = self._written.get((op.site, op.version))
            held = UNKNOWN if value is None else self._argument(value)
            if isinstance(value, Ref):
                own = self._types[value.id]
                if own.dtype is not op.type.dtype or len(key_axes(own)) != len(key_axes(op.type)):
                    held = self._without(held)
            return held
        if op.site.name == "pattern":
            return PATTERN
        return scores(op.type.dtype) if op.site.name == "scores" else Held()

    def _without(self, held: Held) -> Held:
        """What is known of a value's numbers alone, once they stand somewhere else."""
        return Held(None, finite=held.finite, positive=held.positive, reach=held.reach)

    def _call(self, op: Call) -> Sequence[Held]:
        name = op.function
        pointwise = FUNCTIONS[name].kind is Kind.POINTWISE
        args = _flat((*op.args, *(arg for _, arg in op.kwargs)))
        known = [self._argument(arg) for arg in args if pointwise or isinstance(arg, Ref)]
        plainly = Held(
            None,
            finite=(name in FINITE or name in KEEPS_ZERO or moves(name))
            and all(held.finite for held in known),
            positive=is_positive(op, known),
            reach=reach_of(op, known),
        )
        found = [
            Held(None, positive=True, reach=1.0) if type_.dtype is DType.BOOL else plainly
            for type_ in op.types
        ]
        if not self._with_keys(op):
            return found
        for number, padding in enumerate(self._padding(op)):
            # Two axes of keys have padding of one beside real keys of the other.
            if padding is not None and len(key_axes(op.types[number])) == 1:
                numbers, broken = padding
                found[number] = replace(found[number], padding=numbers, unless_broken=broken)
        return found

    def _padding(self, op: Call) -> Sequence[Padding | None]:
        """For each result what stands at padding, and whether that holds unless real keys are broken."""
        name, count = op.function, len(op.outs)
        unknown: list[Padding | None] = [None] * count
        first = operands(op)[0]
        held = self._held[first]
        if FUNCTIONS[name].kind is Kind.POINTWISE:
            return self._pointwise(op)
        if name in SOFTMAX or name in LOG_SOFTMAX:
            if not self._along(op):
                return unknown
            if name in SOFTMAX:
                return [((0.0,), held.reach == inf)]
            return [shifted(held, Held(reach=held.reach + 100))]
        if (name in SELECTS or FUNCTIONS[name].kind is Kind.SHAPE) and name != "torch.broadcast_tensors":
            sources = list(refs(op.args[0])) if op.args else []
            if not sources or not all(key_axes(self._types[source]) for source in sources):
                return unknown
            both = union([self._held[source] for source in sources])
            if both.padding is None:
                return unknown
            whole = (both.padding, both.unless_broken)
            return [whole, *unknown[1:]] if name in WITH_INDICES else [whole] * count
        if name in KEEPS_ZERO and held.zero:
            return [(ZERO, held.unless_broken), *unknown[1:]]
        if name in PRODUCTS or (name == "torch.nn.functional.linear" and len(operands(op)) == 2):
            keyed = [value for value in operands(op) if key_axes(self._types[value])]
            if all(self._held[value].zero for value in keyed):
                broken = any(self._held[value].unless_broken for value in keyed)
                finite = all(self._held[value].finite for value in operands(op))
                return [(ZERO, broken or not finite)]
        return unknown

    # --- element by element --------------------------------------------------------------------------------------

    def _pointwise(self, op: Call) -> Sequence[Padding | None]:
        unknown: list[Padding | None] = [None] * len(op.outs)
        args = [*op.args, *(arg for _, arg in op.kwargs)]
        used = [ref for arg in args for ref in refs(arg)]
        places = {self._types[value].ndim - axis for value in used for axis in key_axes(self._types[value])}
        if len(places) != 1:
            return unknown  # keys meet other keys
        name = op.function
        broken = any(self._held[value].unless_broken for value in used)
        if broken and name not in LINEAR:
            return unknown
        if not op.kwargs and (special := self._half_known(op)) is not None:
            return [special]
        choices: list[list[Arg | Element]] = []
        for arg in args:
            numbers = self._elements(arg, name)
            if numbers is None:
                return unknown
            choices.append(numbers)
        if prod(len(numbers) for numbers in choices) > _MOST:
            return unknown
        several: list[list[Number]] = [[] for _ in op.outs]
        names = [key for key, _ in op.kwargs]
        for chosen in product(*choices):
            split = len(op.args)
            made = on_elements(name, chosen[:split], dict(zip(names, chosen[split:], strict=True)))
            if made is None or len(made) != len(several):
                return unknown
            for numbers, number in zip(several, made, strict=True):
                numbers.append(number)
        return [(distinct(numbers), broken) for numbers in several]

    def _elements(self, arg: Arg, name: str) -> list[Arg | Element] | None:
        """What may stand in the place of an argument, for one key that is padding."""
        if not isinstance(arg, Ref):
            return None if any(True for _ in refs(arg)) else [arg]
        type_, held = self._types[arg.id], self._held[arg.id]
        if name in FILLED or (name == "torch.Tensor.type_as" and not key_axes(type_)):
            return [Element(0, type_.dtype)]
        if held.padding is None or not key_axes(type_):
            return None
        return [Element(number, type_.dtype) for number in held.padding]

    def _half_known(self, op: Call) -> Padding | None:
        """What a function makes of one known and one unknown operand, for those where that is clear."""
        name = op.function
        if name == "torch.masked_fill" and len(op.args) == 3:
            return self._where(op.args[1], op.args[2], op.args[0])
        if name == "torch.where" and len(op.args) == 3:
            return self._where(*op.args)
        if len(op.args) != 2:
            return None
        one, two = (self._argument(arg) for arg in op.args)
        left, right = (self._keyed(arg) for arg in op.args)
        if left and right and one.padding is not None and two.padding is not None:
            return None
        for mine, keyed, other, is_other_keyed in ((one, left, two, right), (two, right, one, left)):
            if not keyed or mine.padding is None or (other.padding is not None and is_other_keyed):
                continue
            second = mine is two
            if isinstance(op.args[0 if second else 1], bool | int | float | Special):
                return None  # a number: all is known
            # What is broken at a real key because of a value without keys is broken whatever the padding.
            if not other.finite and is_other_keyed:
                return None
            broken = mine.unless_broken or not other.finite
            if mine.zero:
                if name == "torch.mul":
                    return (ZERO, broken)
                if name == "torch.div" and not second and not is_other_keyed:
                    return (ZERO, True)
                if name in XLOGY and not second:
                    return (ZERO, broken)
                if name in AND:
                    return ((False,), mine.unless_broken)
            if name in OR and op.types[0].dtype is DType.BOOL and mine.padding == (True,):
                return ((True,), mine.unless_broken)
            if mine.lowest and (name == "torch.add" or (name == "torch.sub" and not second)):
                return shifted(mine, other)
        return None

    def _where(self, condition: Arg, chosen: Arg, other: Arg) -> Padding | None:
        known = self._argument(condition)
        truths = {bool(number) for number in known.padding or (True, False)}
        if not self._keyed(condition):
            truths = {True, False}
        sides = [side for side, truth in ((chosen, True), (other, False)) if truth in truths]
        found: list[Held] = []
        for side in sides:
            held = self._argument(side)
            if held.padding is None or (isinstance(side, Ref) and not self._keyed(side)):
                return None
            found.append(held)
        both = union(found)
        return (both.padding or (), both.unless_broken)

    # --- the parts of operations ---------------------------------------------------------------------------------

    def _with_keys(self, op: Op) -> bool:
        return has_keys(self._types[value] for value in operands(op))

    def _keyed(self, arg: Arg) -> bool:
        return isinstance(arg, Ref) and bool(key_axes(self._types[arg.id]))

    def _argument(self, arg: Arg) -> Held:
        if isinstance(arg, Ref):
            return self._held[arg.id]
        if isinstance(arg, bool | int | float | complex | Special):
            return of_number(plain(arg))
        return Held(positive=True, reach=0.0)

    def _along(self, op: Call) -> bool:
        """Does a soft-max go along the keys?"""
        named: Mapping[str, Arg] = dict(op.kwargs)
        dim = op.args[1] if len(op.args) > 1 else named.get("dim", named.get("axis"))
        type_ = self._types[operands(op)[0]]
        if not isinstance(dim, int):
            return True
        return dim % max(type_.ndim, 1) in key_axes(type_)

    def _adds_nothing(self, members: Sequence[int]) -> bool:
        """Do the products over keys that these values have in common leave padding out?"""
        held = [self._held[value] for value in members]
        return any(one.zero for one in held) and all(one.tame for one in held)


def _flat(args: Sequence[Arg]) -> list[Arg]:
    found: list[Arg] = []
    for arg in args:
        found += _flat(arg) if isinstance(arg, tuple) else [arg]
    return found
