"""Models that are no language models, and those without a table of sites: their modules, by path."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NoReturn, Self, cast

from torch import nn

from tracelens.backends.module_sides import unknown_module
from tracelens.backends.plain_anatomy import PlainAnatomy
from tracelens.compiling import Compiler
from tracelens.errors import (
    Blaming,
    NotALanguageModelError,
    NoTraceError,
    OptionError,
    SpecialisedGraphError,
    UnknownAttributeError,
)
from tracelens.inputs import Inputs
from tracelens.ir.dims import Sizes
from tracelens.ir.graph import Graph
from tracelens.ir.ops import Const
from tracelens.location import here
from tracelens.module_handle import ModuleHandle
from tracelens.open_recordings import open_recorders
from tracelens.recorder import Recorder
from tracelens.results import Results
from tracelens.reusable import Reusable, require_graph
from tracelens.subject import INPUTS
from tracelens.tracing import Program, Record, Recording, Trace
from tracelens.values import Value
from tracelens.view import Fold, Line, Shown, Stack, Table, View, html

_KEPT = 16  # shapes of inputs for which a model is kept ready

_WORDS = {
    "layers": "layers with named sites",
    "generate": "text to generate",
    "prepare": "prompts",
    "tokenizer": "a tokenizer",
    "sites": "named sites",
    "unembed": "an unembedding",
    "config": "a configuration that tracelens reads",
    "n_layers": "layers that tracelens counts",
}


class PlainModel(Shown):
    """Any module of PyTorch, whose submodules can be read and changed by path.

    Made by :func:`tracelens.wrap`. ``model.trace(x)`` takes what the module's forward takes. There are no named sites,
    layers or prompts: those come from the table of a family of language models. What is recorded is right for inputs of
    the same shapes, dtypes and settings; the module itself is never modified.
    """

    def __init__(self, module: nn.Module, reason: str) -> None:
        self._module = module
        self._reason = reason
        self._fitted: OrderedDict[str, Fitted] = OrderedDict()
        with Blaming(here()):
            PlainAnatomy(module, (), {}, reason)  # refuses what cannot be run, before anything is recorded

    # --- blocks --------------------------------------------------------------------------------------------------

    def trace(self, *args: Any, **kwargs: Any) -> Trace:
        """Opens a block that runs the model once, on these arguments of its forward, when it ends.

        >>> import torch, tracelens as tl
        >>> mlp = tl.wrap(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)))
        >>> with mlp.trace(torch.ones(3, 4)):
        ...     hidden = mlp.module("1").output.save()
        ...     mlp.module("2").output[:, 0] = 0.0
        ...     result = mlp.module("").output.save()
        >>> hidden.shape, result[:, 0]
        (torch.Size([3, 8]), tensor([0., 0., 0.]))
        """
        fitted, inputs = self._fit(args, kwargs)
        return PlainTrace(fitted, inputs)

    def record(self, *args: Any, **kwargs: Any) -> Record:
        """Opens a block that only records, for inputs of the shapes, dtypes and settings of these."""
        fitted, inputs = self._fit(args, kwargs)
        return PlainRecord(fitted, inputs)

    def compile(self, graph: Graph | Record | Trace) -> PlainProgram:
        """A reusable program: ``program(x)`` runs the graph without recording it again."""
        return PlainProgram(self, graph.graph if isinstance(graph, Recording) else graph)

    def _fit(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Fitted, Inputs]:
        if any(isinstance(arg, str) for arg in args):
            raise NotALanguageModelError(
                f"{self!r} takes what its forward takes, and no prompts: {self._reason}",
                at=here(),
                instead='its own inputs: model.trace(**tokenizer(text, return_tensors="pt"))',
            )
        inputs = Inputs(args, kwargs)
        fitted = self._fitted.get(inputs.signature)
        if fitted is None:
            with Blaming(here()):
                fitted = self._fitted[inputs.signature] = Fitted(self, inputs)
            while len(self._fitted) > _KEPT:
                self._fitted.popitem(last=False)
        return fitted, inputs

    # --- what there is -------------------------------------------------------------------------------------------

    @property
    def hf(self) -> Any:
        """The wrapped module."""
        return self._module

    def modules(self) -> tuple[str, ...]:
        """The paths of all modules; which of them a forward pass calls depends on its inputs."""
        return tuple(path for path, _ in self._module.named_modules(remove_duplicate=False))

    def describe(self) -> str:
        """One line: what the module is, its size, its device."""
        anatomy = PlainAnatomy(self._module, (), {}, self._reason)
        count = sum(parameter.numel() for parameter in self._module.parameters())
        dtype = str(anatomy.dtype).removeprefix("torch.")
        return f"{type(self._module).__name__} ({count:,} parameters) on {anatomy.spread}, {dtype}"

    def _open(self) -> Recorder | None:
        """The open recording of this model in the current context, whatever its inputs."""
        for recorder in open_recorders():
            if isinstance(recorder.anatomy, PlainAnatomy) and recorder.anatomy.model is self._module:
                return recorder
        return None

    def _recorder(self, what: str) -> Recorder:
        recorder = self._open()
        if recorder is None:
            raise NoTraceError(
                f"{what} was used outside a block, where there is nothing to read or change",
                at=here(),
                instead="with model.trace(x) as t: ...",
            )
        return recorder

    def module(self, path: str) -> ModuleHandle:
        """A module by its path, whose inputs and outputs can be read and written; ``""`` is the whole model.

        Raises :class:`~tracelens.errors.UnknownModuleError`, and :class:`~tracelens.errors.MetaForwardError` where what
        the modules receive cannot be learned from a forward pass on tensors without data.
        """
        try:
            self._module.get_submodule(path)
        except (AttributeError, TypeError):
            if isinstance(path, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # users may not be typed
                error = unknown_module(self._module, path)
                error.at = here()
                raise error from None
        anatomy: Any = self._recorder(f"model.module({path!r})").anatomy
        return ModuleHandle(anatomy, path)

    def param(self, path: str) -> Value:
        """A parameter or buffer as a value, by its path."""
        recorder = self._recorder(f"model.param({path!r})")
        return Value(recorder, recorder.parameter(path))

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        what = _WORDS.get(name)
        if "hook" in name:
            raise NotALanguageModelError(
                f"{self!r} has no {name!r}: hooks are set by tracelens, for the length of a run",
                at=here(),
                instead="in a block model.module(path).output.save() to read, model.module(path).output = new to "
                "change; model.hf is the module itself",
            )
        raise NotALanguageModelError(
            f"{self!r} has no {name!r}" + (f", which is {what}" if what else "") + f": {self._reason}",
            at=here(),
            instead="model.module(path).output; model.modules() lists the paths, model.hf is the module itself",
        )

    def __setattr__(self, name: str, new: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, new)
            return
        path = name if name in self.modules() else ""
        side = "input" if name in ("input", "inputs") else "output"
        raise UnknownAttributeError(
            f"nothing can be assigned to {name!r} of a model: what it computes is changed at its modules",
            at=here(),
            instead=f'model.module("{path}").{side} = value, in a block; model.modules() lists the paths',
        )

    def _view(self) -> View:
        return Line(f"<tracelens model without named sites: {type(self._module).__name__}>")

    def _repr_html_(self) -> str:
        rows = tuple((path or '""', type(module).__name__) for path, module in self._module.named_modules())
        return html(
            Stack((Line(self.describe()), Fold(f"{len(rows)} modules", Table(("path", "module"), rows))))
        )


class Fitted:
    """A model with inputs of one shape: what blocks and programs hold."""

    def __init__(self, model: PlainModel, inputs: Inputs) -> None:
        self.model = model
        self.sizes = inputs.sizes
        self.anatomy = PlainAnatomy(model._module, inputs.args, inputs.kwargs, model._reason)
        self._compiler = Compiler(self.anatomy)

    def describe(self) -> str:
        return self.model.describe()

    def prepare(self, inputs: Inputs) -> Inputs:
        return inputs


class _OnInputs(Recording):
    """A block on inputs: right for others of the same shapes only, which the graph says."""

    def __init__(self, fitted: Fitted, inputs: Inputs) -> None:
        super().__init__(cast(Any, fitted), inputs)
        self._whole = fitted.model

    def _outer(self) -> Recorder | None:
        return self._whole._open()

    def __enter__(self) -> Self:
        super().__enter__()
        assert self._recorder is not None
        self._recorder.pin(INPUTS)
        return self


class PlainTrace(_OnInputs, Trace):
    """A block that runs the model once on its inputs, when it ends."""

    def __init__(self, fitted: Fitted, inputs: Inputs) -> None:
        _OnInputs.__init__(self, fitted, inputs)  # without what traces of language models can be told


class PlainRecord(_OnInputs, Record):
    """A block that only records."""


class PlainProgram(Reusable):
    """A compiled graph: call it on inputs of the shapes that it was recorded for."""

    def __init__(self, model: PlainModel, graph: Graph) -> None:
        require_graph(graph, "model.record(x)")
        object.__setattr__(self, "graph", graph)
        self._model = model
        self._names = frozenset(op.name for op in graph.ops if isinstance(op, Const) and op.name is not None)
        taken = sorted(self._names & set(inspect.signature(model._module.forward).parameters))
        if taken:
            raise OptionError(
                f"the constant {taken[0]!r} has the name of an argument of the model's forward, so that "
                f"program({taken[0]}=...) could mean either",
                at=here(),
                instead="tl.constant(tensor, name=...) with another name",
            )
        self._program: Program | None = None
        for fitted in list(model._fitted.values()):
            if self._fits(fitted.sizes):
                self._program = Program(cast(Any, fitted), graph)

    def _fits(self, sizes: Sizes) -> bool:
        return all(sizes.get(pin.symbol) == pin.size for pin in self.graph.pins)

    def __call__(self, *args: Any, **kwargs: Any) -> Results:
        """The results for arguments of the model's forward.

        Keywords that are names of constants (:func:`tracelens.constant`) are other values for these, for this call.
        Raises :class:`~tracelens.errors.SpecialisedGraphError` for others than those that the graph was recorded for.
        """
        constants = {name: kwargs.pop(name) for name in self._names & set(kwargs)}
        program, inputs = self._on(args, kwargs)
        return program(inputs, **constants)

    def _on(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Program, Inputs]:
        """The program for arguments of the model's forward, and what it runs on."""
        fitted, inputs = self._model._fit(args, kwargs)
        if not self._fits(inputs.sizes) or not self.graph.pins:
            raise SpecialisedGraphError(
                f"the graph was recorded for inputs of other shapes, dtypes or settings than {inputs.signature}",
                at=here(),
                instead="inputs like those that it was recorded on, or a recording on these",
            )
        if self._program is None:
            # A graph out of a file: what the model's modules receive is known only now.
            self._program = Program(cast(Any, fitted), self.graph)
        return self._program, inputs

    def _swept(self, given: Any) -> tuple[Program, Inputs]:
        """The same for what ``tl.sweep`` is given: one argument, a tuple of them, or a dict by name."""
        args = given if isinstance(given, tuple) else () if isinstance(given, Mapping) else (given,)
        return self._on(args, dict(given) if isinstance(given, Mapping) else {})

    def explain(self) -> str:
        """The graph with its lines, the plan, and the program."""
        if self._program is None:
            return self.graph.text()
        return self._program.explain()
