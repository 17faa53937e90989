"""The ranks of a model do one thing together: before a run they see to it that it is the same thing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from tracelens.backends.mesh import Mesh
from tracelens.backends.ranks.failures import described, failure
from tracelens.compiled import Compiled, relocate
from tracelens.errors import OptionError, PipelineError, PlansDifferError, TracelensError
from tracelens.ir.graph import Graph
from tracelens.ir.ops import Grad, Keep, Save
from tracelens.prompted import Prompt


def require_agreement(mesh: Mesh, compiled: Compiled, graph: Graph, prompt: Prompt) -> None:
    """Raises :class:`~tracelens.errors.PlansDifferError` on every rank if one has another plan, prompt or constant."""
    parts = {
        "plan": json.dumps([compiled.plan_digest, *(save.to for save in compiled.saves)]).encode(),
        "prompt": prompt.batch.input_ids.numpy().tobytes() + prompt.batch.mask.numpy().tobytes(),
        "captured tensors": b"".join(graph.constants[index].payload() for index, _ in compiled.used),
    }
    digests = {name: hashlib.sha256(data).digest() for name, data in parts.items()}
    if mesh.agreed(b"".join(digests.values())):
        return
    raise differing([name for name, digest in digests.items() if not mesh.agreed(digest)])


def differing(parts: Sequence[str]) -> PlansDifferError:
    """The error for ranks that differ in some of what a run needs."""
    return PlansDifferError(
        f"the ranks differ in their {' and '.join(parts)}, so that they would wait for each other for ever",
        instead="the same script on every rank: the same prompt, and random tensors from one seed",
    )


def require_success(mesh: Mesh, error: TracelensError | None, graph: Graph) -> None:
    """Raises on every rank what went wrong on one; each has taken part to the end. ``error``: this rank's own.

    The ranks that did nothing wrong raise the error of the first that did, with its number and traceback.
    """
    first = mesh.first_failed(error is not None)
    if first is None:
        return
    own = json.dumps(described(error)).encode() if error is not None else b""
    about = json.loads(mesh.told(own, first))
    if error is not None:
        raise error
    failed = failure(first, mesh.world, "the run", about)
    raise (failed if failed.original is None else relocate(failed.original, graph)) from failed


def refuse_on_ranks(graph: Graph, *, stages: int) -> None:
    """Refuses by name what ranks cannot do so far."""
    for number, op in enumerate(graph.ops):
        if isinstance(op, Save) and op.keep is Keep.DEVICE:
            error: TracelensError = OptionError(
                f'{op.name!r} is saved with device="keep", and the ranks keep nothing between runs',
                instead="value.save(), which brings it to the host",
            )
            raise graph.blame(error, number)
        if isinstance(op, Grad) and stages > 1:
            error = PipelineError(
                "a gradient would have to travel back through the stages of a pipeline, which it cannot so far",
                instead="tensor parallelism alone: tl.load(name, tp=...)",
            )
            raise graph.blame(error, number)
