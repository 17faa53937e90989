"""gpt-oss: heads that may look at nothing (sinks), and a mixture of experts in every layer."""

from typing import Any

from torch import Tensor

from tracelens.backends.architectures.llama import LLAMA
from tracelens.backends.architectures.mixtral import MIXTRAL
from tracelens.backends.base import Family, RowsView, Side, Tap, expert_taps


def _chosen(router: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The weights and the experts of each token [B * P, k], as the router makes them of its logits [B * P, E]."""
    best, experts = logits.topk(router.top_k, dim=-1)
    return best.softmax(-1), experts


GPT_OSS = Family(
    "gpt-oss",
    ("gpt_oss",),
    LLAMA.layers,
    {
        **{name: tap for name, tap in LLAMA.taps.items() if name in MIXTRAL.taps},
        "mlp_in": Tap("mlp", Side.IN, "hidden_states"),
        # The block forgets the logits that its router returns.
        "router_logits": Tap("mlp.router", Side.OUT, 0, RowsView(), _chosen),
        "expert_index": Tap("mlp.router", Side.OUT, 2, RowsView()),
        "expert_weights": Tap("mlp.router", Side.OUT, 1, RowsView()),
        **expert_taps("mlp.experts"),
        # Beside the weights of the experts, for which nobody asks.
        "mlp_out": Tap("mlp", Side.OUT, 0),
        "mlp_add": Tap("mlp", Side.OUT, 0),
    },
    MIXTRAL.absent,
    widths=MIXTRAL.widths,
    # Rounded to the model's dtype before it is normed.
    wide_softmax=False,
    sinks=True,
)
