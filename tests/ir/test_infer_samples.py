"""One call of every function that has no rule of its own: typed as torch types it, or not in the catalogue."""

from __future__ import annotations

import warnings

import pytest
import torch

from tracelens.errors import ForbiddenFunctionError
from tracelens.ir import dims
from tracelens.ir.abstract import AbstractArg
from tracelens.ir.functions import FUNCTIONS, Kind
from tracelens.ir.infer import dtype_of, infer_call, resolve, torch_dtype
from tracelens.ir.rules import rule_for
from tracelens.ir.types import TensorType, parse_type

SIZES = {"B": 2, "P": 4}

X = "f32[B,P,6]"
SQUARE = "f32[B,P,3,3]"
LABELS = "i64[B,P]"
PAIR = (X, X)
IMAGE1, IMAGE2, IMAGE3 = "f32[B,4,8]", "f32[B,4,8,8]", "f32[B,4,8,8,8]"

_OF_A_SQUARE = """
    cholesky cholesky_ex cond det eig eigh eigvals eigvalsh inv inv_ex ldl_factor ldl_factor_ex lu lu_factor
    lu_factor_ex matrix_exp matrix_norm matrix_rank pinv qr slogdet svd svdvals diagonal"""
# name -> arguments; a trailing dict is keyword arguments
_SAMPLES: dict[str, dict[str, tuple[object, ...]]] = {
    "torch": {
        "cross": ("f32[B,P,3]", "f32[B,P,3]", -1),
        "cumulative_trapezoid": (X,),
        "diff": (X,),
        "index_add": (X, -1, "i64[2]", "f32[B,P,2]"),
        "index_copy": (X, -1, "i64[2]", "f32[B,P,2]"),
        "index_fill": (X, -1, "i64[2]", 0.5),
        "index_reduce": (X, -1, "i64[2]", "f32[B,P,2]", "amax"),
        "index_put": (X, ("i64[2]",), "f32[P,6]"),
        "renorm": (X, 2, 0, 1.0),
        "scatter": (X, -1, "i64[B,P,2]", 0.5),
        "scatter_add": (X, -1, "i64[B,P,2]", "f32[B,P,2]"),
        "scatter_reduce": (X, -1, "i64[B,P,2]", "f32[B,P,2]", "sum"),
        "select_scatter": (X, "f32[B,P]", -1, 2),
        "slice_scatter": (X, "f32[B,P,2]", -1, 0, 2),
        "take_along_dim": (X, "i64[B,P,2]", -1),
        "tensor_split": (X, 4, -1),
        "trapezoid": (X,),
        "cdist": PAIR,
        "cholesky": (SQUARE,),
        "cholesky_inverse": (SQUARE,),
        "cholesky_solve": ("f32[B,P,3,2]", SQUARE),
        "det": (SQUARE,),
        "inverse": (SQUARE,),
        "logdet": (SQUARE,),
        "lu_solve": ("f32[B,P,3,2]", SQUARE, "i32[B,P,3]"),
        "lu_unpack": (SQUARE, "i32[B,P,3]"),
        "matrix_exp": (SQUARE,),
        "matrix_power": (SQUARE, 3),
        "pinverse": (SQUARE,),
        "qr": (SQUARE,),
        "searchsorted": (X, "f32[B,P,2]"),
        "slogdet": (SQUARE,),
        "svd": (SQUARE,),
        "tril": (X,),
        "triu": (X,),
        "view_as_complex": ("f32[B,P,2]",),
        "view_as_real": ("c64[B,P]",),
        "chain_matmul": ("f32[P,6]", "f32[6,5]"),
        "kron": ("f32[P,6]", "f32[6,5]"),
        "affine_grid_generator": ("f32[B,2,3]", (2, 1, 4, 4), False),
        "batch_norm": (IMAGE1, "f32[4]", "f32[4]", "f32[4]", "f32[4]", False, 0.1, 1e-5, False),
        "binary_cross_entropy_with_logits": (X, X),
        "block_diag": ("f32[P,6]", "f32[2,2]"),
        "cartesian_prod": ("f32[P]", "f32[3]"),
        "column_stack": (("f32[P]", "f32[P]"),),
        "constant_pad_nd": (X, (1, 1), 0.0),
        "conv1d": (IMAGE1, "f32[3,4,3]"),
        "conv2d": (IMAGE2, "f32[3,4,3,3]"),
        "conv3d": (IMAGE3, "f32[3,4,3,3,3]"),
        "conv_tbc": ("f32[8,B,4]", "f32[3,4,5]", "f32[5]"),
        "conv_transpose1d": (IMAGE1, "f32[4,3,3]"),
        "conv_transpose2d": (IMAGE2, "f32[4,3,3,3]"),
        "conv_transpose3d": (IMAGE3, "f32[4,3,3,3,3]"),
        "cosine_embedding_loss": ("f32[B,6]", "f32[B,6]", "f32[B]"),
        "diag": ("f32[P]",),
        "diag_embed": (X,),
        "diagflat": ("f32[P]",),
        "diagonal": (X, 0, 1, 2),
        "diagonal_scatter": (SQUARE, "f32[B,P,3]", 0, 2, 3),
        "dist": PAIR,
        "dsplit": (X, 2),
        "dstack": (PAIR,),
        "frobenius_norm": (X, (1, 2)),
        "gradient": ("f32[8]",),
        "grid_sampler": (IMAGE2, "f32[B,5,5,2]", 0, 0, False),
        "group_norm": (IMAGE1, 2),
        "hinge_embedding_loss": PAIR,
        "histc": (X, 10),
        "hsplit": ("f32[B,6]", 3),
        "hstack": (PAIR,),
        "instance_norm": (IMAGE1, None, None, None, None, True, 0.1, 1e-5, False),
        "kl_div": PAIR,
        "margin_ranking_loss": ("f32[B]", "f32[B]", "f32[B]"),
        "masked_scatter": (X, "bool[B,P,6]", X),
        "meshgrid": ("f32[P]", "f32[3]", {"indexing": "ij"}),
        "norm_except_dim": (X, 2, 0),
        "nuclear_norm": ("f32[P,6]",),
        "poisson_nll_loss": (X, X, True, False, 1e-8, 1),
        "put": (X, "i64[2]", "f32[2]"),
        "repeat_interleave": (X, 2, -1),
        "rot90": (X,),
        "stft": ("f32[B,64]", 16, 4, 16, "f32[16]", {"return_complex": True}),
        "take": (X, "i64[2]"),
        "trace": ("f32[P,6]",),
        "triangular_solve": ("f32[B,P,3,2]", SQUARE),
        "triplet_margin_loss": (X, X, X),
        "unravel_index": ("i64[P]", (3, 4)),
        "vsplit": ("f32[6,B]", 3),
        "vstack": (PAIR,),
    },
    "torch.Tensor": {
        "unfold": (X, 2, 2, 1),
        "new_full": (X, (2, 3), 1.0),
        "new_ones": (X, (2, 3)),
        "new_zeros": (X, (2, 3)),
        "sum_to_size": (X, (1, 6)),
    },
    "torch.linalg": {
        **dict.fromkeys(_OF_A_SQUARE.split(), (SQUARE,)),
        "cross": ("f32[B,P,3]", "f32[B,P,3]"),
        "vecdot": PAIR,
        "householder_product": (SQUARE, "f32[B,P,3]"),
        "ldl_solve": (SQUARE, "i32[B,P,3]", "f32[B,P,3,2]"),
        "lu_solve": (SQUARE, "i32[B,P,3]", "f32[B,P,3,2]"),
        "matrix_power": (SQUARE, 3),
        "multi_dot": (("f32[P,6]", "f32[6,5]", "f32[5,4]"),),
        "norm": (X, 2, -1),
        "solve": (SQUARE, "f32[B,P,3,2]"),
        "solve_ex": (SQUARE, "f32[B,P,3,2]"),
        "solve_triangular": (SQUARE, "f32[B,P,3,2]", {"upper": True}),
        "tensorinv": ("f32[4,6,8,3]", 2),
        "tensorsolve": ("f32[2,3,6]", "f32[2,3]"),
        "vander": ("f32[B,5]",),
    },
    "torch.fft": {
        **dict.fromkeys(("fft", "ifft", "rfft", "irfft", "hfft", "ihfft", "fftn", "fftshift", "rfftn"), (X,)),
        **dict.fromkeys(("fft2", "hfft2", "ifft2", "ihfft2", "irfft2", "rfft2"), (X,)),
        **dict.fromkeys(("hfftn", "ifftn", "ifftshift", "ihfftn", "irfftn"), (X,)),
    },
    "torch.nn.functional": {
        "softmin": (X, -1),
        "one_hot": (LABELS, 10),
        "pad": (X, (1, 1)),
        "pairwise_distance": PAIR,
        "bilinear": (X, X, "f32[5,6,6]"),
        "scaled_dot_product_attention": ("f32[B,2,P,8]", "f32[B,2,P,8]", "f32[B,2,P,8]"),
        "affine_grid": ("f32[B,2,3]", (2, 1, 4, 4), False),
        "batch_norm": (IMAGE1, "f32[4]", "f32[4]"),
        "binary_cross_entropy": PAIR,
        "binary_cross_entropy_with_logits": PAIR,
        "channel_shuffle": (IMAGE2, 2),
        "conv1d": (IMAGE1, "f32[3,4,3]"),
        "conv2d": (IMAGE2, "f32[3,4,3,3]"),
        "conv3d": (IMAGE3, "f32[3,4,3,3,3]"),
        "conv_tbc": ("f32[8,B,4]", "f32[3,4,5]", "f32[5]"),
        "conv_transpose1d": (IMAGE1, "f32[4,3,3]"),
        "conv_transpose2d": (IMAGE2, "f32[4,3,3,3]"),
        "conv_transpose3d": (IMAGE3, "f32[4,3,3,3,3]"),
        "cosine_embedding_loss": ("f32[B,6]", "f32[B,6]", "f32[B]"),
        "cross_entropy": ("f32[P,6]", "i64[P]"),
        "fold": ("f32[B,16,9]", (4, 4), (2, 2)),
        "grid_sample": (IMAGE2, "f32[B,5,5,2]", {"align_corners": False}),
        "group_norm": (IMAGE1, 2),
        "hinge_embedding_loss": PAIR,
        "huber_loss": PAIR,
        "instance_norm": (IMAGE1,),
        "interpolate": (IMAGE1, {"scale_factor": 2.0}),
        "kl_div": (X, X, {"reduction": "batchmean"}),
        "l1_loss": PAIR,
        "local_response_norm": (IMAGE1, 2),
        "margin_ranking_loss": ("f32[B]", "f32[B]", "f32[B]"),
        "mse_loss": PAIR,
        "multi_margin_loss": ("f32[P,6]", "i64[P]"),
        "multilabel_margin_loss": ("f32[P,6]", "i64[P,6]"),
        "multilabel_soft_margin_loss": ("f32[P,6]", "f32[P,6]"),
        "nll_loss": ("f32[P,6]", "i64[P]"),
        "pdist": ("f32[5,6]",),
        "pixel_shuffle": (IMAGE2, 2),
        "pixel_unshuffle": (IMAGE2, 2),
        "poisson_nll_loss": PAIR,
        "prelu": (IMAGE1, "f32[4]"),
        "smooth_l1_loss": PAIR,
        "soft_margin_loss": PAIR,
        "triplet_margin_loss": (X, X, X),
        "unfold": (IMAGE2, (2, 2)),
        **{
            f"{pool}{rank}d": (image, *sizes)
            for rank, image in ((1, IMAGE1), (2, IMAGE2), (3, IMAGE3))
            for pool, sizes in (
                ("adaptive_avg_pool", (2,)), ("adaptive_max_pool", (2,)), ("avg_pool", (2,)), ("max_pool", (2,)),
                ("lp_pool", (2.0, 2)),
            )
        },
    },
}  # fmt: skip
SAMPLES = {f"{prefix}.{name}": args for prefix, names in _SAMPLES.items() for name, args in names.items()}


