"""The typing rules by function, and whether a call that has none mixes positions.

A call *mixes* positions unless it treats every position for itself and keeps the axis ``P`` whole, so that leaving out
or adding padding changes nothing for the real tokens:

* pointwise functions do not mix, and neither do functions along other axes, transposes, ``squeeze`` and ``unsqueeze``,
  and patterns in which ``p`` stays an axis of its own;
* reducing ``P``, working along it (soft-max, cumsum, sort, flip, roll, cat), contracting it, merging it with other axes
  and indexing it mix; ``x[:, :]``, ``x[:, -1]`` and ``x[:, -1:]`` do not (padding is on the left, so the last position
  is every row's last token), and token selectors do not;
* reducing, indexing or merging the batch axis while ``P`` stays mixes: the rows' positions do not line up;
* so does an axis ``P`` that meets the number that it is in this prompt: its positions are then addressed by number;
* the keys ``S`` that attention looks at are positions too, except where they only add up (sums, soft-max, contraction,
  maximum): whether keys that are padding have no weight there, as in a pattern, is for :mod:`tracelens.ir.keys` to say;
* whatever is not known not to mix, mixes.
"""

from __future__ import annotations

from tracelens.errors import DtypeError, ShapeError, UnsupportedFunctionError
from tracelens.ir import dims as sizes
from tracelens.ir import (
    rules_axis,
    rules_einops,
    rules_join,
    rules_lens,
    rules_pointwise,
    rules_product,
    rules_reduce,
    rules_shape,
)
from tracelens.ir.abstract import (
    AbstractArg,
    AbstractKwargs,
    Defer,
    Inferred,
    Misfit,
    Sizing,
    axes_of,
    bind,
    carries,
    has_positions,
    rows_differ,
    tensors_in,
    touching,
)
from tracelens.ir.functions import Function, Kind
from tracelens.ir.rules_pointwise import Rule, pointwise
from tracelens.ir.types import DType, TensorType

Args = tuple[AbstractArg, ...]


