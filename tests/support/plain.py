"""Plain transformers, with hooks placed by hand: a second oracle, and the proof that a trace left a model as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

from tests.support.batches import Batch
from tracelens.ir.sites import Site

Side = Literal["input", "output"]
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
    with ExitStack() as stack:
        yield {site: stack.enter_context(capture(model, *hook_point(model, site))) for site in sites}


# --- where a site is, found by reading the modules of transformers -----------------------------------------------

_ROTARY_HOOKS: dict[str, tuple[str, Side]] = {
    "embed": ("model.embed_tokens", "output"),
    "resid_pre": ("model.layers.{}", "input"),
    "attn_norm": ("model.layers.{}.input_layernorm", "output"),
    "attn_in": ("model.layers.{}.self_attn", "input"),
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
_GPT2_HOOKS: dict[str, tuple[str, Side]] = {
    "embed": ("transformer.wte", "output"),
    "pos_embed": ("transformer.wpe", "output"),
    "resid_pre": ("transformer.h.{}", "input"),
    "attn_norm": ("transformer.h.{}.ln_1", "output"),
    "attn_in": ("transformer.h.{}.attn", "input"),
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
    table = _GPT2_HOOKS if model.config.model_type == "gpt2" else _ROTARY_HOOKS
    path, side = table[site.name]
    return path.format(site.layer), side


@contextmanager
def edited(model: PreTrainedModel, site: Site, edit: Edit) -> Iterator[None]:
    """Runs the model with ``edit`` applied at a site, by a hook or, for ``resid_mid``, in a block rewritten by hand."""
    if site.name == "resid_mid":
        with edited_block(model, site.layer or 0, edit):
            yield
    else:
        with replace(model, *hook_point(model, site), edit):
            yield


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

    block.forward = gpt2_forward if gpt2 else rotary_forward
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

    A parameter's version counts its in-place changes, so that values need not be copied.
    """
    entries: dict[str, str] = {}
    alive: list[object] = []

    def identity(thing: object) -> str:
        alive.append(thing)
        return f"{type(thing).__name__}#{id(thing):x}"

    def shown(thing: object) -> str:
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
