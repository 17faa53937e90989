"""``explain()``: graph, plan and programs of a block, as text."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING

from tracelens.explain_tokens import tokens_section
from tracelens.inputs import Inputs
from tracelens.ir.graph import Graph
from tracelens.ir.ops import Apply, Write
from tracelens.ir.step_flow import uncapturable
from tracelens.ir.text import op_text
from tracelens.ir.types import bytes_text
from tracelens.ir.windows import PREFILL, StepWindow
from tracelens.plan import Plan
from tracelens.prompted import Prompt
from tracelens.subject import INPUTS

if TYPE_CHECKING:
    from tracelens.compiled import Compiled
    from tracelens.generation_plan import CompiledGeneration, CompiledTail


def explain(model: str, graph: Graph, compiled: Compiled, prompt: Prompt | None) -> str:
    """What will run, or has run: the recorded graph with its lines, the plan, and each place's program."""
    plan = compiled.plan
    over = f", over {prompt}" if prompt is not None else ", for prompts of any size"
    sections = [
        f"{model}{over}",
        _graph(graph),
        *_tokens(graph, prompt),
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


def explain_generation(
    model: str, graph: Graph, compiled: CompiledGeneration, prompt: Prompt | None, steps: int | None
) -> str:
    """What runs in which steps of a generation: the graph, what is saved over all steps, and each run of steps.

    ``steps``: how many there are at most.
    """
    over = f", over {prompt}" if prompt is not None else ""
    most = f", at most {steps} step{'s' if steps != 1 else ''}" if steps is not None else ""
    sections = [f"{model}{over}{most}", _graph(graph), *_tokens(graph, prompt)]
    if compiled.courses:
        sections.append("\n".join(["saves, over all steps", *_courses(compiled, prompt, steps)]))
    for window, part, tail in zip(compiled.stepped.segments, compiled.parts, compiled.tails, strict=True):
        sizes = None if prompt is None else prompt.sizes
        if sizes is not None and window.start:
            sizes = {**sizes, "P": 1, "S": sizes["P"] + window.start}
        hazards = uncapturable(part.plan.graph)
        captured = f"no: {'; '.join(hazards)}" if hazards else "yes"
        lines = [f"{window.words}{' (the prompt)' if window == PREFILL else ''}", part.plan.text(sizes)]
        lines.append(f"  can be captured in a CUDA graph: {captured}")
        lines += [shortened(program.text()) for program in part.programs if program.blocks]
        sections.append("\n".join(lines))
        if tail is not None:
            sections.append(_later(window, tail, prompt))
    return "\n\n".join(sections)


def _later(window: StepWindow, tail: CompiledTail, prompt: Prompt | None) -> str:
    """What is done for several steps at once."""
    sizes, which = None, "several steps"
    if prompt is not None:
        steps, positions = tail.together(prompt.sizes)
        sizes = {**prompt.sizes, "P": steps}
        size = bytes_text(sum(tail.bytes_kept(sizes).values()))
        which = "each step" if steps == 1 else f"up to {steps} steps, whose operands wait ({size})"
        if 0 in window:
            which += f", and for {positions} positions of the prompt" if positions < prompt.sizes["P"] else ""
    lines = [f"{window.words}, at once for {which}", tail.compiled.plan.text(sizes)]
    lines += [shortened(program.text()) for program in tail.compiled.programs if program.blocks]
    return "\n".join(lines)


def _tokens(graph: Graph, prompt: Prompt | None) -> list[str]:
    section = None if prompt is None or isinstance(prompt, Inputs) else tokens_section(graph, prompt)
    return [] if section is None else [section]


def _courses(compiled: CompiledGeneration, prompt: Prompt | None, steps: int | None) -> list[str]:
    """What each save becomes, and how large it can be."""
    lines: list[str] = []
    for course in compiled.courses:
        how = (
            "as it is"
            if course.once
            else "position after position"
            if course.axis is not None
            else "step by step"
        )
        where = "" if course.window is None or course.window.every else f" in {course.window.words}"
        size = ""
        if prompt is not None and steps is not None:
            size = f", at most {bytes_text(course.nbytes(prompt.sizes, steps))}"
        to = f", to {course.save.to}" if course.save.to is not None else ""
        lines.append(
            f"  {course.save.name!r}{where}, {how}: {len(course.save.values)} x {course.type}{size}{to}"
        )
    return lines


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
