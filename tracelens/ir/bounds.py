"""What functions do to numbers: which keep them finite, zero, positive or small, which only move them."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod

from tracelens.ir.functions import FUNCTIONS, Kind
from tracelens.ir.ops import Call, Ref
from tracelens.ir.padding import Held


def _torch(names: str) -> frozenset[str]:
    return frozenset(f"torch.{name}" for name in names.split())


SUMS = _torch("sum nansum")
EXTREMES = _torch("amax")
LOG_SUMS = _torch("logsumexp special.logsumexp")
SOFTMAX = _torch("softmax special.softmax")
LOG_SOFTMAX = _torch("log_softmax special.log_softmax")

# From finite numbers these make finite ones, as far as their dtype reaches.
FINITE = _torch("""
    abs add sub mul neg positive square tanh sigmoid erf sin cos atan asinh relu nn.functional.relu nn.functional.gelu
    nn.functional.silu nn.functional.softplus nn.functional.leaky_relu nn.functional.layer_norm nn.functional.rms_norm
    nn.functional.linear nn.functional.embedding clamp clamp_min clamp_max where masked_fill maximum minimum detach
    clone Tensor.contiguous Tensor.to Tensor.type_as round floor ceil trunc frac sign xlogy special.xlogy
    special.entr zeros_like ones_like full_like softmax special.softmax log_softmax special.log_softmax sum mean amax
    amin max min std var cumsum matmul bmm mm mv dot einsum inner outer tensordot linalg.matmul linalg.vector_norm norm
    cat stack select narrow gather index_select unbind split chunk flip roll sort topk lerp addcmul logsumexp
    """) | {"einops.einsum", "einops.reduce", "tracelens.leaf", "tracelens.masked_mean"}  # fmt: skip
# A derivative at zero, or at the lowest number, is finite too.
SMOOTH = FINITE - _torch("xlogy special.xlogy special.entr linalg.vector_norm norm std var") | _torch(
    "div exp"
)

POSITIVE = _torch("""
    abs square exp exp2 relu nn.functional.relu nn.functional.relu6 nn.functional.softplus sigmoid sqrt cosh softmax
    special.softmax var std linalg.vector_norm norm erfc ones_like zeros_like
    """)  # fmt: skip
KEEPS_SIGN = _torch("""
    add mul div Tensor.to Tensor.type_as Tensor.contiguous detach clone positive maximum minimum floor ceil round trunc
    tanh log1p expm1 asinh atan erf pow sum mean nansum amax amin max min cumsum matmul bmm mm mv dot einsum inner
    tensordot linalg.matmul cat stack select narrow gather index_select unbind split chunk flip roll sort topk
    """) | {"einops.einsum", "tracelens.leaf"}  # fmt: skip
# Nothing grows larger in these.
KEEPS_REACH = _torch("""
    abs neg positive detach clone relu nn.functional.relu Tensor.to Tensor.type_as Tensor.contiguous where masked_fill
    maximum minimum mean amax amin max min cat stack select narrow gather index_select unbind split chunk flip roll sort
    topk
    """) | {"tracelens.leaf"}  # fmt: skip
# What is zero for one key after the other, along other axes than the keys', is zero.
KEEPS_ZERO = _torch("""
    sum mean nansum nanmean amax amin max min median nanmedian cumsum cumprod prod norm linalg.vector_norm std var
    count_nonzero any all nn.functional.normalize
    """) | {"tracelens.masked_mean"}  # fmt: skip
# Every element of the (first) result is one of the first argument.
SELECTS = _torch("""
    amax amin max min median mode kthvalue cummax cummin sort msort topk flip fliplr flipud roll select narrow
    narrow_copy gather index_select take_along_dim unbind split split_with_sizes chunk unsafe_split unsafe_chunk
    unsafe_split_with_sizes tensor_split cat stack any all
    """) | {"einops.rearrange", "einops.repeat", "tracelens.leaf"}  # fmt: skip
WITH_INDICES = _torch("max min median mode kthvalue cummax cummin sort topk")
# nan goes through these as nan.
LINEAR = _torch(
    "mul div neg add sub Tensor.to Tensor.type_as Tensor.contiguous clone detach positive abs square"
)
FILLED = _torch("zeros_like ones_like full_like")
AND, OR = _torch("logical_and bitwise_and"), _torch("logical_or bitwise_or")
XLOGY = _torch("xlogy special.xlogy special.xlog1py")
PRODUCTS = _torch("matmul bmm mm mv dot inner tensordot einsum linalg.matmul") | {"einops.einsum"}


def moves(name: str) -> bool:
    return FUNCTIONS[name].kind is Kind.SHAPE or name in ("einops.rearrange", "einops.repeat")


def is_product(name: str) -> bool:
    return FUNCTIONS[name].kind is Kind.PRODUCT or name in (
        "torch.einsum",
        "einops.einsum",
        "torch.nn.functional.linear",
    )


def is_positive(op: Call, known: Sequence[Held]) -> bool:
    """Is no number of the result below zero, given what is ``known`` of the operands?"""
    name = op.function
    if name in POSITIVE or (name == "torch.maximum" and any(held.positive for held in known)):
        return True
    if name in ("torch.clamp", "torch.clamp_min", "torch.clamp_max"):
        named = dict(op.kwargs)
        low = op.args[1] if len(op.args) > 1 else named.get("min")
        high = op.args[2] if len(op.args) > 2 else named.get("max")
        above = name != "torch.clamp_max" and isinstance(low, int | float) and low >= 0
        return all(held.positive for held in known) or (
            above and (high is None or (isinstance(high, int | float) and high >= 0))
        )
    keeps = name in KEEPS_SIGN or name in ("torch.where", "torch.masked_fill") or moves(name)
    return keeps and all(held.positive for held in known)


def reach_of(op: Call, known: Sequence[Held]) -> float:
    """How large numbers of the result may be, given what is ``known`` of the operands."""
    name, reaches = op.function, [held.reach for held in known]
    if name in SOFTMAX:
        return 1.0
    if name in LOG_SOFTMAX:
        return 2 * reaches[0] + 100
    if name in ("torch.mean", "torch.amax", "torch.amin", "torch.max", "torch.min") or moves(name):
        return max(reaches, default=inf)
    if op.kwargs and name not in KEEPS_REACH:
        return inf
    if name in ("torch.add", "torch.sub"):
        return sum(reaches)
    if name == "torch.mul":
        return prod(reaches) if inf not in reaches else inf
    if name == "torch.div" and len(op.args) == 2 and not isinstance(op.args[1], Ref):
        return reaches[0] / reaches[1] if reaches[1] else inf
    return max(reaches, default=inf) if name in KEEPS_REACH else inf
