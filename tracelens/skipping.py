"""Modules that a block does not run: what their sites would have been does not exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tracelens.errors import CausalityError, SkippedSiteError, VerificationError
from tracelens.ir.graph import Graph
from tracelens.ir.module_sites import ModuleSite, can_travel
from tracelens.ir.ops import Op, Read, Ref, Write
from tracelens.ir.sites import Site
from tracelens.ir.unrun import behind, goes_only_to, sees
from tracelens.location import Location
from tracelens.origins import Origin
from tracelens.subject import Anatomy, spelling


@dataclass(frozen=True, slots=True)
class Skipped:
    """A module that is not run: the moment before it, the site that it would have made, and the user's line."""

    begins: ModuleSite
    site: Site
    location: Location
    write: Write
    """What stands in its place."""

    def holds(self, site: Site) -> bool:
        """Does a site lie inside of the module?"""
        return self.begins.sequence < site.sequence < self.site.sequence

    def alone_receives(self, site: Site, anatomy: Anatomy) -> bool:
        """Would the module be the only one to see what is written to a site?"""
        names = anatomy.names_at(site) if isinstance(site, ModuleSite) else ()
        return any(goes_only_to(name, self.write) for name in (site, *names))

    @property
    def whole_layer(self) -> bool:
        return self.site.name == "resid_post"


def refuse_inside(skipped: Sequence[Skipped], site: Site) -> None:
    """Raises :class:`SkippedSiteError` for a site inside of a module that is not run."""
    for module in skipped:
        if module.holds(site):
            raise SkippedSiteError(
                f"{site} lies inside of {module.begins.module}, which this block does not run",
                also=(("it was replaced at", module.location),),
                instead=f"what stands in its place: {spelling(module.site)}",
            )


def refuse_late(new: Skipped, ops: Sequence[Op], locations: Sequence[Location]) -> None:
    """Raises :class:`SkippedSiteError` where the block has already looked at what the module would have made."""
    for op, location in zip(ops, locations, strict=True):
        if not isinstance(op, Read | Write) or not (op.site == new.site or new.holds(op.site)):
            continue
        if isinstance(op, Write) and op.instead is not None and op.site == new.site:
            raise SkippedSiteError(
                f"{new.begins.module} is replaced twice in this block",
                at=new.location,
                also=(("the first time at", location),),
                instead=f"one of the two; later lines can write what stands in its place: {spelling(new.site)} = value",
            )
        verb = "read" if isinstance(op, Read) else "replaced" if op.instead is not None else "written"
        inside = "" if op.site == new.site else f", inside of {new.begins.module},"
        raise SkippedSiteError(
            f"{op.site}{inside} was {verb} before {new.begins.module} was replaced, and without that module running it "
            "never exists",
            at=new.location,
            also=((f"it was {verb} at", location),),
            instead=f"replace the module first, and use {spelling(new.site)} after that"
            if op.site == new.site
            else f"the block without that line: what stands in the place of the module is {spelling(new.site)}",
        )


def refuse_unseen(skipped: Sequence[Skipped], site: Site, anatomy: Anatomy) -> None:
    """Raises :class:`SkippedSiteError` for a write to what only a module receives that is not run.

    Whatever stands in the module's place was made before this write.
    """
    for module in skipped:
        if module.alone_receives(site, anatomy):
            raise SkippedSiteError(
                f"{site} goes to {module.begins.module} and nowhere else, which this block does not run: "
                "nothing would see what is written there",
                also=(("it was replaced at", module.location),),
                instead=f"this line before the one that replaces it, by a value made of {spelling(site)}"
                + (" (layer.skip() sees all writes before it)" if module.whole_layer else "")
                + f"; or a write to what stands in its place: {spelling(module.site)}",
            )


def refuse_overlooked(
    new: Skipped, ops: Sequence[Op], locations: Sequence[Location], anatomy: Anatomy
) -> None:
    """Raises :class:`SkippedSiteError` where something was written to what only the module receives, and what takes its
    place is made without it."""
    written = [
        (number, op)
        for number, op in enumerate(ops)
        if isinstance(op, Write) and new.alone_receives(op.site, anatomy)
    ]
    if not written:
        return
    value = new.write.value
    reads = behind(ops, value.id)[1] if isinstance(value, Ref) else ()
    reads = [read for read in reads if new.alone_receives(read.site, anatomy)]
    for number, op in written:
        if not any(sees(read, op) for read in reads):
            raise SkippedSiteError(
                f"{op.site} was written, which goes to {new.begins.module} and nowhere else; without that module "
                "running nothing sees it, because what takes its place is not made of it",
                at=new.location,
                also=((f"{op.site} was written at", locations[number]),),
                instead=f"a value made of {spelling(op.site)}, or the block without that write",
            )


def refuse_unready(new: Skipped, origin: Origin, locations: Sequence[Location]) -> None:
    """Raises :class:`CausalityError` if a value is not there yet when the module would have run."""
    begins = new.begins
    if origin.order < begins.order or (origin.order == begins.order and can_travel(origin.sites, begins)):
        return
    late = ", ".join(sorted(map(str, origin.sites))) or "a gradient"
    raise CausalityError(
        f"{begins.module} would be replaced by something made of {late}, which is not there yet when it would run",
        at=new.location,
        also=(("the value was read at", locations[origin.number]),),
        instead="a value made of what the module receives, or of what comes before it",
    )


def refuse_unseen_in(graph: Graph, anatomy: Anatomy) -> None:
    """Raises :class:`VerificationError` where nothing sees a write of a graph, which may be from elsewhere, because a
    module is not run."""
    if not any(write.instead is not None for write in graph.writes):
        return
    locations = [graph.location(number) for number in range(len(graph.ops))]
    unrun: list[Skipped] = []
    for number, op in enumerate(graph.ops):
        if not isinstance(op, Write):
            continue
        try:
            if op.instead is None:
                refuse_unseen(unrun, op.site, anatomy)
            else:
                unrun.append(Skipped(op.instead, op.site, locations[number], op))
                refuse_overlooked(unrun[-1], graph.ops[:number], locations, anatomy)
        except SkippedSiteError as error:
            raise graph.blame(VerificationError(error.problem, instead=error.instead), number) from None