def typed(arg: object) -> AbstractArg:
    if isinstance(arg, tuple):
        return tuple(typed(part) for part in arg)
    return parse_type(arg) if isinstance(arg, str) and "[" in arg else arg


def concrete(arg: AbstractArg) -> object:
    if isinstance(arg, TensorType):
        shape, dtype = arg.sizes(SIZES), torch_dtype(arg.dtype)
        if not arg.dtype.is_floating:
            return torch.ones(shape, dtype=dtype)
        value = torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
        if arg.ndim >= 2 and shape[-1] == shape[-2]:
            value = value @ value.mT + torch.eye(shape[-1], dtype=dtype)  # symmetric and not singular
        return value
    return tuple(concrete(part) for part in arg) if isinstance(arg, tuple) else arg


# The oldest torch that is supported lacks some functions of the catalogue, which was made with 2.13.
OLDER = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)


def test_there_is_a_sample_of_every_function_without_a_rule() -> None:
    ruled = {name for name, entry in FUNCTIONS.items() if entry.kind is Kind.POINTWISE or rule_for(entry)}
    assert SAMPLES.keys() == FUNCTIONS.keys() - ruled


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_typed_as_torch_types_them(name: str) -> None:
    args = SAMPLES[name]
    named = args[-1] if isinstance(args[-1], dict) else {}
    plain = tuple(typed(arg) for arg in (args[:-1] if named else args))
    try:
        function = resolve(name)
    except ForbiddenFunctionError:
        if not OLDER:
            raise
        pytest.skip(f"torch {torch.__version__} has no {name}; from 2.13 on none may be missing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = function(*(concrete(arg) for arg in plain), **named)
    single = isinstance(result, torch.Tensor)
    truth = [(dtype_of(part.dtype), tuple(part.shape)) for part in ([result] if single else result)]
    inferred = infer_call(name, plain, tuple(named.items()), SIZES)
    assert [(type_.dtype, type_.sizes(SIZES)) for type_ in inferred.types] == truth
    assert (inferred.fields is None) == single
    if not single:
        assert inferred.fields in ((), getattr(result, "_fields", None) or FUNCTIONS[name].results)
    others = {**SIZES, **{s: n for s, n in (("B", 3), ("P", 5)) if s not in inferred.pins}}
    assert all(size >= 0 for type_ in inferred.types for size in type_.sizes(others))
    assert all(not inferred.pins & dims.symbols(dim) for type_ in inferred.types for dim in type_.shape)
