"""Every way to write to a site, each with the same edit in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.support.batches import Batch
from tests.support.hand_forward import Intercept
from tracelens.ir.sites import Site

Edit = Callable[[Tensor, Batch, Tensor, Tensor], Tensor]
"""``(the site's tensor, the batch, v, x)`` to the new one; ``v`` is added, ``x`` assigned, both [width]."""


@dataclass(frozen=True)
class Spelling:
    """``code`` is run as Python source, so that it is Python itself that calls read, operator and assignment."""

    code: str
    edit: Edit
    ragged: bool = True
    """Does it mean something where rows differ in length?  A row by its number keeps its padding, so it is refused."""

    def run(self, site: Site, **names: object) -> None:
        """Executes the code on a site, with ``model``, ``v`` and ``x`` in ``names``."""
        exec(compile(self.code.replace("SITE", spelled(site)), "<spelling>", "exec"), dict(names))

    def intercept(self, site: Site, batch: Batch, v: Tensor, x: Tensor) -> Intercept:
        """The same for the oracle."""

        def intercept(at: Site, tensor: Tensor) -> Tensor:
            return self.edit(tensor, batch, v, x).to(tensor.dtype) if at == site else tensor

        return intercept


def spelled(site: Site) -> str:
    """``model.layers[1].mlp_out``, ``model.logits``."""
    return f"model.{site.name}" if site.layer is None else f"model.layers[{site.layer}].{site.name}"


def _at_last(change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Edit:
    def edit(tensor: Tensor, batch: Batch, v: Tensor, x: Tensor) -> Tensor:
        new = tensor.clone()
        new[:, -1] = change(new[:, -1], v, x).to(tensor.dtype)
        return new

    return edit


def _at_tokens(tokens: slice | int, change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Edit:
    """Real tokens are counted from each row's first, after its padding."""

    def edit(tensor: Tensor, batch: Batch, v: Tensor, x: Tensor) -> Tensor:
        new = tensor.clone()
        for row, mask in enumerate(batch.mask):
            columns = mask.nonzero()[:, 0][tokens].reshape(-1)
            new[row, columns] = change(new[row, columns], v, x).to(tensor.dtype)
        return new

    return edit


def _added(tensor: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return tensor + v


def _assigned(tensor: Tensor, v: Tensor, x: Tensor) -> Tensor:
    return x.expand_as(tensor)


SPELLINGS: dict[str, Spelling] = {
    spelling.code: spelling
    for spelling in (
        Spelling("SITE += v", lambda t, batch, v, x: t + v),
        Spelling("SITE = SITE + v", lambda t, batch, v, x: t + v),
        Spelling("SITE = v + SITE", lambda t, batch, v, x: v + t),
        Spelling("h = SITE; h += v; SITE = h", lambda t, batch, v, x: t + v),
        Spelling("SITE *= 0.5", lambda t, batch, v, x: t * 0.5),
        Spelling("SITE -= v; SITE *= 2", lambda t, batch, v, x: (t - v).to(t.dtype) * 2),
        Spelling("SITE = x", lambda t, batch, v, x: x.expand_as(t)),
        Spelling("SITE = 0", lambda t, batch, v, x: torch.zeros_like(t)),
        Spelling("SITE = SITE.clamp(min=0)", lambda t, batch, v, x: t.clamp(min=0)),
        Spelling("SITE[:, -1] += v", _at_last(_added)),
        Spelling("SITE[:, -1] = x", _at_last(_assigned)),
        Spelling("SITE[:, -1] = SITE[:, -1] + v", _at_last(_added)),
        Spelling("h = SITE; h[:, -1] = x", _at_last(_assigned)),
        Spelling("SITE[:, -1:] += v", _at_last(_added)),
        Spelling(
            "SITE[:, -1][:, :7] = 0", _at_last(lambda t, v, x: torch.cat((0 * t[:, :7], t[:, 7:]), dim=1))
        ),
        Spelling("SITE[..., :7] = 0", lambda t, batch, v, x: torch.cat((0 * t[..., :7], t[..., 7:]), dim=-1)),
        Spelling("SITE[1] += v", lambda t, batch, v, x: torch.cat((t[:1], t[1:2] + v, t[2:])), ragged=False),
        Spelling("SITE.tok[2] = x", _at_tokens(2, _assigned)),
        Spelling("SITE.tok[-2] += v", _at_tokens(-2, _added)),
        Spelling("SITE.tok[1:3] += v", _at_tokens(slice(1, 3), _added)),
        Spelling("SITE.tok[1:3] = x", _at_tokens(slice(1, 3), _assigned)),
    )
}
