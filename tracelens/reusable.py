"""What programs on prompts and programs on plain inputs have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NoReturn

from tracelens.errors import OptionError, UnknownAttributeError
from tracelens.ir.graph import Graph
from tracelens.ir.ops import Const, Save
from tracelens.location import here
from tracelens.refusing import unknown_attribute
from tracelens.view import Line, Shown, Stack, View, folded, html


class Reusable(Shown, ABC):
    """What programs on prompts and on plain inputs have in common: how they look, and what cannot be assigned."""

    graph: Graph

    def __setattr__(self, name: str, new: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, new)
            return
        named = any(isinstance(op, Const) and op.name == name for op in self.graph.ops)
        raise UnknownAttributeError(
            f"nothing can be assigned to program.{name}: a program does not change",
            at=here(),
            instead=f"program(prompt, {name}=value), for one call; tl.sweep(program, prompt, {name}=[...])"
            if named
            else "program(prompt, name=value) for a constant that has a name in the recording: "
            f'{name if name.isidentifier() else "v"} = tl.constant(tensor, name="{name}")',
        )

    if not TYPE_CHECKING:  # type checkers know the attributes that there are

        def __getattr__(self, name: str) -> NoReturn:
            if name.startswith("_") or name == "graph":  # not there yet
                raise AttributeError(name)
            if name in {op.name for op in self.graph.ops if isinstance(op, Save)}:
                raise unknown_attribute("a program", name, "program", (), f'program(prompt)["{name}"]')
            public = tuple(key for key in dir(type(self)) if not key.startswith("_"))
            instead = "program(prompt)[name] is a result; program.graph, program.explain()"
            raise unknown_attribute("a program", name, "program", (*public, "graph"), instead)

    @abstractmethod
    def explain(self) -> str:
        """The graph with its lines, the plan, and the program of each place."""

    def _view(self) -> View:
        return Line(program_text(self.graph))

    def _repr_html_(self) -> str:
        return html(Stack((self._view(), *folded(self.explain()))))


def require_graph(graph: object, recording: str) -> None:
    """Refuses what is no graph; ``recording`` is how this model's user opens a block that makes one."""
    if not isinstance(graph, Graph):
        raise OptionError(
            f"model.compile takes a graph or a recording, not a {type(graph).__name__}",
            at=here(),
            instead=f"model.compile(r), where r is from: with {recording} as r: ...",
        )


def program_text(graph: Graph) -> str:
    """A program in one line."""
    return f"<program: {len(graph.ops)} operations, saves {[save.name for save in graph.saves]}>"
