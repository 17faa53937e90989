"""What goes between the process that holds a block and the ranks that run it: graphs, prompts, placements, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from tracelens.backends.transfer import on_cpu
from tracelens.batch import Batch
from tracelens.branching import Branched, with_copies
from tracelens.compiled import numbered
from tracelens.constants import Captured, capture, from_payload
from tracelens.errors import ForbiddenFunctionError
from tracelens.ir.functions import FUNCTIONS
from tracelens.ir.graph import Graph
from tracelens.ir.infer import dtype_of, torch_dtype
from tracelens.ir.layout import Joined, Layout, Partial, Replicate, Shard
from tracelens.ir.ops import Call, Selector
from tracelens.ir.parse import parse
from tracelens.ir.types import DType
from tracelens.placement import InParts, Place, Placement, Probed
from tracelens.prompted import Prompt
from tracelens.selection import Selection

# --- graphs ----------------------------------------------------------------------------------------------------------


def graph_from(document: str) -> Graph:
    """The graph of a document (:attr:`Compiled.document`), whose lines are the numbers of its operations.

    Raises :class:`~tracelens.errors.ForbiddenFunctionError` for a function outside the allow-list.
    """
    graph = parse(document)
    for op in graph.ops:
        if isinstance(op, Call) and op.function not in FUNCTIONS:
            raise ForbiddenFunctionError(f"{op.function!r} is not on the allow-list; it was not run")
    return numbered(graph)


def constants_data(graph: Graph) -> tuple[list[str | None], dict[str, torch.Tensor]]:
    """The names and the tensors of a graph's constants."""
    names: list[str | None] = []
    tensors: dict[str, torch.Tensor] = {}
    for number, constant in enumerate(graph.constants):
        names.append(constant.name)
        if isinstance(constant, Captured):
            tensors[f"constant.{number}"] = on_cpu(constant.tensor.detach())
        else:
            tensors[f"constant.{number}"] = from_payload(
                constant.payload(), constant.type, constant.name
            ).tensor
    return names, tensors


def with_constants(graph: Graph, names: Sequence[str | None], tensors: Mapping[str, torch.Tensor]) -> Graph:
    """A graph with the constants that :func:`constants_data` was given."""
    found = tuple(capture(tensors[f"constant.{number}"], name) for number, name in enumerate(names))
    return replace(graph, constants=found)


# --- prompts ---------------------------------------------------------------------------------------------------------


def prompt_header(prompt: Prompt, selectors: tuple[Selector, ...]) -> dict[str, Any]:
    """What of a prompt is no tensor: lengths, and where token selectors point, in the order of the graph."""
    chosen = [prompt.select(selector) for selector in selectors]
    batch = prompt.batch
    return {
        "branches": [batch.branches, dtype_of(batch.kind).value] if isinstance(batch, Branched) else None,
        "lengths": list(prompt.batch.lengths),
        "chosen": [[[list(row) for row in one.columns], one.drops] for one in chosen],
    }


def prompt_tensors(prompt: Prompt) -> dict[str, torch.Tensor]:
    batch = prompt.batch
    return {"input_ids": batch.input_ids, "mask": batch.mask, "position_ids": batch.position_ids}


def prompt_from(
    header: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    selectors: tuple[Selector, ...],
    owner: object,
) -> Prompt:
    """The prompt on a rank, which needs no tokenizer: where selectors point came with it."""
    batch = Batch(tensors["input_ids"], tensors["mask"], tensors["position_ids"], tuple(header["lengths"]))
    if header["branches"] is not None:
        branches, kind = header["branches"]
        batch = with_copies(batch, branches, torch_dtype(DType(kind)))
    prompt = Prompt(batch, None, owner)
    for selector, (columns, drops) in zip(selectors, header["chosen"], strict=True):
        prompt.point(selector, Selection(tuple(tuple(row) for row in columns), drops))
    return prompt


# --- placements ------------------------------------------------------------------------------------------------------


def placement_data(placement: Placement) -> dict[str, Any]:
    """A placement as JSON's types."""
    return {
        "places": [[place.index, place.device, place.ranks] for place in placement.places],
        "layers": list(placement.layers),
        "ends": dict(placement.ends),
        "modules": dict(placement.modules),
        "layouts": {name: _axis(layout) for name, layout in placement.layouts.items()},
        "own_layouts": [[*key, _axis(layout)] for key, layout in placement.own_layouts.items()],
        "unknown": [[*key, reason] for key, reason in placement.unknown.items()],
        "parameters": {path: _axis(layout) for path, layout in placement.parameters.items()},
        "probed": None
        if (probed := placement.probed) is None
        else {
            "parts": {name: [one.dim, one.ndim] for name, one in probed.parts.items()},
            "unclear": dict(probed.unclear),
            "sums": sorted(probed.sums),
        },
    }


def placement_from(data: Mapping[str, Any]) -> Placement:
    """The placement that :func:`placement_data` was given."""
    return Placement(
        tuple(Place(*place) for place in data["places"]),
        tuple(data["layers"]),
        data["ends"],
        data["modules"],
        layouts={name: _layout(axis) for name, axis in data["layouts"].items()},
        parameters={path: _layout(axis) for path, axis in data["parameters"].items()},
        probed=None
        if (probed := data["probed"]) is None
        else Probed(
            {name: InParts(*one) for name, one in probed["parts"].items()},
            probed["unclear"],
            frozenset(probed["sums"]),
        ),
        own_layouts={(name, layer): _layout(axis) for name, layer, axis in data["own_layouts"]},
        unknown={(name, layer): reason for name, layer, reason in data["unknown"]},
    )


def _axis(layout: Layout) -> int | str | None:
    if isinstance(layout, Partial):
        return layout.joined.value
    return layout.dim if isinstance(layout, Shard) else None


def _layout(axis: int | str | None) -> Layout:
    if isinstance(axis, str):
        return Partial(Joined(axis))
    return Replicate() if axis is None else Shard(axis)


# --- results ---------------------------------------------------------------------------------------------------------


def results_data(results: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Saved tensors by name; those of ragged prompts are one for each row."""
    rows: dict[str, int | None] = {}
    tensors: dict[str, torch.Tensor] = {}
    for number, (name, value) in enumerate(results.items()):
        if isinstance(value, torch.Tensor):
            rows[name] = None
            tensors[str(number)] = value
        else:
            parts = cast("list[torch.Tensor]", value)
            rows[name] = len(parts)
            tensors |= {f"{number}.{row}": part for row, part in enumerate(parts)}
    return {"rows": rows}, tensors


def results_from(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What :func:`results_data` was given."""
    found: dict[str, Any] = {}
    for number, (name, rows) in enumerate(header["rows"].items()):
        found[name] = (
            tensors[str(number)] if rows is None else [tensors[f"{number}.{row}"] for row in range(rows)]
        )
    return found
