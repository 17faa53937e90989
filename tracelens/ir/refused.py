"""The functions that a graph cannot hold, each with a reason and with what to write instead."""

from __future__ import annotations

import re
from enum import Enum


class Reason(Enum):
    """Why a function is refused."""

    IN_PLACE = "changes its argument"
    RANDOM = "is random"
    DYNAMIC_SHAPE = "has a result whose shape depends on the data"
    DEVICE = "is about devices, and the plan decides where values live"
    HOST_READ = "needs the numbers before the model has run"
    AUTOGRAD = "is about autograd"
    QUESTION = "asks about a tensor instead of computing one"
    LOW_LEVEL = "is about how a tensor is stored"
    NO_SHAPE_RULE = "has no rule that gives its shape before the run"
    MODULE = "is a whole module"
    INDEXING = "is indexing, which is an operation of its own"


Refusal = tuple[Reason, str | None]

APPLY = "tl.apply(function, value, like=value) runs any Python function on the real tensors"
_IN_PLACE = "the same function without the underscore: a value is never changed in place"
_RANDOM = "draw the random numbers before the trace and use the tensor as a constant"
_DATA = "tl.where(condition, value, other) keeps the shape; or .save() the value and select after the block"
_DEVICE = "leave devices out; .save(device=...) says where a saved tensor ends up"
_HOST = ".save() the value and read it after the block"
_TABLE = "torch.nn.functional.embedding(index, table) for rows, torch.index_select(tensor, axis, index)"
_GRADIENT = "tl.grad(loss, site) gives the gradient of one number with respect to a site that was read"
_QUESTION = "value.shape, value.dtype and value.ndim are known while recording"

