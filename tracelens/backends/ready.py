"""Is a model ready to run, and where?"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd  # the base of all of torch's

from tracelens.backends.anatomy import ModelAnatomy
from tracelens.errors import ModelClosedError, TrainingModeError


def running_device(anatomy: ModelAnatomy) -> torch.device:
    """The model's device; refuses to run a model that was loaded without weights."""
    device = anatomy.device
    if device.type == "meta":
        raise ModelClosedError(
            "this model was loaded without weights: its sites can be listed and graphs recorded, but it cannot run",
            instead="tl.load(...) without weights=False",
        )
    if anatomy.model.training:
        _refuse_dropout(anatomy.model)
    return device


def _refuse_dropout(model: nn.Module) -> None:
    """A model in training mode is welcome as long as nothing in it is random."""
    for path, module in model.named_modules():
        if not module.training:
            continue
        of_module = getattr(module, "p", 0.0) if isinstance(module, _DropoutNd) else 0.0
        # Attention functions are told how much to drop by an attribute of their module.
        if max(_rate(of_module), _rate(getattr(module, "attention_dropout", 0.0))) > 0:
            raise TrainingModeError(
                f"the model is in training mode, where {path or 'it'} drops activations at random: "
                "no two runs would agree",
                instead="model.hf.eval() before the block",
            )


def _rate(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
