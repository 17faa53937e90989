"""Mixtral: the block of Llama, where the MLP of every layer is a mixture of experts."""

from typing import Any

from torch import Tensor

from tracelens.backends.architectures.absences import NO_EXPERTS
from tracelens.backends.architectures.llama import MISTRAL
from tracelens.backends.base import Family, RowsView, Side, Tap, expert_taps
from tracelens.ir.types import DType

_NEURONS = ("mlp_pre", "mlp_up", "mlp_act")


def _chosen(router: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The weights and the experts of each token [B * P, k], as the router makes them of its logits [B * P, E]."""
    weights, experts = logits.float().softmax(-1).topk(router.top_k, dim=-1)
    return weights / weights.sum(-1, keepdim=True), experts


MIXTRAL = Family(
    "Mixtral",
    ("mixtral",),
    MISTRAL.layers,
    {
        **{name: tap for name, tap in MISTRAL.taps.items() if name not in _NEURONS},
        "mlp_in": Tap("mlp", Side.IN, "hidden_states"),
        # The block forgets the logits that its router returns.
        "router_logits": Tap("mlp.gate", Side.OUT, 0, RowsView(), _chosen),
        "expert_index": Tap("mlp.gate", Side.OUT, 2, RowsView()),
        # Left in the dtype of the softmax.
        "expert_weights": Tap("mlp.gate", Side.OUT, 1, RowsView(), dtype=DType.FLOAT32),
        **expert_taps("mlp.experts"),
        "mlp_out": Tap("mlp", Side.OUT),
    },
    {
        **{name: reason for name, reason in MISTRAL.absent.items() if name not in NO_EXPERTS},
        **dict.fromkeys(
            _NEURONS,
            "each layer is a mixture of experts: experts work on the rows of the tokens that come to them, so there is "
            "no [B, P, neurons]",
        ),
    },
    widths={"E": "num_local_experts", "k": "num_experts_per_tok", "N": "intermediate_size"},
)
