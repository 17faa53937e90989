"""Which module makes a site, and whether it can be left out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tracelens.backends.base import ScaledView, Side
from tracelens.backends.stand_in import unfillable
from tracelens.backends.survey import ModuleCall
from tracelens.errors import AbsentSiteError, ReplacementError, TracelensError, VerificationError
from tracelens.ir.graph import Graph
from tracelens.ir.module_sites import OUTPUT, Key, ModuleSite
from tracelens.ir.ops import Write
from tracelens.ir.sites import Site
from tracelens.ir.types import TensorType

if TYPE_CHECKING:
    from tracelens.backends.anatomy import ModelAnatomy


@dataclass(frozen=True, slots=True)
class Replacement:
    """A module that need not run: the moment before it, what it returns, and where the site's tensor lies in that.

    ``lent``: what it returns changes in place later, so that nobody else may hold it.
    """

    begins: ModuleSite
    returns: Any
    key: Key
    type: TensorType
    lent: bool


def replacement(anatomy: ModelAnatomy, site: Site) -> Replacement:
    """What can stand in for the module that makes a site; :class:`ReplacementError` where nothing can."""
    type_ = anatomy.type_of(site)
    if isinstance(site, ModuleSite):
        call, key, needed = anatomy.sides.call_of(site.path, site.call), site.key, True
        if site.side != OUTPUT:
            raise ReplacementError(
                f"{site} is what a module receives, and only what one returns can be replaced",
                instead=f"model.{site.module}.replace(value), or a write to the input: model.{site} = value",
            )
    else:
        call, key = _made_by(anatomy, site)
        needed = False  # the family's table says that the site is all that is used of what the module returns
    reason = unfillable(call, key, alone=not needed)
    if reason is not None:
        raise ReplacementError(
            f"module {call.path!r} cannot be left out, because {reason}, and one tensor is given",
            instead="a module inside that returns one tensor, or a write to its output",
        )
    return Replacement(call.begins, call.returns, key, type_, call.outputs[key].lent)


def _made_by(anatomy: ModelAnatomy, site: Site) -> tuple[ModuleCall, Key]:
    tap = anatomy.family.taps[site.name]
    path = anatomy.module_path(tap, site.layer)  # the module itself may be another stage's
    if tap.side is not Side.OUT or not isinstance(getattr(tap, "view", None), ScaledView | None):
        raise ReplacementError(
            f"{site} is not the whole output of a module, so no module can be left out for it",
            instead=f"a write: model.layers[i].{site.name} = value; or replace(attn_add=...), replace(mlp_add=...)",
        )
    call = anatomy.sides.call_of(path, None)
    choices: list[Key] = [()] if tap.key is None else []
    choices.append((0 if tap.key is None else tap.key,))
    key = next((key for key in choices if key in call.outputs), None)
    if key is None:
        raise ReplacementError(f"module {path!r} does not return {site} as its table says")
    return call, key


def output_site(anatomy: ModelAnatomy, call: ModuleCall) -> Site:
    """The site that a call of a module makes: the named one if there is one, so that it can be read by its name."""
    if len(call.outputs) != 1:
        raise ReplacementError(
            f"module {call.path!r} cannot be left out, because it returns {len(call.outputs)} tensors: one is given",
            instead="a module inside that returns one tensor, or a write to one of its outputs",
        )
    ((key, leaf),) = call.outputs.items()
    if leaf.site.call is None:
        for site in sorted(anatomy.named_at(call.path, OUTPUT), key=lambda site: site.sequence):
            tap = anatomy.family.taps[site.name]
            if getattr(tap, "view", None) is None and _made_by(anatomy, site)[1] == key:
                return site
    return leaf.site


def at_home(anatomy: ModelAnatomy, graph: Graph) -> Graph:
    """The graph with the moments at which this very model would run the modules that are replaced.

    Which module makes a named site, and when it would begin, are facts of the model: a graph from another one names
    the same site and another moment. Raises :class:`VerificationError` where this model cannot leave the module out.
    """
    if not any(write.instead is not None for write in graph.writes):
        return graph
    ops = list(graph.ops)
    for number, op in enumerate(graph.ops):
        if not isinstance(op, Write) or op.instead is None:
            continue
        try:
            begins = replacement(anatomy, op.site).begins
        except AbsentSiteError as error:
            raise graph.blame(VerificationError(error.problem), number) from None
        except TracelensError as error:
            raise graph.blame(error, number) from None
        if isinstance(op.site, ModuleSite) and begins != op.instead:
            error = VerificationError(
                f"this model reaches {begins.text} where the graph has {op.instead.text}, instead of which it replaces "
                f"{op.site}",
                instead="a graph that was recorded for this model; one that names sites (replace(mlp_add=...)) runs on "
                "other families too",
            )
            raise graph.blame(error, number)
        ops[number] = replace(op, instead=begins)
    return replace(graph, ops=tuple(ops))


def needed_in_generation(anatomy: ModelAnatomy, path: str) -> str | None:
    """Why a module cannot be left out in generation, if it cannot.

    The lengths of the cache are asked of one layer for each kind of attention, and a layer that is left out stores
    nothing: later steps would count their positions from zero.
    """
    kinds: list[str] = getattr(anatomy.config, "layer_types", None) or []
    asked = sorted({0, *(kinds.index(kind) for kind in set(kinds))} & set(range(anatomy.n_layers)))
    for layer in asked:
        attention = anatomy.module_path(anatomy.family.taps["attn_in"], layer)
        if not path or attention == path or attention.startswith(path + "."):
            return f"the attention of layer {layer} tells all others how much is in the cache"
    return None
