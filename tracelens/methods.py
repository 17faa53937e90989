"""What a model can be asked beyond its blocks: the lens on a value, and analyses that are recipes on the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from tracelens.handles import recorder_of
from tracelens.lens_value import Lens, Translator, lens_of

if TYPE_CHECKING:
    from tracelens.lens.result import LensResult
    from tracelens.lens.results import LensResults
    from tracelens.model import Model


class Methods:
    """The part of :class:`tracelens.Model` that stands on the rest of it."""

    def lens(
        self,
        value: Any,
        lens: Translator | None = None,
        *,
        layer: int | None = None,
        norm: bool | None = None,
        workspace: int | None = None,
    ) -> Lens:
        """The logit lens on a value [..., D] in a block: what the model's own head would make of it.

        ``lens``: a tuned lens, whose translator of the value's ``layer`` is applied first (the layer is known for a
        site and for what is indexed from one; a computed value stands for the state after the ``layer`` given).
        ``norm``: apply the model's last norm; the default is to, except to ``model.final_norm``, which has been through
        it. ``workspace``: bytes that logits in hand may take, 64 MiB.
        The result has ``topk``, ``log_prob``, ``rank``, ``entropy``, ``kl`` and more: :class:`tracelens.Lens`.

        Several layers at once, ``model.lens(model.layers[:].resid_post)``, read the unembedding once for all of them.

        Raises :class:`~tracelens.errors.LensError` for what is no such value, and whatever ``lens`` raises if it was
        made for another model.

        >>> with model.trace("The capital of France is"):                            # doctest: +SKIP
        ...     lens = model.lens(model.layers[:].resid_post[:, -1])
        ...     best = lens.topk(1).indices.save()                                    # [layers, 1, 1]
        ...     lost = lens.kl().save()                                               # [layers, 1], to the final output
        """
        model = cast("Model", self)
        recorder = recorder_of(model.anatomy, "model.lens(...)")
        if lens is not None:
            lens.check(model)
        return lens_of(
            value,
            model._hf,
            model._tokenizer,
            recorder=recorder,
            head=model.anatomy.head,
            translate=None if lens is None else lens.translate,
            layer=layer,
            norm=norm,
            workspace=workspace,
        )

    def logit_lens(
        self,
        prompt: Any,
        *,
        generate: int = 0,
        components: str | Sequence[str] = ("resid_post",),
        layers: str | int | Iterable[int] = "all",
        positions: str | int | slice | Sequence[int] = "all",
        top_k: int = 10,
        track: Sequence[str | int] | Mapping[str, int] = (),
        metrics: Sequence[str] = ("log_prob", "rank", "entropy", "kl"),
        lens: Translator | None = None,
        edit: Callable[[Any], object] | None = None,
        batch_size: int | None = None,
        workspace: int | None = None,
        **options: Any,
    ) -> LensResult | LensResults:
        """What every layer would say next, at every position: the logit lens (nostalgebraist 2020), ready to look at.

        ``prompt``: as for :meth:`trace`; one gives a :class:`tracelens.LensResult`, a list of them
        :class:`tracelens.LensResults`. ``generate``: so many tokens are generated, and looked at while they are made
        (the last one is not run through the model); ``options`` are those of :meth:`generate`. ``components``: sites
        of a layer as wide as the residual stream. ``layers``: "all", or some. ``positions``: "all", "prompt",
        "generated", "last", or tokens of the prompt as for ``.tok``.

        For each of these the ``top_k`` likeliest tokens with their log-probabilities over the whole vocabulary, and
        ``metrics``: ``log_prob`` and ``rank`` of the token that follows, ``entropy``, ``kl`` from the final layer,
        ``logsumexp``. ``track``: tokens whose log-probability and rank are wanted everywhere. ``lens``: a
        :class:`tracelens.TunedLens`. ``edit``: a function that is called in the block with ``t``, before anything is
        read, for interventions. ``batch_size``: how many prompts run together. ``workspace``: bytes that logits in hand
        may take. No logits are kept: memory is the states of the pass, the workspace and the result.

        Raises :class:`~tracelens.errors.LensError` for what is not there to be looked at, and what
        :meth:`trace` and :meth:`generate` raise.

        >>> lens = model.logit_lens("The capital of France is")                      # doctest: +SKIP
        >>> lens.plot("entropy")                                                     # doctest: +SKIP
        """
        from tracelens.lens.logit_lens import logit_lens

        return logit_lens(
            cast("Model", self),
            prompt,
            generate=generate,
            components=components,
            layers=layers,
            positions=positions,
            top_k=top_k,
            track=track,
            metrics=metrics,
            lens=lens,
            edit=edit,
            batch_size=batch_size,
            workspace=workspace,
            **options,
        )
