"""What a write changes in the forward pass, in words."""

from __future__ import annotations

from tracelens.ir.graph import Graph
from tracelens.ir.ops import Write
from tracelens.ir.sites import Effect
from tracelens.ir.unrun import shut_out

_REACH = {
    Effect.STREAM: "the residual stream: every later layer sees it",
    Effect.BRANCH: "one branch only: the stream changes through that sublayer",
    Effect.OUTPUT: "after the last layer: only the output changes",
    Effect.MODULE: "one side of a module: whatever reads that tensor sees it",
}


def reach(graph: Graph, write: Write) -> str:
    """What sees a write; a layer in whose place stands something else ends the stream."""
    effect = write.site.kind.effect
    if effect is Effect.STREAM:
        ends = [unrun.site.layer for unrun in shut_out(graph.ops, write) if unrun.site.layer is not None]
        if ends:
            return f"the residual stream up to layer {min(ends)}, in whose place stands what does not see it"
    return _REACH[effect]
