"""OPT: learned positions, and an MLP without a module of its own, on the tokens of all rows one after the other."""

from tracelens.backends.architectures.absences import (
    NO_EXPERTS,
    NO_GATE,
    NO_POST_NORMS,
    NO_QK_NORMS,
    NO_ROTATION,
)
from tracelens.backends.base import Family, HeadsView, RowsView, Side, Tap

OPT = Family(
    "OPT",
    ("opt",),
    "model.decoder.layers.{}",
    {
        "embed": Tap("model.decoder.embed_tokens", Side.OUT),
        "pos_embed": Tap("model.decoder.embed_positions", Side.OUT),
        "resid_pre": Tap("", Side.IN, "hidden_states"),
        "attn_norm": Tap("self_attn_layer_norm", Side.OUT),
        "attn_in": Tap("self_attn", Side.IN, "hidden_states"),
        "q": Tap("self_attn.q_proj", Side.OUT, view=HeadsView(("H",))),
        "k": Tap("self_attn.k_proj", Side.OUT, view=HeadsView(("H",))),
        "v": Tap("self_attn.v_proj", Side.OUT, view=HeadsView(("H",))),
        "scores": Tap("self_attn", Side.INSIDE, "scores"),
        "pattern": Tap("self_attn", Side.INSIDE, "pattern"),
        "z": Tap("self_attn.out_proj", Side.IN, view=HeadsView(("H",))),
        "attn_out": Tap("self_attn.out_proj", Side.OUT),
        "attn_add": Tap("self_attn", Side.OUT, 0),
        "resid_mid": Tap("final_layer_norm", Side.IN, view=RowsView()),
        "mlp_norm": Tap("final_layer_norm", Side.OUT, view=RowsView()),
        "mlp_in": Tap("fc1", Side.IN, view=RowsView()),
        "mlp_pre": Tap("fc1", Side.OUT, view=RowsView()),
        "mlp_act": Tap("fc2", Side.IN, view=RowsView()),
        "mlp_out": Tap("fc2", Side.OUT, view=RowsView()),
        "mlp_add": Tap("fc2", Side.OUT, view=RowsView()),
        "resid_post": Tap("", Side.OUT),
        "final_norm": Tap("model.decoder.final_layer_norm", Side.OUT),
        "lm_head": Tap("lm_head", Side.OUT),
        "logits": Tap("", Side.OUT, "logits"),
    },
    {**NO_EXPERTS, **NO_GATE, **NO_POST_NORMS, **NO_QK_NORMS, **NO_ROTATION},
    neurons="ffn_dim",
    refusals={
        "do_layer_norm_before=False": "its norms come after each sum and change the stream itself (opt-350m), so that "
        "nothing that is added stays in it",
        "word_embed_proj_dim": "its embedding and its head are narrower than the stream, with projections between "
        "them, so that no vector of the stream is what the head reads",
    },
    refused_if={
        "do_layer_norm_before=False": lambda config: not config.do_layer_norm_before,
        "word_embed_proj_dim": lambda config: config.word_embed_proj_dim != config.hidden_size,
    },
)
