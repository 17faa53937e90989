"""Tuned lenses as folders, in the layout of the tuned-lens package: ``config.json`` and the maps beside it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from tracelens.errors import LensFolderError
from tracelens.lens.translators import Translator

CONFIG = "config.json"
SAFE, PICKLED = "params.safetensors", "params.pt"
PUBLISHED = "AlignmentResearch/tuned-lens"
"""The Space on the hub with the lenses that the authors of the tuned lens have trained."""
_KIND = "linear_tuned_lens"


@dataclass(frozen=True)
class LensConfig:
    """What a folder says of its lens. All but ``tracelens`` are the tuned-lens package's own words.

    ``unembed_hash``: the loose digest of the model's unembedding; ``tracelens["unembed_sha256"]`` are the strict ones.
    """

    base_model_name_or_path: str
    d_model: int
    num_hidden_layers: int
    bias: bool = True
    base_model_revision: str | None = None
    unembed_hash: str | None = None
    lens_type: str = _KIND
    tracelens: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def strict(self) -> Mapping[str, str]:
        """The strict digests of the unembedding, by dtype; none in a folder that another program wrote."""
        found = self.tracelens.get("unembed_sha256")
        return cast("dict[str, str]", found) if isinstance(found, dict) else {}


def write(folder: Path, config: LensConfig, tensors: Mapping[str, Tensor], *, pickled: bool) -> None:
    """Writes a lens; ``pickled``: the maps in the form that the tuned-lens package reads."""
    from safetensors.torch import save_file

    if folder.exists() and not folder.is_dir():
        raise LensFolderError(f"{folder} is a file", instead="the folder that the lens is to be in")
    folder.mkdir(parents=True, exist_ok=True)
    content = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    if pickled:
        torch.save(content, folder / PICKLED)
    else:
        save_file(content, folder / SAFE)
    # What an earlier save left there is of another lens.
    (folder / (SAFE if pickled else PICKLED)).unlink(missing_ok=True)
    (folder / CONFIG).write_text(json.dumps(asdict(config), indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> tuple[LensConfig, list[Translator]]:
    """Reads a lens; raises :class:`LensFolderError` for a folder that is none, or not whole."""
    config = _config(folder / CONFIG)
    for name, content_of in ((SAFE, _safe), (PICKLED, _unpickled)):
        if (folder / name).is_file():
            return config, _translators(config, content_of(folder / name), folder / name)
    raise LensFolderError(
        f"{folder} has a {CONFIG}, and neither {SAFE} nor {PICKLED} beside it",
        instead="the whole folder that lens.save wrote, or a published lens' folder",
    )


def _config(path: Path) -> LensConfig:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LensFolderError(f"there is no tuned lens in {path.parent}: {error}", instead=_FOLDER) from None
    known = {entry.name for entry in fields(LensConfig)}
    given: dict[str, Any] = (
        {name: found[name] for name in known & set(found)} if isinstance(found, dict) else {}
    )
    shapes = ("d_model", "num_hidden_layers")
    if (
        not all(type(given.get(name)) is int and given[name] > 0 for name in shapes)
        or not isinstance(given.get("base_model_name_or_path"), str)
        or not isinstance(given.get("tracelens", {}), dict)
    ):
        raise LensFolderError(
            f"{path} is no {CONFIG} of a tuned lens: it has to say base_model_name_or_path, d_model and "
            "num_hidden_layers",
            instead=_FOLDER,
        )
    kind = given.get("lens_type", _KIND)
    if kind != _KIND:
        raise LensFolderError(
            f"{path} is of a lens of the type {kind!r}, which is not known here", instead=f"one of {_KIND!r}"
        )
    return LensConfig(**given)


_FOLDER = f"a folder with {CONFIG}, and with {SAFE} or {PICKLED}"


def _safe(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise LensFolderError(f"{path} is not an intact safetensors file: {error}", instead=_FOLDER) from None


def _unpickled(path: Path) -> Any:
    """The tensors of a file that ``torch.save`` wrote. Nothing but tensors is ever made of it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise LensFolderError(
            f"{path} is not a file of tensors alone, and other things are not unpickled, since that would run code: "
            + str(error).splitlines()[0],
            instead=f"the lens in the form {SAFE}: lens.save(folder), where it can be loaded",
        ) from None


def _translators(config: LensConfig, content: Any, path: Path) -> list[Translator]:
    kinds = ("weight", "bias") if config.bias else ("weight",)
    names = [f"{layer}.{kind}" for layer in range(config.num_hidden_layers) for kind in kinds]
    found: dict[str, Any] = content if isinstance(content, dict) else {}
    if set(found) != set(names):
        odd = sorted(map(str, set(found) ^ set(names)))
        raise LensFolderError(
            f"{path} does not have the maps of {config.num_hidden_layers} layers, 0.weight to {names[-1]}: "
            + ", ".join(
                f"{name} {'is missing' if name in names else 'is something else'}" for name in odd[:3]
            ),
            instead="a lens of the format linear_tuned_lens; older ones are to be converted by tuned-lens itself",
        )
    width = config.d_model
    for name in names:
        tensor, shape = found[name], (width, width) if name.endswith("weight") else (width,)
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise LensFolderError(
                f"{name} in {path} is no map for d_model {width}: {_words(tensor)}", instead=_FOLDER
            )
        if not tensor.isfinite().all():
            raise LensFolderError(f"{name} in {path} has numbers that are not finite", instead=_FOLDER)
    wide = {name: found[name].float() for name in names}
    return [
        Translator(wide[f"{layer}.weight"], wide.get(f"{layer}.bias"))
        for layer in range(config.num_hidden_layers)
    ]


def _words(found: object) -> str:
    if not isinstance(found, Tensor):
        return type(found).__name__
    return f"{list(found.shape)} of {str(found.dtype).removeprefix('torch.')}"


def fetched(name: str, repo: str | None, revision: str | None) -> Path:
    """The folder of a lens on the hub, brought here (or from the cache): a published one, or one in ``repo``."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    where = {"repo_id": repo or PUBLISHED, "repo_type": "model" if repo else "space", "revision": revision}
    within = f"lens/{name}" if repo is None else name.strip("./")
    folder = f"{within}/" if within else ""
    try:
        config = hf_hub_download(filename=folder + CONFIG, **where)
        try:
            hf_hub_download(filename=folder + (PICKLED if repo is None else SAFE), **where)
        except EntryNotFoundError as error:
            if repo is None or isinstance(error, FileNotFoundError):
                raise
            hf_hub_download(filename=folder + PICKLED, **where)
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise LensFolderError(
            f"there is no folder {name!r} here, and no lens of that name could be had from "
            f"{where['repo_id']} on the hub: " + str(error).strip().splitlines()[0],
            instead=_FOLDER + "; or the name of a published lens, where the hub can be reached",
        ) from error
    return Path(config).parent
