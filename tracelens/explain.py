"""``explain()``: graph, plan and programs of a block, as text."""

from __future__ import annotations

from tracelens.ir.graph import Graph
from tracelens.ir.ops import Write
from tracelens.ir.text import op_text
from tracelens.ir.types import bytes_text
from tracelens.memory import extra_memory
from tracelens.plan import Plan
from tracelens.program import Program
from tracelens.prompted import Prompt
from tracelens.subject import INPUTS


def explain(
    model: str, graph: Graph, plan: Plan, programs: tuple[Program, ...], prompt: Prompt | None
) -> str:
    """What will run, or has run: the recorded graph with its lines, the plan, and each place's program."""
    over = f", over {prompt}" if prompt is not None else ", for prompts of any size"
    sections = [
        f"{model}{over}",
        _graph(graph),
        "\n".join(
            [
                plan.text(None if prompt is None else prompt.sizes),
                *_memory(plan, programs, prompt),
                *_unseen(graph, plan),
            ]
        ),
        *(program.text() for program in programs if program.blocks),
    ]
    return "\n\n".join(sections)


def _memory(plan: Plan, programs: tuple[Program, ...], prompt: Prompt | None) -> list[str]:
    """What each device holds beside the model; on the host alone nobody counts it."""
    if prompt is None or [place.device for place in plan.placement.places] == ["cpu"]:
        return []
    found = extra_memory(programs, plan, prompt.sizes)
    return [
        f"  holds at most {bytes_text(one.bytes)} on {one.place.device} beside the model" for one in found
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
    texts = [op_text(op) for op in graph.ops]
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
