"""Steering vectors of other packages: llama.cpp's and repeng's GGUF, steering-vectors, the tensors of CAA."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tracelens.errors import (
    Blaming,
    MissingExtraError,
    SteeringFileError,
    SteeringMismatchError,
    SteeringVectorError,
)
from tracelens.extras import required
from tracelens.ir.sites import Site
from tracelens.location import here
from tracelens.steering.facts import Facts, Place
from tracelens.steering.vector import SteeringVector

if TYPE_CHECKING:
    from tracelens.model import Model

ARCH = "controlvector"
_FACTS = f"{ARCH}.tracelens_facts"
_DIRECTION = re.compile(r"direction\.(\d+)")

# --- GGUF: llama.cpp and repeng --------------------------------------------------------------------------------------


def write_gguf(vector: SteeringVector, path: Path) -> None:
    """Writes ``direction.k``, one 1-D F32 tensor for each layer: llama.cpp adds it to what leaves block k."""
    gguf = required("gguf", extra="demo", what="a GGUF file")
    _require_alone(vector, "resid_post", "llama.cpp adds control vectors to what leaves a block")
    if 0 in vector.layers:
        raise SteeringVectorError(
            "llama.cpp has no direction for the block 0, and refuses files with one",
            instead="v.at(layers=range(1, model.n_layers)).to_gguf(path)",
        )
    require_folder(path)
    writer = gguf.GGUFWriter(path, ARCH)
    writer.add_string(f"{ARCH}.model_hint", vector.facts.architecture or vector.facts.model or "unknown")
    writer.add_uint32(f"{ARCH}.layer_count", len(vector))
    writer.add_string(_FACTS, json.dumps(vector.facts.to_dict(), sort_keys=True))
    for (_, layer), direction in vector.directions.items():
        writer.add_tensor(f"direction.{layer}", direction.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path, model: Model | None) -> SteeringVector:
    """Reads the control vector of a GGUF file."""
    gguf = required("gguf", extra="demo", what="a GGUF file")
    path.stat()
    reader = gguf.GGUFReader(path)
    said = {name: _text(reader, name) for name in ("general.architecture", f"{ARCH}.model_hint", _FACTS)}
    if said["general.architecture"] != ARCH:
        raise SteeringFileError(
            f"{path.name} is a GGUF file of {said['general.architecture']!r}, and a vector's is of {ARCH!r}",
            instead="the file of a control vector",
        )
    directions: dict[Place, Any] = {}
    for tensor in reader.tensors:
        numbered = _DIRECTION.fullmatch(tensor.name)
        if numbered is None or tensor.tensor_type != gguf.GGMLQuantizationType.F32 or len(tensor.shape) != 1:
            raise SteeringFileError(
                f"{path.name} has a tensor {tensor.name!r} of {tensor.tensor_type.name} with {len(tensor.shape)} axes",
                instead="tensors direction.1, direction.2, ... of F32 with one axis, as llama.cpp reads them",
            )
        directions["resid_post", int(numbered[1])] = torch.from_numpy(tensor.data.copy())
    if len({len(direction) for direction in directions.values()}) > 1:
        raise SteeringFileError(
            f"{path.name} has directions of several lengths", instead="directions of one model"
        )
    if facts := said[_FACTS]:
        return SteeringVector(directions, Facts.from_dict(json.loads(facts)))
    hint = said[f"{ARCH}.model_hint"]
    _require_architecture(hint, model, path.name)
    return SteeringVector(directions, _facts(model, "control vector", architecture=hint))


def _require_architecture(hint: str | None, model: Model | None, what: str) -> None:
    if model is None or not hint:
        return
    kind: str = model.config.model_type
    known = {_plain(kind), _plain(kind.removesuffix("_text")), _plain(_LLAMA_CPP.get(kind, kind))}
    if _plain(hint) not in known:
        raise SteeringMismatchError(
            f"{what} is for a {hint}, and the model is a {kind}", instead="a vector of this model"
        )


_LLAMA_CPP = {"mistral": "llama", "mixtral": "llama"}
"""What llama.cpp calls kinds of models that have another name in transformers."""


def _plain(name: str) -> str:
    """Names of architectures are written with and without marks between the words."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _text(reader: Any, name: str) -> str | None:
    found = reader.get_field(name)
    return None if found is None else bytes(found.parts[-1]).decode("utf-8")


def to_repeng(vector: SteeringVector) -> Any:
    """A ``ControlVector`` of repeng, whose directions belong to what leaves a block; needs that package.

    Raises :class:`~tracelens.errors.SteeringVectorError` for other sites.
    """
    with Blaming(here()):
        try:
            repeng = required("repeng", extra=None, what="a ControlVector of repeng")
        except AttributeError as error:  # repeng 0.4 names np.float_, which numpy 2 has no more
            raise MissingExtraError(
                f"this repeng cannot be imported beside this numpy: {str(error).splitlines()[0]}",
                instead='pip install "numpy<2", or a newer repeng; to_gguf and from_gguf need neither',
            ) from error
        _require_alone(vector, "resid_post", "repeng adds directions to what leaves a block")
    kind = vector.facts.architecture or vector.facts.model or "unknown"
    return repeng.ControlVector(kind, {layer: vector[site, layer].numpy().copy() for site, layer in vector})


