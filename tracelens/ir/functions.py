"""The catalogue: every function that a graph can hold, by its canonical qualified name.

A function is here because it is public, pure (no side effect, no randomness) and its result's shape follows from its
arguments alone. Everything else is in :mod:`tracelens.ir.refused`, with a reason. Kinds say how positions are treated
and so which rule decides whether a call mixes them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """How a function treats the axes of its operands."""

    POINTWISE = "element by element, after broadcasting"
    REDUCTION = "reduces the axes named by dim, or all"
    AXIS = "works along the axis named by dim; all others are carried along"
    TRAILING = "works on the last axes; the leading ones are carried along"
    SHAPE = "moves elements, changes none"
    PRODUCT = "multiplies and contracts"
    PATTERN = "the axes are named by a pattern"
    GENERAL = "anything; taken to mix positions wherever there are some"


@dataclass(frozen=True, slots=True)
class Function:
    """One entry of the catalogue; ``results`` names the fields where there are several results."""

    name: str
    kind: Kind
    results: tuple[str, ...] | None = None


# One table per kind: a prefix, then the names below it.
_TABLES: dict[Kind, dict[str, str]] = {
    Kind.POINTWISE: {
        "torch": """
            abs acos acosh add addcdiv addcmul angle asin asinh atan atan2 atanh bitwise_and bitwise_left_shift
            bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil celu clamp clamp_max clamp_min clone complex
            conj conj_physical copysign cos cosh deg2rad detach digamma div eq erf erfc erfinv exp exp2 expm1
            float_power floor floor_divide fmax fmin fmod frac frexp full_like gcd ge gt heaviside hypot i0 igamma
            igammac imag isclose isfinite isinf isnan isneginf isposinf isreal lcm ldexp le lerp lgamma log log10
            log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt masked_fill
            maximum minimum mul mvlgamma nan_to_num ne neg nextafter ones_like polar polygamma positive pow rad2deg
            real reciprocal relu remainder resolve_conj resolve_neg round rsqrt rsub selu sgn sigmoid sign signbit
            sin sinc sinh sqrt square sub tan tanh threshold trunc where xlogy zeros_like""",
        "torch.Tensor": "contiguous to type_as",
        "torch.nn.functional": """
            celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 selu
            silu softplus softshrink softsign tanhshrink threshold""",
        "torch.special": """
            airy_ai bessel_j0 bessel_j1 bessel_y0 bessel_y1 chebyshev_polynomial_t chebyshev_polynomial_u
            chebyshev_polynomial_v chebyshev_polynomial_w digamma entr erf erfc erfcx erfinv exp2 expit expm1
            gammainc gammaincc gammaln hermite_polynomial_h hermite_polynomial_he i0 i0e i1 i1e
            laguerre_polynomial_l legendre_polynomial_p log1p log_ndtr logit modified_bessel_i0 modified_bessel_i1
            modified_bessel_k0 modified_bessel_k1 multigammaln ndtr ndtri polygamma psi round
            scaled_modified_bessel_k0 scaled_modified_bessel_k1 shifted_chebyshev_polynomial_t
            shifted_chebyshev_polynomial_u shifted_chebyshev_polynomial_v shifted_chebyshev_polynomial_w sinc
            spherical_bessel_j0 xlog1py xlogy zeta""",
    },
    Kind.REDUCTION: {
        "torch": """
            all amax amin aminmax any argmax argmin count_nonzero logsumexp max mean median min nanmean nanmedian
            nanquantile nansum norm prod quantile std std_mean sum var var_mean""",
        "torch.linalg": "vector_norm",
        "torch.special": "logsumexp",
    },
    Kind.AXIS: {
        "torch": """
            argsort cat chunk cross cummax cummin cumprod cumsum cumulative_trapezoid diff flip fliplr flipud gather
            index_add index_copy index_fill index_reduce index_select kthvalue log_softmax logcumsumexp mode msort
            narrow narrow_copy renorm roll scatter scatter_add scatter_reduce select select_scatter slice_scatter
            softmax sort split split_with_sizes stack take_along_dim tensor_split topk trapezoid unbind
            unsafe_chunk unsafe_split unsafe_split_with_sizes""",
        "torch.Tensor": "unfold",
        "torch.nn.functional": "cosine_similarity glu normalize softmin",
        "torch.special": "log_softmax softmax",
        "torch.linalg": "cross vecdot",
        "torch.fft": "fft ifft rfft irfft hfft ihfft",
    },
    Kind.TRAILING: {
        "torch": """
            cdist cholesky cholesky_inverse cholesky_solve det inverse logdet lu_solve lu_unpack matrix_exp matrix_power
            pinverse qr searchsorted slogdet svd tril triu view_as_complex view_as_real bucketize isin""",
        "torch.nn.functional": "embedding layer_norm linear one_hot pad pairwise_distance rms_norm",
        "torch.linalg": """
            cholesky cholesky_ex cond det eig eigh eigvals eigvalsh householder_product inv inv_ex ldl_factor
            ldl_factor_ex ldl_solve lu lu_factor lu_factor_ex lu_solve matrix_exp matrix_norm matrix_power
            matrix_rank pinv qr slogdet solve solve_ex solve_triangular svd svdvals""",
    },
    Kind.SHAPE: {
        "torch": """
            adjoint atleast_1d atleast_2d atleast_3d broadcast_tensors broadcast_to flatten movedim permute ravel
            reshape squeeze t tile transpose unflatten unsqueeze""",
        "torch.Tensor": "expand expand_as repeat reshape_as view view_as",
    },
    Kind.PRODUCT: {
        "torch": """
            addbmm addmm addmv addr baddbmm bmm chain_matmul dot inner kron matmul mm mv outer tensordot vdot""",
        "torch.linalg": "matmul multi_dot",
        "torch.nn.functional": "bilinear scaled_dot_product_attention",
    },
    Kind.PATTERN: {
        "torch": "einsum",
        "einops": "einsum rearrange reduce repeat",
    },
    Kind.GENERAL: {
        "torch": """
            affine_grid_generator batch_norm binary_cross_entropy_with_logits block_diag cartesian_prod
            column_stack constant_pad_nd conv1d conv2d conv3d conv_tbc conv_transpose1d
            conv_transpose2d conv_transpose3d cosine_embedding_loss diag diag_embed
            diagflat diagonal diagonal_scatter dist dsplit dstack frobenius_norm gradient grid_sampler group_norm
            hinge_embedding_loss histc hsplit hstack index_put instance_norm kl_div margin_ranking_loss masked_scatter
            meshgrid norm_except_dim nuclear_norm poisson_nll_loss put repeat_interleave rot90 stft
            take trace triangular_solve triplet_margin_loss unravel_index vsplit vstack""",
        "torch.Tensor": "new_full new_ones new_zeros sum_to_size",
        "torch.linalg": "diagonal norm tensorinv tensorsolve vander",
        "torch.fft": "fft2 fftn fftshift hfft2 hfftn ifft2 ifftn ifftshift ihfft2 ihfftn irfft2 irfftn rfft2 rfftn",
        "torch.nn.functional": """
            adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
            adaptive_max_pool3d affine_grid avg_pool1d avg_pool2d avg_pool3d batch_norm binary_cross_entropy
            binary_cross_entropy_with_logits channel_shuffle conv1d conv2d conv3d conv_tbc conv_transpose1d
            conv_transpose2d conv_transpose3d cosine_embedding_loss cross_entropy fold
            grid_sample group_norm hinge_embedding_loss huber_loss instance_norm interpolate kl_div l1_loss
            local_response_norm lp_pool1d lp_pool2d lp_pool3d margin_ranking_loss max_pool1d max_pool2d max_pool3d
            mse_loss multi_margin_loss multilabel_margin_loss multilabel_soft_margin_loss nll_loss pdist
            pixel_shuffle pixel_unshuffle poisson_nll_loss prelu smooth_l1_loss soft_margin_loss
            triplet_margin_loss unfold""",
        "tracelens": "leaf lens lens_distance lens_joined lens_part lens_targets masked_mean",
    },
}

_SORTED = ("values", "indices")
_RESULTS: dict[str, tuple[str, ...]] = {
    "torch.aminmax": ("min", "max"),
    "torch.frexp": ("mantissa", "exponent"),
    **dict.fromkeys(
        [
            f"torch.{name}"
            for name in (
                "cummax",
                "cummin",
                "kthvalue",
                "max",
                "median",
                "min",
                "mode",
                "nanmedian",
                "sort",
                "topk",
            )
        ],
        _SORTED,
    ),
    "torch.qr": ("Q", "R"),
    "torch.svd": ("U", "S", "V"),
    "torch.slogdet": ("sign", "logabsdet"),
    "torch.triangular_solve": ("solution", "cloned_coefficient"),
    "torch.lu_unpack": ("P", "L", "U"),
    "torch.linalg.cholesky_ex": ("L", "info"),
    "torch.linalg.eig": ("eigenvalues", "eigenvectors"),
    "torch.linalg.eigh": ("eigenvalues", "eigenvectors"),
    "torch.linalg.inv_ex": ("inverse", "info"),
    "torch.linalg.ldl_factor": ("LD", "pivots"),
    "torch.linalg.ldl_factor_ex": ("LD", "pivots", "info"),
    "torch.linalg.lu": ("P", "L", "U"),
    "torch.linalg.lu_factor": ("LU", "pivots"),
    "torch.linalg.lu_factor_ex": ("LU", "pivots", "info"),
    "torch.linalg.qr": ("Q", "R"),
    "torch.linalg.slogdet": ("sign", "logabsdet"),
    "torch.linalg.solve_ex": ("result", "info"),
    "torch.linalg.svd": ("U", "S", "Vh"),
}

# Names that some supported torch does not have; elsewhere an entry that does not resolve is a defect.
NOT_IN_EVERY_TORCH: frozenset[str] = frozenset({"torch.chain_matmul", "torch.triangular_solve"})

# Other spellings of an entry, with the same arguments in the same order.
_SYNONYMS = """
    absolute=abs arccos=acos arccosh=acosh arcsin=asin arcsinh=asinh arctan=atan arctan2=atan2 arctanh=atanh
    clip=clamp concat=cat concatenate=cat divide=div true_divide=div fix=trunc ger=outer greater=gt
    greater_equal=ge less=lt less_equal=le moveaxis=movedim multiply=mul negative=neg not_equal=ne
    row_stack=vstack subtract=sub swapaxes=transpose swapdims=transpose trapz=trapezoid"""
SYNONYMS: dict[str, str] = {
    **{f"torch.{old}": f"torch.{new}" for old, new in (pair.split("=") for pair in _SYNONYMS.split())},
    "torch.nn.functional.softmax": "torch.softmax",
    "torch.nn.functional.log_softmax": "torch.log_softmax",
    "torch.hardshrink": "torch.nn.functional.hardshrink",
    "torch.prelu": "torch.nn.functional.prelu",
    "torch.rms_norm": "torch.nn.functional.rms_norm",
}

# Python's operators, as methods of a tensor. The reflected ones take their operands the other way round.
OPERATORS: dict[str, str] = {
    "add": "add",
    "sub": "sub",
    "mul": "mul",
    "truediv": "div",
    "div": "div",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "pow": "pow",
    "matmul": "matmul",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "lshift": "bitwise_left_shift",
    "rshift": "bitwise_right_shift",
}
UNARY_OPERATORS: dict[str, str] = {"neg": "neg", "pos": "positive", "abs": "abs", "invert": "bitwise_not"}
COMPARISONS: tuple[str, ...] = ("eq", "ne", "lt", "le", "gt", "ge")

# Methods that change the dtype, all of them ``.to(dtype)``.
CONVERSIONS: dict[str, str] = {
    "double": "float64",
    "float": "float32",
    "half": "float16",
    "bfloat16": "bfloat16",
    "long": "int64",
    "int": "int32",
    "short": "int16",
    "char": "int8",
    "byte": "uint8",
    "bool": "bool",
    "cfloat": "complex64",
    "cdouble": "complex128",
}


def _entries() -> Iterator[Function]:
    for kind, prefixes in _TABLES.items():
        for prefix, names in prefixes.items():
            for name in names.split():
                qualified = f"{prefix}.{name}"
                yield Function(qualified, kind, _RESULTS.get(qualified))


FUNCTIONS: dict[str, Function] = {entry.name: entry for entry in _entries()}


def nearest(name: str) -> tuple[str, ...]:
    """The supported names that ``name`` is likely a misspelling of, best first.

    >>> nearest("torch.sofmax")[0]
    'torch.softmax'
    """
    last = name.rpartition(".")[2]
    by_last: dict[str, list[str]] = {}
    for known in FUNCTIONS:
        by_last.setdefault(known.rpartition(".")[2], []).append(known)
    near = difflib.get_close_matches(last, by_last, n=3, cutoff=0.7)
    found = [known for word in near for known in by_last[word]]
    return tuple(sorted(found, key=lambda known: -difflib.SequenceMatcher(None, known, name).ratio())[:3])
