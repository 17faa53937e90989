"""Holds a model's sites to what they are called: one short forward pass, and the identities between them.

What is found for one model holds for all that are built alike, so it is kept: by the classes of its modules, the
settings of its configuration that are no sizes, the family's table, and the versions of transformers and of identities.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tracelens import identities
from tracelens.backends.architectures.registry import fingerprint
from tracelens.backends.functions_between import facts_of
from tracelens.errors import TracelensError
from tracelens.identities import IN_A_LAYER, OF_THE_MODEL, PARALLEL, STREAM, Facts, Identity, error
from tracelens.ir.sites import KIND, KINDS, TEXT, Scope, Site
from tracelens.pretrained import cache_root
from tracelens.view import Line, Shown, Stack, Table, View

if TYPE_CHECKING:
    from tracelens.backends.anatomy import ModelAnatomy
    from tracelens.model import Model

TOKENS = 6
"""So many tokens are run: enough for a query to have several keys."""
ROWS = 32
"""Of so many tokens of the vocabulary the logits are compared."""


@dataclass(frozen=True, slots=True)
class Check:
    """One identity in a model: the largest relative error over the layers that were looked at, and whether it holds."""

    identity: str
    error: float
    holds: bool
    layers: tuple[int, ...]


@dataclass(frozen=True, repr=False)
class SiteProof(Shown):
    """What :meth:`Model.check_sites` found.

    ``verified``: by site, an identity that holds and would not if the name were another tensor's. ``refuted``: by site,
    why it is not what it is called. ``derived``: the sites for which no identity speaks; they are where the family's
    table says. ``skipped``: why nothing was looked at, if nothing was.
    """

    checks: tuple[Check, ...]
    verified: Mapping[str, str]
    refuted: Mapping[str, str]
    derived: tuple[str, ...]
    skipped: str | None = None

    @property
    def ok(self) -> bool:
        """Does nothing tell against any site?"""
        return not self.refuted

    def status(self, site: str) -> str:
        """``"verified"``, ``"derived"`` or ``"refuted"``."""
        return "refuted" if site in self.refuted else "verified" if site in self.verified else "derived"

    def _view(self) -> View:
        if self.skipped is not None:
            return Line(f"the sites were not looked at: {self.skipped}")
        words = f"{len(self.verified)} sites verified, {len(self.derived)} by the family's table alone"
        if self.refuted:
            words += "; REFUTED: " + "; ".join(f"{site}: {why}" for site, why in self.refuted.items())
        rows = tuple(
            (check.identity, f"{check.error:.1e}", "yes" if check.holds else "NO", _numbers(check.layers))
            for check in self.checks
        )
        return Stack((Line(words), Table(("identity", "largest relative error", "holds", "layers"), rows)))


def _numbers(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "-"


def prove(model: Model) -> SiteProof:
    """Reads the sites of some layers in one forward pass of a few tokens, and compares them."""
    anatomy = model.anatomy
    layers = layers_to_look_at(anatomy)
    read, whole = _read(model, layers)
    head = anatomy.head
    facts = facts_of(anatomy.config, anatomy.family, scale=head.scale, softcap=head.softcap)
    limit = max(1e-4, 8 * torch.finfo(anatomy.dtype).eps)
    stream = STREAM if anatomy.has(Site("resid_mid", layers[0])) else PARALLEL
    found: list[tuple[Identity, float, tuple[int, ...]]] = []
    for identity in (*stream, *IN_A_LAYER):
        errors: dict[int, float] = {}
        for layer in layers:
            if (compared := _compared(identity, read[layer], facts)) is not None:
                errors[layer] = compared
        if errors:
            found.append((identity, max(errors.values()), tuple(errors)))
    for identity in OF_THE_MODEL:
        if (compared := _compared(identity, whole, facts)) is not None:
            found.append((identity, compared, ()))
    return judged(anatomy, found, limit)


def judged(
    anatomy: ModelAnatomy, found: Sequence[tuple[Identity, float, tuple[int, ...]]], limit: float
) -> SiteProof:
    """What errors say of the sites: where an identity fails, those of its sites that no other one speaks for."""
    present = [
        kind.name for kind in KINDS if kind.scope not in TEXT and anatomy.has(_somewhere(anatomy, kind.name))
    ]
    checks = tuple(Check(each.text, gap, gap <= limit, layers) for each, gap, layers in found)
    verified: dict[str, str] = {}
    for identity, gap, _ in found:
        if gap <= limit:
            for site in identity.speaks_for:
                if site in present:
                    verified.setdefault(site, identity.text)
    refuted: dict[str, str] = {}
    for identity, gap, _ in found:
        if gap > limit and identity.refutes:
            blamed = [site for site in identity.speaks_for if site in present and site not in verified]
            for site in blamed or [site for site in identity.speaks_for if site in present]:
                refuted.setdefault(
                    site, f"in this model {identity.text} does not hold (by {gap:.1g} of the largest number)"
                )
    verified = {site: why for site, why in verified.items() if site not in refuted}
    derived = tuple(site for site in present if site not in verified and site not in refuted)
    return SiteProof(checks, verified, refuted, derived)


def _compared(identity: Identity, read: Mapping[str, Tensor], facts: Facts) -> float | None:
    if any(name not in read for name in identity.sites) or any(name in read for name in identity.unless):
        return None
    both = identity.both(read, facts)
    return None if both is None else error(*both)


def _somewhere(anatomy: ModelAnatomy, name: str) -> Site:
    if KIND[name].scope is not Scope.LAYER:
        return Site(name)
    layers = anatomy.layers_with(name)
    return Site(name, layers[0] if layers else 0)


# --- one pass ---------------------------------------------------------------------------------------------------------


def layers_to_look_at(anatomy: ModelAnatomy) -> tuple[int, ...]:
    """The first layer of each kind there is, by its modules and by what the configuration calls it."""
    kinds: dict[object, int] = {}
    for layer in range(anatomy.n_layers):
        kinds.setdefault(_kind_of(anatomy, layer), layer)
    return tuple(kinds.values())


def _kind_of(anatomy: ModelAnatomy, layer: int) -> object:
    words = getattr(anatomy.config, "layer_types", None)
    name = words[layer] if isinstance(words, list | tuple) and len(words) > layer else None
    block = anatomy._whole.get_submodule(anatomy.family.layers.format(layer))
    return name, tuple((path, type(module).__name__) for path, module in block.named_modules())


def _read(model: Model, layers: Sequence[int]) -> tuple[dict[int, dict[str, Tensor]], dict[str, Tensor]]:
    """The sites of these layers, and those of the whole model, in float64."""
    anatomy = model.anatomy
    vocabulary = anatomy.vocabulary
    tokens = [
        (7 * number + 11) % vocabulary for number in range(min(TOKENS, anatomy.max_positions or TOKENS))
    ]
    rows = [number * vocabulary // ROWS for number in range(min(ROWS, vocabulary))]
    names = [kind.name for kind in KINDS if kind.scope is Scope.LAYER]
    wanted = [(name, layer) for layer in layers for name in names if anatomy.has(Site(name, layer))]
    after = [layer + 1 for layer in layers if layer + 1 < model.n_layers and layer + 1 not in layers]
    with model.trace([tokens]) as t:
        for name, layer in wanted:
            getattr(model.layers[layer], name).save(f"{layer} {name}")
        for layer in after:
            model.layers[layer].resid_pre.save(f"{layer} resid_pre")
        model.layers[0].resid_pre.save("first.resid_pre")
        for name in ("embed", "pos_embed", "final_norm"):
            if anatomy.has(Site(name)):
                getattr(model, name).save(name)
        model.lm_head[..., rows].save("lm_head")
        model.logits[..., rows].save("logits")
        model.unembed[rows].save("unembedding")
        if anatomy.head.bias is not None:
            model.param(anatomy.head.bias)[rows].save("unembedding bias")
    read: dict[int, dict[str, Tensor]] = {}
    for layer in layers:
        own = {name: t[f"{layer} {name}"].double() for name, at in wanted if at == layer}
        if layer + 1 < model.n_layers:
            own["next.resid_pre"] = t[f"{layer + 1} resid_pre"].double()
        read[layer] = own
    of_layers = tuple(f"{layer} " for layer in range(model.n_layers))
    whole = {name: value.double() for name, value in t.results.items() if not name.startswith(of_layers)}
    return read, whole


# --- what is known already --------------------------------------------------------------------------------------------

_known: dict[str, SiteProof] = {}


def proof_of(model: Model) -> SiteProof:
    """The proof of a model that is built as this one is: made once, and kept in a file of the cache if nothing fails.

    Nothing is run for a model that has no numbers here, is in training mode, or would first have to load its weights.
    """
    anatomy = model.anatomy
    key = _key(anatomy)
    found = _known.get(key) or _stored(key)
    if found is None:
        reason = _not_now(anatomy)
        if reason is not None:
            return SiteProof((), {}, {}, (), skipped=reason)
        try:
            found = prove(model)
        except (TracelensError, RuntimeError) as problem:
            # A model that cannot be run at all says so when its user runs it.
            return SiteProof((), {}, {}, (), skipped=f"a forward pass of {TOKENS} tokens failed: {problem!r}")
        if found.refuted:
            return found  # of this model alone: hooks of somebody's own may be the reason
        _store(key, found)
    _known[key] = found
    return found


def _not_now(anatomy: ModelAnatomy) -> str | None:
    if anatomy.elsewhere is None and any(each.is_meta for each in anatomy.model.parameters()):
        return "weights are on the meta device, or offloaded"
    if anatomy.mesh is not None:
        return "the ranks of a script are its own"
    return "the model is in training mode" if anatomy.model.training else None


def _key(anatomy: ModelAnatomy) -> str:
    """What a model has in common with those that are built alike."""
    own = ("_name_or_path", "transformers_version", "dtype")
    settings = {
        name: value
        for name, value in anatomy.config.to_dict().items()
        if isinstance(value, bool | str | type(None)) and name not in own
    }
    kinds = [repr(_kind_of(anatomy, layer)) for layer in layers_to_look_at(anatomy)]
    told = (
        version("transformers"),
        _version(),
        fingerprint(anatomy.family),
        sorted(settings.items()),
        kinds,
        str(anatomy.dtype),
    )
    return hashlib.sha256(repr(told).encode()).hexdigest()


@cache
def _version() -> str:
    """Of the identities themselves, so that a change of theirs looks anew."""
    return hashlib.sha256(inspect.getsource(identities).encode()).hexdigest()


def _path(key: str) -> Path:
    return cache_root() / "sites" / f"{key}.json"


def _stored(key: str) -> SiteProof | None:
    try:
        found = json.loads(_path(key).read_text(encoding="utf-8"))
        checks = tuple(Check(**{**check, "layers": tuple(check["layers"])}) for check in found["checks"])
        return SiteProof(checks, found["verified"], found["refuted"], tuple(found["derived"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store(key: str, proof: SiteProof) -> None:
    text = json.dumps(
        {
            "checks": [asdict(check) for check in proof.checks],
            "verified": dict(proof.verified),
            "refuted": dict(proof.refuted),
            "derived": proof.derived,
        }
    )
    path = _path(key)
    with suppress(OSError):  # a cache that cannot be written is looked for in vain the next time
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(text)
        Path(file.name).replace(path)
