"""Refuses a prompt that a graph, which was made ready for any, is not right for."""

from __future__ import annotations

from tracelens.compiled import Compiled
from tracelens.errors import PositionAxisError, SpecialisedGraphError, TracelensError, WriteTargetError
from tracelens.generation_plan import CompiledGeneration
from tracelens.ir.graph import Graph
from tracelens.ir.ops import IndexPut, operands
from tracelens.ir.padding import has_keys
from tracelens.ir.text import op_text
from tracelens.misaligned import graph_misaligned
from tracelens.prompted import Prompt
from tracelens.subject import PADS


def check_fits(graph: Graph, compiled: Compiled | CompiledGeneration, prompt: Prompt) -> None:
    """Refuses a prompt of other sizes than the graph is right for."""
    for pin in graph.pins:
        size = prompt.lengths_digest if pin.symbol == PADS else prompt.sizes[pin.symbol]
        if size == pin.size:
            continue
        if pin.symbol == PADS:
            problem = "the graph addresses tokens by a mask that was made for prompts of other lengths"
        else:
            what = {"B": "rows", "P": "positions", "S": "attended positions"}.get(pin.symbol, pin.symbol)
            problem = f"the graph was recorded for {pin.size} {what}, and this prompt has {size}"
        raise graph.blame(
            SpecialisedGraphError(
                problem, instead="record again for this prompt, or record without using the size as a number"
            ),
            max(pin.op, 0),
        )
    for number, selector in compiled.selectors:
        try:
            selection = prompt.select(selector)
            if selection.repeats and isinstance(graph.ops[number], IndexPut):
                raise WriteTargetError(
                    "a token is selected twice in a row, so that assigning to it has no one meaning",
                    instead="each token once",
                )
        except TracelensError as error:
            raise graph.blame(error, number) from None
    if prompt.ragged and compiled.mixing:
        number = compiled.mixing[0]
        raise graph.blame(
            graph_misaligned(
                op_text(graph.ops[number]),
                has_keys(graph.types[value] for value in operands(graph.ops[number])),
            ),
            number,
        )
    if prompt.ragged and compiled.padded:
        number, saved = compiled.padded[0]
        raise graph.blame(
            PositionAxisError(
                f"the rows of this prompt differ in length, and a {saved} that is saved holds the positions of all "
                "rows together, padding included",
                instead="prompts of one length; or a tensor that is [B, P, ...], such as a named site",
            ),
            number,
        )
