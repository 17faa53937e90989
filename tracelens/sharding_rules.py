"""Which functions may run on the parts of a value that lie on several ranks, and what they make of them.

A function that is not here, or whose arguments do not fit, is given whole values: its operands are gathered first, and
the plan shows it. Every entry is held to the whole tensor by a test, for every axis that it may be given in parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tracelens.ir.abstract import Defer, bind
from tracelens.ir.functions import FUNCTIONS, Kind
from tracelens.ir.layout import WHOLE_EVERYWHERE, Joined, Layout, Partial, Shard, owned
from tracelens.ir.ops import Arg, Call, Ref, operands
from tracelens.ir.types import TensorType


@dataclass(frozen=True, slots=True)
class Choice:
    """The layouts that an operation is given its operands in, and those of its results."""

    needs: Mapping[int, Layout]
    gives: tuple[Layout, ...]


@dataclass(frozen=True, slots=True)
class Given:
    """A call, with what is known of its operands: layouts (whole or in parts) and types."""

    op: Call
    layouts: Mapping[int, Layout]
    types: Mapping[int, TensorType]
    ranks: int

    def bind(self, signature: str) -> dict[str, Arg]:
        return bind(signature, self.op.args, self.op.kwargs)

    def layout(self, value: int) -> Layout:
        return self.layouts[value]

    def alone(self, arg: Arg) -> tuple[int, int]:
        """The value of an argument and the axis that it is in parts along; the others must be whole."""
        if not isinstance(arg, Ref) or not isinstance(layout := self.layout(arg.id), Shard):
            raise Defer
        if any(isinstance(self.layout(value), Shard) for value in operands(self.op) if value != arg.id):
            raise Defer
        return arg.id, layout.dim

    def choice(self, needs: Mapping[int, Layout], *gives: Layout) -> Choice:
        """``gives`` for each result; one is for all of them. Without anything in parts there is nothing to choose."""
        if not any(isinstance(layout, Shard) for layout in needs.values()):
            raise Defer  # an axis one element wide is whole where it is broadcast
        found = gives if len(gives) == len(self.op.outs) else gives * len(self.op.outs)
        return Choice({**dict.fromkeys(operands(self.op), WHOLE_EVERYWHERE), **needs}, found)


def on_parts(
    op: Call, layouts: Mapping[int, Layout], types: Mapping[int, TensorType], ranks: int
) -> Choice | None:
    """How a call is done where its operands are; ``None`` if it needs whole values.

    Partial results are taken to have been joined.
    """
    if not any(isinstance(layouts[value], Shard) for value in operands(op)):
        return None
    function = FUNCTIONS.get(op.function)
    rule = _RULES.get(op.function)
    if rule is None and function is not None and function.kind is Kind.POINTWISE:
        rule = _pointwise
    if rule is None:
        return None
    try:
        return rule(Given(op, layouts, types, ranks))
    except Defer:
        return None


# --- element by element ------------------------------------------------------------------------------------------


def _pointwise(given: Given) -> Choice:
    op = given.op
    whole = op.types[0]
    values = tuple(dict.fromkeys(operands(op)))
    axes = {
        layout.dim + whole.ndim - given.types[value].ndim
        for value in values
        if isinstance(layout := given.layout(value), Shard)
    }
    if len(axes) != 1:
        raise Defer
    axis = axes.pop()
    needs: dict[int, Layout] = {}
    for value in values:
        type_ = given.types[value]
        own = axis - (whole.ndim - type_.ndim)
        if own >= 0 and type_.shape[own] != 1:
            needs[value] = Shard(own)
    return given.choice(needs, Shard(axis))


def _as_another(given: Given) -> Choice:
    """``to`` and ``type_as``: of another operand only the dtype matters, however it lies."""
    own = {value: given.layout(value) for value in operands(given.op)}
    first = given.op.args[0]
    if not isinstance(first, Ref):
        raise Defer
    return given.choice(own, own[first.id])


# --- along axes --------------------------------------------------------------------------------------------------


def _axes(arg: Arg, ndim: int) -> tuple[int, ...]:
    """Axes as they are given to a function; none is all of them."""
    if arg is None or arg == ():
        return tuple(range(ndim))
    parts = arg if isinstance(arg, tuple) else (arg,)
    found: list[int] = []
    for part in parts:
        if not isinstance(part, int) or isinstance(part, bool) or not -ndim <= part < ndim:
            raise Defer
        found.append(part % ndim)
    return tuple(found)


def _moved(axis: int, gone: Sequence[int]) -> int:
    """Where an axis is after others have gone."""
    return axis - sum(other < axis for other in gone)


_PLAIN = "input dim keepdim * dtype"
_REDUCTIONS: dict[str, tuple[str, Joined | None]] = {
    "torch.sum": (_PLAIN, Joined.SUM),
    "torch.nansum": (_PLAIN, Joined.SUM),
    "torch.mean": (_PLAIN, Joined.MEAN),
    "torch.nanmean": (_PLAIN, None),
    "torch.prod": (_PLAIN, None),
    "torch.count_nonzero": ("input dim", Joined.SUM),
    "torch.amax": ("input dim keepdim", Joined.MAX),
    "torch.amin": ("input dim keepdim", Joined.MIN),
    "torch.max": ("input dim keepdim", Joined.MAX),
    "torch.min": ("input dim keepdim", Joined.MIN),
    "torch.norm": ("input p dim keepdim * dtype", Joined.NORM),
    "torch.linalg.vector_norm": ("input ord dim keepdim * dtype", Joined.NORM),
    **dict.fromkeys(
        (
            "torch.all",
            "torch.any",
            "torch.argmax",
            "torch.argmin",
            "torch.logsumexp",
            "torch.special.logsumexp",
            "torch.median",
            "torch.nanmedian",
        ),
        ("input dim keepdim", None),
    ),
    **dict.fromkeys(
        ("torch.std", "torch.var", "torch.std_mean", "torch.var_mean"),
        ("input dim unbiased keepdim * correction", None),
    ),
}


def _reduction(given: Given) -> Choice:
    signature, joined = _REDUCTIONS[given.op.function]
    bound = given.bind(signature)
    if isinstance(bound.get("dim"), Ref):
        return _pointwise(given)  # max(a, b)
    if isinstance(bound.get("dim"), bool) or bound.get("dim") == ():
        raise Defer
    value, axis = given.alone(bound.get("input"))
    type_ = given.types[value]
    axes = _axes(bound.get("dim"), type_.ndim)
    needs: dict[int, Layout] = {value: Shard(axis)}
    if axis not in axes:
        kept = bound.get("keepdim", False) is True
        return given.choice(needs, Shard(axis if kept else _moved(axis, axes)))
    if joined is None or len(given.op.outs) > 1:
        raise Defer
    if joined is Joined.NORM and bound.get("p", bound.get("ord", 2)) not in (2, "fro"):
        raise Defer
    size = type_.shape[axis]
    assert isinstance(size, int)  # the model's own width
    if joined is Joined.MEAN and size % given.ranks:
        raise Defer  # a mean of means needs stretches of one length
    first, last = owned(size, given.ranks, given.ranks - 1)
    if first == last:
        raise Defer  # a rank without any element has no largest one
    return given.choice(needs, Partial(joined))


_KEEPING: dict[str, tuple[str, int | None]] = {
    # The signature, and the axis that is meant where none is given; None: it must be given.
    **dict.fromkeys(
        (
            "torch.softmax",
            "torch.log_softmax",
            "torch.special.softmax",
            "torch.special.log_softmax",
            "torch.cumsum",
            "torch.cumprod",
        ),
        ("input dim * dtype", None),
    ),
    **dict.fromkeys(("torch.cummax", "torch.cummin", "torch.logcumsumexp"), ("input dim", None)),
    "torch.sort": ("input dim descending stable", -1),
    "torch.argsort": ("input dim descending stable", -1),
    "torch.topk": ("input k dim largest sorted", -1),
    "torch.flip": ("input dims", None),
    "torch.nn.functional.normalize": ("input p dim eps", 1),
    "torch.nn.functional.glu": ("input dim", -1),
    "torch.diff": ("input n dim", -1),
    "torch.roll": ("input shifts dims", None),
    "torch.narrow": ("input dim start length", None),
    "torch.split": ("input split_size_or_sections dim", 0),
    "torch.split_with_sizes": ("input split_sizes dim", 0),
    "torch.chunk": ("input chunks dim", 0),
}
_DROPPING: dict[str, tuple[str, int | None]] = {
    "torch.select": ("input dim index", None),
    "torch.unbind": ("input dim", 0),
    "torch.kthvalue": ("input k dim keepdim", -1),
    "torch.mode": ("input dim keepdim", -1),
}


def _along(given: Given) -> Choice:
    name = given.op.function
    signature, default = _KEEPING.get(name) or _DROPPING[name]
    bound = given.bind(signature)
    value, axis = given.alone(bound.get("input"))
    dim = bound.get("dim", bound.get("dims", default))
    if dim is None:
        raise Defer
    axes = _axes(dim, given.types[value].ndim)
    if axis in axes:
        raise Defer
    dropped = name in _DROPPING and bound.get("keepdim", False) is not True
    return given.choice({value: Shard(axis)}, Shard(_moved(axis, axes) if dropped else axis))


def _joining(given: Given) -> Choice:
    """``cat`` and ``stack``."""
    stacks = given.op.function == "torch.stack"
    bound = given.bind("tensors dim")
    values, dim = operands(given.op), bound.get("dim", 0)
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise Defer
    axes = {layout.dim for value in values if isinstance(layout := given.layout(value), Shard)}
    ndim = given.types[values[0]].ndim
    if len(axes) != 1 or any(given.types[value].ndim != ndim for value in values):
        raise Defer
    axis = axes.pop()
    there = dim % (ndim + stacks)
    if not stacks and there == axis:
        raise Defer
    return given.choice(dict.fromkeys(values, Shard(axis)), Shard(axis + (stacks and there <= axis)))


def _normalised(given: Given) -> Choice:
    """``layer_norm`` and ``rms_norm``, over last axes that every rank has whole."""
    bound = given.bind("input normalized_shape weight bias eps")
    value, axis = given.alone(bound.get("input"))
    shape = bound.get("normalized_shape")
    if not isinstance(shape, tuple) or axis >= given.types[value].ndim - len(shape):
        raise Defer
    return given.choice({value: Shard(axis)}, Shard(axis))


def _masked_mean(given: Given) -> Choice:
    value, axis = given.alone(given.op.args[0])
    if axis < 2:
        raise Defer
    return given.choice({value: Shard(axis)}, Shard(axis - 1))


def _as_it_is(given: Given) -> Choice:
    value, axis = given.alone(given.op.args[0])
    return given.choice({value: Shard(axis)}, Shard(axis))


# --- shapes ------------------------------------------------------------------------------------------------------


def _permuted(given: Given) -> Choice:
    bound = given.bind("input dims")
    value, axis = given.alone(bound.get("input"))
    dims = _axes(bound.get("dims"), given.types[value].ndim)
    return given.choice({value: Shard(axis)}, Shard(dims.index(axis)))


def _transposed(given: Given) -> Choice:
    value, axis = given.alone(given.op.args[0])
    ndim = given.types[value].ndim
    if given.op.function == "torch.t":
        one, other = (0, 1) if ndim == 2 else (0, 0)
    else:
        bound = given.bind("input dim0 dim1")
        (one,), (other,) = _axes(bound.get("dim0"), ndim), _axes(bound.get("dim1"), ndim)
    return given.choice({value: Shard(axis)}, Shard({one: other, other: one}.get(axis, axis)))


def _unsqueezed(given: Given) -> Choice:
    bound = given.bind("input dim")
    value, axis = given.alone(bound.get("input"))
    (dim,) = _axes(bound.get("dim"), given.types[value].ndim + 1)
    return given.choice({value: Shard(axis)}, Shard(axis + (dim <= axis)))


def _squeezed(given: Given) -> Choice:
    bound = given.bind("input dim")
    value, axis = given.alone(bound.get("input"))
    if bound.get("dim") is None:
        raise Defer  # a part may be one element wide where the whole is not
    shape = given.types[value].shape
    axes = _axes(bound["dim"], len(shape))
    if axis in axes:
        raise Defer
    return given.choice({value: Shard(axis)}, Shard(_moved(axis, [dim for dim in axes if shape[dim] == 1])))


def _flattened(given: Given) -> Choice:
    bound = given.bind("input start_dim end_dim")
    value, axis = given.alone(bound.get("input"))
    ndim = given.types[value].ndim
    (start,), (end,) = _axes(bound.get("start_dim", 0), ndim), _axes(bound.get("end_dim", -1), ndim)
    if start < axis <= end:
        raise Defer  # stretches of an inner axis do not stay together
    size = given.types[value].shape[axis]
    if axis == start and (not isinstance(size, int) or size % given.ranks):
        raise Defer
    return given.choice({value: Shard(axis)}, Shard(axis if axis <= start else axis - (end - start)))


def _unflattened(given: Given) -> Choice:
    """``unflatten`` into as many stretches as there are ranks; or of an axis that is whole."""
    bound = given.bind("input dim sizes")
    value, axis = given.alone(bound.get("input"))
    (dim,) = _axes(bound.get("dim"), given.types[value].ndim)
    sizes = bound.get("sizes")
    if not isinstance(sizes, tuple) or not all(isinstance(size, int) for size in sizes):
        raise Defer
    if axis != dim:
        return given.choice({value: Shard(axis)}, Shard(axis if axis < dim else axis + len(sizes) - 1))
    size = given.types[value].shape[axis]
    inner = math.prod(part for part in sizes[1:] if isinstance(part, int))
    if sizes[0] != -1 or not isinstance(size, int) or size % (given.ranks * inner):
        raise Defer  # the first of them is for each rank to find out
    return given.choice({value: Shard(axis)}, Shard(axis))


# --- products ----------------------------------------------------------------------------------------------------


def _contracted(given: Given, labels: Sequence[tuple[int, str]], out: str) -> Choice:
    """Operands whose axes have labels: equal ones belong together, and those that are not in ``out`` are summed."""
    parts = {own[layout.dim] for value, own in labels if isinstance(layout := given.layout(value), Shard)}
    if len(parts) != 1 or len({value for value, _ in labels}) != len(labels):
        raise Defer
    label = parts.pop()
    needs: dict[int, Layout] = {}
    for value, own in labels:
        if own.count(label) > 1:
            raise Defer
        if label in own and given.types[value].shape[own.index(label)] != 1:
            needs[value] = Shard(own.index(label))
    return given.choice(needs, Shard(out.index(label)) if label in out else Partial(Joined.SUM))


def _matmul(given: Given) -> Choice:
    bound = given.bind("input other")
    one, other = bound.get("input"), bound.get("other")
    if not isinstance(one, Ref) or not isinstance(other, Ref):
        raise Defer
    left, right = given.types[one.id].ndim, given.types[other.id].ndim
    batch = "abcdefgh"
    first = "k" if left == 1 else batch[len(batch) - (left - 2) :] + "ik"
    second = "k" if right == 1 else batch[len(batch) - (right - 2) :] + "kj"
    leading = max(first[:-2], second[:-2], key=len)
    out = leading + ("i" if left > 1 else "") + ("j" if right > 1 else "")
    return _contracted(given, [(one.id, first), (other.id, second)], out)


_FIXED = {
    "torch.bmm": ("input mat2", "bij", "bjk", "bik"),
    "torch.mm": ("input mat2", "ij", "jk", "ik"),
    "torch.mv": ("input vec", "ij", "j", "i"),
    "torch.dot": ("input tensor", "i", "i", ""),
    "torch.outer": ("input vec2", "i", "j", "ij"),
}


def _fixed(given: Given) -> Choice:
    signature, left, right, out = _FIXED[given.op.function]
    one, other = map(given.bind(signature).get, signature.split())
    if not isinstance(one, Ref) or not isinstance(other, Ref):
        raise Defer
    return _contracted(given, [(one.id, left), (other.id, right)], out)


def _linear(given: Given) -> Choice:
    """``linear`` of what every rank has whole along the last axis."""
    value, axis = given.alone(given.op.args[0])
    if axis == given.types[value].ndim - 1:
        raise Defer
    return given.choice({value: Shard(axis)}, Shard(axis))


def _einsum(given: Given) -> Choice:
    equation, rest = given.op.args[:1], given.op.args[1:]
    if not equation or not isinstance(equation[0], str) or given.op.kwargs:
        raise Defer
    if "->" not in equation[0] or "." in equation[0]:
        raise Defer
    inputs, out = equation[0].replace(" ", "").split("->")
    labels: list[tuple[int, str]] = []
    for own, part in zip(inputs.split(","), rest, strict=True):
        if not isinstance(part, Ref):
            raise Defer
        labels.append((part.id, own))
    return _contracted(given, labels, out)


_RULES: dict[str, Callable[[Given], Choice]] = {
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys((*_KEEPING, *_DROPPING), _along),
    **dict.fromkeys(("torch.cat", "torch.stack"), _joining),
    **dict.fromkeys(("torch.nn.functional.layer_norm", "torch.nn.functional.rms_norm"), _normalised),
    **dict.fromkeys(_FIXED, _fixed),
    **dict.fromkeys(("torch.Tensor.to", "torch.Tensor.type_as"), _as_another),
    "torch.permute": _permuted,
    "torch.transpose": _transposed,
    "torch.t": _transposed,
    "torch.unsqueeze": _unsqueezed,
    "torch.squeeze": _squeezed,
    "torch.flatten": _flattened,
    "torch.unflatten": _unflattened,
    "torch.matmul": _matmul,
    "torch.linalg.matmul": _matmul,
    "torch.nn.functional.linear": _linear,
    "torch.einsum": _einsum,
    "tracelens.leaf": _as_it_is,
    "tracelens.masked_mean": _masked_mean,
}
RULED = frozenset(_RULES)
"""The functions with a rule of their own; those that work element by element need none."""
