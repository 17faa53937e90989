"""What several families lack, each with the reason."""

NO_EXPERTS = dict.fromkeys(
    ("router_logits", "expert_index", "expert_weights", "expert_act", "expert_out"),
    "its layers have one MLP for all tokens, and no experts that tokens are sent to",
)
NO_POST_NORMS = {
    "attn_post_norm": "what attention returns is added as it is, without a norm in between; use attn_add",
    "mlp_post_norm": "what the MLP returns is added as it is, without a norm in between; use mlp_add",
}
NO_POSITION_EMBEDDING = {
    "pos_embed": "positions enter by rotation inside attention (RoPE), so there is no position embedding"
}
NO_QK_NORMS = {
    "q_normed": "its queries have no norm of their own; use q",
    "k_normed": "its keys have no norm of their own; use k",
}
NO_GATE = {"mlp_up": "its MLP has no gate; use mlp_pre"}
NO_ROTATION = {
    "q_rot": "positions are added to the embedding, so nothing is rotated in attention; use q",
    "k_rot": "positions are added to the embedding, so nothing is rotated in attention; use k",
}
PARALLEL = {
    "resid_mid": "attention and MLP read the stream side by side and both are added to it at once, so there is nothing "
    "between them; use resid_pre or resid_post, or attn_add and mlp_add"
}
