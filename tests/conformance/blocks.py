"""Blocks whose forward was rewritten by hand: the stream between attention and MLP goes through an edit.

No hook can do this in most of them: the block keeps the stream in a local variable, and the norm has a reference to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

Edit = Callable[[Tensor], Tensor]


@contextmanager
def edited_middle(model: PreTrainedModel, index: int, edit: Edit) -> Iterator[None]:
    """Runs the model with one block that edits the stream between its sublayers."""
    kind = model.config.get_text_config().model_type
    block: Any = model.get_decoder()
    block = getattr(block, "model", block)  # Llama-4 says that it is its own
    block = (block.h if hasattr(block, "h") else block.layers)[index]

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return _FORWARDS[kind](block, edit, hidden_states, *args, **kwargs)

    block.forward = forward
    try:
        yield
    finally:
        del block.forward


def _llama(block: Any, edit: Edit, x: Tensor, **kwargs: Any) -> Tensor:
    attention, _ = block.self_attn(hidden_states=block.input_layernorm(x), **kwargs)
    middle = edit(x + attention)
    return middle + block.mlp(block.post_attention_layernorm(middle))


def _llama4(block: Any, edit: Edit, x: Tensor, **kwargs: Any) -> Tensor:
    attention, _ = block.self_attn(hidden_states=block.input_layernorm(x), **kwargs)
    middle = edit(x + attention)
    made = block.feed_forward(block.post_attention_layernorm(middle))
    return middle + (made[0] if isinstance(made, tuple) else made).view(x.shape)


def _hybrid(block: Any, edit: Edit, x: Tensor, position_embeddings: Any, **kwargs: Any) -> Tensor:
    normed, past = block.input_layernorm(x), kwargs.pop("past_key_values")
    if hasattr(block, "linear_attn"):
        attention = block.linear_attn(hidden_states=normed, cache_params=past, **kwargs)
    else:
        rotation = {"position_embeddings": position_embeddings, "past_key_values": past}
        attention, _ = block.self_attn(hidden_states=normed, **rotation, **kwargs)
    middle = edit(x + attention)
    return middle + block.mlp(block.post_attention_layernorm(middle))


def _gpt_oss(block: Any, edit: Edit, x: Tensor, **kwargs: Any) -> Tensor:
    attention, _ = block.self_attn(hidden_states=block.input_layernorm(x), **kwargs)
    middle = edit(x + attention)
    return middle + block.mlp(block.post_attention_layernorm(middle))[0]


def _granite(block: Any, edit: Edit, x: Tensor, **kwargs: Any) -> Tensor:
    attention, _ = block.self_attn(hidden_states=block.input_layernorm(x), **kwargs)
    middle = edit(x + attention * block.residual_multiplier)
    return middle + block.mlp(block.post_attention_layernorm(middle)) * block.residual_multiplier


def _glm4(block: Any, edit: Edit, x: Tensor, **kwargs: Any) -> Tensor:
    attention, _ = block.self_attn(hidden_states=block.input_layernorm(x), **kwargs)
    middle = edit(x + block.post_self_attn_layernorm(attention))
    return middle + block.post_mlp_layernorm(block.mlp(block.post_attention_layernorm(middle)))


def _gemma(block: Any, edit: Edit, x: Tensor, **kwargs: Any) -> Tensor:
    attention, _ = block.self_attn(hidden_states=block.input_layernorm(x), **kwargs)
    middle = edit(x + block.post_attention_layernorm(attention))
    return middle + block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(middle)))


def _olmo2(block: Any, edit: Edit, x: Tensor, **kwargs: Any) -> Tensor:
    attention, _ = block.self_attn(hidden_states=x, **kwargs)
    middle = edit(x + block.post_attention_layernorm(attention))
    return middle + block.post_feedforward_layernorm(block.mlp(middle))


def _neox(block: Any, edit: Edit, x: Tensor, **kwargs: Any) -> Tensor:
    attention, _ = block.attention(block.input_layernorm(x), **kwargs)
    middle = edit(attention + x)
    return block.mlp(block.post_attention_layernorm(middle)) + middle


def _opt(block: Any, edit: Edit, x: Tensor, **kwargs: Any) -> Tensor:
    attention, _ = block.self_attn(hidden_states=block.self_attn_layer_norm(x), **kwargs)
    middle = edit(x + attention).reshape(-1, x.shape[-1])
    made = block.fc2(block.activation_fn(block.fc1(block.final_layer_norm(middle))))
    return (middle + made).view(x.shape)


def _bloom(block: Any, edit: Edit, x: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
    stream, weights = block.self_attention(block.input_layernorm(x), x, **kwargs)
    middle = edit(stream)
    return block.mlp(block.post_attention_layernorm(middle), middle), weights


def _falcon(block: Any, edit: Edit, x: Tensor, **kwargs: Any) -> tuple[Tensor, Any]:
    attention, weights = block.self_attention(block.input_layernorm(x), **kwargs)
    middle = edit(x + attention)
    return middle + block.mlp(block.post_attention_layernorm(middle)), weights


_FORWARDS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("mixtral", "phi3", "olmoe", "glm", "smollm3", "olmo", "gemma", "deepseek_v3"), _llama),
    "gpt_oss": _gpt_oss,
    "llama4_text": _llama4,
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _hybrid),
    "granite": _granite,
    "glm4": _glm4,
    **dict.fromkeys(("gemma2", "gemma3_text"), _gemma),
    **dict.fromkeys(("olmo2", "olmo3"), _olmo2),
    "gpt_neox": _neox,
    "opt": _opt,
    "bloom": _bloom,
    "falcon": _falcon,
}
