"""Writes the tables of ``docs/sites.md`` from the vocabulary and the families' tables, so that they cannot drift."""

from __future__ import annotations

from collections.abc import Iterable

from tracelens.backends.architectures import FAMILIES
from tracelens.backends.base import Family, NeuronsView, RowsView, ScaledView, Side, Tap, View
from tracelens.ir.sites import KINDS, TEXT, Effect, Kind, Scope

_WIDTHS = {
    "D": "d_model",
    "M": "neurons",
    "V": "vocabulary",
    "H": "heads",
    "K": "kv heads",
    "c": "query width",
    "d": "head width",
    "E": "experts",
    "k": "experts per token",
    "N": "neurons of an expert",
}
_REACH = {
    Effect.STREAM: "**stream**",
    Effect.BRANCH: "branch",
    Effect.OUTPUT: "output",
    Effect.NONE: "read only",
}


def vocabulary() -> str:
    """Every site, in the order of the forward pass."""
    return _table(
        ("site", "also called", "shape", "a write changes", "meaning"),
        (
            (
                _written(kind),
                ", ".join(f"`{alias}`" for alias in kind.aliases),
                ", ".join(_WIDTHS.get(str(dim), str(dim)) for dim in kind.shape),
                _REACH[kind.effect],
                kind.meaning,
            )
            for kind in _shown()
        ),
    )


def families() -> str:
    """One section per family: where each site is found, or why the family lacks it."""
    return "\n\n".join(_family(family) for family in FAMILIES)


def _family(family: Family) -> str:
    types = ", ".join(f"`{kind}`" for kind in family.model_types)
    found = [
        (_written(kind), _hook_point(family, kind, family.taps[kind.name]), _REACH[kind.effect])
        for kind in _shown()
        if kind.name in family.taps
    ]
    missing = [kind for kind in _shown() if kind.name not in family.taps]
    parts = [
        f"### {family.name}",
        f"`model_type` {types}{f', where {family.these}' if family.these else ''}; layers are "
        f"`{family.layers.format('i')}`.",
        _table(("site", "where it is in the transformers model", "a write changes"), found),
    ]
    if missing:
        reasons = (f"* `{kind.name}`: {family.absent.get(kind.name, 'not in the table')}" for kind in missing)
        parts.append("Absent, and reading or writing it raises `AbsentSiteError`:\n\n" + "\n".join(reasons))
    if family.in_some:
        parts.append(
            "In some layers only; in the others it raises `AbsentSiteError`:\n\n"
            + "\n".join(
                f"* {', '.join(f'`{name}`' for name in some.names)}: in {some.these}; any other layer {some.others}"
                for some in family.in_some
            )
        )
    if family.refusals:
        refused = (f"* `{option}`: {reason}" for option, reason in family.refusals.items())
        parts.append("Configurations that are refused when the model is loaded:\n\n" + "\n".join(refused))
    if family.not_on_ranks:
        reasons = (f"* `{way}=`: {reason}" for way, reason in family.not_on_ranks.items())
        parts.append(
            "Refused by `tl.load`, because transformers would compute something else:\n\n"
            + "\n".join(reasons)
        )
    return "\n\n".join(parts)


def _shown() -> tuple[Kind, ...]:
    return tuple(kind for kind in KINDS if kind.scope not in TEXT)


def _written(kind: Kind) -> str:
    return f"`layers[i].{kind.name}`" if kind.scope is Scope.LAYER else f"`{kind.name}`"


def _hook_point(family: Family, kind: Kind, tap: Tap) -> str:
    module = tap.module
    if kind.scope is Scope.LAYER:
        layer = family.layers.format("i")
        module = f"{layer}.{tap.module}" if tap.module else layer
    many = max(
        (len(word.choices) for name, word in family.words.items() if f"{{{name}}}" in module), default=1
    )
    each = [
        module.format_map({name: word.choices[number] for name, word in family.words.items()})
        if many > 1
        else module
        for number in range(many)
    ]
    where = " or ".join(f"`{path}`" for path in each) if module else "the model"
    only = next((f", in {some.these}" for some in family.in_some if kind.name in some.names), "")
    if tap.side is Side.INSIDE:
        return f"the attention function that {where} calls{only}"
    if tap.side is Side.EXPERTS:
        return f"per row, among the experts of {where}{only}"
    side = "input" if tap.side is Side.IN else "output"
    field = f" (field `{tap.key}`)" if tap.side is Side.OUT and isinstance(tap.key, str) else ""
    if tap.side is Side.OUT and isinstance(tap.key, int) and isinstance(tap.view, RowsView):
        field = f" (part {tap.key + 1} of the tuple)"
    return f"{_part(tap.view)}{side} of {where}{field}{only}"


def _part(view: View | None) -> str:
    if view is None:
        return ""
    if isinstance(view, NeuronsView):
        return f"part {view.index + 1} of {len(view.parts)} of the "
    if isinstance(view, ScaledView):
        return f"`{view.by}` times the "
    if isinstance(view, RowsView):
        return "per row, "
    if view.heads_first:
        return "heads and positions swapped, "
    parts = len(view.parts)
    one = "kv head" if "K" in view.parts else "head"
    of = f"of each {one}'s share of the " if view.grouped else "of the "
    return "per head, " + (f"part {view.index + 1} of {parts} {of}" if parts > 1 else "")


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