def from_repeng(found: Any, model: Model | None = None) -> SteeringVector:
    """A steering vector of a ``ControlVector`` of repeng: direction l belongs to what leaves block l, ``resid_post``.

    Raises :class:`~tracelens.errors.SteeringMismatchError` for one of another kind of model.
    """
    hint = str(found.model_type)
    with Blaming(here()):
        _require_architecture(hint, model, "the control vector")
        directions = {("resid_post", int(layer)): direction for layer, direction in found.directions.items()}
        return _checked(SteeringVector(directions, _facts(model, "control vector", architecture=hint)), model)


# --- steering-vectors ------------------------------------------------------------------------------------------------

_SITE_OF = {
    "decoder_block": "resid_post",
    "self_attn": "attn_out",
    "mlp": "mlp_out",
    "input_layernorm": "attn_norm",
}
_AFTER_ATTENTION = "post_attention_layernorm"


class _Stored:
    """What a saved SteeringVector of that package is read as: its attributes, and none of its code."""

    layer_activations: Mapping[int, Tensor]
    layer_type: str = "decoder_block"


def to_steering_vectors(vector: SteeringVector, model: Model | None = None) -> Any:
    """A ``SteeringVector`` of the steering-vectors package, for one site; needs that package.

    ``model``: needed for ``post_ln``, since the module of the name that the package has for it is another one in some
    families. Raises :class:`~tracelens.errors.SteeringVectorError` for sites that the package does not know.
    """
    types = {site: kind for kind, site in _SITE_OF.items()}
    if model is not None:
        types[_after_attention(model)] = _AFTER_ATTENTION
    (site, *others) = vector.sites
    with Blaming(here()):
        package = required("steering_vectors", extra=None, what="a SteeringVector of steering-vectors")
        if others or site not in types:
            raise SteeringVectorError(
                f"steering-vectors has one of {', '.join(types)} in a vector, and this has {', '.join(vector.sites)}",
                instead=f'v.at(sites="{next(iter(types))}"); for post_ln, to_steering_vectors(v, model)',
            )
    activations = {layer: vector[site, layer].clone() for _, layer in vector}
    return package.SteeringVector(activations, types[site])


def from_steering_vectors(found: Any, model: Model | None = None) -> SteeringVector:
    """A steering vector of a ``SteeringVector`` of the steering-vectors package.

    Its layer types are the outputs of modules: ``decoder_block`` is ``resid_post``, ``self_attn`` ``attn_out``, ``mlp``
    ``mlp_out``, ``input_layernorm`` ``attn_norm``; ``post_attention_layernorm`` is ``post_ln`` in most families and
    ``attn_post_norm`` in Gemma's, so it needs the ``model``. Raises
    :class:`~tracelens.errors.SteeringVectorError` without it, and for a type that is not known.
    """
    kind = str(found.layer_type)
    with Blaming(here()):
        if kind == _AFTER_ATTENTION and model is not None:
            site = _after_attention(model)
        elif kind in _SITE_OF:
            site = _SITE_OF[kind]
        else:
            raise SteeringVectorError(
                f"the vector is for modules {kind!r}, and it is not known which site that is",
                instead="from_steering_vectors(vector, model)"
                if kind == _AFTER_ATTENTION
                else ", ".join(_SITE_OF),
            )
        directions = {
            (site, _layer(layer, model)): tensor for layer, tensor in found.layer_activations.items()
        }
        return _checked(SteeringVector(directions, _facts(model, "steering-vectors")), model)


def _after_attention(model: Model) -> str:
    """Which site the norm of that name makes: in families with a norm behind attention, that one has the name."""
    return "attn_post_norm" if model.anatomy.has(Site("attn_post_norm", 0)) else "mlp_norm"


# --- tensors: CAA, and saved objects ---------------------------------------------------------------------------------

_CAA = re.compile(r"vec_layer_(\d+)_.*\.pt")


def write_folder(vector: SteeringVector, folder: Path) -> None:
    """Writes one ``vec_layer_L_MODEL.pt`` for each layer, as CAA has them."""
    _require_alone(vector, "resid_post", "CAA adds vectors to what leaves a block")
    folder.mkdir(parents=True, exist_ok=True)
    name = (vector.facts.model or "model").rstrip("/").rpartition("/")[2]
    for site, layer in vector:
        torch.save(vector[site, layer].clone(), folder / f"vec_layer_{layer}_{name}.pt")