# Reason -> hint -> names. Names without a dot are both ``torch.<name>`` and ``torch.Tensor.<name>``.
_TABLES: dict[Reason, dict[str, str]] = {
    Reason.IN_PLACE: {
        _IN_PLACE: "torch.Tensor.module_load torch.batch_norm_update_stats",
        "an assignment to a site: site[...] = value": "torch.Tensor.__setitem__",
    },
    Reason.RANDOM: {
        _RANDOM: """bernoulli binomial multinomial normal poisson rrelu torch.nn.functional.rrelu
            torch.rand_like torch.randn_like torch.randint_like torch.rand torch.randn torch.randint torch.randperm
            torch.nn.functional.gumbel_softmax torch.pca_lowrank torch.svd_lowrank
            torch.nn.functional.fractional_max_pool2d torch.nn.functional.fractional_max_pool3d
            torch.nn.functional.fractional_max_pool2d_with_indices
            torch.nn.functional.fractional_max_pool3d_with_indices
            torch.lobpcg""",
        "module.eval() before the trace, or the trace without dropout": """
            dropout alpha_dropout feature_dropout feature_alpha_dropout torch.native_dropout
            torch.nn.functional.dropout torch.nn.functional.alpha_dropout torch.nn.functional.feature_alpha_dropout
            torch.nn.functional.dropout1d torch.nn.functional.dropout2d torch.nn.functional.dropout3d""",
        "torch.zeros_like(value)": "torch.empty_like torch.Tensor.new_empty torch.Tensor.new_empty_strided",
    },
    Reason.DYNAMIC_SHAPE: {
        _DATA: "nonzero masked_select argwhere unique unique_consecutive bincount",
        "torch.nn.functional.one_hot with num_classes": "torch.nn.functional.embedding_bag torch.embedding_bag",
        "nonzero_static is not supported either; " + _DATA: "nonzero_static",
    },
    Reason.DEVICE: {
        _DEVICE: """torch.Tensor.cuda torch.Tensor.cpu torch.Tensor.xpu torch.Tensor.ipu torch.Tensor.mtia
            get_device torch.Tensor.pin_memory torch.Tensor.is_pinned torch.Tensor.record_stream""",
    },
    Reason.HOST_READ: {
        _HOST: """torch.Tensor.item torch.Tensor.tolist torch.Tensor.numpy torch.Tensor.__array__
            torch.Tensor.__array_wrap__ torch.Tensor.__format__ torch.Tensor.__repr__ torch.Tensor.__float__
            torch.Tensor.__int__ torch.Tensor.__long__ torch.Tensor.__index__ torch.Tensor.__complex__
            torch.Tensor.__dlpack__ torch.Tensor.__dlpack_device__ torch.Tensor.__deepcopy__
            torch.Tensor.__reduce_ex__ torch.Tensor.__setstate__ torch.Tensor.share_memory_""",
        "tl.where(condition, a, b)": "torch.Tensor.__bool__ torch.Tensor.__nonzero__ is_nonzero",
        "(a == b).all(), or torch.isclose(a, b).all()": "equal allclose",
        "(value == item).any()": "torch.Tensor.__contains__",
        "value.shape[0]": "torch.Tensor.__len__",
    },
    Reason.AUTOGRAD: {
        _GRADIENT: """torch.Tensor.backward torch.Tensor.register_hook torch.Tensor.retain_grad
            torch.Tensor.register_post_accumulate_grad_hook torch.Tensor.requires_grad_ torch.Tensor.detach_""",
    },
    Reason.QUESTION: {
        _QUESTION: """torch.Tensor.dim torch.Tensor.ndimension torch.Tensor.nelement numel torch.Tensor.size
            torch.Tensor.type torch.Tensor.stride torch.Tensor.storage_offset torch.Tensor.element_size
            torch.Tensor.dim_order torch.Tensor.sparse_dim torch.Tensor.dense_dim is_same_size torch.Tensor.is_set_to
            torch.Tensor.is_shared torch.Tensor.is_contiguous torch.Tensor.has_names torch.result_type
            is_complex is_conj is_distributed is_floating_point is_inference is_neg is_signed
            torch.Tensor.is_coalesced""",
    },
    Reason.INDEXING: {
        _TABLE: "torch.Tensor.__getitem__",
        "value.flip(0)": "torch.Tensor.__reversed__",
    },
    Reason.MODULE: {
        APPLY: """torch.nn.functional.multi_head_attention_forward torch.gru torch.gru_cell torch.lstm
            torch.lstm_cell torch.rnn_relu torch.rnn_relu_cell torch.rnn_tanh torch.rnn_tanh_cell torch.autocast
            torch.nn.functional.triplet_margin_with_distance_loss""",
    },
    Reason.NO_SHAPE_RULE: {
        APPLY: """combinations corrcoef cov istft torch.nn.functional.gaussian_nll_loss
            lu geqrf orgqr ormqr histogram torch.histogramdd torch.linalg.lstsq torch.ctc_loss
            torch.nn.functional.ctc_loss torch.hash_tensor torch.Tensor.hash_tensor
            torch.nn.functional.linear_cross_entropy
            torch.nn.functional.max_unpool1d torch.nn.functional.max_unpool2d torch.nn.functional.max_unpool3d
            torch.nn.functional.adaptive_max_pool1d_with_indices torch.nn.functional.adaptive_max_pool2d_with_indices
            torch.nn.functional.adaptive_max_pool3d_with_indices torch.nn.functional.max_pool1d_with_indices
            torch.nn.functional.max_pool2d_with_indices torch.nn.functional.max_pool3d_with_indices""",
    },
    Reason.LOW_LEVEL: {
        "torch.matmul on dense tensors": "smm sspaddmm torch.hspmm torch.spmm torch.saddmm",
        "reshape, view or expand": """torch.Tensor.as_strided as_strided_scatter torch.as_strided
            torch.Tensor.resize torch.Tensor.resize_as torch.Tensor.set_ slice_inverse""",
        "the dtype's own functions": "dequantize int_repr qscheme torch.Tensor.chalf",
        "the function of torch.nn.functional": """torch.embedding torch.layer_norm torch.adaptive_max_pool1d
            torch.max_pool1d torch.max_pool2d torch.max_pool3d""",
        "a value's transpose: .mT or .transpose(-2, -1)": "torch.Tensor.H.__get__",
        APPLY: """torch.Tensor.const_data_ptr torch.Tensor.data_ptr torch.Tensor.storage torch.Tensor.storage_type
            torch.Tensor.untyped_storage torch.Tensor.to_dense torch.Tensor.to_mkldnn torch.Tensor.to_sparse
            torch.Tensor.sparse_mask torch.Tensor.coalesce torch.Tensor.indices torch.Tensor.values
            torch.Tensor.col_indices torch.Tensor.ccol_indices torch.Tensor.crow_indices torch.Tensor.row_indices
            torch.Tensor.index torch.convolution torch.native_norm torch.native_layer_norm torch.native_group_norm
            torch.native_batch_norm torch.nn.functional.native_channel_shuffle torch.choose_qparams_optimized
            torch.grid_sampler_2d torch.grid_sampler_3d torch.max_pool1d_with_indices torch.Tensor.to_padded_tensor
            torch.sym_float torch.sym_ite torch.sym_max torch.sym_min torch.sym_not torch.sym_sqrt torch.sym_sum
            torch.nn.functional._sym_int""",
    },
}

