"""What other libraries call the sites, as data: each library's names, and what each of them means here.

Read off TransformerLens 4.3 (its bridge, and the names of HookedTransformer that it keeps as aliases), nnterp 1.3 and
interp-engine 1.14. Those of TransformerLens were compared number by number, on tiny Llama, Qwen3, Gemma-3 and GPT-2.
Names whose tensor this library does not have are here, too: with what they are, so that nobody takes the nearest one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class NoSite:
    """What a name means that is no site here, and which sites are near it."""

    meaning: str
    near: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ByMlp:
    """A name that means one site in gated MLPs, and another one in plain ones."""

    gated: str
    plain: str


Meaning = str | NoSite | ByMlp


@dataclass(frozen=True, slots=True)
class Scheme:
    """The names of one library: in a layer, whose number stands at ``{layer}``, and of the whole model."""

    name: str
    layer: str
    of_layers: Mapping[str, Meaning]
    of_model: Mapping[str, Meaning]


_NORMALIZED = "what a norm divides its input to, before its gain: no module returns it"
_SCALE = "what a norm divides by"
_BEFORE_NORM = "what the norm before the sublayer receives; other libraries call what the norm returns so"
_ROTATION = "of the rotary embedding"

TRANSFORMER_LENS = Scheme(
    "transformer_lens",
    "blocks.{layer}.{name}",
    {
        "hook_resid_pre": "resid_pre",
        "hook_in": "resid_pre",
        "ln1.hook_in": "resid_pre",
        "ln1.hook_normalized": NoSite(_NORMALIZED, ("attn_norm",)),
        "ln1.hook_scale": NoSite(_SCALE, ("resid_pre",)),
        "ln1.hook_out": "attn_norm",
        "hook_attn_in": NoSite(_BEFORE_NORM, ("resid_pre", "attn_in")),
        "hook_q_input": NoSite(_BEFORE_NORM, ("resid_pre", "attn_in")),
        "hook_k_input": NoSite(_BEFORE_NORM, ("resid_pre", "attn_in")),
        "hook_v_input": NoSite(_BEFORE_NORM, ("resid_pre", "attn_in")),
        "attn.hook_in": "attn_in",
        "attn.q.hook_in": "attn_in",
        "attn.k.hook_in": "attn_in",
        "attn.v.hook_in": "attn_in",
        "attn.hook_q": "q",
        "attn.q.hook_out": "q",
        "attn.hook_k": "k",
        "attn.k.hook_out": "k",
        "attn.hook_v": "v",
        "attn.v.hook_out": "v",
        "attn.hook_q_normed": "q_normed",
        "attn.q_norm.hook_in": "q",
        "attn.q_norm.hook_out": "q_normed",
        "attn.q_norm.hook_normalized": NoSite(_NORMALIZED, ("q_normed",)),
        "attn.q_norm.hook_scale": NoSite(_SCALE, ("q",)),
        "attn.hook_k_normed": "k_normed",
        "attn.k_norm.hook_in": "k",
        "attn.k_norm.hook_out": "k_normed",
        "attn.k_norm.hook_normalized": NoSite(_NORMALIZED, ("k_normed",)),
        "attn.k_norm.hook_scale": NoSite(_SCALE, ("k",)),
        "attn.hook_rot_q": "q_rot",
        "attn.hook_rot_k": "k_rot",
        "attn.hook_cos": NoSite(_ROTATION, ("q_rot", "k_rot")),
        "attn.hook_sin": NoSite(_ROTATION, ("q_rot", "k_rot")),
        "attn.hook_attn_scores": "scores",
        "attn.hook_pattern": "pattern",
        "attn.hook_z": "z",
        "attn.o.hook_in": "z",
        "attn.hook_result": NoSite(
            "what each head adds, made of z: model.layers[i].head_out", ("head_out", "z")
        ),
        "attn.hook_out": "attn_out",
        "attn.o.hook_out": "attn_out",
        "attn.hook_hidden_states": "attn_out",
        "ln1_post.hook_in": "attn_out",
        "ln1_post.hook_normalized": NoSite(_NORMALIZED, ("attn_post_norm",)),
        "ln1_post.hook_scale": NoSite(_SCALE, ("attn_out",)),
        "ln1_post.hook_out": "attn_post_norm",
        "hook_attn_out": "attn_add",
        "hook_resid_mid": "resid_mid",
        "ln2.hook_in": "resid_mid",
        "ln2.hook_normalized": NoSite(_NORMALIZED, ("mlp_norm",)),
        "ln2.hook_scale": NoSite(_SCALE, ("resid_mid",)),
        "ln2.hook_out": "mlp_norm",
        "hook_mlp_in": NoSite(_BEFORE_NORM, ("resid_mid", "mlp_in")),
        "mlp.hook_in": "mlp_in",
        "mlp.gate.hook_in": "mlp_in",
        "mlp.in.hook_in": "mlp_in",
        "mlp.hook_pre": "mlp_pre",
        "mlp.gate.hook_out": "mlp_pre",
        "mlp.hook_pre_linear": "mlp_up",
        "mlp.in.hook_out": ByMlp(gated="mlp_up", plain="mlp_pre"),
        "mlp.hook_post": "mlp_act",
        "mlp.out.hook_in": "mlp_act",
        "mlp.hook_out": "mlp_out",
        "mlp.out.hook_out": "mlp_out",
        "mlp.hook_expert_weights": NoSite(
            "the chances of all experts, before any are chosen: router_logits.softmax(-1)",
            ("router_logits", "expert_weights"),
        ),
        "mlp.hook_expert_indices": "expert_index",
        "ln2_post.hook_in": "mlp_out",
        "ln2_post.hook_normalized": NoSite(_NORMALIZED, ("mlp_post_norm",)),
        "ln2_post.hook_scale": NoSite(_SCALE, ("mlp_out",)),
        "ln2_post.hook_out": "mlp_post_norm",
        "hook_mlp_out": "mlp_add",
        "hook_resid_post": "resid_post",
        "hook_out": "resid_post",
    },
    {
        "hook_embed": "embed",
        "embed.hook_out": "embed",
        "hook_pos_embed": "pos_embed",
        "pos_embed.hook_out": "pos_embed",
        "ln_final.hook_in": NoSite("what the last norm receives", ("layers[-1].resid_post",)),
        "ln_final.hook_normalized": NoSite(_NORMALIZED, ("final_norm",)),
        "ln_final.hook_scale": NoSite(_SCALE, ("layers[-1].resid_post",)),
        "ln_final.hook_out": "final_norm",
        "unembed.hook_in": "final_norm",
        "unembed.hook_out": "lm_head",
        "hook_unembed": "lm_head",
    },
)

NNTERP = Scheme(
    "nnterp",
    "{name}[{layer}]",
    {
        "layers_input": "resid_pre",
        "layers_output": "resid_post",
        "attentions_input": "attn_in",
        "attentions_output": "attn_out",
        "attention_probabilities": "pattern",
        "mlps_input": "mlp_in",
        "mlps_output": "mlp_out",
    },
    {"token_embeddings": "embed", "ln_final.output": "final_norm", "logits": "logits"},
)

INTERP_ENGINE = Scheme(
    "interp_engine",
    "{name}.{layer}",
    {
        "resid_pre": "resid_pre",
        "attn_in": "attn_in",
        "value": "v",
        "q_norm_in": "q",
        "q_norm_out": "q_normed",
        "k_norm_in": "k",
        "k_norm_out": "k_normed",
        "attn_scores": "scores",
        "attn_probs": "pattern",
        "z": "z",
        "attn_out": "attn_out",
        "attn_out_post": "attn_add",
        "resid_mid": "resid_mid",
        "mlp_in": "mlp_in",
        "mlp_pre": "mlp_pre",
        "mlp_pre_linear": "mlp_up",
        "mlp_act": "mlp_act",
        "router_logits": "router_logits",
        "expert_weights": "expert_weights",
        "expert_indices": "expert_index",
        "mlp_out": "mlp_out",
        "mlp_out_post": "mlp_add",
        "resid_post": "resid_post",
    },
    {"embeddings": "embed", "final_norm": "final_norm", "lm_head": "lm_head"},
)

SCHEMES: Mapping[str, Scheme] = {scheme.name: scheme for scheme in (TRANSFORMER_LENS, NNTERP, INTERP_ENGINE)}