def read_folder(folder: Path, model: Model | None, site: str) -> SteeringVector:
    """Reads all ``vec_layer_L_*.pt`` of a folder."""
    found: dict[Place, Any] = {}
    for path in sorted(folder.iterdir()):
        if (numbered := _CAA.fullmatch(path.name)) is None:
            continue
        place = (site, int(numbered[1]))
        if place in found:
            raise SteeringFileError(
                f"{folder.name} has two files for layer {numbered[1]}",
                instead="a folder with those of one model",
            )
        found[place] = _one(_tensor(_unpickled(path), path))
    if not found:
        raise SteeringFileError(
            f"the folder {folder.name!r} has no vec_layer_*.pt", instead="a folder of CAA's vectors"
        )
    return SteeringVector(found, _facts(model, "CAA"))


def read_tensors(path: Path, model: Model | None, layer: int | None, site: str) -> SteeringVector:
    """Reads a tensor, a dict of tensors by layer, or an object of the steering-vectors package."""
    found = _unpickled(path)
    if isinstance(found, _Stored):
        return from_steering_vectors(found, model)
    if isinstance(found, Mapping):
        directions = {
            (site, _layer(number, model)): _one(_tensor(tensor, path)) for number, tensor in found.items()
        }
        return SteeringVector(directions, _facts(model, "tensors"))
    direction = _tensor(found, path)
    if direction.ndim > 1 and direction.shape[:-1].numel() > 1:
        raise SteeringFileError(
            f"{path.name} holds a tensor {list(direction.shape)}, and does not say which layer each row belongs to",
            instead="rows = torch.load(path), then SteeringVector.from_directions(model, {(site, layer): "
            "row for layer, row in enumerate(rows)}); hidden_states[l + 1] is layer l's resid_post",
        )
    numbered = _CAA.fullmatch(path.name)
    said = None if numbered is None else int(numbered[1])
    if layer is None and said is None:
        raise SteeringFileError(
            f"{path.name} does not say which layer its tensor belongs to",
            instead="tl.steering.load(path, layer=13)",
        )
    number = _layer(said if layer is None else layer, model)
    if said is not None and number != said:
        raise SteeringFileError(
            f"{path.name} says that it is of layer {said}, and layer={layer} was given",
            instead=f"tl.steering.load(path); to use it at another layer, SteeringVector({{({site!r}, {number}): "
            f"v[{site!r}, {said}]}})",
        )
    return SteeringVector({(site, number): _one(direction)}, _facts(model, "CAA"))


def _unpickled(path: Path) -> Any:
    """What a file of torch holds, if it is tensors in plain containers; nothing in it is run."""
    known: Any = [(_Stored, "steering_vectors.steering_vector.SteeringVector")]
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SteeringFileError(
            f"{path.name} holds more than tensors, and reading it could run what is in it",
            instead="tensors alone: torch.save(tensor, path), or v.save(path) in safetensors",
        ) from error


def _one(direction: Tensor) -> Tensor:
    """One direction, also where it is written with axes of one before its own: [1, width]."""
    return direction.reshape(-1) if direction.ndim and direction.shape[:-1].numel() == 1 else direction


def _tensor(found: Any, path: Path) -> Tensor:
    if not isinstance(found, Tensor):
        raise SteeringFileError(
            f"{path.name} holds a {type(found).__name__} where a tensor should be",
            instead="a tensor, a dict of tensors by layer, or a SteeringVector of the steering-vectors package",
        )
    return found


# --- for all of them -------------------------------------------------------------------------------------------------


def require_folder(path: Path) -> None:
    """Raises for a file that is to be written in a folder that is not there."""
    if not path.absolute().parent.is_dir():
        raise SteeringFileError(
            f"{path}: there is no folder {path.parent}",
            instead=f"Path({str(path.parent)!r}).mkdir(parents=True) before",
        )


def _layer(number: Any, model: Model | None) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or (number < 0 and model is None):
        raise SteeringFileError(
            f"{number!r} is no layer"
            if not isinstance(number, int)
            else f"layer {number} counts from the end",
            instead="layers counted from 0; or the model: tl.steering.load(path, model)",
        )
    return number + model.n_layers if number < 0 and model is not None else number


def _facts(model: Model | None, method: str, architecture: str | None = None) -> Facts:
    return (
        Facts(method=method, architecture=architecture) if model is None else Facts.of(model, method=method)
    )


def _checked(vector: SteeringVector, model: Model | None) -> SteeringVector:
    if model is not None:
        vector.check(model)
    return vector


def _require_alone(vector: SteeringVector, site: str, why: str) -> None:
    if vector.sites != (site,):
        raise SteeringVectorError(
            f"{why}, which is {site}, and this vector is for {', '.join(vector.sites)}",
            instead=f'v.at(sites="{site}")',
        )
