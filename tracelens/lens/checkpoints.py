"""Where a training stands, in a file, so that it can go on there and end as it would have without a stop."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tracelens.errors import LensTrainingError
from tracelens.lens.head import on
from tracelens.lens.training import Progress
from tracelens.lens.translators import named

FILE = "training.safetensors"
_HOST = torch.device("cpu")


def store(progress: Progress, identity: dict[str, Any], folder: Path) -> None:
    """Writes the file; whoever looks sees the old one or the new one, whole."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"map.{name}": tensor for name, tensor in named(progress.translators).items()}
    for number, parameter in enumerate(progress.parameters):
        for key, value in progress.optimizer.state[parameter].items():
            tensors[f"optimizer.{number}.{key}"] = value
    tensors["losses"] = torch.tensor(progress.losses, dtype=torch.float64)
    host = {name: on(tensor.detach(), _HOST).contiguous() for name, tensor in tensors.items()}
    scratch = folder / (FILE + ".writing")
    save_file(host, scratch, metadata={"training": json.dumps(identity, sort_keys=True)})
    os.replace(scratch, folder / FILE)


def resume(progress: Progress, identity: dict[str, Any], folder: Path) -> None:
    """Brings a training to where the file says it stands, if there is one.

    Raises :class:`LensTrainingError` if that is another training: of other texts, another model or another plan.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.exists():
        return
    try:
        with safe_open(path, "pt") as file:
            stored = json.loads((file.metadata() or {})["training"])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise LensTrainingError(
            f"{path} is no intact checkpoint of a training: {error}", instead="another folder as checkpoint="
        ) from None
    # What JSON makes of the plan: tuples are lists there.
    wanted = json.loads(json.dumps(identity))
    if stored != wanted:
        differ = [name for name in sorted({*stored, *wanted}) if stored.get(name) != wanted.get(name)]
        words = "; ".join(f"{name}: {stored.get(name)!r} there, {wanted.get(name)!r} here" for name in differ)
        raise LensTrainingError(
            f"{path} is of another training ({words})",
            instead="the same arguments and texts as there, or another folder as checkpoint=",
        )
    with torch.no_grad():
        for name, tensor in named(progress.translators).items():
            tensor.copy_(tensors[f"map.{name}"])
    for number, parameter in enumerate(progress.parameters):
        prefix = f"optimizer.{number}."
        state = {
            name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
        }
        # Adam counts its steps on the host.
        progress.optimizer.state[parameter] = {
            key: value if value.ndim == 0 else on(value, parameter.device) for key, value in state.items()
        }
    progress.losses[:] = tensors["losses"].tolist()
