"""Models whose weights accelerate keeps in memory or on disk, and brings to their modules for each forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn
from transformers import PreTrainedModel

Way = Callable[[PreTrainedModel, Path], PreTrainedModel]


def _memory(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return cpu_offload(model, execution_device="cpu")


def _memory_with_buffers(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return cpu_offload(model, execution_device="cpu", offload_buffers=True)


def _disk(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    return disk_offload(model, folder, execution_device="cpu")


def _mixed(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Every second part on disk, the others not offloaded: the device that runs them is the CPU."""
    parts = parts_of(model)
    map_ = {path: "disk" if number % 2 else "cpu" for number, path in enumerate(parts)}
    return dispatch_model(model, map_, main_device="cpu", offload_dir=folder)


def _layers_at_once(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Layers on disk, each of which loads all of its weights when it is entered."""
    map_ = {path: "disk" if _is_layer(path) else "cpu" for path in parts_of(model)}
    kinds = {type(part).__name__ for path, part in parts_of(model).items() if _is_layer(path)}
    return dispatch_model(
        model, map_, main_device="cpu", offload_dir=folder, preload_module_classes=sorted(kinds)
    )


WAYS: Mapping[str, Way] = {
    "memory": _memory,
    "memory with buffers": _memory_with_buffers,
    "disk": _disk,
    "mixed": _mixed,
    "layers at once": _layers_at_once,
}


def parts_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers, and the modules beside them, by path: what device maps are made of."""
    found: dict[str, nn.Module] = {}
    for path, part in model.named_children():
        for inner, child in part.named_children():
            whole = f"{path}.{inner}"
            if isinstance(child, nn.ModuleList):
                found.update({f"{whole}.{number}": layer for number, layer in enumerate(child)})
            else:
                found[whole] = child
        if not list(part.named_children()):
            found[path] = part
    return found


def _is_layer(path: str) -> bool:
    return path.rpartition(".")[2].isdigit()


def loaded(model: nn.Module) -> set[str]:
    """The parameters that have data now."""
    return {name for name, parameter in model.named_parameters() if not parameter.is_meta}
