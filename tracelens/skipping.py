"""Modules that a block does not run: what their sites would have been does not exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tracelens.errors import CausalityError, SkippedSiteError
from tracelens.ir.module_sites import ModuleSite, can_travel
from tracelens.ir.ops import Op, Read, Write
from tracelens.ir.sites import Site
from tracelens.location import Location
from tracelens.origins import Origin
from tracelens.subject import spelling


@dataclass(frozen=True, slots=True)
class Skipped:
    """A module that is not run: the moment before it, the site that it would have made, and the user's line."""

    begins: ModuleSite
    site: Site
    location: Location

    def holds(self, site: Site) -> bool:
        """Does a site lie inside of the module?"""
        return self.begins.sequence < site.sequence < self.site.sequence


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
        verb = "read" if isinstance(op, Read) else "replaced" if op.instead is not None else "written"
        inside = "" if op.site == new.site else f", inside of {new.begins.module},"
        raise SkippedSiteError(
            f"{op.site}{inside} was {verb} before {new.begins.module} was replaced, and without that module running it "
            "never exists",
            at=new.location,
            also=((f"it was {verb} at", location),),
            instead=f"replace the module first, and use {spelling(new.site)} after that",
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
