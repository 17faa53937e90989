"""What several families lack, each with the reason."""

NO_EXPERTS = dict.fromkeys(
    ("router_logits", "expert_index", "expert_weights"),
    "its layers have one MLP for all tokens, and no experts that tokens are sent to",
)
NO_POST_NORMS = {
    "attn_post_norm": "what attention returns is added as it is, without a norm in between; use attn_add",
    "mlp_post_norm": "what the MLP returns is added as it is, without a norm in between; use mlp_add",
}
NO_POSITION_EMBEDDING = {
    "pos_embed": "positions enter by rotation inside attention (RoPE), so there is no position embedding"
}
