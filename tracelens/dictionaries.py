"""``model.splice``: a trained dictionary at the site that it was trained on, as its own metadata says.

SAELens keeps that in ``sae.cfg.metadata`` (since version 6) or in ``sae.cfg``: ``hook_name``, for transcoders
``hook_name_out`` besides, in TransformerLens' names. Any module with a ``hook_name`` of its own is read alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tracelens import sites
from tracelens.errors import Blaming, SpliceError
from tracelens.ir.sites import Site
from tracelens.location import here
from tracelens.operand import Operand
from tracelens.splicing import Splice, splice

if TYPE_CHECKING:
    from tracelens.model import Model

_CENTRED = (
    "embed",
    "pos_embed",
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "attn_add",
    "mlp_out",
    "mlp_add",
)
"""What is written to the stream, and the stream: what centred weights change."""
_BIASED = ("v", "z")
"""What folded value biases change."""


def splice_at(model: Model, module: Any, *, site: Any, to: Any, keep_error: bool) -> Splice:
    """A splice at a site that is given, or that the module's metadata names."""
    with Blaming(here()):
        found = _Metadata(module)
        source = found.site(model, "hook_name") if site is None else site
        if source is None:
            raise SpliceError(
                f"this {type(module).__name__} does not say where it belongs: it has no cfg.metadata.hook_name, no "
                "cfg.hook_name and no hook_name",
                instead='model.splice(sae, site="layers.8.resid_post"), the site that it was trained on',
            )
        target = to
        if site is None and to is None:
            target = found.site(model, "hook_name_out")
            found.require_ours(model, source)
        found.require_plain()
        values = [_value(model, each) for each in (source, target)]
    return splice(values[0], module, keep_error=keep_error, to=values[1])


def _value(model: Model, site: Any) -> Any:
    if site is None or isinstance(site, Operand):
        return site
    return model[site.text if isinstance(site, Site) else site]


class _Metadata:
    """What a module says of how it was trained; nothing, for one that says nothing."""

    def __init__(self, module: Any) -> None:
        self._module = module
        cfg = getattr(module, "cfg", None)
        self._places = [place for place in (getattr(cfg, "metadata", None), cfg, module) if place is not None]

    def get(self, name: str) -> Any:
        for place in self._places:
            found = place.get(name) if isinstance(place, Mapping) else getattr(place, name, None)
            if found is not None:
                return found
        return None

    def site(self, model: Model, which: str) -> Site | None:
        name = self.get(which)
        if name is None:
            return None
        if self.get("hook_head_index") is not None:
            raise SpliceError(
                f"this {type(self._module).__name__} is of head {self.get('hook_head_index')} of {name!r} alone, and a "
                "splice stands at a whole site",
                instead="z = model.layers[i].head(h).z; model.layers[i].head(h).z = z + (sae.decode(f) - sae(z))",
            )
        return sites.parse(name, model)

    def require_plain(self) -> None:
        """Refuses a dictionary that was trained on scaled activations, while it does not scale them itself."""
        if self.get("normalize_activations") == "expected_average_only_in":
            raise SpliceError(
                f"this {type(self._module).__name__} was trained on activations times a factor that is not in its "
                "weights (normalize_activations='expected_average_only_in')",
                instead="sae.fold_activation_norm_scaling_factor(factor), with the factor of its training",
            )

    def require_ours(self, model: Model, site: Site) -> None:
        """Refuses a dictionary that was trained on another model's numbers: TransformerLens can change the weights."""
        options = self.get("model_from_pretrained_kwargs")
        if not isinstance(options, Mapping) or "no_processing" in str(self.get("model_class_name")):
            return
        changed = None
        if options.get("center_writing_weights") and site.name in _CENTRED:
            changed = "center_writing_weights"
        if options.get("fold_value_biases") and site.name in _BIASED:
            changed = "fold_value_biases"
        if changed is not None:
            raise SpliceError(
                f"this {type(self._module).__name__} was trained on a model whose weights had been changed "
                f"({changed}=True), so that {site} had other numbers than here",
                instead="one that was trained on the model as it is; or say that the site is meant all the same: "
                f"model.splice(sae, site={site.text!r})",
            )
