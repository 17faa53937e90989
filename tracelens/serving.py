"""What a rank does for the process that owns it: loads its part of a model, runs graphs on it, lets go of it."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from tracelens.backends.architectures.registry import learn
from tracelens.backends.generation_options import tokenizer_of
from tracelens.backends.mesh import local
from tracelens.backends.places import look_at, placement
from tracelens.backends.ranks.channel import Message
from tracelens.backends.ranks.instep import InStepError
from tracelens.backends.sharded_loading import load_part
from tracelens.backends.users_plan import load_parallelized
from tracelens.compiled import Compiled
from tracelens.compiling import Compiler
from tracelens.errors import PlansDifferError
from tracelens.gathered import ends_of, missed
from tracelens.generating import generate as generated
from tracelens.generation_plan import CompiledGeneration
from tracelens.ir.graph import Graph
from tracelens.model import Model
from tracelens.prompted import Prompt
from tracelens.remote import (
    graph_from,
    placement_data,
    prompt_from,
    results_data,
    with_constants,
)
from tracelens.telling import StepMade, StepTold

if TYPE_CHECKING:
    from tracelens.backends.ranks.served import Served


_KEPT = 256
_Made = TypeVar("_Made", Compiled, CompiledGeneration)


class Loaded:
    """A model on a rank, with the graphs that it was told of: each is sent and read once."""

    def __init__(self, model: Model, source: str) -> None:
        self.model = model
        self.source = source
        """Where it was loaded from."""
        self._graphs: OrderedDict[str, Graph] = OrderedDict()

    def graph(self, name: str, sent: str | None) -> Graph | None:
        """The graph of a digest; ``sent``: its document, where that came with the request."""
        if sent is not None:
            self._graphs[name] = graph_from(sent)
            while len(self._graphs) > _KEPT:
                self._graphs.popitem(last=False)
        return self._graphs.get(name)


def load(served: Served, request: Message) -> Message:
    """This rank's part of a model; the answer says how all of it lies."""
    header = request.header
    learn(header["families"])
    source, dtype, options = header["source"], _dtype(header["dtype"]), header["options"]
    if header["parallelize"] is None:
        sizes = {name: header[name] for name in ("tp", "pp", "ep")}
        part = load_part(source, **sizes, dtype=dtype, options=options)
    else:
        part = load_parallelized(
            source, header["parallelize"], ranks=header["tp"], dtype=dtype, options=options
        )
    model = Model(part)
    look_at(model.anatomy)
    model._compiler.owned = True
    served.models[header["model"]] = Loaded(model, source)
    return Message(
        {
            "placement": placement_data(placement(model.anatomy)),
            "dtype": str(model.anatomy.dtype).removeprefix("torch."),
            "bytes": sum(local(tensor).nbytes for tensor in part.parameters()),
        }
    )


def _dtype(name: str) -> Any:
    return getattr(torch, name) if isinstance(getattr(torch, name, None), torch.dtype) else name


def run(served: Served, request: Message) -> Message:
    """One forward pass; the first rank answers with what was saved."""
    asked = _asked(served, request, Compiler.compile)
    if asked is None:
        return Message({"unknown": True})
    model, graph, compiled, prompt = asked
    ran = model._compiler.run(graph, compiled, prompt)
    mesh = model.anatomy.mesh
    about: dict[str, Any] = {}
    if mesh is not None and request.header.get("compare"):
        about = {"stage": mesh.stage, "copies": ran.copies()}
    if mesh is not None and not mesh.has_results:
        return Message(about)
    try:
        header, tensors = results_data({name: get() for name, get in ran.tensors.items()})
    except Exception as error:
        raise InStepError from error
    return Message({**header, **about, "seconds": ran.report.seconds}, tensors)


def generate(served: Served, request: Message) -> Message:
    """New tokens, drawn alike on all ranks."""
    asked = _asked(served, request, Compiler.compile_generation)
    if asked is None:
        return Message({"unknown": True})
    model, graph, compiled, prompt = asked
    header, options = request.header, _options(served, request)
    torch.manual_seed(header["seed"])
    made = generated(
        model, model._compiler, graph, compiled, prompt, options, include_last=header["include_last"]
    )
    mesh = model.anatomy.mesh
    if mesh is not None and not mesh.has_results:
        return Message({"tokens": made.tokens})
    try:
        # Of what no step was made the owner knows by itself.
        values = {
            course.save.name: made.tensors[course.save.name]()
            for course in compiled.courses
            if missed(course, prompt, ends_of(made.tokens), include_last=header["include_last"]) is None
        }
        found, tensors = results_data(values)
    except Exception as error:
        raise InStepError from error
    return Message({**found, "tokens": made.tokens}, tensors)


def stream(served: Served, request: Message) -> Message:
    """New tokens as they are made: the first rank says what each step has given, and all wait to hear of another."""
    asked = _asked(served, request, Compiler.compile_stream)
    if asked is None:
        return Message({"unknown": True})
    model, graph, compiled, prompt = asked
    mesh, talk = model.anatomy.mesh, served.talk
    assert talk is not None

    def tell(made: StepMade) -> bool:
        if mesh is None or mesh.has_results:
            try:
                found, tensors = results_data(made.saves)
                talk.say(Message({**found, "step": made.step, "tokens": made.tokens}, tensors))
            except Exception as error:
                raise InStepError from error  # the others wait for a word, and are told of it
        return not talk.hears_more()

    torch.manual_seed(request.header["seed"])
    told = StepTold(tell, set())
    options = _options(served, request)
    made = generated(model, model._compiler, graph, compiled, prompt, options, told=told)
    return Message({"tokens": made.tokens})


def _options(served: Served, request: Message) -> dict[str, Any]:
    """What transformers' generation is given."""
    options = dict(request.header["options"])
    if options.get("stop_strings") is not None:
        options["tokenizer"] = tokenizer_of(served.models[request.header["model"]].source)
    return options


def _asked(
    served: Served, request: Message, compile: Callable[[Compiler, Graph], _Made]
) -> tuple[Model, Graph, _Made, Prompt] | None:
    """What a request is about; ``None`` if it names a graph that this rank does not know (any more)."""
    header, tensors = request.header, request.tensors
    loaded: Loaded = served.models[header["model"]]
    graph = loaded.graph(header["graph"], header.get("document"))
    if graph is None:
        return None
    graph = with_constants(graph, header["constants"], tensors)
    # The owner has held the constants to the graph; those of a sweep have a row for each row of this very prompt.
    compiled = compile(loaded.model._compiler, replace(graph, constants=()))
    if compiled.plan_digest != header["plan"]:
        raise PlansDifferError(
            "a rank has made another plan than the process that recorded the block",
            instead="one version of tracelens, torch and transformers everywhere",
        )
    selectors = tuple(selector for _, selector in compiled.selectors)
    return loaded.model, graph, compiled, prompt_from(header, tensors, selectors, loaded.model.anatomy)


def drop(served: Served, request: Message) -> Message:
    """Lets go of a model."""
    served.models.pop(request.header["model"], None)
    gc.collect()  # a model leads back to itself, and its memory is wanted now
    if served.device.type == "cuda":
        torch.cuda.empty_cache()
    return Message()
