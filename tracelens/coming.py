"""Names that are planned but not there yet, each with what to write meanwhile. An entry goes when its name comes."""

from __future__ import annotations

from tracelens.errors import UnknownSiteError
from tracelens.location import here

ON_THE_MODEL: dict[str, str] = {
    "lens": "the model's final norm and the unembedding: norm(h) @ model.unembed.T, with norm = model.hf.model.norm",
}


def not_yet(what: str, meanwhile: str) -> UnknownSiteError:
    """The error for a name that is planned."""
    return UnknownSiteError(
        f"{what} is planned but not there yet", at=here(), instead=f"meanwhile, {meanwhile}"
    )
