"""OLMoE: norms before sublayers, as in Llama, queries and keys normed as in OLMo-2, experts as in Qwen3-MoE."""

from tracelens.backends.architectures.llama import LLAMA
from tracelens.backends.architectures.mixtral import MIXTRAL
from tracelens.backends.architectures.olmo2 import OLMO2
from tracelens.backends.architectures.qwen3_moe import QWEN3_MOE
from tracelens.backends.base import Family

_OF_OLMO2 = ("q_normed", "k_normed")
_OF_QWEN3 = (
    "mlp_in",
    "router_logits",
    "expert_index",
    "expert_weights",
    "expert_act",
    "expert_out",
    "mlp_out",
)

OLMOE = Family(
    "OLMoE",
    ("olmoe",),
    LLAMA.layers,
    {
        **{name: tap for name, tap in LLAMA.taps.items() if name in MIXTRAL.taps},
        **{name: OLMO2.taps[name] for name in _OF_OLMO2},
        **{name: QWEN3_MOE.taps[name] for name in _OF_QWEN3},
    },
    {name: reason for name, reason in MIXTRAL.absent.items() if name not in _OF_OLMO2},
    widths={**QWEN3_MOE.widths, "N": "intermediate_size"},
    refusals={
        "clip_qkv": "what its projections and norms return is clipped in place, so that q_normed, k_normed and v are "
        "not what attention goes on with"
    },
)
