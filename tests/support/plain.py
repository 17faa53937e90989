"""Plain transformers, with hooks placed by hand: a second oracle, and the proof that a trace left a model as it was."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

from tests.support.batches import Batch
from tracelens.ir.sites import Site

Side = Literal["input", "output", "inside"]
Edit = Callable[[Tensor], Tensor]


def plain_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The logits [B, P, V] of transformers itself, without a cache and in the current grad mode."""
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.mask.long(),
        position_ids=batch.position_ids,
        use_cache=False,
    ).logits


@contextmanager
def capture(model: nn.Module, path: str, side: Side) -> Iterator[list[Tensor]]:
    """Collects a copy of what enters or leaves the module at ``path``, once per call of it."""
    seen: list[Tensor] = []

    def look(tensor: Tensor) -> Tensor:
        seen.append(tensor.detach().clone())
        return tensor

    with replace(model, path, side, look):
        yield seen


@contextmanager
def replace(model: nn.Module, path: str, side: Side, edit: Edit) -> Iterator[None]:
    """Passes what enters or leaves the module at ``path`` through ``edit``; of a tuple, the first element."""
    module = model.get_submodule(path)
    if side == "input":
        handle = module.register_forward_pre_hook(_on_input(edit), with_kwargs=True)
    else:
        handle = module.register_forward_hook(_on_output(edit))
    try:
        yield
    finally:
        handle.remove()


