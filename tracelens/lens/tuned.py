"""The tuned lens: what each layer says, read through a map that was trained for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tracelens.errors import Blaming, LensMismatchError, OptionError
from tracelens.lens.checkpoints import resume, store
from tracelens.lens.evaluation import LensEvaluation, evaluate
from tracelens.lens.fingerprint import fingerprint_of
from tracelens.lens.head import Head, on
from tracelens.lens.lens_files import LensConfig, fetched, read, write
from tracelens.lens.text_windows import windows_of
from tracelens.lens.training import Plan, Progress, States
from tracelens.lens.translators import Translator, named, state_of
from tracelens.location import here
from tracelens.mapped import MappedValue
from tracelens.progress import watched
from tracelens.slices import require_rows
from tracelens.values import Value
from tracelens.view import Line, Shown, Stack, Table, View

if TYPE_CHECKING:
    from tracelens.model import Model

Texts = Iterable[str] | Iterable[Sequence[int]]


@dataclass(frozen=True, repr=False)
class LensTraining(Shown):
    """How a lens was trained.

    ``plan``: the settings. ``losses``: KL(final || lens) of each step and map [steps, n_layers], float64, in nats per
    token, before the step. ``bits_per_byte``: nats per token times this are bits per byte of the texts; ``None`` where
    token ids were given. ``windows``: how many windows of ``plan["context"]`` tokens the texts were.
    """

    plan: dict[str, Any]
    losses: Tensor
    bits_per_byte: float | None
    windows: int

    def _view(self) -> View:
        ends = self.losses[[0, -1]]
        heads = ("map", "first step", "last step")
        rows = ends.T.tolist()
        if self.bits_per_byte is not None:
            heads += ("bits per byte, last step",)
            rows = [[*row, row[-1] * self.bits_per_byte] for row in rows]
        table = tuple(
            (f"layers[{layer}].resid_pre", *(f"{value:.4f}" for value in row))
            for layer, row in enumerate(rows)
        )
        words = f"KL(final || lens) in nats per token; {len(self.losses)} steps over {self.windows} windows"
        return Stack((Line(words), Table(heads, table)))


class TunedLens(Shown):
    """A lens with a trained affine map for each state of the residual stream (Belrose et al. 2023, arXiv:2303.08112).

    Where the logit lens applies the model's last norm and its unembedding to a state ``h`` as it is, this one applies
    them to ``h + h @ weight.T + bias``. The map of ``layers[l].resid_pre``, which is ``layers[l - 1].resid_post``, is
    number ``l``; what the final norm receives has none, since there the lens is the model itself.

    >>> tuned = tl.TunedLens.train(model, texts, steps=250)               # doctest: +SKIP
    >>> tuned.save("my-lens")                                             # doctest: +SKIP
    >>> model.logit_lens("The capital of France is", lens=tuned)          # doctest: +SKIP
    """

    def __init__(
        self,
        config: LensConfig,
        translators: Sequence[Translator] | None,
        *,
        training: LensTraining | None = None,
        verified: bool = True,
    ) -> None:
        self.config = config
        self._translators = None if translators is None else tuple(translators)
        self._training = training
        self._verified = verified

    # --- making one ----------------------------------------------------------------------------------------------

    @classmethod
    def identity(cls, model: Model) -> TunedLens:
        """The lens whose maps change nothing, which is the logit lens."""
        with Blaming(here()):
            return cls(config_of(model, bias=True, digests=False), None)

    @classmethod
    def train(
        cls,
        model: Model,
        texts: Texts,
        *,
        steps: int = 250,
        tokens_per_step: int = 2**18,
        context: int | None = None,
        batch_size: int = 8,
        optimizer: Literal["sgd", "adam"] = "sgd",
        learning_rate: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 1e-3,
        clip: float = 1.0,
        warmup: int | None = None,
        bias: bool = True,
        seed: int = 0,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 25,
        device: str | torch.device | None = None,
        progress: bool | None = None,
    ) -> TunedLens:
        """Trains a lens for a model, wherever the model lies, so that every state says what the final one says.

        The model itself is not changed. ``texts``: texts, or lists of token ids; they are cut in windows of ``context``
        tokens (2048, or what the model can take), drawn anew in each epoch, so training never runs out of them.
        ``steps`` of ``tokens_per_step`` tokens (no more than the texts have), ``batch_size`` windows in a forward pass.
        The loss is KL(final || lens), for each map on its own; a lens needs memory for its maps, their gradients and
        momenta (d_model squared times layers, in float32), and for the logits of a few tokens.

        ``optimizer``: ``"sgd"``, with Nesterov ``momentum`` and a learning rate of ``learning_rate * (1 - momentum)``;
        or ``"adam"``, with ``learning_rate / 1000`` and a ``warmup`` of a fifth of the steps, at most 1000 (0 for sgd).
        After it the rate falls linearly to zero. ``weight_decay`` pulls to the identity, ``clip`` is the largest norm
        of all gradients together. Equal arguments give equal lenses.

        ``checkpoint``: a folder in which the training is kept, every ``checkpoint_every`` steps. Called again with the
        same arguments it goes on there, and ends with the very numbers of a training without a stop.
        ``device``: where maps are trained; by default where the model has its unembedding, or for a model on ranks the
        host. ``progress``: a bar or none; by default one where somebody is looking.

        Raises :class:`~tracelens.errors.OptionError` for arguments that make no plan and for texts of less than a
        window, and :class:`~tracelens.errors.LensTrainingError` for a checkpoint of another training, for a divergence
        that is not finite, and for a model with a head of a kind that is not known.
        """
        with Blaming(here()), trainable():
            rows = require_rows(batch_size) or 1
            length = min(2048, model.anatomy.max_positions or 2048) if context is None else context
            for name, value in (
                ("steps", steps),
                ("tokens_per_step", tokens_per_step),
                ("checkpoint_every", checkpoint_every),
            ):
                if type(value) is not int or value < 1:
                    raise OptionError(f"{name}={value!r} is no number of them", instead=f"{name}=100")
            windows = windows_of(model, texts, length)
            if warmup is None:
                warmup = min(1000, steps // 5) if optimizer == "adam" else 0
            plan = Plan(
                steps=steps,
                tokens_per_step=min(tokens_per_step, windows.ids.numel()),
                context=length,
                optimizer=optimizer,
                learning_rate=learning_rate,
                momentum=momentum,
                weight_decay=weight_decay,
                clip=clip,
                warmup=warmup,
                bias=bias,
                seed=seed,
            )
            config = config_of(model, bias=bias)
            head = Head(model, None if device is None else torch.device(device))
            states = States(model)
            states.require_head(model, head, windows.ids[:1])
            kept = Progress.begun(plan, model.n_layers, config.d_model, head.device)
            identity = {**plan.described(), "texts": windows.digest, "unembed_sha256": dict(config.strict)}
            folder = None if checkpoint is None else Path(checkpoint)
            if folder is not None:
                resume(kept, identity, folder)
            left = range(len(kept.losses), plan.steps)
            each = plan.each * length
            for number in watched(left, [each] * len(left), "token", progress):
                kept.step(plan, states, head, windows, rows)
                if folder is not None and ((number + 1) % checkpoint_every == 0 or number + 1 == plan.steps):
                    store(kept, identity, folder)
            maps = [
                Translator(weight.detach(), None if bias is None else bias.detach())
                for weight, bias in kept.translators
            ]
            report = LensTraining(
                plan.described(),
                torch.tensor(kept.losses, dtype=torch.float64),
                windows.bits_per_byte,
                len(windows.ids),
            )
            return cls(config, maps, training=report)

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        repo: str | None = None,
        revision: str | None = None,
        verify: bool = True,
    ) -> TunedLens:
        """Reads a lens from a folder, or a published one from the hub by the name of its model.

        The folder is that of :meth:`save`, or of the tuned-lens package, whose pickled tensors are read without
        unpickling anything else. ``load("gpt2")`` gets a lens of the authors of the tuned lens;
        ``load("lenses/mine", repo="me/my-repository")`` one in a folder of a repository of yours (``"."`` for its top),
        at a ``revision``. A lens is used only with the model whose unembedding it was trained for;
        ``verify=False`` uses it with any of that shape.

        Raises :class:`~tracelens.errors.LensFolderError` where there is no lens, or none that is intact.
        """
        with Blaming(here()):
            folder = Path(source)
            if repo is not None or not folder.is_dir():
                folder = fetched(str(source), repo, revision)
            config, translators = read(folder)
            return cls(config, translators, verified=verify)

    def save(self, folder: str | Path, *, pickled: bool = False) -> Path:
        """Writes the lens to a folder, as ``config.json`` and ``params.safetensors``; gives the folder.

        ``pickled=True`` writes ``params.pt`` in place of the latter, which the tuned-lens package reads.

        Raises :class:`~tracelens.errors.LensFolderError` if there is a file of that name.
        """
        with Blaming(here()):
            host = torch.device("cpu")
            tensors = {name: on(tensor, host) for name, tensor in named(list(self.translators)).items()}
            write(Path(folder), self.config, tensors, pickled=pickled)
        return Path(folder)

    # --- what it is ----------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """What results call the lens."""
        kind = "logit lens" if self._translators is None else "tuned lens"
        return f"{kind} of {self.config.base_model_name_or_path}"

    @property
    def translators(self) -> tuple[Translator, ...]:
        """The maps, by the number of their state: ``weight`` [D, D] and ``bias`` [D] (or ``None``), float32."""
        if self._translators is not None:
            return self._translators
        width = self.config.d_model
        return tuple(
            Translator(torch.zeros(width, width), torch.zeros(width) if self.config.bias else None)
            for _ in range(self.config.num_hidden_layers)
        )

    @property
    def training(self) -> LensTraining | None:
        """How it was trained, with the losses of each step; ``None`` for a lens that was loaded."""
        return self._training

    def translate(self, value: Any, layer: int, component: str | None = None) -> Any:
        """A layer's state [..., D] as its map has it, in the same dtype; the map computes in float32.

        ``value``: a value of a block, or a tensor. ``component``: which site of the layer it is, ``resid_post`` or
        ``resid_pre``; by default the one that a value was read from, and ``resid_post`` for a tensor. The last layer's
        ``resid_post`` comes back as it is.

        Raises :class:`~tracelens.errors.LensMismatchError` for other sites and layers, and for computed values of which
        it is not said which site they stand for.
        """
        with Blaming(here()):
            if isinstance(value, MappedValue):
                raise OptionError(
                    "each layer has a map of its own, and this is a value of several layers",
                    instead="one layer after the other: for layer in range(...): lens.translate(value, layer)",
                )
            if component is None:
                component = site_of(value)
            number = state_of(component, layer)
            count = self.config.num_hidden_layers
            if not 0 <= layer < count:
                raise LensMismatchError(
                    f"the lens is of a model with {count} layers, and there is no layer {layer} among them",
                    instead="the number of a layer, from 0",
                )
        if self._translators is None or number == count:
            return value
        weight, bias = self._translators[number]
        wide = value.float()
        return (wide + torch.nn.functional.linear(wide, weight, bias)).to(value.dtype)

    def check(self, model: Model) -> None:
        """Raises :class:`~tracelens.errors.LensMismatchError` unless the lens is one for this model."""
        config, anatomy = self.config, model.anatomy
        for mine, word, theirs in (
            (config.d_model, "d_model", anatomy.widths["D"]),
            (config.num_hidden_layers, "layers", model.n_layers),
        ):
            if mine != theirs:
                raise LensMismatchError(
                    f"the lens is for {config.base_model_name_or_path}, with {mine} {word}, and this model has "
                    f"{theirs}",
                    instead=f"a lens that was trained for this model: {_TRAIN}",
                )
        if not self._verified or not (config.strict or config.unembed_hash):
            return
        found = fingerprint_of(model)
        agrees = found.agrees(config.strict) if config.strict else config.unembed_hash in found.loose
        if not agrees:
            raise LensMismatchError(
                f"the lens was trained for {config.base_model_name_or_path}, whose unembedding is another one than "
                "this model's, so what it says would be about another model",
                instead=f"a lens for this model: {_TRAIN}; or TunedLens.load(..., verify=False), if the two are "
                "nearly the same (a fine-tune, another precision)",
            )

    def evaluate(
        self,
        model: Model,
        texts: Texts,
        *,
        context: int | None = None,
        batch_size: int = 8,
        device: str | torch.device | None = None,
        progress: bool | None = None,
    ) -> LensEvaluation:
        """How far each state is from the model's own last word, with the lens and without: KL(final || lens) in nats.

        The arguments are those of :meth:`train`; take texts that it has not seen.

        Raises :class:`~tracelens.errors.LensMismatchError` if the lens is for another model.
        """
        with Blaming(here()):
            self.check(model)
            rows = require_rows(batch_size) or 1
            length = min(2048, model.anatomy.max_positions or 2048) if context is None else context
            windows = windows_of(model, texts, length)
            head = Head(model, None if device is None else torch.device(device))
            maps: Sequence[Translator | None] = [
                Translator(on(weight, head.device), None if bias is None else on(bias, head.device))
                for weight, bias in self.translators
            ]
            return evaluate(model, head, windows, maps, rows, progress)

    def __len__(self) -> int:
        """The number of maps, which is the model's number of layers."""
        return self.config.num_hidden_layers

    def _view(self) -> View:
        config = self.config
        return Line(f"<{self.name}: {len(self)} maps, d_model {config.d_model}>")


def site_of(value: Any) -> str:
    """The name of the site that a value of a block was read from, or a part of."""
    if not isinstance(value, Value):
        return "resid_post"
    site = value._root()._site
    if site is None:
        raise LensMismatchError(
            "this value was computed, so that nobody knows which state of the stream it stands for",
            instead='lens.translate(value, layer, "resid_post"), or model.lens(value, lens=lens, layer=layer)',
        )
    return site.name


def trainable() -> AbstractContextManager[Any]:
    """Takes back an inference mode of the user's, if there is one: to say it does more than that."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


_TRAIN = "tl.TunedLens.train(model, texts)"


def config_of(model: Model, *, bias: bool, digests: bool = True) -> LensConfig:
    """What is to be said of a lens for this model."""
    found = fingerprint_of(model) if digests else None
    return LensConfig(
        base_model_name_or_path=str(getattr(model.config, "_name_or_path", "") or type(model.hf).__name__),
        d_model=model.anatomy.widths["D"],
        num_hidden_layers=model.n_layers,
        bias=bias,
        base_model_revision=getattr(model.config, "_commit_hash", None),
        unembed_hash=None if found is None else found.loose[0],
        tracelens={} if found is None else {"unembed_sha256": dict(found.strict)},
    )
