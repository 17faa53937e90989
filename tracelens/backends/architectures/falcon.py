"""Falcon in its three layouts: one sublayer after the other, or side by side behind one norm or two."""

from dataclasses import replace
from typing import Any

from tracelens.backends.architectures.absences import PARALLEL
from tracelens.backends.architectures.bloom import BLOOM
from tracelens.backends.base import Carry, Family, HeadsView, Side, Tap


def _kv_heads(config: Any) -> int:
    return 1 if config.multi_query and not config.new_decoder_architecture else config.num_kv_heads


def _two_norms(config: Any) -> bool:
    return config.new_decoder_architecture and config.num_ln_in_parallel_attn in (None, 2)


# For each kv head its queries, its key and its value: head by head, in groups, or (one kv head) side by side.
_FUSED = ("H", "K", "K")

_TAPS = {
    **BLOOM.taps,
    "embed": Tap("transformer.word_embeddings", Side.OUT),
    "q": Tap("self_attention.query_key_value", Side.OUT, view=HeadsView(_FUSED, 0, grouped=True)),
    "k": Tap("self_attention.query_key_value", Side.OUT, view=HeadsView(_FUSED, 1, grouped=True)),
    "v": Tap("self_attention.query_key_value", Side.OUT, view=HeadsView(_FUSED, 2, grouped=True)),
    "attn_add": Tap("self_attention", Side.OUT, 0),
    "resid_mid": Tap("post_attention_layernorm", Side.IN),
    "mlp_in": Tap("mlp", Side.IN, "x"),
    # Where sublayers are side by side, what attention returns is added to these in place.
    "mlp_out": Tap("mlp.dense_4h_to_h", Side.OUT, changes=True),
    "mlp_add": Tap("mlp", Side.OUT, changes=True),
}
_POSITIONS = "positions enter inside attention, by rotation or as a bias on the scores (ALiBi)"

FALCON_SEQUENTIAL = Family(
    "Falcon (sequential)",
    ("falcon",),
    BLOOM.layers,
    _TAPS,
    {
        **BLOOM.absent,
        "pos_embed": f"{_POSITIONS}, so there is no position embedding",
        "q_rot": f"{_POSITIONS}, which its block does in a way of its own that cannot be tapped; use q",
        "k_rot": f"{_POSITIONS}, which its block does in a way of its own that cannot be tapped; use k",
    },
    neurons="ffn_hidden_size",
    attends_itself=True,
    carries=(Carry("resid_mid", "mlp_add", "resid_post"),),
    widths={"K": _kv_heads},
    serves=lambda config: not (config.parallel_attn or config.new_decoder_architecture),
    these="`parallel_attn` and `new_decoder_architecture` are false",
)
FALCON_TWO_NORMS = replace(
    FALCON_SEQUENTIAL,
    name="Falcon (parallel, two norms)",
    taps={
        **{name: tap for name, tap in _TAPS.items() if name != "resid_mid"},
        "attn_norm": Tap("ln_attn", Side.OUT),
        # What ln_mlp returned, before attention: seen where the MLP receives it, which is after attention.
        "mlp_norm": Tap("mlp", Side.IN, "x"),
    },
    absent={**FALCON_SEQUENTIAL.absent, **PARALLEL},
    carries=(),
    serves=_two_norms,
    these="`new_decoder_architecture` is true and `num_ln_in_parallel_attn` is 2",
)
FALCON_PARALLEL = replace(
    FALCON_TWO_NORMS,
    name="Falcon (parallel, one norm)",
    taps={name: tap for name, tap in _TAPS.items() if name not in ("resid_mid", "mlp_norm")},
    absent={
        **FALCON_TWO_NORMS.absent,
        "mlp_norm": "the MLP reads the norm that attention reads; use attn_norm for both, or mlp_in for the MLP",
    },
    serves=None,
    these="attention and MLP share a norm",
)