def _on_input(edit: Edit) -> Callable[..., tuple[tuple[object, ...], dict[str, object]]]:
    def hook(
        module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        if args:
            return (edit(args[0]), *args[1:]), dict(kwargs)
        # The attention modules of the rotary families are called with names alone.
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    return hook


def _on_output(edit: Edit) -> Callable[..., object]:
    def hook(module: nn.Module, args: object, output: object) -> object:
        if isinstance(output, Tensor):
            return edit(output)
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        output.logits = edit(output.logits)  # the model itself
        return output

    return hook


@contextmanager
def captured(model: PreTrainedModel, sites: list[Site]) -> Iterator[dict[Site, list[Tensor]]]:
    """Captures several sites at once, each by a hook of its own."""
    seen: dict[Site, list[Tensor]] = {site: [] for site in sites}

    def look(site: Site, tensor: Tensor) -> Tensor:
        seen[site].append(tensor.detach().clone())
        return tensor

    with ExitStack() as stack:
        for site in sites:
            if site.name == "resid_mid":
                path, side = hook_point(model, site)
                stack.enter_context(replace(model, path, side, functools.partial(look, site)))
        others = [site for site in sites if site.name != "resid_mid"]
        stack.enter_context(edited_at(model, {site: functools.partial(look, site) for site in others}))
        yield seen


# --- where a site is, found by reading the modules of transformers -----------------------------------------------

_ROTARY_HOOKS: dict[str, tuple[str, Side]] = {
    "embed": ("model.embed_tokens", "output"),
    "resid_pre": ("model.layers.{}", "input"),
    "attn_norm": ("model.layers.{}.input_layernorm", "output"),
    "attn_in": ("model.layers.{}.self_attn", "input"),
    "q": ("model.layers.{}.self_attn.q_proj", "output"),
    "k": ("model.layers.{}.self_attn.k_proj", "output"),
    "v": ("model.layers.{}.self_attn.v_proj", "output"),
    "q_normed": ("model.layers.{}.self_attn.q_norm", "output"),
    "k_normed": ("model.layers.{}.self_attn.k_norm", "output"),
    "q_rot": ("model.layers.{}.self_attn", "inside"),
    "k_rot": ("model.layers.{}.self_attn", "inside"),
    "scores": ("model.layers.{}.self_attn", "inside"),
    "pattern": ("model.layers.{}.self_attn", "inside"),
    "z": ("model.layers.{}.self_attn.o_proj", "input"),
    "attn_out": ("model.layers.{}.self_attn.o_proj", "output"),
    "attn_add": ("model.layers.{}.self_attn", "output"),
    "resid_mid": ("model.layers.{}.post_attention_layernorm", "input"),
    "mlp_norm": ("model.layers.{}.post_attention_layernorm", "output"),
    "mlp_in": ("model.layers.{}.mlp", "input"),
    "mlp_pre": ("model.layers.{}.mlp.gate_proj", "output"),
    "mlp_up": ("model.layers.{}.mlp.up_proj", "output"),
    "mlp_act": ("model.layers.{}.mlp.down_proj", "input"),
    "mlp_out": ("model.layers.{}.mlp.down_proj", "output"),
    "mlp_add": ("model.layers.{}.mlp", "output"),
    "resid_post": ("model.layers.{}", "output"),
    "final_norm": ("model.norm", "output"),
    "lm_head": ("lm_head", "output"),
    "logits": ("", "output"),
}
_EXPERT_HOOKS: dict[str, tuple[str, Side]] = {
    **_ROTARY_HOOKS,
    "router_logits": ("model.layers.{}.mlp.gate", "output"),
    "expert_index": ("model.layers.{}.mlp.gate", "output"),
    "expert_weights": ("model.layers.{}.mlp.gate", "output"),
    # No module shows these: the block of experts is written by hand for them, as it is for its router.
    "expert_act": ("model.layers.{}.mlp.gate", "output"),
    "expert_out": ("model.layers.{}.mlp.gate", "output"),
    "mlp_out": ("model.layers.{}.mlp", "output"),
}
_ROUTER = ("router_logits", "expert_weights", "expert_index", "expert_act", "expert_out")
"""What a block of experts has inside."""
_GEMMA_HOOKS: dict[str, tuple[str, Side]] = {
    **_ROTARY_HOOKS,
    "attn_post_norm": ("model.layers.{}.post_attention_layernorm", "output"),
    "attn_add": ("model.layers.{}.post_attention_layernorm", "output"),
    "resid_mid": ("model.layers.{}.pre_feedforward_layernorm", "input"),
    "mlp_norm": ("model.layers.{}.pre_feedforward_layernorm", "output"),
    "mlp_post_norm": ("model.layers.{}.post_feedforward_layernorm", "output"),
    "mlp_add": ("model.layers.{}.post_feedforward_layernorm", "output"),
}
_GPT2_HOOKS: dict[str, tuple[str, Side]] = {
    "embed": ("transformer.wte", "output"),
    "pos_embed": ("transformer.wpe", "output"),
    "resid_pre": ("transformer.h.{}", "input"),
    "attn_norm": ("transformer.h.{}.ln_1", "output"),
    "attn_in": ("transformer.h.{}.attn", "input"),
    "q": ("transformer.h.{}.attn.c_attn", "output"),
    "k": ("transformer.h.{}.attn.c_attn", "output"),
    "v": ("transformer.h.{}.attn.c_attn", "output"),
    "scores": ("transformer.h.{}.attn", "inside"),
    "pattern": ("transformer.h.{}.attn", "inside"),
    "z": ("transformer.h.{}.attn.c_proj", "input"),
    "attn_out": ("transformer.h.{}.attn.c_proj", "output"),
    "attn_add": ("transformer.h.{}.attn", "output"),
    "resid_mid": ("transformer.h.{}.ln_2", "input"),
    "mlp_norm": ("transformer.h.{}.ln_2", "output"),
    "mlp_in": ("transformer.h.{}.mlp", "input"),
    "mlp_pre": ("transformer.h.{}.mlp.c_fc", "output"),
    "mlp_act": ("transformer.h.{}.mlp.c_proj", "input"),
    "mlp_out": ("transformer.h.{}.mlp.c_proj", "output"),
    "mlp_add": ("transformer.h.{}.mlp", "output"),
    "resid_post": ("transformer.h.{}", "output"),
    "final_norm": ("transformer.ln_f", "output"),
    "lm_head": ("lm_head", "output"),
    "logits": ("", "output"),
}


def hook_point(model: PreTrainedModel, site: Site) -> tuple[str, Side]:
    """The module and the side where plain transformers shows a site; a ``KeyError`` if it does not."""
    tables = {"gpt2": _GPT2_HOOKS, "gemma3_text": _GEMMA_HOOKS, "qwen3_moe": _EXPERT_HOOKS}
    table = tables.get(model.config.model_type, _ROTARY_HOOKS)
    path, side = table[site.name]
    return path.format(site.layer), side


def can_edit(model: PreTrainedModel, site: Site) -> bool:
    """Can the site be edited by hand?  Inside attention, only the eager function can be opened."""
    return hook_point(model, site)[1] != "inside" or model.config._attn_implementation == "eager"


@contextmanager
def edited(model: PreTrainedModel, site: Site, edit: Edit) -> Iterator[None]:
    """Runs the model with ``edit`` applied at a site, by a hook or, for ``resid_mid``, in a block rewritten by hand."""
    if site.name == "resid_mid":
        with edited_block(model, site.layer or 0, edit):
            yield
        return
    path, side = hook_point(model, site)
    if side == "inside":
        with edited_attention(model, path, {site.name: edit}):
            yield
        return
    if site.name in _ROUTER:
        with edited_router(model, path, {site.name: edit}):
            yield
        return
    with replace(model, path, side, _per_head(model, site, edit)):
        yield


@contextmanager
def edited_at(model: PreTrainedModel, edits: Mapping[Site, Edit]) -> Iterator[None]:
    """Runs the model with several sites edited at once."""
    inside: dict[str, dict[str, Edit]] = {}
    routers: dict[str, dict[str, Edit]] = {}
    with ExitStack() as stack:
        for site, edit in edits.items():
            path, side = hook_point(model, site)
            if side == "inside":
                inside.setdefault(path, {})[site.name] = edit
            elif site.name in _ROUTER:
                routers.setdefault(path, {})[site.name] = edit
            else:
                stack.enter_context(edited(model, site, edit))
        for path, found in inside.items():
            stack.enter_context(edited_attention(model, path, found))
        for path, found in routers.items():
            stack.enter_context(edited_router(model, path, found))
        yield


def _per_head(model: PreTrainedModel, site: Site, edit: Edit) -> Edit:
    """The edit of a module's tensor for the edit of a site in it that has an axis for heads."""
    width = (
        getattr(model.config, "head_dim", None)
        or model.config.hidden_size // model.config.num_attention_heads
    )

    def split(flat: Tensor) -> Tensor:
        return edit(flat.view(*flat.shape[:-1], -1, width)).reshape(flat.shape)

    def third(fused: Tensor) -> Tensor:
        thirds = list(fused.chunk(3, dim=-1))
        thirds["qkv".index(site.name)] = split(thirds["qkv".index(site.name)].contiguous())
        return torch.cat(thirds, dim=-1)

    if site.name in ("q", "k", "v") and model.config.model_type == "gpt2":
        return third
    if site.name in ("q_normed", "k_normed") and model.config.model_type == "gemma3_text":
        return lambda heads_first: edit(heads_first.transpose(1, 2)).transpose(1, 2)
    return split if site.name in ("q", "k", "v", "z") else edit


@contextmanager
def edited_attention(model: PreTrainedModel, path: str, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Runs the model with the eager function of its modelling file rewritten by hand for one attention module."""
    if model.config._attn_implementation != "eager":
        raise ValueError("only eager attention has scores and a pattern that can be edited by hand")
    attention = model.get_submodule(path)
    modelling = sys.modules[type(attention).__module__]
    original = modelling.eager_attention_forward

    def eager(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        scaling: float,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        if module is not attention:
            return original(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        # A key that its own query may not see is padding, which nobody sees, whatever is edited.
        padding = (attention_mask.diagonal(dim1=-2, dim2=-1) != 0)[..., None, :]

        def at(site: str, tensor: Tensor) -> Tensor:
            return edits[site](tensor) if site in edits else tensor

        query = at("q_rot", query.transpose(1, 2)).transpose(1, 2)
        key = at("k_rot", key.transpose(1, 2)).transpose(1, 2)
        shared = query.shape[1] // key.shape[1]
        if shared > 1:
            key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
        scores = at("scores", torch.matmul(query, key.transpose(2, 3)) * scaling + attention_mask)
        scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
        gpt2 = model.config.model_type == "gpt2"
        weights = nn.functional.softmax(scores, dim=-1, dtype=None if gpt2 else torch.float32).to(query.dtype)
        weights = at("pattern", weights).masked_fill(padding & ~padding.transpose(-1, -2), 0.0)
        return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights

    modelling.eager_attention_forward = eager
    try:
        yield
    finally:
        modelling.eager_attention_forward = original


@contextmanager
def edited_router(model: PreTrainedModel, path: str, edits: Mapping[str, Edit]) -> Iterator[None]:
    """One block of experts with a forward of its own, written out by hand around its router's weights."""
    block = model.get_submodule(path.rpartition(".")[0])
    router = block.gate

    def forward(hidden_states: Tensor) -> Tensor:
        def at(site: str, tensor: Tensor) -> Tensor:
            return edits[site](tensor) if site in edits else tensor

        sizes, rows = hidden_states.shape[:2], hidden_states.flatten(0, 1)
        logits = nn.functional.linear(rows, router.weight)
        logits = at("router_logits", logits.unflatten(0, sizes)).flatten(0, 1)
        chances = logits.softmax(-1, dtype=torch.float32)
        weights, experts = torch.topk(chances, model.config.num_experts_per_tok, dim=-1)
        if model.config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(logits.dtype)
        experts = at("expert_index", experts.unflatten(0, sizes)).flatten(0, 1)
        weights = at("expert_weights", weights.unflatten(0, sizes)).flatten(0, 1)
        if "expert_act" not in edits and "expert_out" not in edits:
            return block.experts(rows, experts, weights).unflatten(0, sizes)
        into, down = block.experts.gate_up_proj, block.experts.down_proj
        act = rows.new_zeros(*experts.shape, down.shape[-1])
        out = rows.new_zeros(*experts.shape, down.shape[-2])
        for expert in range(len(down)):
            place, token = (experts.t() == expert).nonzero(as_tuple=True)
            gate, up = nn.functional.linear(rows[token], into[expert]).chunk(2, dim=-1)
            act[token, place] = nn.functional.silu(gate) * up
        act = at("expert_act", act.unflatten(0, sizes)).flatten(0, 1)
        for expert in range(len(down)):
            place, token = (experts.t() == expert).nonzero(as_tuple=True)
            out[token, place] = nn.functional.linear(act[token, place], down[expert])
        out = at("expert_out", out.unflatten(0, sizes)).flatten(0, 1)
        return (out * weights[..., None]).sum(1).unflatten(0, sizes)

    block.forward = forward
    try:
        yield
    finally:
        del block.forward


@contextmanager
def edited_block(model: PreTrainedModel, index: int, edit: Edit) -> Iterator[None]:
    """One block with a forward of its own: the stream between attention and MLP goes through ``edit``.

    No hook can do this: the block keeps the stream in a local variable and gives the norm only a reference to it.
    """
    gpt2 = model.config.model_type == "gpt2"
    block = model.get_submodule(f"transformer.h.{index}" if gpt2 else f"model.layers.{index}")

    def gpt2_forward(
        hidden_states: Tensor,
        past_key_values: object = None,
        attention_mask: object = None,
        *rest: object,
        **kwargs,
    ) -> Tensor:
        kwargs.pop("encoder_attention_mask", None)
        attention = block.attn(
            block.ln_1(hidden_states),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            **kwargs,
        )
        middle = edit(attention[0] + hidden_states)
        return middle + block.mlp(block.ln_2(middle))

    def rotary_forward(hidden_states: Tensor, **kwargs) -> Tensor:
        attention = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **kwargs)
        middle = edit(hidden_states + attention[0])
        return middle + block.mlp(block.post_attention_layernorm(middle))

    def gemma_forward(hidden_states: Tensor, **kwargs) -> Tensor:
        attention = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **kwargs)
        middle = edit(hidden_states + block.post_attention_layernorm(attention[0]))
        mlp = block.mlp(block.pre_feedforward_layernorm(middle))
        return middle + block.post_feedforward_layernorm(mlp)

    forwards = {"gpt2": gpt2_forward, "gemma3_text": gemma_forward}
    block.forward = forwards.get(model.config.model_type, rotary_forward)
    try:
        yield
    finally:
        del block.forward


