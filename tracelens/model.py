"""A model as users hold it: its layers and sites, and the blocks that look at and change them."""

from __future__ import annotations

import copy
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tracelens.backends.anatomy import ModelAnatomy
from tracelens.backends.branching import Branches, with_branches
from tracelens.backends.generation_options import require_count, require_own
from tracelens.backends.windows import require_rows_as_alone
from tracelens.batch import prepare
from tracelens.compiling import Compiler, owning
from tracelens.errors import Blaming, OptionError, PromptError, TracelensError
from tracelens.generation import Generation
from tracelens.handles import LayerHandle, Layers, global_site, no_target, recorder_of, unknown_global
from tracelens.ir.graph import Graph
from tracelens.ir.sites import GLOBAL_KINDS, TEXT_KINDS, Site
from tracelens.location import here
from tracelens.memory import bytes_of
from tracelens.methods import Methods
from tracelens.module_handle import ModuleHandle
from tracelens.placement import Placement
from tracelens.prompt_tokens import PromptTokens
from tracelens.prompted import Prompt
from tracelens.ranked import Parts, RankedCompiler
from tracelens.site_table import SiteTable, site_table
from tracelens.slices import require_rows
from tracelens.streaming import Stream, graph_of
from tracelens.tracing import Program, Record, Recording, Trace
from tracelens.values import Value
from tracelens.view import Fold, Line, Shown, Stack, View, display, html

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tracelens.backends.base import Family
    from tracelens.backends.ranks.pool import Ranks

_OWN = ("_compiler", "_hf", "_latest", "_parts", "_tokenizer", "anatomy", "layers")


