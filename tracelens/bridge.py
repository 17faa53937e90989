"""The door to nnsight: graphs of tracelens on models that people hold there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from tracelens.backends.nnsight_bridge import forward_through, module_of
from tracelens.backends.transfer import inputs_on
from tracelens.compiling import owning
from tracelens.constants import Captured
from tracelens.errors import Blaming, OptionError
from tracelens.fitting import check_fits
from tracelens.ir.graph import Graph
from tracelens.ir.passes.as_reached import as_reached
from tracelens.leaving import Members, leave
from tracelens.location import here
from tracelens.model import Model
from tracelens.reference import evaluate
from tracelens.results import Results
from tracelens.tracing import Program, Recording


def run_with_nnsight(graph: Graph | Recording | Program, nnsight_model: Any, prompt: Any) -> Results:
    """Runs a recorded graph on a model that nnsight holds, through nnsight, and gives what the graph saves.

    ``nnsight_model``: an ``nnsight.NNsight`` or ``nnsight.TransformersModel`` of a family that tracelens knows.
    ``prompt`` is what :meth:`Model.trace` takes. The results are those of ``model.compile(graph)(prompt)``, on the CPU.
    Slower than tracelens' own programs: every site is fetched from nnsight's thread. Sites that are no module's input
    or output (inside the attention function) are refused, and so are graphs with gradients.

    Record the graph on the same weights: ``tl.wrap(nnsight_model._module, nnsight_model.tokenizer)`` sees them, and
    ``tl.Graph.from_json`` gives graphs of files. Raises :class:`~tracelens.errors.BridgeError` and the errors of
    ``model.compile``.
    """
    with Blaming(here()):
        graph = _graph_of(graph)
        model = Model(module_of(nnsight_model), getattr(nnsight_model, "tokenizer", None))
        compiled = model._compiler.compile(graph)
        prepared = model.prepare(prompt)
        check_fits(graph, compiled, prepared)
        device = model.anatomy.device
        inputs = inputs_on(prepared.batch.model_inputs(), device)
        mask = inputs_on({"mask": prepared.batch.mask}, device)["mask"]
        ordered = as_reached(graph, model.anatomy.family.reached)
        found = evaluate(
            ordered,
            forward_through(nnsight_model, model.anatomy, ordered, inputs, mask),
            constants=[
                model._compiler.constants.place(cast("Captured", constant), device, [])
                for constant in ordered.constants
            ],
            parameters=model.anatomy.weight,
            select=prepared.select,
            sizes=prepared.sizes,
            functions=cast("tuple[Callable[..., Any], ...]", ordered.functions),
        )
        saved = {save.name: _members(found[save.name], save.stacked) for save in graph.saves}
        return Results(compiled.described, leave(graph.saves, graph, saved, prepared))


def _graph_of(given: Any) -> Graph:
    graph = given.graph if isinstance(given, Recording | Program) else given
    if not isinstance(graph, Graph):
        raise OptionError(
            f"tl.run_with_nnsight takes a graph, a recording or a program, not a {type(graph).__name__}",
            instead="tl.run_with_nnsight(r, nnsight_model, prompt), where r is from: with model.record() as r: ...",
        )
    return owning(graph)


def _members(tensor: torch.Tensor, stacked: bool) -> Members:
    parts = tensor.unbind(0) if stacked else (tensor,)
    return tuple((part, part._version) for part in parts)
