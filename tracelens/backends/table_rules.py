"""What a family's table has to say before a model is held to it."""

from __future__ import annotations

from collections.abc import Iterator
from string import Formatter

from tracelens.backends.base import Family, HeadsView, NeuronsView, ScaledView, Side, Tap
from tracelens.errors import FamilyTableError
from tracelens.ir.sites import KIND, KINDS, TEXT, Scope, near

NEEDED = ("resid_pre", "resid_post", "final_norm", "lm_head", "logits")
"""Without these nothing can be run or read: the stream, and what becomes of it."""
_INSIDE = ("v", "q_rot", "k_rot", "scores", "pattern")
_WIDTHS = frozenset({"D", "M", "V", "H", "K", "c", "d"})


def require_complete(family: Family) -> None:
    """Raises :class:`~tracelens.errors.FamilyTableError` for a table that leaves a site out, or names what is none."""
    if not isinstance(family, Family):  # pyright: ignore[reportUnnecessaryIsInstance]  # users may not be typed
        raise FamilyTableError(f"a {type(family).__name__} is no table: tl.families.Family(...) is")
    problem = next(problems(family), None)
    if problem is not None:
        wrong, instead = problem
        raise FamilyTableError(f"the table {family.name!r} {wrong}", instead=instead)


def problems(family: Family) -> Iterator[tuple[str, str | None]]:
    """What is wrong with a table, and what to write instead."""
    if not family.model_types or not all(isinstance(each, str) and each for each in family.model_types):
        yield "serves no type of models", 'model_types=("starcoder2",), what config.model_type is'
    if family.layers.count("{}") != 1:
        yield f"has its layers at {family.layers!r}, without a place for the number", '"model.layers.{}"'
    names = tuple(kind.name for kind in KINDS if kind.scope not in TEXT)
    for word, said in (("taps", family.taps), ("absent", family.absent)):
        for name in said:
            if name not in names:
                close = ", ".join(near(name, names))
                yield f"has {name!r} in {word}, which is no site", f"did you mean {close}?" if close else None
    for name in names:
        if name in family.taps and name in family.absent:
            yield f"has {name!r} in taps and in absent", None
        if name not in family.taps and not str(family.absent.get(name, "")).strip():
            yield (
                f"does not say where {name!r} is",
                f'a Tap in taps; or in absent a reason: {{"{name}": "why these models lack it"}}',
            )
    for name in NEEDED:
        if name not in family.taps:
            yield f"has no tap for {name!r}, which every language model has", None
    if "embed" not in family.taps and family.embedding is None:
        yield "does not say which module has a row for each token", "a tap for 'embed', or embedding="
    for name, tap in family.taps.items():
        if name in names:
            yield from _of_tap(family, name, tap)
    for group in family.in_some:
        for name in group.names:
            if name not in family.taps or KIND[name].scope is not Scope.LAYER:
                yield f"has {name!r} in in_some, which is no site of a layer in taps", None
    for names_, _ in family.withheld.values():
        for name in names_:
            if name not in family.taps:
                yield f"withholds {name!r}, which it has no tap for", None
    for name in family.reached:
        if name not in family.taps:
            yield f"has {name!r} in reached, which it has no tap for", None


def _of_tap(family: Family, name: str, tap: Tap) -> Iterator[tuple[str, str | None]]:
    if not isinstance(tap, Tap):  # pyright: ignore[reportUnnecessaryIsInstance]  # users may not be typed
        yield f"has a {type(tap).__name__} for {name!r}", 'Tap("self_attn", Side.OUT, 0)'
        return
    if tap.side is Side.INSIDE and tap.key not in _INSIDE:
        yield f"has {tap.key!r} inside attention for {name!r}", "one of " + ", ".join(_INSIDE)
    words = [word for _, word, _, _ in Formatter().parse(tap.module) if word is not None]
    for word in words:
        if word not in family.words:
            yield (
                f"has the word {word!r} in the path of {name!r}, and does not say what it is",
                f'words={{"{word}": ...}}',
            )
    if isinstance(tap.view, ScaledView) and tap.side is Side.INSIDE:
        yield f"multiplies {name!r}, which is inside attention", "a ScaledView of a module's input or output"
    known = _WIDTHS | set(family.widths)
    used = {width for width in KIND[name].shape if isinstance(width, str)}
    if isinstance(tap.view, HeadsView | NeuronsView):
        used |= set(tap.view.parts)
        if not 0 <= tap.view.index < len(tap.view.parts):
            yield f"has part {tap.view.index} of {len(tap.view.parts)} for {name!r}", None
    for width in sorted(used - known):
        yield (
            f"has {name!r}, and no width {width!r}",
            f'widths={{"{width}": "the configuration\'s word for it"}}',
        )
