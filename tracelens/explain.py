"""``explain()``: graph, plan and programs of a block, as text."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING

from tracelens.ir.graph import Graph
from tracelens.ir.ops import Apply, Write
from tracelens.ir.text import op_text
from tracelens.ir.types import bytes_text
from tracelens.plan import Plan
from tracelens.prompted import Prompt
from tracelens.subject import INPUTS

if TYPE_CHECKING:
    from tracelens.compiled import Compiled


def explain(model: str, graph: Graph, compiled: Compiled, prompt: Prompt | None) -> str:
    """What will run, or has run: the recorded graph with its lines, the plan, and each place's program."""
    plan = compiled.plan
    over = f", over {prompt}" if prompt is not None else ", for prompts of any size"
    sections = [
        f"{model}{over}",
        _graph(graph),
        "\n".join(
            [
                plan.text(None if prompt is None else prompt.sizes),
                *_lent(graph, compiled),
                *_memory(graph, compiled, prompt),
                *_unseen(graph, plan),
            ]
        ),
        *(shortened(program.text()) for program in compiled.programs if program.blocks),
    ]
    return "\n\n".join(sections)


def _lent(graph: Graph, compiled: Compiled) -> list[str]:
    """What accelerate loads for modules of the model that the block applies."""
    lent = compiled.lent(graph)
    return [
        f"  applies {one.module} ({graph.location(number).short}), for which accelerate loads at most "
        f"{bytes_text(one.bytes)} on {one.device}"
        for number, op in enumerate(graph.ops)
        if isinstance(op, Apply)
        for one in lent.get(op.index, ())
    ]


def _memory(graph: Graph, compiled: Compiled, prompt: Prompt | None) -> list[str]:
    """What each device holds beside the model; on the host alone nobody counts it."""
    if prompt is None or [place.device for place in compiled.plan.placement.places] == ["cpu"]:
        return []
    return [
        f"  holds at most {bytes_text(one.bytes)} on {one.place.device} beside the model"
        for one in compiled.held(graph, prompt.sizes)
    ]


def _unseen(graph: Graph, plan: Plan) -> list[str]:
    """The writes that are not done, because nothing that is saved comes after them."""
    done = {op.site for op in plan.graph.writes}
    return [
        f"  not done: the write to {op.site} ({graph.location(number).short}), which nothing that is saved can see"
        for number, op in enumerate(graph.ops)
        if isinstance(op, Write) and op.site not in done
    ]


def _graph(graph: Graph) -> str:
    texts = [shortened(op_text(op)) for op in graph.ops]
    width = min(max((len(text) for text in texts), default=0), 96)
    lines = ["graph (as recorded)" if texts else "graph (as recorded): empty"]
    for number, text in enumerate(texts):
        location = graph.location(number)
        lines.append(f"  {text.ljust(width)}  # {location.short}".rstrip())
    for pin in graph.pins:
        lines.append(
            "  right only for inputs of the same shapes, dtypes and settings"
            if pin.symbol == INPUTS
            else f"  right only for prompts with {pin.symbol} = {pin.size}"
        )
    return "\n".join(lines)


_QUOTED_OR_LISTED = re.compile(
    r'"(?:[^"\\]|\\.)*"|%\d+(?:, %\d+){4,}|(?P<type>\w+\[[^\[\]]*\])(?:, (?P=type)(?![^ ,\n])){2,}'
)
_LEAST = 5
"""How many numbers at equal distances are worth a shorter form."""


def shortened(text: str) -> str:
    """Lines of operations for reading: what can be filled in from a list's beginning and end is left out.

    ``%4, %6, %8, %10, %12`` is ``%4, %6, ..., %12``, and three types ``f32[B]`` are ``3 x f32[B]``.

    >>> shortened('save "%1, %2, %3, %4, %5" <- stack(%0, %1, %2, %3, %4, %9)')
    'save "%1, %2, %3, %4, %5" <- stack(%0, %1, ..., %4, %9)'
    """
    return _QUOTED_OR_LISTED.sub(_shorter, text)


def _shorter(found: re.Match[str]) -> str:
    whole = found[0]
    if whole.startswith('"'):
        return whole
    if found["type"] is not None:
        return f"{whole.count(found['type'])} x {found['type']}"
    numbers = [int(part.lstrip("%")) for part in whole.split(", ")]
    parts: list[str] = []
    while numbers:
        steps = [later - earlier for earlier, later in pairwise(numbers)]
        run = next((place for place, step in enumerate(steps) if step != steps[0]), len(steps)) + 1
        if run < _LEAST:
            parts.append(f"%{numbers.pop(0)}")
        else:
            parts += [f"%{numbers[0]}", f"%{numbers[1]}", "...", f"%{numbers[run - 1]}"]
            del numbers[:run]
    return ", ".join(parts)
