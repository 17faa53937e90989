"""What a model can be asked beyond its blocks: the lens on a value, and analyses that are recipes on the blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from tracelens import sites
from tracelens.dictionaries import splice_at
from tracelens.handles import recorder_of
from tracelens.lens.attribution import logit_attribution
from tracelens.lens.logit_lens import logit_lens
from tracelens.lens_value import Lens, Translator, lens_of
from tracelens.parallel_check import ParallelReport, check_parallel
from tracelens.proving import SiteProof, prove
from tracelens.splicing import Splice
from tracelens.values import Value

if TYPE_CHECKING:
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
        it. ``workspace``: bytes that logits in hand may take, 16 MiB.
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

    def __getitem__(self, name: str) -> Value:
        """A site by its name here or in another library, in a block: ``model["blocks.5.hook_resid_post"]``.

        As :func:`tracelens.sites.parse` understands names; also the path of a module with its side,
        ``model["model.layers.5.mlp.output"]``, which is :meth:`tracelens.Model.module` in short.
        """
        return sites.read(cast("Model", self), name)

    def __setitem__(self, name: str, new: Any) -> None:
        sites.write(cast("Model", self), name, new)

    def splice(self, module: Any, *, site: Any = None, to: Any = None, keep_error: bool = True) -> Splice:
        """Puts a sparse autoencoder or a transcoder into the model's path, at the site that its metadata names.

        ``module``: one with ``encode`` and ``decode``, such as an SAE of SAELens; what it says in ``cfg.metadata``,
        ``cfg`` or itself of ``hook_name`` (and ``hook_name_out``, for a transcoder) is understood as
        :func:`tracelens.sites.parse` does. ``site``, ``to``: where it is to stand instead, as names or values.
        For all else see :func:`tracelens.splice`.

        >>> with model.trace("The capital of France is"):                            # doctest: +SKIP
        ...     with model.splice(sae) as s:
        ...         s.features[..., 17] = 0
        ...     logits = model.logits.save()

        Raises :class:`~tracelens.errors.SpliceError` for a module that names no site, and for one that was trained on
        other numbers than this model has there (changed weights, scaled activations).
        """
        recorder_of(cast("Model", self).anatomy, "model.splice(...)")
        return splice_at(cast("Model", self), module, site=site, to=to, keep_error=keep_error)

    def check_parallel(self, prompt: Any, *, tolerance: float | None = None) -> ParallelReport:
        """Compares every site of every layer, and the logits, with those of the same model in one process.

        Loads the model once more for that time, whole and on one device, where it has to fit. The report is a table:
        for each site the largest error of all layers, relative to the largest number there, where it is, and whether
        it is within ``tolerance``. That is 1e-5, or 8 times the precision of the model's dtype if this is more.

        >>> model.check_parallel("The capital of France is").ok                      # doctest: +SKIP
        True

        Raises :class:`~tracelens.errors.OptionError` for a model that is not on ranks of this process.
        """
        return check_parallel(cast("Model", self), prompt, tolerance)

    def check_sites(self) -> SiteProof:
        """Holds the model's sites to what they are called: a forward pass of six tokens, and the sums between sites.

        The result is a table of identities (``resid_mid + mlp_add == resid_post``, ``pattern @ v == z``, ...) with the
        largest relative error of each, and says which sites are verified by one, refuted, or taken from the table of
        the family alone. ``tl.load`` and ``tl.wrap`` do this by themselves, once for models that are built alike.

        >>> model.check_sites().ok                                                   # doctest: +SKIP
        True
        """
        return prove(cast("Model", self))

    logit_lens = logit_lens
    logit_attribution = logit_attribution
