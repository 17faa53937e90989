"""Sites by module path: what any module receives or returns, ``module("model.layers.3.mlp.down_proj").output``.

The vocabulary of :mod:`tracelens.ir.sites` has an order that holds for every model. Where a module's sides come in it
depends on the model, so a site of this kind says it itself: after which named site, and as the how many-th tensor.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

from tracelens.ir.sites import Effect, Kind, Order, Scope, Sequence, Site

Key = tuple[int | str, ...]
"""The way to a tensor among a module's arguments, or in what it returns: ``("logits",)``, ``(0,)``, ``()``."""

INPUT, OUTPUT = "input", "output"
SIDES = (INPUT, OUTPUT)
_START: Sequence = (0, -1, 0, 0)  # after the prompt, before the first named site; without its step


@dataclass(frozen=True, slots=True)
class ModuleSite(Site):
    """One tensor on one side of a module.

    ``call``: which call of the module in a forward pass, where there are several. ``after``: the last named site that
    the pass reaches before it (``None``: there is none), ``number``: counts the tensors of modules from there on.
    ``amid``: the site lies among named sites of one level.
    """

    path: str = ""
    side: str = OUTPUT
    key: Key = ()
    call: int | None = None
    after: Site | None = None
    number: int = 0
    amid: bool = False

    __hash__ = Site.__hash__

    def __str__(self) -> str:
        return self.name if self.steps is None else f"{self.name} in {self.steps.words}"

    @property
    def text(self) -> str:
        """The site in the text form of a graph, with its place in the forward pass."""
        after = "start" if self.after is None else str(self.after)
        return f"{self.name} {'amid' if self.amid else 'after'} {after}+{self.number}"

    @property
    def module(self) -> str:
        """The call of the module, as one writes it."""
        return f"module({json.dumps(self.path)})" + ("" if self.call is None else f".call({self.call})")

    @property
    def problem(self) -> str | None:
        """What is wrong with the site as it stands, whatever the model."""
        if self.number < 1 or (self.call is not None and self.call < 0):
            return "counts from 1 the tensors after a site, and calls from 0"
        if self.side == INPUT and not self.key:
            return "does not say which of the inputs it is"
        if self.amid and self.after is None:
            return "lies amid no sites"
        return None

    @property
    def kind(self) -> Kind:
        """What there is to say of it in the words of the vocabulary: where it lies, and what a write changes."""
        return _kind(Scope.BEFORE if self.after is None else self.after.kind.scope)

    @property
    def order(self) -> Order:
        """The site's place in the forward pass, which :attr:`sequence` refines."""
        base = (0, *_START) if self.after is None else self.after.order
        return base if self.amid else (*base, self.number)

    @property
    def sequence(self) -> Sequence:
        """A total order that refines :attr:`order`."""
        base = (0, *_START) if self.after is None else self.after.sequence
        return (*base, self.number)


@lru_cache(maxsize=8)
def _kind(scope: Scope) -> Kind:
    return Kind("module", scope, 0, (), Effect.MODULE, "a tensor that a module receives or returns")


def module_site(
    path: str,
    side: str,
    key: Key,
    call: int | None,
    *,
    after: Site | None,
    number: int,
    amid: bool,
) -> ModuleSite:
    """The site with its name, which is how one writes it: ``module("lm_head").call(1).output[0]``."""
    keys = "".join(f"[{json.dumps(part)}]" for part in key)
    # The inputs have one that needs no key: it is the first tensor, and stands for itself in all other spellings.
    word = "inputs" if side == INPUT and key else side
    which = "" if call is None else f".call({call})"
    name = f"module({json.dumps(path)}){which}.{word}{keys}"
    return ModuleSite(name, path=path, side=side, key=key, call=call, after=after, number=number, amid=amid)


def can_travel(sites: Collection[Site], target: Site) -> bool:
    """Can values of sites of ``target``'s own order reach it?

    Named sites of one level feed each other in no model. Where a module's side comes among them, the model knows.
    """
    return bool(sites) and all(
        site.sequence < target.sequence and (isinstance(target, ModuleSite) or isinstance(site, ModuleSite))
        for site in sites
    )