class Model(Methods, Shown):
    """A language model whose inside can be read and changed.

    Made by :func:`tracelens.load` and :func:`tracelens.wrap`. ``model.layers[i].<site>`` and ``model.<site>`` name the
    tensors of the forward pass; inside a block, reading one gives a value and assigning to one changes the model's
    computation for that run. The model itself is never modified.
    """

    layers: Layers

    def __init__(
        self,
        hf_model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        _parts: Parts | None = None,
        _elsewhere: Placement | None = None,
        _family: Family | None = None,
    ) -> None:
        with Blaming(here()):
            anatomy = ModelAnatomy(hf_model, _family)
        anatomy.elsewhere = _elsewhere
        compiler = Compiler(anatomy) if _parts is None else RankedCompiler(anatomy, _parts)
        layers = Layers(LayerHandle(anatomy, index) for index in range(anatomy.n_layers))
        own = (compiler, hf_model, None, _parts, tokenizer, anatomy, layers)
        for name, value in zip(_OWN, own, strict=True):
            object.__setattr__(self, name, value)

    if TYPE_CHECKING:
        anatomy: ModelAnatomy
        _compiler: Compiler
        _hf: nn.Module
        _tokenizer: PreTrainedTokenizerBase | None
        _latest: Prompt | None
        _parts: Parts | None

    # --- blocks --------------------------------------------------------------------------------------------------

    def trace(
        self,
        prompt: Any,
        *,
        batch_size: int | None = None,
        max_extra_memory: int | str | None = None,
        measure: bool = False,
    ) -> Trace:
        """Opens a block that runs the model once on ``prompt`` when it ends.

        ``prompt``: a text, a list of texts, a conversation (a list of ``{"role": ..., "content": ...}``, or several of
        these), token ids (list, nested list, tensor, array), or a dict with ``input_ids`` and ``attention_mask``.
        ``batch_size``: how many prompts run together at most. The block runs once for each slice of so many, padded to
        its own longest prompt, with a bar on a terminal and in a notebook; the results are those of all together.
        ``max_extra_memory``: how much the block may hold on a device beside the model, in bytes or as ``"2GiB"``; with
        ``batch_size`` one slice of it. ``measure``: ``t.report`` also tells the peak of memory on each device, for
        which torch's own peak is reset.

        Raises :class:`~tracelens.errors.PromptError` and its kinds at once, and
        :class:`~tracelens.errors.ExtraMemoryError` before the model runs; with ``batch_size``
        :class:`~tracelens.errors.RowsMeetError` for a block in which prompts do not stay apart. What goes wrong with a
        slice is told with its rows.
        """
        rows = require_rows(batch_size)
        return Trace(self, self.prepare(prompt), _room(max_extra_memory), measure=measure, batch_size=rows)

    def record(self, prompt: Any = None, *, generation: bool = False) -> Record:
        """Opens a block that only records; without a prompt, sizes are symbols and the graph fits every prompt.

        ``generation``: the graph is one for :meth:`stream`, with the steps of a generation (``r.decode``, ``r.steps``).
        """
        return Record(self, None if prompt is None else self.prepare(prompt), generation=generation)

    def compile(self, graph: Graph | Record | Trace, *, max_extra_memory: int | str | None = None) -> Program:
        """A reusable program: ``program(prompt)`` runs the graph without recording it again.

        ``max_extra_memory``: as for :meth:`trace`, for every prompt that the program is called with.
        """
        recorded = graph.graph if isinstance(graph, Record | Trace) else graph
        return Program(self, recorded, _room(max_extra_memory))

    def generate(
        self,
        prompt: Any,
        *,
        max_new_tokens: int,
        seed: int | None = None,
        include_last: bool = False,
        batch_size: int | None = None,
        max_extra_memory: int | str | None = None,
        **options: Any,
    ) -> Generation:
        """Opens a block that reads and writes while up to ``max_new_tokens`` tokens are generated, when it ends.

        ``prompt``: as for :meth:`trace`. ``seed``: of tokens that are drawn (``do_sample=True``), which are then the
        same on one device and on ranks; your own random numbers go on as if nothing had been drawn. ``include_last``:
        one more pass, over the last token, so that saved positions are those of the whole text.
        ``batch_size``, ``max_extra_memory``: as for :meth:`trace`; with ``batch_size`` tokens are drawn slice by slice,
        so that a seed gives other ones than without. ``options`` go to transformers' ``generate`` (``do_sample``,
        ``temperature``, ``eos_token_id``, ``stop_strings``, ...); the default is greedy.

        >>> with model.generate("The capital of France is", max_new_tokens=20) as t:   # doctest: +SKIP
        ...     model.layers[12].post_ln += 3.0 * v                    # in every step
        ...     t.decode.layers[20].resid_post += w                    # in those of new tokens
        ...     norms = model.layers[:].resid_post.norm(dim=-1).save() # [layers, 1, P + 19]
        >>> t.text                                                                     # doctest: +SKIP

        Raises :class:`~tracelens.errors.OptionError` for options under which a step would not be one token of each row
        (beam search, assisted generation, ...).
        """
        if type(max_new_tokens) is not int or max_new_tokens < 0:
            raise OptionError(
                f"max_new_tokens={max_new_tokens!r} is no number of tokens",
                at=here(),
                instead="max_new_tokens=20; 0 runs the model over the prompt alone",
            )
        rows = require_rows(batch_size)
        if seed is not None and type(seed) is not int:
            raise OptionError(f"seed={seed!r} is no whole number", at=here(), instead="seed=0")
        prepared = self.prepare(prompt, room=max_new_tokens)
        single = isinstance(prompt, str) or prepared.sizes["B"] == 1
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            single = False
        each = require_count(options.pop("num_return_sequences", None))
        if each != 1:
            # Several texts of one prompt are rows of their own.
            batch = prepared.batch.each(each)
            prepared, single = Prompt(batch, prepared.tokenizer, prepared.owner), False
        settings: dict[str, Any] = {"do_sample": False, **options, "max_new_tokens": max_new_tokens}
        if settings["do_sample"] is False:
            # Sampling settings of the model's own generation_config do not belong to a greedy run (and warn).
            for name in ("temperature", "top_p", "top_k"):
                settings.setdefault(name, None)
        settings.setdefault("pad_token_id", self._pad_id)
        with Blaming(here()):
            require_own(settings)
        return Generation(
            self,
            prepared,
            settings,
            single=single,
            include_last=include_last,
            seed=seed,
            most=_room(max_extra_memory),
            batch_size=rows,
        )

    def stream(
        self,
        prompt: Any,
        graph: Graph | Recording | None = None,
        *,
        max_new_tokens: int,
        seed: int | None = None,
        **options: Any,
    ) -> Stream:
        """Tokens, and what ``graph`` saves, while they are made: one event for each step.

        ``graph``: of ``model.record(generation=True)``, or of a :meth:`generate` block that has ended. The other
        arguments are those of :meth:`generate`. Leaving the loop ends the generation.

        >>> with model.record(generation=True) as r:                                   # doctest: +SKIP
        ...     r.decode.layers[12].post_ln += 3.0 * v
        ...     model.layers[20].resid_post[:, -1].norm(dim=-1).save("norm")
        >>> for event in model.stream("The capital of France is", r, max_new_tokens=20):   # doctest: +SKIP
        ...     print(event.text, event["norm"])

        On ranks, ``timeout=`` of :func:`tracelens.load` is the time of each step; your own is not counted. Raises
        :class:`~tracelens.errors.OptionError` under torchrun, where each rank has a loop of its own, and for a save
        with ``to=``, whose file a stream would not write.
        """
        if self.anatomy.mesh is not None:
            raise OptionError(
                "under torchrun every rank runs the loop itself: one that leaves it earlier, or that communicates in "
                "it, would have the others wait for it within a step",
                at=here(),
                instead="model = tl.load(name, tp=2) in a script without torchrun, whose one loop leads all ranks; or "
                "with model.generate(prompt, max_new_tokens=...) as t: ...",
            )
        if options.get("batch_size") is not None:
            raise OptionError(
                "an event is one step of all rows, and batch_size= runs some of them at a time",
                at=here(),
                instead="with model.generate(prompts, max_new_tokens=..., batch_size=8) as t: ...",
            )
        block = self.generate(prompt, max_new_tokens=max_new_tokens, seed=seed, **options)
        with Blaming(here()):
            return Stream(block, owning(graph_of(graph)), here())

    def prepare(self, prompt: Any, *, room: int = 0, branches: Branches | None = None) -> Prompt:
        """The prompt as the model will see it: token ids, padded on the left, with a mask and positions.

        ``trace`` and programs take it in place of a prompt. ``branches=7``: the last token stands there seven times,
        ``.tok[-7:]``, each as if alone, in one pass; ``branches=[[319, 347]]``: so do tokens that may come next.
        """
        if branches is not None:
            return with_branches(self.anatomy, self.prepare(prompt), branches)
        if isinstance(prompt, Prompt) and not room:
            if prompt.owner is not self.anatomy:
                raise PromptError(
                    "this prompt was prepared for another model",
                    at=here(),
                    instead="model.prepare(...) of this model",
                )
            return prompt
        latest = self._latest
        if latest is not None and not room and latest.holds(prompt):
            return latest
        try:
            batch = prepare(
                prompt,
                self._tokenizer,
                max_positions=self.anatomy.max_positions,
                room=room,
                vocab_size=self.anatomy.vocabulary,
                pad_id=self._pad_id,
            )
        except TracelensError as error:
            error.at = error.at or here()
            raise
        require_rows_as_alone(self.anatomy, batch.lengths, room)
        prepared = Prompt(batch, self._tokenizer, self.anatomy)
        if isinstance(prompt, torch.Tensor) and not room:
            object.__setattr__(self, "_latest", prepared)
        return prepared

    @cached_property
    def _pad_id(self) -> int:
        """What stands at padding: any token will do."""
        tokenizer = self._tokenizer
        for candidate in (
            getattr(tokenizer, "pad_token_id", None),
            getattr(self.anatomy.config, "pad_token_id", None),
            getattr(tokenizer, "eos_token_id", None),
        ):
            if isinstance(candidate, int):
                return candidate
        return 0

    # --- ranks ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends the ranks that were launched for this model, or lets go of its parts on ranks of yours; safe to repeat.

        It happens by itself when the model or the process ends. A model of this process has nothing to close.
        """
        if self._parts is not None:
            self._parts.close()

    @property
    def ranks(self) -> Ranks | None:
        """The processes that have the parts of the model, if it was loaded with ``tp=`` or ``pp=``."""
        return None if self._parts is None else self._parts.ranks

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- what there is -------------------------------------------------------------------------------------------

    @property
    def hf(self) -> Any:
        """The transformers model."""
        return self._hf

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, if there is one."""
        return self._tokenizer

    @property
    def config(self) -> Any:
        """The model's configuration."""
        hf: Any = self._hf
        return hf.config

    @property
    def n_layers(self) -> int:
        """The number of layers."""
        return self.anatomy.n_layers

    def sites(self) -> SiteTable:
        """All sites: name, shape, dtype, what a write changes, and for absent ones the reason."""
        return site_table(self.anatomy)

    def tokens(self, prompt: Any) -> PromptTokens:
        """The tokens of a prompt, or of several, with their positions and ids: what ``.tok[...]`` addresses."""
        return PromptTokens(self.prepare(prompt))

    def show(self, prompt: Any) -> None:
        """Shows the tokens of a prompt, or of several: a grid in a notebook, lines of text elsewhere.

        Positions are those of ``.tok``: real tokens, from 0; the padding before a shorter prompt is marked.

        >>> model.show("The capital of France is")                                   # doctest: +SKIP
        5 tokens
          position  0      1           2      3          4
          token     "The"  " capital"  " of"  " France"  " is"
          id        504    3575        282    4649       314
        """
        display(self.tokens(prompt))

    def describe(self) -> str:
        """One line: family, size, device."""
        anatomy = self.anatomy
        name = getattr(self.config, "_name_or_path", "") or type(self._hf).__name__
        there = str(anatomy.spread) if anatomy.elsewhere is None else str(anatomy.elsewhere)
        return (
            f"{name.rstrip('/').rpartition('/')[2]} ({anatomy.family.name}, {anatomy.n_layers} layers, "
            f"d_model {anatomy.widths['D']}) on {there}, {str(anatomy.dtype).removeprefix('torch.')}"
        )

    # --- parameters ----------------------------------------------------------------------------------------------

    @property
    def unembed(self) -> Value:
        """The unembedding matrix [V, D] as a value; ``model.unembed[token_id]`` is the direction of one token."""
        return self.param(self.anatomy.head.weight)

    def param(self, path: str) -> Value:
        """A parameter or buffer of the model as a value, by its path in the transformers model."""
        recorder = recorder_of(self.anatomy, f"model.param({path!r})")
        return Value(recorder, recorder.parameter(path))

    # --- modules -------------------------------------------------------------------------------------------------

    def module(self, path: str) -> ModuleHandle:
        """A module by its path, whose inputs and outputs can be read and written as sites are.

        >>> with model.trace("The capital of France is"):                             # doctest: +SKIP
        ...     h = model.module("model.layers.3.mlp.down_proj").input.save()         # [B, P, neurons]
        ...     model.module("model.layers.5.self_attn.k_proj").output[:, -1] = 0

        Shapes and dtypes are learned when a module is first named, by a forward pass on tensors without data. Raises
        :class:`~tracelens.errors.UnknownModuleError`, :class:`~tracelens.errors.MetaForwardError` where that pass is
        impossible, and at use :class:`~tracelens.errors.ModuleCallError` and
        :class:`~tracelens.errors.ModuleTensorError`.
        """
        return ModuleHandle(self.anatomy, path)

    def modules(self) -> tuple[str, ...]:
        """The paths of the modules that a forward pass calls, in the order in which it does so first."""
        with Blaming(here()):
            return self.anatomy.sides.paths()

    # --- sites ---------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        site = global_site(name)
        if site is None:
            raise unknown_global(name, _PUBLIC)
        return Value.of_site(recorder_of(self.anatomy, f"model.{name}"), site)

    def __setattr__(self, name: str, new: Any) -> None:
        site = global_site(name)
        if site is None:
            raise no_target(name, _PUBLIC)
        recorder_of(self.anatomy, f"model.{name}").write(site, new)

    def __deepcopy__(self, memo: dict[int, Any]) -> Model:
        if self._parts is not None:
            self._parts.refuse_copies()
        # The weights are copied; what was compiled for the original and its tokenizer, which nobody changes, are not.
        # In the memo first: a hook of the user's on the transformers model may lead back here.
        found = memo[id(self)] = Model.__new__(Model)
        found.__init__(copy.deepcopy(self._hf, memo), self._tokenizer)
        # A copy on ranks lies as the original.
        for name in ("probed", "seen", "distributed"):
            setattr(found.anatomy, name, getattr(self.anatomy, name))
        return found

    def __dir__(self) -> list[str]:
        present = [kind.name for kind in GLOBAL_KINDS if self.anatomy.has(Site(kind.name))]
        return sorted({*_PUBLIC, *present, *(kind.name for kind in TEXT_KINDS)})

    def _view(self) -> View:
        return Line(f"<tracelens model: {self.describe()}>")

    def _repr_html_(self) -> str:
        return html(Stack((Line(self.describe()), Fold("sites", self.sites()._view()))))


_PUBLIC = tuple(
    sorted({"layers", *(name for name in (*vars(Model), *vars(Methods)) if not name.startswith("_"))})
)


def _room(size: int | str | None) -> int | None:
    if size is None:
        return None
    with Blaming(here()):
        return bytes_of(size)
