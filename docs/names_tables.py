"""Writes the table of ``docs/how-to/names_of_other_libraries.md`` from the tables that names are understood by."""

from __future__ import annotations

from tracelens.ir.sites import KINDS, TEXT, Kind, Scope
from tracelens.other_names import SCHEMES, ByMlp, Meaning, NoSite, Scheme


def names() -> str:
    """Every site with what other libraries call it."""
    lines = [
        "| site | " + " | ".join(map(_title, SCHEMES.values())) + " |",
        "| --- " * (len(SCHEMES) + 1) + "|",
    ]
    for kind in KINDS:
        if kind.scope not in TEXT:
            own = f"`layers.5.{kind.name}`" if kind.scope is Scope.LAYER else f"`{kind.name}`"
            lines.append(
                f"| {own} | " + " | ".join(_called(kind, scheme) for scheme in SCHEMES.values()) + " |"
            )
    return "\n".join(lines)


def no_sites() -> str:
    """The names that are no site here, with what they are."""
    lines = ["| name | what it is | near it |", "| --- | --- | --- |"]
    for scheme in SCHEMES.values():
        for table in (scheme.of_layers, scheme.of_model):
            for name, meaning in table.items():
                if (said := _said(meaning)) is not None:
                    lines.append(f"| `{name}` ({_title(scheme)}) | {said[0]} | {said[1]} |")
    return "\n".join(lines)


def _title(scheme: Scheme) -> str:
    return {"transformer_lens": "TransformerLens", "nnterp": "nnterp", "interp_engine": "interp-engine"}[
        scheme.name
    ]


def _called(kind: Kind, scheme: Scheme) -> str:
    table = scheme.of_layers if kind.scope is Scope.LAYER else scheme.of_model
    own = [name for name, meaning in table.items() if meaning == kind.name]
    if kind.scope is Scope.LAYER:
        own = [scheme.layer.format(name=name, layer=5) for name in own]
    return ", ".join(f"`{name}`" for name in own) or "-"


def _said(meaning: Meaning) -> tuple[str, str] | None:
    if isinstance(meaning, NoSite):
        return meaning.meaning, ", ".join(f"`{near}`" for near in meaning.near)
    if isinstance(meaning, ByMlp):
        return "depends on the model", f"`{meaning.gated}` in a gated MLP, `{meaning.plain}` in a plain one"
    return None
