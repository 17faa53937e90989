"""Trains the maps of a tuned lens: each state of the residual stream is to say what the model says at its end.

The plan is that of Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens"
(arXiv:2303.08112), section 3: KL(final || lens), SGD with Nesterov momentum, weight decay towards the identity, a
gradient of at most norm 1 over all maps together, and a learning rate that falls linearly to zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tracelens.errors import LensTrainingError, OptionError
from tracelens.lens.head import Head, on
from tracelens.lens.text_windows import Windows
from tracelens.lens.translators import Translator, empty

if TYPE_CHECKING:
    from tracelens.model import Model
    from tracelens.tracing import Program

_WORKSPACE = 1 << 28
"""Bytes for the logits of one tile: as many tokens at a time as fit."""


@dataclass(frozen=True)
class Plan:
    """How a lens is trained; two runs with equal plans and texts end with equal lenses."""

    steps: int
    tokens_per_step: int
    context: int
    optimizer: str
    learning_rate: float
    momentum: float
    weight_decay: float
    clip: float
    warmup: int
    bias: bool
    seed: int

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adam"):
            raise OptionError(f"there is no optimizer {self.optimizer!r} here", instead='"sgd" or "adam"')
        if type(self.seed) is not int:
            raise OptionError(f"seed={self.seed!r} is no whole number", instead="seed=0")
        if not 0 <= self.momentum < 1:
            raise OptionError(f"momentum={self.momentum!r} is not from 0 up to 1", instead="momentum=0.9")
        if not self.learning_rate > 0:
            raise OptionError(
                f"learning_rate={self.learning_rate!r} moves nothing", instead="learning_rate=1.0"
            )

    @property
    def each(self) -> int:
        """The windows of one step."""
        return max(1, self.tokens_per_step // self.context)

    def rate(self, step: int) -> float:
        """The share of the learning rate that a step takes: up over the warm-up, then down to nothing at the end."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return (self.steps - step) / (self.steps - self.warmup)

    def described(self) -> dict[str, Any]:
        """The plan as plain data."""
        return asdict(self)

    def optimiser(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """The optimizer, with its learning rate before :meth:`rate`."""
        if self.optimizer == "sgd":
            # torch's momentum makes steps larger by 1 / (1 - momentum), which is taken back here.
            return torch.optim.SGD(
                parameters,
                lr=self.learning_rate * (1 - self.momentum),
                momentum=self.momentum,
                nesterov=self.momentum > 0,
                weight_decay=self.weight_decay,
            )
        return torch.optim.Adam(
            parameters,
            lr=self.learning_rate * 1e-3,
            betas=(self.momentum, 0.999),
            weight_decay=self.weight_decay,
            amsgrad=True,
        )


class States:
    """Runs a model over windows, and gives the states of its residual stream."""

    def __init__(self, model: Model) -> None:
        kept = "keep" if model.ranks is None else "cpu"
        self.count = model.n_layers
        with model.record() as r:
            for layer in range(self.count):
                model.layers[layer].resid_pre.save(str(layer), device=kept)
            model.layers[self.count - 1].resid_post.save(str(self.count), device=kept)
        self._program: Program = model.compile(r)

    def of(self, ids: Tensor) -> list[Tensor]:
        """All states [n, D] of the tokens of some windows [B, context], the embedding first, the final one last."""
        found = self._program(ids)
        return [found[str(number)].flatten(0, 1) for number in range(self.count + 1)]

    def tiles(self, ids: Tensor, head: Head, batch_size: int) -> Iterator[list[Tensor]]:
        """The states, some tokens at a time, where the head is: so few that their logits stay small."""
        rows = max(1, _WORKSPACE // (12 * len(head.unembedding)))
        for batch in ids.split(batch_size):
            for tile in zip(*(state.split(rows) for state in self.of(batch)), strict=True):
                yield [on(state, head.device) for state in tile]

    def require_head(self, model: Model, head: Head, ids: Tensor) -> None:
        """Raises :class:`LensTrainingError` where the model makes other logits of its final state than the head."""
        with model.trace(ids) as t:
            model.layers[self.count - 1].resid_post[0].save("state")
            model.logits[0].save("logits")
        head.require_models_own(t["state"], t["logits"])


@dataclass(frozen=True)
class Target:
    """What the model says at its end, for some tokens: probabilities [n, V], and the sum of p log p of each [n]."""

    probabilities: Tensor
    negative_entropy: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, head: Head, state: Tensor) -> Target:
        """Of the final state [n, D]."""
        logs = head.logits(head.norm(state)).log_softmax(-1)
        probabilities = logs.exp()
        return cls(probabilities, logs.mul_(probabilities).sum(-1))

    @torch.no_grad()
    def compared(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """KL(final || lens) [n] in nats of the lens' logits [n, V], and the logs of its probabilities [n, V]."""
        logs = logits.log_softmax(-1)
        return self.negative_entropy - torch.linalg.vecdot(self.probabilities, logs), logs


def translated(state: Tensor, translator: Translator | None) -> Tensor:
    """A state as a map has it: computed in float32, given in the state's own dtype."""
    if translator is None:
        return state
    wide = state.float()
    return (wide + nn.functional.linear(wide, translator.weight, translator.bias)).to(state.dtype)


def learn(head: Head, target: Target, state: Tensor, translator: Translator, share: float) -> float:
    """Adds to a map's gradients those of ``share`` times the divergences; gives the divergences' sum."""
    with torch.enable_grad():
        normed = head.norm(translated(state, translator))
    logits = head.logits(normed)
    divergences, logs = target.compared(logits)
    # The derivative by the logits: the lens' probabilities less the model's.
    gradient = logs.exp_().sub_(target.probabilities)
    torch.autograd.backward([normed], [head.pulled_back(gradient, logits) * share])
    return divergences.sum().item()


@dataclass
class Progress:
    """A training as far as it has come."""

    translators: list[Translator]
    optimizer: torch.optim.Optimizer
    losses: list[list[float]]
    """Of each step, in nats: one number a map."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in the order in which the optimizer has it."""
        return [part for both in self.translators for part in both if isinstance(part, nn.Parameter)]

    @classmethod
    def begun(cls, plan: Plan, count: int, width: int, device: torch.device) -> Progress:
        """Before the first step: maps that change nothing."""
        translators = [
            Translator(nn.Parameter(weight), None if bias is None else nn.Parameter(bias))
            for weight, bias in empty(count, width, bias=plan.bias, device=device)
        ]
        found = cls(
            translators,
            plan.optimiser([part for both in translators for part in both if part is not None]),
            [],
        )
        for group in found.optimizer.param_groups:
            group["initial_lr"] = group["lr"]  # of which steps take shares
        return found

    def step(self, plan: Plan, states: States, head: Head, windows: Windows, batch_size: int) -> None:
        """One step of the plan."""
        number = len(self.losses)
        ids = windows.drawn(number, plan.each, plan.seed)
        share = 1 / ids.numel()
        lost = [0.0] * len(self.translators)
        self.optimizer.zero_grad(set_to_none=False)
        for *tile, final in states.tiles(ids, head, batch_size):
            target = Target.of(head, final)
            for layer, state in enumerate(tile):
                lost[layer] += learn(head, target, state, self.translators[layer], share)
        losses = [sum_ * share for sum_ in lost]
        if not all(map(math.isfinite, losses)):
            worst = next(layer for layer, loss in enumerate(losses) if not math.isfinite(loss))
            raise LensTrainingError(
                f"in step {number} the divergence of the map of layers[{worst}].resid_pre is {losses[worst]}",
                instead="a smaller learning_rate=; or the model in another dtype, if its own logits are not finite",
            )
        nn.utils.clip_grad_norm_(self.parameters, plan.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * plan.rate(number)
        self.optimizer.step()
        self.losses.append(losses)
