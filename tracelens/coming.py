"""Names that are planned but not there yet, each with what to write meanwhile. An entry goes when its name comes."""

from __future__ import annotations

from tracelens.errors import UnknownSiteError
from tracelens.location import here

_PROJECTION = "its weights on what attention reads: model.layers[i].attn_in @ model.param(path).T"
_HEADS = "model.layers[i].attn_out, the sum of what the heads add"
_PATTERN = 'tl.load(name, attn_implementation="eager").hf(ids, output_attentions=True).attentions[i]'

ON_LAYERS: dict[str, str] = {
    **dict.fromkeys(("q", "k", "v", "q_normed", "k_normed", "q_rot", "k_rot"), _PROJECTION),
    **dict.fromkeys(("scores", "pattern"), _PATTERN),
    **dict.fromkeys(("z", "head", "head_out"), _HEADS),
}
ON_THE_MODEL: dict[str, str] = {
    "lens": "the model's final norm and the unembedding: norm(h) @ model.unembed.T, with norm = model.hf.model.norm",
}
ON_BLOCKS: dict[str, str] = {
    "prompts": "one block for each prompt, or .tok[...] for tokens of each row",
    **dict.fromkeys(("prefill", "decode", "steps"), "a write in model.generate holds in every step"),
}


def not_yet(what: str, meanwhile: str) -> UnknownSiteError:
    """The error for a name that is planned."""
    return UnknownSiteError(
        f"{what} is planned but not there yet", at=here(), instead=f"meanwhile, {meanwhile}"
    )
