"""Models whose weights accelerate keeps in memory or on disk, and brings to their modules for each forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import device, nn
from transformers import PreTrainedModel


class Way(Protocol):
    """Offloads a model, of which everything runs on one device."""

    def __call__(self, model: PreTrainedModel, folder: Path, on: str = "cpu") -> PreTrainedModel: ...


def _memory(model: PreTrainedModel, folder: Path, on: str = "cpu") -> PreTrainedModel:
    return cast(PreTrainedModel, cpu_offload(model, execution_device=device(on)))


def _memory_with_buffers(model: PreTrainedModel, folder: Path, on: str = "cpu") -> PreTrainedModel:
    return cast(PreTrainedModel, cpu_offload(model, execution_device=device(on), offload_buffers=True))


def _disk(model: PreTrainedModel, folder: Path, on: str = "cpu") -> PreTrainedModel:
    return cast(PreTrainedModel, disk_offload(model, folder, execution_device=device(on)))


def _mixed(model: PreTrainedModel, folder: Path, on: str = "cpu") -> PreTrainedModel:
    """Every second part on disk, the others where they run."""
    places = {path: "disk" if number % 2 else on for number, path in enumerate(parts_of(model))}
    return _dispatched(model, places, folder, on)


def _layers_at_once(model: PreTrainedModel, folder: Path, on: str = "cpu") -> PreTrainedModel:
    """Layers on disk, each of which loads all of its weights when it is entered."""
    places = {path: "disk" if _is_layer(path) else on for path in parts_of(model)}
    kinds = {type(part).__name__ for path, part in parts_of(model).items() if _is_layer(path)}
    return _dispatched(model, places, folder, on, preload_module_classes=sorted(kinds))


def _dispatched(
    model: PreTrainedModel, places: Mapping[str, str], folder: Path, on: str, **options: Any
) -> PreTrainedModel:
    found = dispatch_model(model, {**places}, main_device=device(on), offload_dir=folder, **options)
    return cast(PreTrainedModel, found)


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
