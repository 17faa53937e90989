"""What a run leaves behind: the saved tensors, each with what it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tracelens.errors import UnknownSaveError
from tracelens.extras import required
from tracelens.ir import dims
from tracelens.ir.graph import Graph
from tracelens.ir.ops import (
    Grad,
    Index,
    IndexItem,
    OwnTokens,
    PromptRow,
    Read,
    Ref,
    Save,
    TokenSelector,
    operands,
)
from tracelens.ir.sites import Site
from tracelens.ir.text import index_text
from tracelens.ir.types import TensorType
from tracelens.ir.windows import DECODE, PREFILL, StepWindow
from tracelens.location import here
from tracelens.selection import written
from tracelens.view import Shown, Table, View

if TYPE_CHECKING:
    import pandas

Fetch = Callable[[], Any]


@dataclass(frozen=True)
class SavedTensor:
    """One saved tensor and what it is.

    ``site``, ``layers`` and ``part`` (``[:, -1]``, ``.tok["Paris"]``) say where it was read, if it is a site or an
    indexed part of one; ``gradient``, whether it is the gradient with respect to that site instead. ``axes`` names its
    axes (``layer``, ``row``, ``position``, or the axis' number); ``fetch()`` gives the tensor, or for prompts of
    different lengths a list of one tensor per prompt.
    """

    name: str
    fetch: Fetch
    type: TensorType
    axes: tuple[str, ...]
    site: Site | None = None
    layers: tuple[int, ...] = ()
    part: str = ""
    gradient: bool = False
    prompt: int | None = None
    steps: StepWindow | None = None
    """In which steps of a generation it was made."""

    @property
    def tensor(self) -> Any:
        """The saved tensor; for prompts of different lengths a list of one tensor per prompt."""
        return self.fetch()

    @property
    def described(self) -> str:
        """What was saved, in the words of the block."""
        if self.site is None:
            return "computed"
        where = f"layers[{_span(self.layers)}].{self.site.name}" if self.layers else self.site.name
        if self.prompt is not None:
            where = f"prompts[{self.prompt}].{where}"
        if self.steps is not None and not self.steps.every:
            where = f"{_scope(self.steps)}.{where}"
        return f"gradient at {where}{self.part}" if self.gradient else where + self.part


class Results(Mapping[str, Any], Shown):
    """The saved tensors of one run by name, in the order in which they were saved.

    ``results["h"]`` is a plain tensor. In a notebook the object shows itself as a table.
    """

    def __init__(self, described: Sequence[SavedTensor], tensors: Mapping[str, Fetch]) -> None:
        self._described = described
        self._tensors = {saved.name: tensors[saved.name] for saved in described}

    @cached_property
    def entries(self) -> dict[str, SavedTensor]:
        """The tensors with what they are: site, layers, axes."""
        return {saved.name: replace(saved, fetch=self._tensors[saved.name]) for saved in self._described}

    def __getitem__(self, name: str) -> Any:
        try:
            return self._tensors[name]()
        except KeyError:
            raise self._unknown(name) from None

    def _unknown(self, name: object) -> UnknownSaveError:
        known = ", ".join(map(repr, self._tensors)) or "nothing"
        return UnknownSaveError(
            f"nothing was saved as {name!r}; saved: {known}",
            at=here(),
            instead="value.save(name) in the block, and the same name here",
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    # --- elsewhere -----------------------------------------------------------------------------------------------

    def to_safetensors(self, path: str | Path) -> Path:
        """Writes all tensors to one safetensors file; ragged results get an entry per prompt (``name.0``)."""
        from safetensors.torch import save_file

        flat: dict[str, torch.Tensor] = {}
        for name, entry in self.entries.items():
            tensor = entry.tensor
            parts = (
                {name: tensor}
                if isinstance(tensor, torch.Tensor)
                else {f"{name}.{i}": t for i, t in enumerate(tensor)}
            )
            flat |= {key: part.detach().cpu().contiguous().clone() for key, part in parts.items()}
        metadata = {name: entry.described for name, entry in self.entries.items()}
        save_file(flat, str(path), metadata=metadata)
        return Path(path)

    def numpy(self) -> dict[str, Any]:
        """All tensors as numpy arrays (ragged results as lists); bfloat16, which numpy lacks, becomes float32."""
        return {name: _numpy(entry.tensor) for name, entry in self.entries.items()}

    def to_pandas(self, name: str | None = None) -> pandas.DataFrame:
        """A table: with ``name`` one row per number of that tensor, its axes as columns; else one row per tensor."""
        pandas: Any = required("pandas", extra="pandas", what="results.to_pandas()")
        if name is None:
            return pandas.DataFrame([_summary(entry) for entry in self.entries.values()]).set_index("name")
        if name not in self.entries:
            raise self._unknown(name)
        entry = self.entries[name]
        tensor = entry.tensor
        parts = [tensor] if isinstance(tensor, torch.Tensor) else list(tensor)
        frames: list[pandas.DataFrame] = []
        for number, part in enumerate(parts):
            array = _numpy(part)
            index = np.indices(array.shape).reshape(array.ndim, -1)
            columns = dict(zip(entry.axes, index, strict=True))
            if len(parts) > 1 and "row" in columns:
                columns["row"] = np.full_like(columns["row"], number)
            if "step" in columns and entry.steps is not None:
                columns["step"] = columns["step"] + entry.steps.start
            if "layer" in columns and entry.layers:
                columns["layer"] = np.asarray(entry.layers)[columns["layer"]]
            frames.append(pandas.DataFrame({**columns, "value": array.reshape(-1)}))
        return pandas.concat(frames, ignore_index=True)

    # --- views ---------------------------------------------------------------------------------------------------

    def _view(self) -> View:
        rows = tuple(_cells(entry) for entry in self.entries.values())
        return Table(_HEADS, rows, empty="Results: nothing was saved")


_HEADS = ("name", "what", "shape", "dtype", "device", "min", "mean", "max")


def _scope(steps: StepWindow) -> str:
    """The steps as one writes them in a block."""
    if steps in _SCOPES:
        return _SCOPES[steps]
    return f"steps[{steps.start if steps.single else steps}]"


_SCOPES = {PREFILL: "prefill", DECODE: "decode"}


def _summary(entry: SavedTensor) -> dict[str, Any]:
    tensor = entry.tensor
    parts: list[torch.Tensor] = [tensor] if isinstance(tensor, torch.Tensor) else list(tensor)
    shape = (
        str(tuple(parts[0].shape))
        if len(parts) == 1
        else f"{len(parts)} x " + str(tuple(parts[0].shape)) + " ..."
    )
    flat = torch.cat([part.reshape(-1) for part in parts])
    numbers = flat.float() if not flat.dtype.is_complex else flat.abs()
    any_numbers = numbers.numel() > 0
    return {
        "name": entry.name,
        "what": entry.described,
        "shape": shape,
        "dtype": str(parts[0].dtype).removeprefix("torch."),
        "device": str(parts[0].device),
        "min": numbers.min().item() if any_numbers else float("nan"),
        "mean": numbers.mean().item() if any_numbers else float("nan"),
        "max": numbers.max().item() if any_numbers else float("nan"),
    }


def _cells(entry: SavedTensor) -> tuple[str, ...]:
    summary = _summary(entry)
    return tuple(f"{cell:.4g}" if isinstance(cell := summary[head], float) else str(cell) for head in _HEADS)


def _numpy(tensor: Any) -> Any:
    if not isinstance(tensor, torch.Tensor):
        return [_numpy(part) for part in tensor]
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()


def describe(graph: Graph, save: Save) -> SavedTensor:
    """What a save of ``graph`` holds, without the tensor."""
    type_ = graph.types[save.values[0]]
    if save.stacked:
        type_ = replace(type_, shape=(len(save.values), *type_.shape))
    axes = tuple(_axis(dim, number) for number, dim in enumerate(type_.shape))
    found = [_site(graph, value) for value in save.values]
    site, part, gradient = found[0]
    layers = tuple(where.layer for where, *_ in found if where is not None and where.layer is not None)
    if save.stacked:
        layers = layers if len(layers) == len(save.values) else _layers(graph, save.values)
        axes = ("layer" if layers else "member", *axes[1:])
    prompts = {_prompt(graph, value) for value in save.values} if site is not None else {None}
    prompt = prompts.pop() if len(prompts) == 1 else None
    return SavedTensor(save.name, _nothing, type_, axes, site, layers, part, gradient, prompt)


def _nothing() -> Any:
    return None


def _layers(graph: Graph, members: tuple[int, ...]) -> tuple[int, ...]:
    """The layers that computed members of a stack belong to: the one that each uses and not all do; none if unclear."""
    used = [_layers_behind(graph, member) for member in members]
    common = frozenset[int].intersection(*used)
    found: list[int] = []
    for layers in used:
        own = layers - common or layers
        if len(own) != 1:
            return ()
        found += own
    return tuple(found) if len(set(found)) == len(found) else ()


def _layers_behind(graph: Graph, value: int) -> frozenset[int]:
    """The layers of the sites that a value is computed from."""
    seen: set[int] = set()
    layers: set[int] = set()
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        op = graph.ops[graph.producer[value]]
        if isinstance(op, Read) and op.site.layer is not None:
            layers.add(op.site.layer)
        elif isinstance(op, Grad):
            waiting.append(op.wrt[op.outs.index(value)])
        else:
            waiting += operands(op)
    return frozenset(layers)


def _axis(dim: dims.Dim, number: int) -> str:
    return (
        "row" if dim == dims.B else "position" if dim == dims.P else "key" if dim == dims.S else str(number)
    )


def _site(graph: Graph, value: int) -> tuple[Site | None, str, bool]:
    parts: list[str] = []
    gradient = False
    while True:
        op = graph.ops[graph.producer[value]]
        if isinstance(op, Read):
            return op.site, "".join(reversed(parts)), gradient
        if isinstance(op, Grad) and not gradient:
            value, gradient = op.wrt[op.outs.index(value)], True
            continue
        if not isinstance(op, Index):
            return None, "", False
        parts.append(_part(op.index))
        value = op.base


def _prompt(graph: Graph, value: int) -> int | None:
    """The prompt of ``t.prompts`` that a part of a site belongs to."""
    while isinstance(op := graph.ops[graph.producer[value]], Index):
        first = op.index[0] if op.index else None
        if isinstance(first, PromptRow):
            return first.row
        value = op.base
    return None


def _part(index: tuple[IndexItem, ...]) -> str:
    """An index as one writes it in a block. Tensors among it have no words of their own."""
    if isinstance(index[0] if index else None, PromptRow):
        return ""  # said before the site
    selector = next((item for item in index if isinstance(item, TokenSelector | OwnTokens)), None)
    if selector is not None:
        return written(selector)
    return "[" + ", ".join("tensor" if isinstance(item, Ref) else index_text((item,)) for item in index) + "]"


def _span(layers: tuple[int, ...]) -> str:
    if len(layers) == 1:
        return str(layers[0])
    if layers == tuple(range(layers[0], layers[0] + len(layers))):
        return f"{layers[0]}:{layers[-1] + 1}"
    return str(list(layers))
