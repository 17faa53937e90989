"""One spelling per call: however it was written, the graph holds it under one name with one order of arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from tracelens.errors import (
    DynamicShapeError,
    InPlaceError,
    RandomFunctionError,
    TracelensError,
    UnsupportedFunctionError,
    ValueBranchError,
)
from tracelens.ir.functions import (
    COMPARISONS,
    CONVERSIONS,
    FUNCTIONS,
    OPERATORS,
    SYNONYMS,
    UNARY_OPERATORS,
    nearest,
)
from tracelens.ir.refused import Reason, refusal
from tracelens.ir.types import DType

Spelt = tuple[str, tuple[object, ...], dict[str, object]]

# Methods that take a shape as separate numbers too.
_SHAPED = "view reshape permute expand repeat tile flip new_zeros new_ones sum_to_size unflatten"
_VARARGS = frozenset(f"torch.Tensor.{name}" for name in _SHAPED.split())
# Functions that take several tensors one by one, or as one list.
_TENSORS = frozenset({"torch.einsum", "torch.meshgrid", "torch.broadcast_tensors", "torch.block_diag"})
DROPOUTS = frozenset(
    f"torch.nn.functional.{name}"
    for name in ("dropout", "alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d")
)
GETTERS = {
    "T": "torch.t",
    "mT": "torch.transpose",
    "mH": "torch.adjoint",
    "real": "torch.real",
    "imag": "torch.imag",
}


def supported_spelling(raw: str) -> str | None:
    """The catalogue's name for a function or method, ``None`` if there is none."""
    if raw in FUNCTIONS:
        return raw
    if raw in SYNONYMS:
        return SYNONYMS[raw]
    if raw in DROPOUTS:
        return raw
    if not raw.startswith("torch.Tensor."):
        return None
    method = raw.removeprefix("torch.Tensor.")
    if method.startswith("__") and method.endswith("__"):
        word = method[2:-2]
        if word in COMPARISONS:
            return f"torch.{word}"
        plain = OPERATORS.get(word) or UNARY_OPERATORS.get(word)
        if plain is None and word.startswith("r"):
            plain = OPERATORS.get(word[1:])
        return None if plain is None else f"torch.{plain}"
    if method in CONVERSIONS:
        return "torch.Tensor.to"
    if method.endswith(".__get__"):
        return GETTERS.get(method.removesuffix(".__get__"))
    namesake = f"torch.{method}"
    return namesake if namesake in FUNCTIONS else SYNONYMS.get(namesake)


