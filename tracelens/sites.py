"""``tl.sites``: sites by name, and by the names that other libraries have for them.

>>> import tracelens as tl
>>> tl.sites.parse("layers.5.post_ln")
Site(name='mlp_norm', layer=5, steps=None)
>>> tl.sites.parse("blocks.5.hook_resid_post").text
'layers.5.resid_post'
>>> tl.sites.names("layers.5.mlp_add")["transformer_lens"]
('blocks.5.ln2_post.hook_out', 'blocks.5.hook_mlp_out')
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tracelens.errors import AmbiguousSiteError, Blaming, UnknownSiteError
from tracelens.ir.module_sites import SIDES
from tracelens.ir.sites import CANONICAL, KIND, Scope, Site, near
from tracelens.location import here
from tracelens.other_names import SCHEMES, ByMlp, Meaning, NoSite, Scheme

if TYPE_CHECKING:
    from tracelens.model import Model

__all__ = ["SCHEMES", "names", "parse"]

_OURS = re.compile(r"(?:model\.)?layers(?:\[(-?\d+)\]|\.(\d+))\.(\w+)")
_OF_LAYERS = {
    name: re.compile(
        re.escape(scheme.layer).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{name\}", "(?P<name>.+)")
    )
    for name, scheme in SCHEMES.items()
}


def parse(name: str | Site, model: Model | None = None) -> Site:
    """The site that a name means, whichever library has given it.

    ``name``: ``"layers.5.resid_post"``, ``"model.layers[5].post_ln"``, ``"logits"``; of TransformerLens
    ``"blocks.5.hook_resid_post"`` (which metadata of SAEs use), of nnterp ``"layers_output[5]"``, of interp-engine
    ``"resid_post.5"``; with a ``model`` also the path of a module and its side, ``"model.layers.5.mlp.output"``, where
    that is a named site. With a ``model`` it is also checked that the model has the site.

    The tensor has the axes that it has here: queries, for instance, are [B, P, H, d], whoever names them. Models whose
    weights another library has changed (TransformerLens can fold norms and centre weights) have other numbers there.

    Raises :class:`~tracelens.errors.AmbiguousSiteError` for names that mean more than one tensor,
    :class:`~tracelens.errors.UnknownSiteError` for those that mean none that is a site here, with the nearest ones, and
    with a model whatever it raises for a site that it lacks.
    """
    with Blaming(here()):
        return _checked(name if isinstance(name, Site) else _parsed(name, model), model)


def names(site: str | Site) -> Mapping[str, tuple[str, ...]]:
    """What other libraries call a site, by library; the tuple of one that has no name for it is empty.

    In TransformerLens a name may depend on the model: ``mlp.in`` makes ``mlp_up`` in a gated MLP, and ``mlp_pre`` in
    a plain one. Such names are left out.
    """
    found = parse(site)
    return {scheme.name: _called(found, scheme) for scheme in SCHEMES.values()}


def _called(site: Site, scheme: Scheme) -> tuple[str, ...]:
    table = scheme.of_model if site.layer is None else scheme.of_layers
    own = (name for name, meaning in table.items() if meaning == site.name)
    if site.layer is None:
        return tuple(own)
    return tuple(scheme.layer.format(name=name, layer=site.layer) for name in own)


# --- names ------------------------------------------------------------------------------------------------------------


def _parsed(name: str, model: Model | None) -> Site:
    if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # users may not be typed
        raise UnknownSiteError(f"a site is named by a text, not by {name!r}", instead='"layers.5.resid_post"')
    if (own := _own(name, model)) is not None:
        return own
    for scheme in SCHEMES.values():
        matched = _OF_LAYERS[scheme.name].fullmatch(name)
        if matched is not None and (meaning := scheme.of_layers.get(matched["name"])) is not None:
            return _meant(name, meaning, int(matched["layer"]), scheme, model)
        if (meaning := scheme.of_model.get(name)) is not None:
            return _meant(name, meaning, None, scheme, model)
    return _of_module(name.removeprefix("path."), model) or _unknown(name)


def _own(name: str, model: Model | None) -> Site | None:
    """By the library's own names, as in the text of a graph or as one writes it in a block."""
    matched = _OURS.fullmatch(name)
    own = None if matched is None else CANONICAL.get(matched[3])
    if matched is not None and own is not None and KIND[own].scope is Scope.LAYER:
        layer = int(matched[1] or matched[2])
        if layer < 0 and model is None:
            raise AmbiguousSiteError(
                f"{name!r} counts from the last layer, and without a model there is none",
                instead="tl.sites.parse(name, model)",
            )
        return Site(own, layer if layer >= 0 or model is None else layer + model.n_layers)
    plain = name.removeprefix("model.")
    own = CANONICAL.get(plain)
    if own is None:
        return None
    if KIND[own].scope is Scope.LAYER:
        raise AmbiguousSiteError(
            f"{name!r} is a site of every layer, so it has to be said which is meant",
            instead=f"'layers.5.{plain}'",
        )
    return Site(own)


