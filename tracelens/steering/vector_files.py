"""Steering vectors in files: safetensors with all facts, and by the ending of the name the formats of others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tracelens.errors import (
    Blaming,
    MissingExtraError,
    SteeringFileError,
    SteeringMismatchError,
    TracelensError,
)
from tracelens.ir.sites import KIND
from tracelens.location import here
from tracelens.steering import interchange
from tracelens.steering.facts import Facts, key_of, place_of
from tracelens.steering.vector import SteeringVector

if TYPE_CHECKING:
    from tracelens.model import Model
    from tracelens.steering.activation_addition import ActivationAddition

FORMAT, VERSION = "tracelens.steering", 1
LAYERS = "counted from 0; resid_post is what leaves the block of that number, resid_pre what enters it"


def save(vector: SteeringVector | ActivationAddition, path: Path) -> None:
    """Writes a vector, or a sequence of them, to a safetensors file."""
    from safetensors.torch import save_file

    if path.suffix.lower() != ".safetensors":
        raise SteeringFileError(
            f"{path.name!r} does not end in .safetensors",
            instead='v.save("v.safetensors"), or v.to_gguf("v.gguf")',
        )
    interchange.require_folder(path)
    tensors = {key_of(place): direction.contiguous() for place, direction in vector.directions.items()}
    said = {
        "version": VERSION,
        "layers": LAYERS,
        "digest": _digest(tensors),
        "facts": vector.facts.to_dict(),
    }
    tokens = getattr(vector, "tokens", None)
    if tokens is not None:
        said["tokens"] = tokens
        said["words"] = getattr(vector, "words", None)
    save_file(tensors, path, metadata={FORMAT: json.dumps(said, sort_keys=True)})


def load(
    path: str | Path, model: Model | None = None, *, layer: int | None = None, site: str = "resid_post"
) -> SteeringVector:
    """Reads a steering vector from a file of :meth:`SteeringVector.save`, or in a format of others.

    ``.safetensors`` has all its facts. ``.gguf``: control vectors of llama.cpp and repeng, ``direction.k``, which
    belongs to what leaves block k, counted from 0. ``.pt``: a tensor of CAA (``vec_layer_13_....pt``, or with
    ``layer=``), a dict of them by layer, or a saved object of the steering-vectors package; of these nothing but
    tensors is read, so no code in them runs. A folder: all ``vec_layer_*.pt`` in it. ``site``: where a bare tensor
    belongs, for CAA what leaves the block.

    ``model``: the model that it is to be one for; directions in files without facts are taken for this model's, if they
    fit. Raises :class:`~tracelens.errors.SteeringMismatchError` where it is not, and
    :class:`~tracelens.errors.SteeringFileError` for files that are not whole, or no vectors.

    >>> v = tl.steering.load("v.safetensors", model)                                     # doctest: +SKIP
    """
    path = Path(path)
    with Blaming(here()):
        with _told(path):
            vector = _read(path, model, layer, site)
        if model is not None:
            try:
                vector.check(model)
            except SteeringMismatchError as error:
                raise SteeringMismatchError(
                    f"{path.name}: {error.problem}", instead=_of_which(vector, model) or error.instead
                ) from None
    return vector


def _of_which(vector: SteeringVector, model: Model) -> str | None:
    """Which model to take, for a file that says no more of its own than how wide its directions are."""
    widths = {len(direction) for direction in vector.directions.values()}
    inside = any(KIND[site].shape[-1] != "D" for site in vector.sites)
    if vector.facts.method not in ("CAA", "tensors", "steering-vectors") or len(widths) > 1 or inside:
        return None
    if (width := widths.pop()) == model.anatomy.widths["D"]:
        return None
    known = _KNOWN_WIDTHS.get(width)
    return f"the model that it was made for, whose d_model is {width}" + (
        f", such as {known}" if known else ""
    )


_KNOWN_WIDTHS = {
    4096: "Llama-2-7b, Llama-3-8B or Mistral-7B",
    5120: "Llama-2-13b or Qwen2.5-14B",
    8192: "Llama-2-70b or Llama-3-70B",
    3584: "Gemma-2-9b or Qwen2.5-7B",
    2304: "Gemma-2-2b",
}
"""Models whose vectors people share, by the width of their residual stream."""


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Says of whatever a reader of a format raises which file it is about."""
    try:
        yield
    except (MissingExtraError, SteeringMismatchError, SteeringFileError):
        raise
    except FileNotFoundError:
        raise SteeringFileError(
            f"there is no file {str(path)!r}", instead="the path of a vector's file"
        ) from None
    except Exception as error:
        words = error.problem if isinstance(error, TracelensError) else f"{type(error).__name__}: {error}"
        raise SteeringFileError(
            f"{path.name} is no steering vector, or not a whole one: {words.splitlines()[0]}",
            instead='a file of v.save("v.safetensors"), v.to_gguf("v.gguf"), or of the packages that are named in '
            "tl.steering.load",
        ) from error


def _read(path: Path, model: Model | None, layer: int | None, site: str) -> SteeringVector:
    if path.is_dir():
        return interchange.read_folder(path, model, site)
    match path.suffix.lower():
        case ".safetensors":
            return _read_safetensors(path)
        case ".gguf":
            return interchange.read_gguf(path, model)
        case ".pt" | ".pth" | ".bin":
            return interchange.read_tensors(path, model, layer, site)
        case _:
            raise SteeringFileError(
                f"{path.name!r} has no ending that names a format", instead=".safetensors, .gguf or .pt"
            )


def load_addition(path: Path, model: Model | None) -> ActivationAddition:
    """Reads an activation addition from its file."""
    from tracelens.steering.activation_addition import ActivationAddition

    with _told(path):
        said, tensors = _stored(path)
        if "tokens" not in said:
            raise SteeringFileError(
                f"{path.name} holds a steering vector, which is no sequence of directions",
                instead="tl.steering.load(path, model)",
            )
        one, other = (tuple(ids) for ids in said["tokens"])
        directions = {place_of(name): tensor for name, tensor in tensors.items()}
        words = said.get("words")
        spelt = None if words is None else (tuple(words[0]), tuple(words[1]))
        found = ActivationAddition(directions, Facts.from_dict(said["facts"]), (one, other), spelt)
    if model is not None:
        found.check(model)
    return found


def _read_safetensors(path: Path) -> SteeringVector:
    said, tensors = _stored(path)
    if "tokens" in said:
        raise SteeringFileError(
            f"{path.name} holds an activation addition, with a direction for each of {len(said['tokens'][0])} "
            "tokens",
            instead="tl.steering.ActivationAddition.load(path, model)",
        )
    return SteeringVector(
        {place_of(name): tensor for name, tensor in tensors.items()}, Facts.from_dict(said["facts"])
    )


def _stored(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a file of :func:`save` says, and its tensors, which have to be as they were written."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        said: dict[str, Any] = json.loads((file.metadata() or {}).get(FORMAT, "null"))
        if said is None:
            raise SteeringFileError(
                f"{path.name} holds tensors, and does not say that they are a steering vector",
                instead="SteeringVector.from_directions(model, {place: tensor}) of what safetensors reads",
            )
        if said["version"] > VERSION:
            raise SteeringFileError(
                f"{path.name} is in version {said['version']} of its format, and this tracelens knows {VERSION}",
                instead="a newer tracelens",
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
    if _digest(tensors) != said["digest"]:
        raise SteeringFileError(
            f"{path.name} has been changed since it was written", instead="the file as it was"
        )
    return said, tensors


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {tuple(tensors[name].shape)}".encode())
        found.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
