"""``explain()``: graph, plan and programs of a block, as text."""

from __future__ import annotations

from tracelens.ir.graph import Graph
from tracelens.ir.sites import Effect
from tracelens.ir.text import op_text
from tracelens.ir.types import TensorType
from tracelens.plan import Plan
from tracelens.program import Program
from tracelens.prompted import Prompt

_REACH = {
    Effect.STREAM: "the residual stream: every later layer sees it",
    Effect.BRANCH: "one branch only: the stream changes through that sublayer",
    Effect.OUTPUT: "after the last layer: only the output changes",
}


def explain(
    model: str, graph: Graph, plan: Plan, programs: tuple[Program, ...], prompt: Prompt | None
) -> str:
    """What will run, or has run: the recorded graph with its lines, the plan, and each place's program."""
    over = f", over {prompt}" if prompt is not None else ", for prompts of any size"
    sections = [
        f"{model}{over}",
        _graph(graph),
        _plan(plan, prompt),
        *(program.text() for program in programs),
    ]
    return "\n\n".join(sections)


def _graph(graph: Graph) -> str:
    texts = [op_text(op) for op in graph.ops]
    width = min(max((len(text) for text in texts), default=0), 96)
    lines = ["graph (as recorded)"]
    for number, text in enumerate(texts):
        location = graph.location(number)
        lines.append(f"  {text.ljust(width)}  # {location.short}".rstrip())
    for pin in graph.pins:
        lines.append(f"  right only for prompts with {pin.symbol} = {pin.size}")
    return "\n".join(lines)


def _plan(plan: Plan, prompt: Prompt | None) -> str:
    n_layers = len(plan.placement.layers)
    lines = ["plan"]
    for place in plan.placement.places:
        owned = [layer for layer, index in enumerate(plan.placement.layers) if index == place.index]
        lines.append(f"  {place}: layers {owned[0]} to {owned[-1]}" if owned else f"  {place}")
    if plan.whole:
        lines.append(f"  every forward pass runs whole: {n_layers} layers and the head")
    elif plan.stop is None:
        lines.append("  no layer runs: nothing in the model is read")
    else:
        lines.append(
            f"  the forward pass enters {plan.layers_run(n_layers)} of {n_layers} layers and stops after {plan.stop}"
        )
    own = [op for op in plan.graph.writes if not (op.site in plan.carried and op.version == 1)]
    lines += [f"  writes {op.site} ({_REACH[op.site.kind.effect]})" for op in own]
    carried = sorted(plan.carried, key=lambda site: site.order)
    lines += [
        f"  {site}: the block's own sum is replaced by one with the value written in the block"
        for site in carried
    ]
    for name, type_ in plan.saved_types().items():
        lines.append(f"  saves {name!r}: {_shape(type_, prompt)}{_size(type_, prompt)}")
    if prompt is not None:
        lines.append(
            f"  bytes that leave the run: {_bytes(plan.bytes_saved(prompt.sizes))}; between places: 0 B"
        )
    return "\n".join(lines)


def _shape(type_: TensorType, prompt: Prompt | None) -> str:
    if prompt is None:
        return str(type_)
    return f"{type_.dtype.value} {list(type_.sizes(prompt.sizes))}"


def _size(type_: TensorType, prompt: Prompt | None) -> str:
    if prompt is None:
        return ""
    return f", {_bytes(type_.nbytes(prompt.sizes))}"


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