def spelt(raw: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Spelt:
    """The canonical call.  Raises a named error where an argument makes the function something a graph cannot hold."""
    name = supported_spelling(raw)
    if name is None:
        raise refused(raw)
    named = {key: value for key, value in kwargs.items() if key not in ("_stacklevel", "memory_format")}
    if named.get("out", ...) is None:
        del named["out"]
    if raw in DROPOUTS:
        return _dropout(raw, args, named)
    method = raw.removeprefix("torch.Tensor.") if raw.startswith("torch.Tensor.") else ""
    if method.startswith("__r") and method[3:-2] in OPERATORS:
        args = (args[1], args[0])
    elif method in CONVERSIONS:
        return name, (args[0], DType(CONVERSIONS[method])), {}
    elif method == "to":
        return _to(args, named)
    elif method == "mT.__get__":
        return name, (args[0], -2, -1), {}
    elif method == "where":
        args = (args[1], args[0], *args[2:])
    elif method == "polygamma":
        args = (args[1], args[0])
    elif raw in _VARARGS:
        args = _collected(args, fixed=2 if method == "unflatten" else 1)
    if raw in _TENSORS:
        head = 1 if raw == "torch.einsum" else 0
        if len(args) == head + 1 and isinstance(args[head], list | tuple):
            args = (*args[:head], *cast("Sequence[object]", args[head]))
    if raw in ("torch.nn.functional.softmax", "torch.nn.functional.log_softmax"):
        args, named = _softmax(raw, args, named)
    elif name == "torch.Tensor.view" and not any(
        isinstance(part, DType) for part in (*args, *named.values())
    ):
        name = "torch.reshape"  # a value has no strides, so there is nothing that only one of the two can do
        named = {"shape" if key == "size" else key: value for key, value in named.items()}
    refuse_arguments(name, args, named)
    return name, tuple(_frozen(arg) for arg in args), {key: _frozen(named[key]) for key in sorted(named)}


def _frozen(arg: object) -> object:
    if type(arg) in (list, tuple):
        return tuple(_frozen(part) for part in cast("Sequence[object]", arg))
    return arg


def _collected(args: tuple[object, ...], fixed: int) -> tuple[object, ...]:
    if len(args) <= fixed or (len(args) == fixed + 1 and isinstance(args[fixed], list | tuple | DType)):
        return args
    return (*args[:fixed], args[fixed:])


def _dropout(raw: str, args: tuple[object, ...], named: dict[str, object]) -> Spelt:
    order = ("input", "p", "training", "inplace")
    bound = {"training": True, **dict(zip(order, args, strict=False)), **named}
    if bound["training"]:
        raise refused(raw)
    return "torch.Tensor.contiguous", (bound["input"],), {}


def _softmax(
    raw: str, args: tuple[object, ...], named: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    bound = {**dict(zip(("input", "dim", "_stacklevel", "dtype"), args, strict=False)), **named}
    dim, dtype = bound.get("dim"), bound.get("dtype")
    if dim is None:
        raise UnsupportedFunctionError(f"{raw} needs dim: without it torch guesses", instead="dim=-1")
    return (bound["input"], dim), {} if dtype is None else {"dtype": dtype}


def _to(args: tuple[object, ...], named: dict[str, object]) -> Spelt:
    wanted = [arg for arg in (*args[1:], named.get("dtype")) if arg is not None and not isinstance(arg, bool)]
    named = {key: value for key, value in named.items() if key not in ("dtype", "copy", "non_blocking")}
    if not named and len(wanted) == 1:
        if isinstance(wanted[0], DType):
            return "torch.Tensor.to", (args[0], wanted[0]), {}
        if hasattr(wanted[0], "shape"):
            return "torch.Tensor.type_as", (args[0], wanted[0]), {}
    if named.keys() == {"other"} and not wanted:
        return "torch.Tensor.type_as", (args[0], named["other"]), {}
    if not named and not wanted:
        return "torch.Tensor.contiguous", args[:1], {}
    raise UnsupportedFunctionError(
        "Tensor.to with a device: the plan decides where values live",
        instead="value.to(dtype); .save(device=...) says where a saved tensor ends up",
    )


# --- arguments that make a pure function impure ------------------------------------------------------------------

# name -> where the argument stands if it is given by position
_DROPOUT_P = {"torch.nn.functional.scaled_dot_product_attention": 4}
_TRAINING = {"torch.nn.functional.batch_norm": 5, "torch.batch_norm": 5}
_INPUT_STATISTICS = {"torch.nn.functional.instance_norm": 5, "torch.instance_norm": 5}
_ACTIVATIONS = "celu elu hardsigmoid hardswish hardtanh leaky_relu mish relu relu6 selu silu threshold"
_INPLACE_LAST = frozenset(f"torch.nn.functional.{name}" for name in _ACTIVATIONS.split())
_MAX_NORM = {"torch.nn.functional.embedding": 3}


def _argument(
    name: str, keyword: str, places: Mapping[str, int], args: Sequence[object], named: Mapping[str, object]
) -> object:
    if name not in places:
        return None
    place = places[name]
    return args[place] if len(args) > place else named.get(keyword)


def refuse_arguments(name: str, args: Sequence[object], named: Mapping[str, object]) -> None:
    """Raises a named error for arguments that write into a tensor, draw numbers or name a device."""
    short = name.removeprefix("torch.").removeprefix("nn.functional.")
    if named.get("out") is not None:
        raise InPlaceError(
            f"{short}(out=...) writes into a tensor", instead="the result is a value of its own"
        )
    given = args[1:] if name in _INPLACE_LAST else ()
    if named.get("inplace") or (given and given[-1] is True):
        raise InPlaceError(
            f"{short}(inplace=True): activations are never changed in place", instead="inplace=False"
        )
    if named.get("generator") is not None:
        raise RandomFunctionError(
            f"{short} draws random numbers", instead="draw the numbers before the trace"
        )
    if named.get("device") is not None or named.get("pin_memory"):
        raise UnsupportedFunctionError(
            f"{short}(device=...): {Reason.DEVICE.value}", instead="leave the device out"
        )
    if _argument(name, "dropout_p", _DROPOUT_P, args, named) not in (None, 0, 0.0):
        raise RandomFunctionError(f"{short} with dropout is random", instead="dropout_p=0.0")
    statistics = (args[1] if len(args) > 1 else None) if args else None
    running = statistics is not None or named.get("running_mean") is not None
    if running and (
        _argument(name, "training", _TRAINING, args, named)
        or _argument(name, "use_input_stats", _INPUT_STATISTICS, args, named)
    ):
        raise InPlaceError(
            f"{short} in training updates its running statistics", instead="the module in eval mode"
        )
    if _argument(name, "max_norm", _MAX_NORM, args, named) is not None:
        raise InPlaceError(f"{short}(max_norm=...) changes the embedding table")
    if name == "torch.where" and len(args) + len(named) < 3:
        raise DynamicShapeError(
            "where(condition) alone gives a shape that depends on the data", instead="where(c, a, b)"
        )
    if name == "torch.nn.functional.one_hot":
        classes = args[1] if len(args) > 1 else named.get("num_classes", -1)
        if classes == -1:
            raise DynamicShapeError("one_hot without num_classes gives a shape that depends on the data")


_ERRORS: dict[Reason, type[TracelensError]] = {
    Reason.IN_PLACE: InPlaceError,
    Reason.RANDOM: RandomFunctionError,
    Reason.DYNAMIC_SHAPE: DynamicShapeError,
    Reason.HOST_READ: ValueBranchError,
}


def refused(raw: str) -> TracelensError:
    """The named error for a function that a graph cannot hold."""
    found = refusal(raw)
    if found is None:
        candidates = nearest(raw)
        hint = f"did you mean {', '.join(candidates)}?" if candidates else None
        return UnsupportedFunctionError(f"{raw} cannot be recorded in a graph", instead=hint)
    reason, hint = found
    return _ERRORS.get(reason, UnsupportedFunctionError)(f"{raw} {reason.value}", instead=hint)
