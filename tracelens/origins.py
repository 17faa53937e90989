"""Where values come from in the forward pass, so that none travels backwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tracelens.errors import CausalityError, GenerationStepError, PositionAxisError
from tracelens.ir.dims import KEY, POSITION
from tracelens.ir.module_sites import can_travel
from tracelens.ir.ops import Arg, Ref, refs
from tracelens.ir.sites import AFTER_ALL, Order, Site
from tracelens.ir.step_flow import steps_of
from tracelens.ir.types import TensorType
from tracelens.ir.windows import PREFILL, ApartError, StepWindow, is_earlier, together
from tracelens.location import Location
from tracelens.subject import spelling


@dataclass(frozen=True, slots=True)
class Origin:
    """The latest sites that a value was made from."""

    order: Order
    sites: frozenset[Site]
    number: int
    """Of the operation that read the site."""
    steps: StepWindow | None = None
    """In a generation, the steps in which the value is there."""


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


def origin_in_steps(
    origins: Sequence[Origin | None],
    types: Sequence[TensorType],
    args: Sequence[Arg],
    *,
    by_token: bool = False,
) -> Origin | None:
    """The same in a generation, where values of several steps may meet; ``by_token``: tokens of the prompt are chosen.

    Raises :class:`GenerationStepError` for values that are in no step there together, and :class:`PositionAxisError`
    where positions of one step would be used in another.
    """
    used = [(value, origin) for arg in args for value in refs(arg) if (origin := origins[value]) is not None]
    try:
        window = together(origin.steps for _, origin in used if origin.steps is not None)
    except ApartError as error:
        raise GenerationStepError(str(error), instead=_SAME_STEPS) from None
    if window is None:
        return None
    if by_token:
        if not PREFILL.within(window):
            raise PositionAxisError(
                f"a value of {window.words} has none of the prompt's tokens: each of these steps has one new token",
                instead="[:, -1] for that token; t.prefill for what .tok[...] chooses of the prompt",
            )
        window = PREFILL
    latest: Origin | None = None
    for value, origin in used:
        require_positions(types[value], origin.steps, window)
        if not is_earlier(origin.steps, window) and (latest is None or origin.order >= latest.order):
            same = latest is not None and origin.order == latest.order
            sites = origin.sites | latest.sites if latest is not None and same else origin.sites
            latest = Origin(origin.order, sites, origin.number, window)
    assert latest is not None
    return latest


def require_positions(type_: TensorType, made: StepWindow | None, window: StepWindow) -> None:
    """Raises :class:`PositionAxisError` for positions of one step that would be used in another."""
    if made is not None and made.single and made != window and type_.symbols & {POSITION, KEY}:
        raise PositionAxisError(
            f"{type_} holds the positions of {made.words}, and would be used in {window.words}, which have others",
            instead="one of them, which has no position axis: value[:, -1], value.tok[3], value.mean(1); "
            "for all of them, a write in the same steps: t.prefill.layers[i].resid_post += value; for a mask, that of "
            "the same steps: t.prefill.positions >= 5",
        )


_SAME_STEPS = (
    "values of the same steps, such as t.decode for both; or of one earlier step, which all later ones can use: "
    "t.steps[0]"
)


def refuse_earlier_steps(
    site: Site, window: StepWindow, origin: Origin, locations: Sequence[Location]
) -> None:
    """Raises :class:`CausalityError` for a write in steps that are over when the value is made."""
    made = origin.steps
    if made is None or not made.single or window.stop is None or window.stop > made.start:
        return
    raise CausalityError(
        f"{site.always} of {window.words} would need a value of {made.words}, which is made later",
        also=(("the value was read at", locations[origin.number]),),
        instead=f"a write in these steps: t.steps[{made.start}:].{spelling(site.always).removeprefix('model.')}; or "
        "two generations, of which the second uses what the first saved",
    )


def refuse_other_steps(site: Site, type_: TensorType, origin: Origin, locations: Sequence[Location]) -> bool:
    """Raises for a write in steps in which the value is not there; is it there before all that they do?"""
    window, made = steps_of(site), origin.steps
    if made is None:
        return False
    refuse_earlier_steps(site, window, origin, locations)
    if not window.within(made) and not (made.single and made.start <= window.start):
        shown = "before it is there" if made.single else "which are not all of these"
        raise GenerationStepError(
            f"{site.always} would be written in {window.words} with a value of {made.words}, {shown}",
            instead=f"a write in these steps: t.steps[{made.start}:].{spelling(site.always).removeprefix('model.')}"
            if made.single
            else f"the same steps for both: {made.words}",
        )
    require_positions(type_, made, window)
    return is_earlier(made, window)


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
        or origin.sites == frozenset((site.always,))
        or (origin.order == site.order and can_travel(origin.sites, site))
    ):
        late = ", ".join(sorted(str(source) for source in origin.sites))
        raise CausalityError(
            f"{site} would need {late}, which the forward pass reaches "
            + ("later" if origin.order > site.order else "at the same moment"),
            at=location,
            also=(("the value was read at", locations[origin.number]),),
            instead="write at a later site, or save the value in one trace and use it in a second one"
            if origin.steps is None or steps_of(site).start
            else "write at a later site; or in t.decode with a value of t.prefill, which comes before all its steps",
        )
