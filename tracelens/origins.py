"""Where values come from in the forward pass, so that none travels backwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tracelens.errors import CausalityError
from tracelens.ir.module_sites import can_travel
from tracelens.ir.ops import Arg, Ref
from tracelens.ir.sites import AFTER_ALL, Order, Site
from tracelens.location import Location


@dataclass(frozen=True, slots=True)
class Origin:
    """The latest sites that a value was made from."""

    order: Order
    sites: frozenset[Site]
    number: int
    """Of the operation that read the site."""


def latest_origin(origins: Sequence[Origin | None], args: Sequence[Arg]) -> Origin | None:
    """The latest sites that any of the arguments was made from; ``origins`` has one entry per value."""
    latest: Origin | None = None
    for arg in args:
        if isinstance(arg, Ref):
            origin = origins[arg.id]
        elif isinstance(arg, tuple):
            origin = latest_origin(origins, arg)
        else:
            continue
        if origin is None or origin is latest:
            continue
        if latest is None or origin.order > latest.order:
            latest = origin
        elif origin.order == latest.order and origin.sites != latest.sites:
            latest = Origin(origin.order, origin.sites | latest.sites, origin.number)
    return latest


def refuse_backwards(site: Site, origin: Origin, locations: Sequence[Location], location: Location) -> None:
    """Raises :class:`CausalityError` if a value of this origin cannot have reached ``site`` yet."""
    if origin.order == AFTER_ALL:
        raise CausalityError(
            f"{site} would need a gradient, which is known only after the forward pass has reached the loss",
            at=location,
            also=(("the gradient was taken at", locations[origin.number]),),
            instead="save the gradient in one trace and write it in a second one",
        )
    if not (
        origin.order < site.order
        or origin.sites == frozenset((site,))
        or (origin.order == site.order and can_travel(origin.sites, site))
    ):
        late = ", ".join(sorted(str(source) for source in origin.sites))
        raise CausalityError(
            f"{site} would need {late}, which the forward pass reaches "
            + ("later" if origin.order > site.order else "at the same moment"),
            at=location,
            also=(("the value was read at", locations[origin.number]),),
            instead="write at a later site, or save the value in one trace and use it in a second one",
        )