# Groups of names that follow a pattern, tried in order after the tables.
_PATTERNS: tuple[tuple[str, Reason, str | None], ...] = (
    (r"torch\.Tensor\.__i\w+__", Reason.IN_PLACE, _IN_PLACE),
    (r"torch\.Tensor\.device\.__get__", Reason.DEVICE, _DEVICE),
    (r"torch\.Tensor\.(data|grad\w*|_grad\w*|requires_grad|retains_grad|is_leaf|output_nr|_backward_hooks|volatile"
     r"|_post_accumulate_grad_hooks)\.__get__", Reason.AUTOGRAD, _GRADIENT),
    (r"torch\.Tensor\.(?!T|mT|mH|H|real|imag)\w+\.__get__", Reason.QUESTION, _QUESTION),
    (r"torch\.Tensor\._\w*[a-z]", Reason.LOW_LEVEL, APPLY),
    (r"torch\.Tensor\._(dim[IV]|\w+_)", Reason.LOW_LEVEL, APPLY),
    (r"torch(\.\w+)*\.[a-z]\w*(?<!_)_", Reason.IN_PLACE, _IN_PLACE),
    (r"torch\.\w+_copy", Reason.LOW_LEVEL, "the same function without _copy"),
    (r"torch(\.Tensor|\.nn\.functional)?\.(q_\w+|quantize\w*|quantized_\w+|fake_quantize\w*|fbgemm_\w+|fused_moving\w+"
     r"|miopen_\w+|batch_norm_\w+|cudnn_\w+|mkldnn_\w+)", Reason.LOW_LEVEL, APPLY),
)  # fmt: skip


def _entries() -> dict[str, Refusal]:
    found: dict[str, Refusal] = {}
    for reason, hints in _TABLES.items():
        for hint, names in hints.items():
            for name in names.split():
                spellings = (name,) if "." in name else (f"torch.{name}", f"torch.Tensor.{name}")
                found.update(dict.fromkeys(spellings, (reason, hint)))
    return found


REFUSED: dict[str, Refusal] = _entries()
_COMPILED = tuple((re.compile(pattern), reason, hint) for pattern, reason, hint in _PATTERNS)


def refusal(name: str) -> Refusal | None:
    """Why a function is refused, by its qualified name, and what to write instead; ``None`` if it is not known.

    >>> refusal("torch.Tensor.add_")[0]
    <Reason.IN_PLACE: 'changes its argument'>
    """
    known = REFUSED.get(name)
    if known is not None:
        return known
    for pattern, reason, hint in _COMPILED:
        if pattern.fullmatch(name):
            return reason, hint
    return None
