"""Names that transformers and other libraries have for parts of a model, each with what it is called here."""

from __future__ import annotations

from tracelens.ir.sites import CANONICAL
from tracelens.other_names import TRANSFORMER_LENS, NoSite

_RAW = "model.hf.{name}: model.hf is the transformers model"
_STREAM = "with model.trace(prompt) as t: model.layers[i].resid_post; model.layers holds the layers"
_HOOKS = "with model.trace(prompt) as t: h = model.layers[i].resid_post.save(), or an assignment to it"

ON_THE_MODEL: dict[str, str] = {
    **dict.fromkeys(
        (
            "base_model",
            "buffers",
            "children",
            "cpu",
            "cuda",
            "device",
            "double",
            "dtype",
            "eval",
            "float",
            "forward",
            "half",
            "load_state_dict",
            "lm",
            "model",
            "named_buffers",
            "named_modules",
            "named_parameters",
            "parameters",
            "requires_grad_",
            "save_pretrained",
            "state_dict",
            "to",
            "train",
            "training",
            "transformer",
            "zero_grad",
        ),
        _RAW,
    ),
    **dict.fromkeys(
        ("block", "blocks", "h"), "model.layers[i]; with model.trace(prompt): model.layers[i].resid_post"
    ),
    **dict.fromkeys(("decoder", "encoder", "hidden_states"), _STREAM),
    **dict.fromkeys(
        (
            "add_hook",
            "activations",
            "cache",
            "hook",
            "hook_dict",
            "hook_points",
            "hooks",
            "inspect",
            "register_hook",
            "reset_hooks",
            "run_with_cache",
            "run_with_hooks",
            "invoke",
            "session",
            "scan",
        ),
        _HOOKS,
    ),
    **dict.fromkeys(("edit", "edits"), "model.compile(r), where r is from: with model.record() as r: ..."),
    **dict.fromkeys(("embed_tokens", "hook_embed", "wte"), "model.embed"),
    **dict.fromkeys(("W_U", "W_unembed"), "model.unembed, the unembedding matrix [V, D]"),
    **dict.fromkeys(("W_E", "W_embed"), "model.param(path); model.hf.named_parameters() lists the paths"),
    **dict.fromkeys(("to_str_tokens", "to_tokens"), "model.tokens(prompt)"),
    **dict.fromkeys(("ln_f", "ln_final", "norm"), "model.final_norm"),
    "replace": "model.layers[i].replace(mlp_add=value), model.module(path).replace(value)",
    "skip": "model.layers[i].skip()",
    "cfg": "model.config",
    "output": "model.logits, or model.layers[i].resid_post",
    "input": "model.embed, or model.layers[i].resid_pre",
}

ON_A_LAYER: dict[str, str] = {
    **dict.fromkeys(("hidden_states", "output", "outputs", "save", "value"), "{owner}.resid_post"),
    **dict.fromkeys(("input", "inputs"), "{owner}.resid_pre"),
    **dict.fromkeys(
        ("attention", "attn", "self_attn", "self_attention"),
        "{owner}.attn_out, or .attn_in for what it receives; other modules by path: model.module(path).output",
    ),
    **dict.fromkeys(
        ("feed_forward", "ffn", "mlp"),
        "{owner}.mlp_out, or .mlp_in for what it receives; other modules by path: model.module(path).output",
    ),
    "act_fn": "{owner}.mlp_act",
    # Another tensor than ours of that name: theirs has the chances of all experts.
    "hook_expert_weights": "{owner}.router_logits.softmax(-1); or .expert_weights of the chosen ones",
    **dict.fromkeys(("gate", "router"), "{owner}.router_logits, or .expert_index for what it chooses"),
    "experts": "{owner}.mlp_out for what they make together, {owner}.expert(i).out for one of them",
    "heads": "{owner}.head(3) or {owner}.head([0, 3])",
    **dict.fromkeys(("input_layernorm", "ln1", "ln_1"), "{owner}.attn_norm"),
    **dict.fromkeys(
        ("ln2", "ln_2", "post_attention_layernorm"), "{owner}.mlp_norm"
    ),
}  # fmt: skip


def elsewhere_called(name: str, owner: str) -> str | None:
    """What ``owner.name`` of another library is called here; ``None`` where that is not known."""
    on_model = owner == "the model"
    said = (ON_THE_MODEL if on_model else ON_A_LAYER).get(name)
    if said is not None:
        hint = said.format(name=name, owner=owner)
        return hint + ".save()" if name == "save" else hint
    if name.startswith("register_") and "hook" in name:
        return _HOOKS if on_model else _HOOKS.replace("model.layers[i]", owner)
    return _of_transformer_lens(name, "model.layers[i]" if on_model else owner)


def _of_transformer_lens(name: str, layer: str) -> str | None:
    """What a ``hook_...`` is, which is called so in a block, in its attention or in its MLP."""
    if not name.startswith("hook_"):
        return None
    for inside in ("", "attn.", "mlp."):
        meaning = TRANSFORMER_LENS.of_layers.get(inside + name)
        if isinstance(meaning, str):
            return f"{layer}.{meaning}"
        if isinstance(meaning, NoSite):
            near = " or ".join(f"{layer}.{site}" for site in meaning.near)
            return f"{near}, which are other tensors: {name} is {meaning.meaning}"
    plain = name.removeprefix("hook_")
    return f"{layer}.{plain}" if plain in CANONICAL else None