def leaf(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    """``tracelens.leaf(value)``: the same value, from which derivatives start."""
    match args:
        case (TensorType() as value,) if not kwargs:
            pass
        case _:
            raise UnsupportedFunctionError("leaf takes a value, and nothing else")
    if not value.dtype.is_floating:
        raise DtypeError(f"leaf({value}): there are derivatives with respect to floating values only")
    return sizing.done(value, False)


def masked_mean(sizing: Sizing, name: str, args: Args, kwargs: AbstractKwargs) -> Inferred:
    """``tracelens.masked_mean(value, mask)``: [B, P, ...] and bool [B, P] to [B, ...]."""
    match args:
        case (TensorType() as value, TensorType() as mask) if not kwargs:
            pass
        case _:
            raise UnsupportedFunctionError("masked_mean takes a value and a mask, and nothing else")
    problem = f"masked_mean({value}, {mask})"
    if not value.dtype.is_floating or mask.dtype is not DType.BOOL:
        raise DtypeError(f"{problem}: the value must be floating and the mask bool")
    if value.ndim < 2 or value.shape[:2] != (sizes.B, sizes.P):
        raise ShapeError(
            f"{problem}: the value's first axes must be B and P",
            instead="value.transpose(...) so that they are",
        )
    if mask.ndim != 2 or not all(map(sizing.equal, value.shape[:2], mask.shape)):
        raise ShapeError(f"{problem}: the mask must be [B,P], one truth for each position of each row")
    # A mask with numbers for axes was made for exactly these rows and positions.
    return sizing.done(TensorType(value.dtype, (value.shape[0], *value.shape[2:])), mask.shape[1] != sizes.P)


RULES: dict[str, Rule] = {
    **rules_pointwise.RULES,
    **rules_reduce.RULES,
    **rules_axis.RULES,
    **rules_join.RULES,
    **rules_shape.RULES,
    **rules_product.RULES,
    **rules_einops.RULES,
    **rules_lens.RULES,
    "tracelens.leaf": leaf,
    "tracelens.masked_mean": masked_mean,
}


def rule_for(function: Function) -> Rule | None:
    """The hand-written rule, if there is one."""
    found = RULES.get(function.name)
    if found is None and function.kind is Kind.POINTWISE:
        return pointwise
    return found


# --- functions without a rule: only whether they mix -------------------------------------------------------------

# The axis that a function works along: its signature up to there, and the default.
_ALONG: dict[str, tuple[str, int]] = {
    f"torch.{name}": (signature, default)
    for names, signature, default in (
        ("scatter scatter_add scatter_reduce", "input dim index src * reduce value include_self", 0),
        ("index_add index_copy", "input dim index source * alpha", 0),
        ("index_fill", "input dim index value", 0),
        ("gather", "input dim index * sparse_grad", 0),
        ("take_along_dim", "input indices dim", 0),
        ("diff", "input n dim prepend append", -1),
        ("renorm", "input p dim maxnorm", 0),
        ("nn.functional.softmin", "input dim _stacklevel dtype", 0),
        ("nn.functional.normalize", "input p dim eps", 1),
        ("nn.functional.glu", "input dim", -1),
        ("softmax log_softmax", "input dim dtype", 0),
        ("cumsum cumprod sum mean prod", "input dim keepdim * dtype", 0),
        ("amax amin all any argmax argmin max min", "input dim keepdim", 0),
        ("linalg.vector_norm", "input ord dim keepdim * dtype", 0),
        ("norm", "input p dim keepdim * dtype", 0),
        ("linalg.vecdot linalg.cross", "input other * dim", -1),
        ("cross", "input other dim", 0),
        ("quantile", "input q dim keepdim * interpolation", 0),
        ("select_scatter", "input src dim index", 0),
        ("slice_scatter", "input src dim start end step", 0),
        ("Tensor.unfold", "input dim size step", 0),
        ("fft.fft fft.ifft fft.rfft fft.irfft fft.hfft fft.ihfft", "input n dim norm", -1),
        ("cumulative_trapezoid trapezoid", "input x * dim dx", -1),
    )
    for name in names.split()
}

# How many of the last axes a function works on; two unless named here.
_TRAILING: dict[str, int] = {
    "torch.searchsorted": 1,
    "torch.nn.functional.one_hot": 0,
    "torch.nn.functional.pairwise_distance": 1,
    "torch.nn.functional.linear": 1,
    "torch.view_as_real": 0,
    "torch.view_as_complex": 1,
}


def mixes(function: Function, args: Args, kwargs: AbstractKwargs) -> bool:
    """Does a call that has been typed on meta tensors mix positions?  ``True`` where that is not known."""
    values = tensors_in((*args, *(value for _, value in kwargs)))
    if not has_positions(values):
        return False
    try:
        if function.kind is Kind.AXIS or function.kind is Kind.REDUCTION:
            return _mixes_along(function.name, args, kwargs, values)
        if function.kind is Kind.TRAILING:
            return _mixes_trailing(function.name, args, values)
    except (Defer, Misfit):
        return True
    return True


def _mixes_along(name: str, args: Args, kwargs: AbstractKwargs, values: list[TensorType]) -> bool:
    if name not in _ALONG:
        return True
    signature, default = _ALONG[name]
    bound = bind(signature, args, kwargs)
    first = values[0]
    given = bound.get("dim")
    if given is None:
        if "dim" in bound or name not in _HAS_DEFAULT:
            return True
        given = default
    axes = axes_of(given, first.ndim)
    for value in values:
        if value.ndim == first.ndim:
            # On the other axes, operands must belong together position by position.
            for axis, (own, other) in enumerate(zip(first.shape, value.shape, strict=True)):
                if axis not in axes and own != other and _matters(own, other):
                    return True
            if touching(value.shape, axes):
                return True
        elif has_positions([value]):
            return True
    return touching(first.shape, axes)


_HAS_DEFAULT = frozenset(name for name, (_, default) in _ALONG.items() if default != 0)


def _matters(*pair: sizes.Dim) -> bool:
    return any(carries(dim, symbol) for dim in pair for symbol in sizes.SYMBOLS)


def _mixes_trailing(name: str, args: Args, values: list[TensorType]) -> bool:
    if name == "torch.nn.functional.pad":
        pad = args[1] if len(args) > 1 else None
        count = (len(pad) + 1) // 2 if isinstance(pad, tuple) and len(args) == 2 else values[0].ndim
    elif name in ("torch.nn.functional.layer_norm", "torch.nn.functional.rms_norm"):
        wanted = args[1] if len(args) > 1 else None
        count = len(wanted) if isinstance(wanted, tuple) else values[0].ndim
    elif name in ("torch.isin", "torch.bucketize", "torch.nn.functional.embedding"):
        return True  # their rules know better
    else:
        count = _TRAILING.get(name, 2)
    if any(touching(value.shape, range(max(value.ndim - count, 0), value.ndim)) for value in values):
        return True
    leading = [TensorType(value.dtype, value.shape[: max(value.ndim - count, 0)]) for value in values]
    with_positions = [value for value in leading if has_positions([value])]
    if any(value.shape != with_positions[0].shape for value in with_positions):
        return True
    return rows_differ([(value, range(-value.ndim, 0)) for value in leading])
