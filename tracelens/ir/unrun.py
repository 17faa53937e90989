"""What can no longer be seen because the one module that it goes to is not run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tracelens.ir.module_sites import INPUT, ModuleSite
from tracelens.ir.ops import Op, Read, Ref, Write, operands, results
from tracelens.ir.sites import KIND, Effect, Site

# The ends of the two sublayers: what their own sites go to, and nothing else does.
_ATTENTION = ("attn_out", "attn_post_norm", "attn_add")
_MLP = ("mlp_out", "mlp_post_norm", "mlp_add")
_FIRST = {**dict.fromkeys(_ATTENTION, "attn_norm"), **dict.fromkeys(_MLP, "mlp_norm")}
_ONE_TO_ONE = {"resid_post": "resid_pre", "q_normed": "q", "k_normed": "k", "lm_head": "final_norm"}


def goes_only_to(site: Site, unrun: Write) -> bool:
    """Is the module in whose place ``unrun`` stands the only one that a site's tensor can reach the output through?

    True of what that very module receives, of the stream that enters a layer, and of what lies before the end of a
    sublayer in it. What else goes there and nowhere else depends on the model, and is not known here.
    """
    begins, made = unrun.instead, unrun.site
    assert begins is not None
    if isinstance(site, ModuleSite):
        return site.side == INPUT and (site.path, site.call) == (begins.path, begins.call)
    if isinstance(made, ModuleSite) or (site.layer, site.steps) != (made.layer, made.steps):
        return False
    if made.name in _FIRST:
        kind = KIND[site.name]
        return (
            kind.effect is Effect.BRANCH
            and KIND[_FIRST[made.name]].level <= kind.level < KIND[made.name].level
        )
    return _ONE_TO_ONE.get(made.name) == site.name


def behind(ops: Sequence[Op], value: int) -> tuple[frozenset[int], tuple[Read, ...]]:
    """The values that one is made of, itself included, and the reads among them."""
    needed = {value}
    reads: list[Read] = []
    for op in reversed(ops):
        if any(made in needed for made, _ in results(op)):
            needed.update(operands(op))
            if isinstance(op, Read):
                reads.append(op)
    return frozenset(needed), tuple(reads)


def sees(read: Read, write: Write) -> bool:
    """Does a read see what was written, there or through what the model makes of it?"""
    if read.site == write.site:
        return read.version >= write.version
    return write.site.sequence < read.site.sequence


def shut_out(ops: Sequence[Op], write: Write) -> Iterator[Write]:
    """The layers that are not run, after a write to the stream, in whose place stands what does not see it."""
    for unrun in ops:
        if not isinstance(unrun, Write) or unrun.instead is None or unrun.site.name != "resid_post":
            continue
        if not write.site.sequence < unrun.instead.sequence:
            continue
        if isinstance(unrun.value, Ref):
            values, reads = behind(ops, unrun.value.id)
            if (isinstance(write.value, Ref) and write.value.id in values) or any(
                sees(r, write) for r in reads
            ):
                continue
        yield unrun
