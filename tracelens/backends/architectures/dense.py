"""What families lack whose layers all have one MLP for every token."""

_REASON = "its layers have one MLP for all tokens, and no experts that tokens are sent to"
NO_EXPERTS = dict.fromkeys(("router_logits", "expert_index", "expert_weights"), _REASON)
