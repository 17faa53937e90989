"""``model.sites()``: what can be read and written, and what cannot, with the reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tracelens.backends.anatomy import ModelAnatomy
from tracelens.ir.sites import KINDS, TEXT, Effect, Scope, Site, near
from tracelens.view import Line, Shown, Stack, Table, View


@dataclass(frozen=True, slots=True)
class SiteRow:
    """One site of a model. ``absent`` is the reason why the model lacks it, or ``None``.

    ``layers``: those that have it, where not all do; ``others``: why the others lack it. ``status``: ``"verified"`` by
    an identity that holds in this model, ``"derived"`` from the family's table alone, or ``"absent"``.
    """

    name: str
    aliases: tuple[str, ...]
    path: str
    shape: str
    dtype: str
    effect: Effect
    meaning: str
    absent: str | None
    layers: tuple[int, ...] = ()
    others: str | None = None
    status: str = "derived"

    @property
    def writable(self) -> bool:
        """Whether this model has the site and one can assign to it."""
        return self.absent is None and self.effect is not Effect.NONE


class SiteTable(Sequence[SiteRow], Shown):
    """The sites of a model, as a table; ``table["post_ln"]`` is one row."""

    def __init__(self, rows: tuple[SiteRow, ...], title: str) -> None:
        self.rows = rows
        self.title = title

    def __getitem__(self, key: int | str | slice) -> SiteRow | tuple[SiteRow, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]  # by name, too
        if isinstance(key, str):
            for row in self.rows:
                if key in (row.name, *row.aliases):
                    return row
            names = tuple(name for row in self.rows for name in (row.name, *row.aliases))
            raise KeyError(f"there is no site {key!r}; near: {', '.join(near(key, names)) or 'none'}")
        return self.rows[key]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[SiteRow]:
        return iter(self.rows)

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                row.path,
                ", ".join(row.aliases),
                row.shape if row.absent is None else "-",
                row.dtype if row.absent is None else "-",
                row.effect.value if row.absent is None else "absent",
                row.status,
                row.absent if row.absent is not None else _meaning(row),
            )
            for row in self.rows
        ]

    def _view(self) -> View:
        return Stack((Line(self.title), Table(_HEADS, tuple(self._cells()))))


def _meaning(row: SiteRow) -> str:
    if row.others is None:
        return row.meaning
    which = f"layer{'s' if len(row.layers) > 1 else ''} {', '.join(map(str, row.layers))}"
    return f"{row.meaning} (in {which}; {row.others})"


_HEADS = ("site", "alias", "shape", "dtype", "a write changes", "status", "meaning")


def site_table(anatomy: ModelAnatomy) -> SiteTable:
    """The table of a model, loaded or not."""
    rows: list[SiteRow] = []
    for kind in KINDS:
        if kind.scope in TEXT:
            continue
        in_layer = kind.scope is Scope.LAYER
        layers = anatomy.layers_with(kind.name) or (0,)
        site = Site(kind.name, layers[0] if in_layer else None)
        absent = anatomy.absence(Site(kind.name))
        some = () if anatomy.in_all_layers(kind.name) else tuple(layers)
        others = (
            [anatomy.absence(Site(kind.name, layer)) for layer in range(anatomy.n_layers)] if some else []
        )
        shape = dtype = ""
        if absent is None:
            type_ = anatomy.type_of(site)
            shape, dtype = str(list(type_.shape)).replace("'", ""), type_.dtype.value
        path = f"layers[i].{kind.name}" if in_layer else kind.name
        lacking = next((reason for reason in others if reason is not None), None)
        rows.append(
            SiteRow(
                kind.name,
                kind.aliases,
                path,
                shape,
                dtype,
                kind.effect,
                kind.meaning,
                absent,
                some if absent is None else (),
                lacking if absent is None else None,
                "absent" if absent is not None else _status(anatomy, kind.name),
            )
        )
        if kind.name == "z":
            rows.append(_head_out(anatomy, dtype))
    return SiteTable(
        tuple(rows), f"{anatomy.family.name}, {anatomy.n_layers} layers (B rows, P positions, S keys)"
    )


def _status(anatomy: ModelAnatomy, name: str) -> str:
    return "derived" if anatomy.proof is None or anatomy.proof.skipped else anatomy.proof.status(name)


def _head_out(anatomy: ModelAnatomy, dtype: str) -> SiteRow:
    """What is computed from ``z`` where it is read."""
    shape = f"[B, P, {anatomy.widths['H']}, {anatomy.widths['D']}]"
    meaning = "what each head adds to attn_out, computed from z (the bias belongs to no head)"
    absent = anatomy.absence(Site("z"))
    status = _status(anatomy, "z") if absent is None else "absent"
    return SiteRow(
        "head_out", (), "layers[i].head_out", shape, dtype, Effect.NONE, meaning, absent, status=status
    )