# --- the model as it was -----------------------------------------------------------------------------------------

_GLOBAL_HOOKS = tuple(
    sorted(name for name in vars(torch_module) if name.startswith("_global_") and "hooks" in name)
)


@dataclass(frozen=True)
class Fingerprint:
    """Everything about a model that a trace must leave alone, as text to compare and to show."""

    entries: dict[str, str]
    # Identities are only worth comparing while the objects live: a freed one's id may be given to another.
    alive: list[object] = field(repr=False)


def model_fingerprint(model: nn.Module) -> Fingerprint:
    """Hooks, attributes, ``forward``, training flags, configuration and every parameter's identity and version.

    A parameter's version counts its in-place changes, so that values need not be copied. Weights that accelerate
    offloads are other objects after each forward pass, ours or not: of these, only that they have no data.
    """
    entries: dict[str, str] = {}
    alive: list[object] = []

    def identity(thing: object) -> str:
        alive.append(thing)
        return f"{type(thing).__name__}#{id(thing):x}"

    def shown(thing: object) -> str:
        if isinstance(thing, Tensor) and thing.is_meta:
            return "offloaded"
        plain = thing is None or isinstance(thing, (bool, int, float, str, torch.dtype, torch.device))
        return repr(thing) if plain else identity(thing)

    for path, module in model.named_modules():
        here = path or "<model>"
        entries[f"{here}: module"] = identity(module)
        entries[f"{here}: class"] = type(module).__qualname__
        entries[f"{here}: attributes"] = " ".join(sorted(vars(module)))
        for name, value in vars(module).items():
            if "hooks" in name and isinstance(value, dict):
                entries[f"{here}: {name}"] = " ".join(
                    f"{key}={identity(hook)}" for key, hook in value.items()
                )
            elif name in ("_parameters", "_buffers", "_modules"):
                entries[f"{here}: {name}"] = " ".join(f"{key}={shown(part)}" for key, part in value.items())
            else:
                entries[f"{here}: {name}"] = shown(value)
        config = getattr(module, "config", None)
        if config is not None:
            entries[f"{here}: config.to_dict()"] = repr(config.to_dict())
            entries[f"{here}: attention implementation"] = repr(config._attn_implementation)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        entries[f"{name}: tensor"] = (
            f"version {tensor._version}, {tensor.dtype}, {tuple(tensor.shape)}, {tensor.device}, "
            f"at {tensor.data_ptr():x}, requires_grad {tensor.requires_grad}, grad {shown(tensor.grad)}, "
            f"hooks {len(tensor._backward_hooks or ())}"
        )
    for name in _GLOBAL_HOOKS:
        hooks = getattr(torch_module, name)
        entries[f"torch: {name}"] = " ".join(f"{key}={identity(hook)}" for key, hook in hooks.items())
    entries["torch: grad mode"] = repr(torch.is_grad_enabled())
    return Fingerprint(entries, alive)


def assert_untouched(before: Fingerprint, after: Fingerprint) -> None:
    """Fails with every difference on lines of its own."""
    lines: list[str] = []
    for key in dict.fromkeys((*before.entries, *after.entries)):
        old, new = before.entries.get(key, "absent"), after.entries.get(key, "absent")
        if old != new:
            gone, come = _different_words(old, new)
            lines += [key, f"    before: {gone}", f"    after:  {come}"]
    assert not lines, "the model was changed:\n" + "\n".join(lines)


def _different_words(old: str, new: str) -> tuple[str, str]:
    """The words that only one side has: lists of attributes are long, and differ in one name."""
    left, right = old.split(" "), new.split(" ")
    gone = " ".join(word for word in left if word not in right)
    come = " ".join(word for word in right if word not in left)
    return gone or "nothing more", come or "nothing more"


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Fails if the block leaves the model other than it was."""
    before = model_fingerprint(model)
    yield
    assert_untouched(before, model_fingerprint(model))
