"""Is a model ready to run, and where?"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase  # the base of all batch norms and instance norms
from torch.nn.modules.dropout import _DropoutNd  # the base of all of torch's
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm  # the older one, a hook

from tracelens.backends.anatomy import ModelAnatomy
from tracelens.errors import ModelClosedError, TrainingModeError

_EVAL = "model.hf.eval() before the block"


def running_device(anatomy: ModelAnatomy) -> torch.device:
    """The model's device; refuses to run a model that was loaded without weights."""
    device = anatomy.device
    if device.type == "meta":
        raise ModelClosedError(
            "this model was loaded without weights: its sites can be listed and graphs recorded, but it cannot run",
            instead="tl.load(...) without weights=False",
        )
    if anatomy.model.training:
        _refuse_training(anatomy.model)
    return device


def _refuse_training(model: nn.Module) -> None:
    """A model in training mode is welcome as long as nothing in it is random, and nothing in it learns."""
    for path, module in model.named_modules():
        if not module.training:
            continue
        if _is_random(module):
            raise TrainingModeError(
                f"the model is in training mode, where {path or 'it'} is random: no two runs would agree",
                instead=_EVAL,
            )
        changed = _changed(module)
        if changed:
            raise TrainingModeError(
                f"the model is in training mode, where {path or 'it'} ({type(module).__name__}) changes its own "
                f"{changed} in every forward pass: a block would change the model for good",
                instead=_EVAL,
            )


def _is_random(module: nn.Module) -> bool:
    """Does a module draw random numbers in training mode?"""
    # Attention functions are told how much to drop by an attribute of their module.
    rates = [getattr(module, "attention_dropout", 0.0)]
    if isinstance(module, _DropoutNd):
        rates.append(module.p)
    elif isinstance(module, nn.MultiheadAttention) or (
        isinstance(module, nn.RNNBase) and module.num_layers > 1
    ):
        rates.append(module.dropout)
    elif isinstance(module, nn.RReLU):
        return module.lower != module.upper
    return max(map(_rate, rates)) > 0


def _changed(module: nn.Module) -> str:
    """The buffers that a module of torch changes when it runs in training mode, in words; empty for none."""
    if isinstance(module, _NormBase) and module.track_running_stats:
        return "running statistics" if module.running_mean is not None else ""
    if isinstance(module, _SpectralNorm) or any(
        isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()
    ):
        return "estimate of a singular vector"
    return ""


def _rate(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
