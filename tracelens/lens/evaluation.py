"""How far a lens is from what the model says at its end, state by state, beside the logit lens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tracelens.extras import required
from tracelens.lens.head import Head
from tracelens.lens.text_windows import Windows
from tracelens.lens.training import States, Target, translated
from tracelens.lens.translators import Translator
from tracelens.progress import watched
from tracelens.view import Line, Shown, Stack, Table, View

if TYPE_CHECKING:
    import pandas

    from tracelens.model import Model


@dataclass(frozen=True, repr=False)
class LensEvaluation(Shown):
    """KL(final || lens) of each state of the residual stream, in nats per token, for a lens and for none.

    ``kl``, ``identity_kl``: means over all tokens [n_layers + 1], float32; the first is of the embedding, the next of
    ``layers[0].resid_post``, the last of what the final norm receives, which is 0. ``kl_error``, ``identity_kl_error``:
    their standard errors, over windows; nan for a single one. ``tokens``: how many tokens. ``bits_per_byte``: nats per
    token times this are bits per byte of the text; ``None`` where token ids were given.
    """

    kl: Tensor
    identity_kl: Tensor
    kl_error: Tensor
    identity_kl_error: Tensor
    tokens: int
    bits_per_byte: float | None

    @property
    def states(self) -> tuple[str, ...]:
        """The states as sites: ``layers[0].resid_pre`` is the embedding."""
        layers = range(len(self.kl) - 1)
        return ("layers[0].resid_pre", *(f"layers[{layer}].resid_post" for layer in layers))

    def to_pandas(self) -> pandas.DataFrame:
        """A table with a row for each state."""
        pandas: Any = required("pandas", extra="pandas", what="evaluation.to_pandas()")
        names = ("kl", "kl_error", "identity_kl", "identity_kl_error")
        return pandas.DataFrame(
            {"state": self.states, **{name: getattr(self, name).numpy() for name in names}}
        )

    def _view(self) -> View:
        per_byte = self.bits_per_byte
        heads = ("state", "KL", "+-", "KL of the logit lens", "+-")
        heads += () if per_byte is None else ("bits per byte",)
        columns = [
            (f"{value:.4f}" for value in numbers.tolist())
            for numbers in (self.kl, self.kl_error, self.identity_kl, self.identity_kl_error)
        ]
        if per_byte is not None:
            columns.append(f"{value:.4f}" for value in (self.kl * per_byte).tolist())
        words = f"KL(final || lens) in nats per token, over {self.tokens} tokens"
        return Stack((Line(words), Table(heads, tuple(zip(self.states, *columns, strict=True)))))


def evaluate(
    model: Model,
    head: Head,
    windows: Windows,
    translators: Sequence[Translator | None],
    batch_size: int,
    progress: bool | None,
) -> LensEvaluation:
    """The divergences of all states over all windows."""
    states = States(model)
    states.require_head(model, head, windows.ids[:1])
    kinds: tuple[Sequence[Translator | None], ...] = (translators, [None] * len(translators))
    found: list[list[list[Tensor]]] = [[[] for _ in translators] for _ in kinds]
    batches = windows.ids.split(batch_size)
    for batch in watched(batches, [batch.numel() for batch in batches], "token", progress):
        for *tile, final in states.tiles(batch, head, batch_size):
            target = Target.of(head, final)
            for layer, state in enumerate(tile):
                for kind, maps in enumerate(kinds):
                    with torch.no_grad():
                        logits = head.logits(head.norm(translated(state, maps[layer])))
                    found[kind][layer].append(target.compared(logits)[0])
    count = len(windows.ids)
    numbers: list[Any] = []
    for kind in found:
        means = torch.stack([torch.cat(parts).view(count, -1).double().mean(1) for parts in kind])
        means = torch.cat([means, torch.zeros_like(means[:1])])  # the final state is what it is compared with
        error = means.std(1) / count**0.5 if count > 1 else torch.full_like(means[:, 0], torch.nan)
        numbers += [means.mean(1).float(), error.float()]
    kl, kl_error, identity_kl, identity_kl_error = (tensor.numpy(force=True) for tensor in numbers)
    return LensEvaluation(
        *(torch.from_numpy(array) for array in (kl, identity_kl, kl_error, identity_kl_error)),
        tokens=windows.ids.numel(),
        bits_per_byte=windows.bits_per_byte,
    )
