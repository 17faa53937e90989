"""Which transfers of a plan send a gradient back: autograd returns derivatives the way that the values came.

A value that was sent on its way from a tensor that a gradient is taken with respect to, to the loss, gets its gradient
where it arrived, and autograd sends that to where the value came from, in every backward pass anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from tracelens.ir.gradients import carries_derivatives, leads_to
from tracelens.ir.graph import Graph
from tracelens.ir.module_sites import ModuleSite
from tracelens.ir.ops import Grad, Read, Ref, Transfer, Write, operands, results
from tracelens.ir.sites import KIND, Effect, Scope, Site


def returning(graph: Graph) -> Mapping[int, int]:
    """For transfers whose gradients come back, by the values that arrive: in how many backward passes.

    Through the model itself a derivative is taken to come wherever the order of the sites lets it. It does not where
    nothing of the tensor is left by a write to queries, keys, scores or a pattern or to a module's side, or where a
    function has no derivative: what the run's report counts is what was sent.
    """
    passes = [op for op in graph.ops if isinstance(op, Grad)]
    sent = {op.out for op in graph.ops if isinstance(op, Transfer)}
    if not passes or not sent:
        return {}
    before = _before(graph)
    after: dict[int, list[int]] = {}
    for value, earlier in before.items():
        for one in earlier:
            after.setdefault(one, []).append(value)
    found: Counter[int] = Counter()
    for op in passes:
        found.update(sent & _reached(before, [op.loss]) & _reached(after, op.wrt))
    return found


def _reached(steps: Mapping[int, Iterable[int]], start: Iterable[int]) -> set[int]:
    found: set[int] = set()
    waiting = list(start)
    while waiting:
        value = waiting.pop()
        if value not in found:
            found.add(value)
            waiting += steps.get(value, ())
    return found


def _before(graph: Graph) -> Mapping[int, list[int]]:
    """For every value, those that a derivative of it goes on to: what it is made of, in the block and by the model."""
    last: dict[Site, Write] = {}
    written: dict[tuple[Site, int], Write] = {}
    for op in graph.writes:
        last[op.site] = written[op.site, op.version] = op
    found: dict[int, list[int]] = {}
    for op in graph.ops:
        if isinstance(op, Read):
            own = written.get((op.site, op.version))
            writes = _leading_to(op.site, last) if own is None else iter((own,))
            sources = [write.value.id for write in writes if isinstance(write.value, Ref)]
        elif carries_derivatives(op):
            sources = list(operands(op))
        else:
            continue
        for value, type_ in results(op):
            if type_.dtype.is_floating:
                found[value] = [one for one in sources if graph.types[one].dtype.is_floating]
    return found


def _leading_to(site: Site, last: Mapping[Site, Write]) -> Iterator[Write]:
    """The writes from which the model's own computation leads to a site."""
    earlier = [write for write in last.values() if leads_to(write.site, site)]
    cut = max((write.site.order for write in earlier if _is_all(write.site)), default=None)
    for write in earlier:
        own = write.site
        if cut is not None and own.order < cut:
            continue
        if not any(other in last and leads_to(other, site) for other in _closing(own)):
            yield write


def _is_all(site: Site) -> bool:
    """Does everything that follows a site follow from it alone?"""
    effect, scope = site.kind.effect, site.kind.scope
    return effect is Effect.OUTPUT or (effect is Effect.STREAM and scope is Scope.LAYER)


def _closing(site: Site) -> Iterator[Site]:
    """The later sites of the same attention or MLP that all of it goes through."""
    if isinstance(site, ModuleSite) or site.kind.scope is not Scope.LAYER:
        return
    for branch in _BRANCHES:
        if KIND[branch[0]].level <= site.kind.level < KIND[branch[-1]].level:
            yield from (
                Site(name, site.layer, site.steps) for name in branch if KIND[name].level > site.kind.level
            )


_BRANCHES = (
    ("attn_norm", "attn_in", "z", "attn_out", "attn_post_norm", "attn_add"),
    ("mlp_norm", "mlp_in", "mlp_act", "mlp_out", "mlp_post_norm", "mlp_add"),
)