def _meant(name: str, meaning: Meaning, layer: int | None, scheme: Scheme, model: Model | None) -> Site:
    if isinstance(meaning, NoSite):
        prefix = "" if layer is None else f"layers.{layer}."
        raise AmbiguousSiteError(
            f"{name!r} of {scheme.name} is no site here: it is {meaning.meaning}",
            instead="one of these, which are other tensors: "
            + ", ".join(f"'{near if '.' in near else prefix + near}'" for near in meaning.near),
        )
    if isinstance(meaning, ByMlp):
        if model is None:
            raise AmbiguousSiteError(
                f"{name!r} of {scheme.name} is {meaning.gated} where the MLP is gated, else {meaning.plain}",
                instead="tl.sites.parse(name, model), or one of the two",
            )
        meaning = meaning.gated if model.anatomy.has(Site("mlp_up", layer)) else meaning.plain
    return Site(meaning, layer)


def _of_module(name: str, model: Model | None) -> Site | None:
    """The named site that one side of a module shows."""
    if model is None:
        return None
    path, _, side = name.rpartition(".")
    if side in SIDES and path in model.modules():
        found = _shown(model, path, side)
        if len(found) == 1:
            return found[0]
        raise AmbiguousSiteError(
            f"{name!r} is no named site" if not found else f"{name!r} is {' and '.join(map(str, found))}",
            instead=f"in a block, model.module({path!r}).{side}",
        )
    if name in model.modules():
        sides = [
            f"'{name}.{side}'" + "".join(f" ({site})" for site in _shown(model, name, side)) for side in SIDES
        ]
        raise AmbiguousSiteError(
            f"{name!r} is a module, which receives something and returns something",
            instead=" or ".join(sides),
        )
    return None


def _shown(model: Model, path: str, side: str) -> tuple[Site, ...]:
    """The named sites that one side of a module shows: the very tensor, not one that the model multiplies first."""
    anatomy = model.anatomy
    return tuple(
        dict.fromkeys(
            site
            for site in anatomy.named_at(path, side)
            if anatomy.factor(anatomy.family.taps[site.name]) == 1
        )
    )


def _unknown(name: str) -> Site:
    number = re.search(r"\d+", name)
    layer = 0 if number is None else int(number[0])
    known = [
        kind.name if kind.scope is not Scope.LAYER else f"layers.{layer}.{kind.name}"
        for kind in KIND.values()
    ]
    for scheme in SCHEMES.values():
        known += [scheme.layer.format(name=own, layer=layer) for own in scheme.of_layers]
        known += scheme.of_model
    close = near(name, tuple(known))
    raise UnknownSiteError(
        f"no library that is known here has a site {name!r}",
        instead=f"did you mean {', '.join(map(repr, close))}?"
        if close
        else "'layers.5.resid_post'; model.sites() lists all; with a model the path of a module and its side",
    )


def _checked(site: Site, model: Model | None) -> Site:
    if model is None:
        return site
    if site.layer is not None and not 0 <= site.layer < model.n_layers:
        _ = model.layers[site.layer]  # says which layers there are
    model.anatomy.type_of(site)  # says why the model has no such site
    return site


# --- in a block -------------------------------------------------------------------------------------------------------


def read(model: Model, name: Any) -> Any:
    """The value that a name means, in an open block: ``model["blocks.5.hook_resid_post"]``."""
    if (handle := _module_side(model, name)) is not None:
        return getattr(*handle)
    site = parse(name, model)
    return getattr(model if site.layer is None else model.layers[site.layer], site.name)


def write(model: Model, name: Any, new: Any) -> None:
    """Assigns to what a name means, in an open block."""
    owner, attribute = _module_side(model, name) or (None, "")
    if owner is None:
        site = parse(name, model)
        owner, attribute = (model if site.layer is None else model.layers[site.layer]), site.name
    setattr(owner, attribute, new)


def _module_side(model: Model, name: Any) -> tuple[Any, str] | None:
    """The module, and which of its sides, where a name is a path with a side."""
    if not isinstance(name, str) or name in CANONICAL:
        return None
    path, _, side = name.removeprefix("path.").rpartition(".")
    return (model.module(path), side) if side in SIDES and path in model.modules() else None
