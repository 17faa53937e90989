"""Where models come from: a hub, a folder, the embedded default, or the user's own hands."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import nn

from tracelens.backends.architectures.lookup import no_table, require_loadable
from tracelens.backends.places import look_at
from tracelens.deriving import derived, held_to
from tracelens.errors import Blaming, OptionError, UnknownArchitectureError
from tracelens.location import here
from tracelens.model import Model
from tracelens.plain_model import PlainModel
from tracelens.pretrained import SOURCES, embedded_model
from tracelens.rank_loading import checked_sizes, load_over_ranks, tokenizer_of
from tracelens.view import in_notebook

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tracelens.backends.ranks.pool import Ranks


def load(
    name: str | Path,
    *,
    weights: bool = True,
    dtype: torch.dtype | str = "auto",
    device_map: str | Mapping[str, str | int | torch.device] | None = None,
    max_memory: Mapping[str | int, str | int] | None = None,
    offload_folder: str | Path | None = None,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    ranks: Ranks | None = None,
    timeout: float | None = None,
    parallelize: str | None = None,
    probe: bool = True,
    **options: Any,
) -> Model:
    """Loads a model and its tokenizer: ``tl.load("smollm2-135m")``, ``tl.load("Qwen/Qwen3-4B")``, ``tl.load("./dir")``.

    ``"smollm2-135m"`` is the embedded default model (SmolLM2-135M-Instruct), which needs no account and no hub.
    ``weights=False`` reads only the configuration: sites, shapes and recordings are there, running is refused.
    ``dtype``: the dtype of the weights, as transformers takes it. ``options`` go to ``from_pretrained``.

    ``device_map``: spreads the model over the devices of this process, by accelerate: ``"auto"``, ``"balanced"``, one
    device (``"cuda:1"``), or the device of each part, where ``"cpu"`` and ``"disk"`` keep weights there that run
    elsewhere. ``max_memory``: how much of it each device may hold (``{0: "20GiB", "cpu": "60GiB"}``).
    ``offload_folder``: where the weights of parts on ``"disk"`` are kept.

    ``tp``, ``pp``: spreads the model over ranks, which are processes that this one launches and owns: ``tp`` of them
    share each layer (tensor parallelism), in ``pp`` stages of layers (a pipeline). ``ep``: as many ranks as ``tp``, of
    which each has some whole experts, rather than a part of each.
    ``ranks``: ranks that are there already (:class:`Ranks`), as many as ``tp * pp``. ``timeout``: seconds that a run
    may take. ``model.close()`` ends them, and so does the end of the model or of this process. Under ``torchrun`` the
    ranks are the processes of the script, and the first of them has the results.

    ``parallelize``: a function of yours that spreads the model, in place of transformers' own plan:
    ``"my_plans:tutorial"`` for ``def tutorial(model, mesh)`` in the module ``my_plans``. Every rank imports it, reads
    the whole model into the host's memory, and calls it with a mesh of ``tp`` ranks; it calls ``parallelize_module``.

    ``probe``: as for :func:`wrap`. Raises :class:`~tracelens.errors.OptionError` for a folder
    that is not there and for options that have no effect, and what transformers raises where a model cannot be found on
    the hub or does not fit.
    """
    if device_map is None and (max_memory is not None or offload_folder is not None):
        name_, value = (
            ("max_memory", max_memory) if offload_folder is None else ("offload_folder", offload_folder)
        )
        raise OptionError(
            f"{name_}={value!r} has no effect without device_map: the model is loaded on one device",
            at=here(),
            instead='tl.load(name, device_map="auto", ...)',
        )
    for option in ("tp_plan", "tp_size", "distributed_config"):
        if option in options:
            raise OptionError(
                f"{option}= is how transformers spreads a model within a program that runs on all ranks",
                at=here(),
                instead="tl.load(name, tp=2); or, in such a program, tl.wrap(model) of the model that it has loaded",
            )
    if isinstance(name, Path) or name.startswith((".", "/", "~")):
        _require_folder(Path(name))
    asked = any(type(size) is not int or size != 1 for size in (tp, pp, ep)) or parallelize is not None
    if not asked and (ranks is not None or timeout is not None):
        raise OptionError(
            f"{'timeout' if ranks is None else 'ranks'}= has no effect without tp=, pp= or ep=: nothing runs on ranks",
            at=here(),
            instead="tl.load(name, tp=2, ...)",
        )
    if asked:
        apart = device_map is not None or not weights
        sizes = checked_sizes(tp, pp, ep, ranks, apart=apart, parallelize=parallelize)
        return load_over_ranks(name, sizes, dtype, ranks, timeout, options, parallelize)
    embedded = str(name) in SOURCES
    source = str(embedded_model(str(name))) if embedded else str(name)
    config, loader = _read(source, options)
    spreading = {
        option: dict(value) if isinstance(value, Mapping) else value
        for option, value in (
            ("device_map", device_map),
            ("max_memory", max_memory),
            ("offload_folder", None if offload_folder is None else str(offload_folder)),
        )
        if value is not None
    }
    if weights:
        with without_bars() if embedded and not (in_notebook() or sys.stderr.isatty()) else nullcontext():
            found = loader.from_pretrained(source, dtype=dtype, **spreading, **options)
    else:
        with torch.device("meta"):
            found = loader.from_config(config).eval()
    if embedded:
        found.config.name_or_path = str(name)  # not the folder in the cache, whose name has a version of ours
    tokenizer = tokenizer_of(source)
    return wrap(found, tokenizer, probe=probe)


def _read(source: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """The configuration of a model, and the class of transformers that loads it.

    A model that does not go on with a text is refused: transformers would load a half of some, with random numbers.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    given = options.get("config")
    config = AutoConfig.from_pretrained(source, **options) if given is None else given
    with Blaming(here()):
        require_loadable(config, source)
    kind = getattr(config, "model_type", None)
    text = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return config, AutoModelForCausalLM if text else AutoModelForImageTextToText


@contextmanager
def without_bars() -> Iterator[None]:
    """Without the progress bars of transformers, which it draws into logs too."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    of_the_hub = not are_progress_bars_disabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the hub's own bars are off by an environment variable
            logging.enable_progress_bar()
        if not of_the_hub:
            disable_progress_bars()


def _require_folder(folder: Path) -> None:
    """What transformers says of a missing folder speaks of names on a hub."""
    if not folder.is_dir():
        raise OptionError(
            f"there is no folder {str(folder)!r} (looked for in {str(Path.cwd())!r})",
            at=here(),
            instead='the folder of a saved model, or a name: tl.load("smollm2-135m"), tl.load("Qwen/Qwen3-4B")',
        )


if TYPE_CHECKING:

    @overload
    def wrap(  # pyright: ignore[reportOverlappingOverload]  # one of a family without a table is the exception
        model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, probe: bool = True
    ) -> Model: ...
    @overload
    def wrap(
        model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, *, probe: bool = True
    ) -> PlainModel: ...


def wrap(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, *, probe: bool = True
) -> Model | PlainModel:
    """Takes a model that is already loaded. Nothing in it is replaced or patched.

    A language model of transformers of a family that has a table gives a :class:`Model`; without a tokenizer, prompts
    are token ids. Any other module gives a :class:`PlainModel`, whose submodules are read and changed by path.

    ``probe``: hold the sites to what they are called, by a forward pass of six tokens (:meth:`Model.check_sites`). It
    is done once for models that are built alike, and kept in a file beside the embedded model's. A site that fails is
    refused at use, and a :class:`~tracelens.errors.RefutedSitesWarning` says which. The environment variable
    ``TRACELENS_PROBE=0`` leaves it out everywhere. A language model of a type without
    a table gets the table that fits its modules, if one does, and of that the sites which are shown to be right;
    without ``probe`` it gives a :class:`PlainModel`. A model of PEFT gives that of the language model in it, whose
    modules have the adapters: ``q`` is what the adapted projection returns.

    Under ``torchrun`` the model may be spread over the ranks, by transformers or by ``parallelize_module``; then all of
    its ranks call this together, and run one forward pass to see how its tensors lie on them.

    Raises :class:`~tracelens.errors.UnknownArchitectureError` for models of a family with a table that are not as it
    says, and :class:`~tracelens.errors.LayoutError` for one that is spread in a way of which nothing is known.
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]  # users may not be typed
        raise UnknownArchitectureError(
            f"a {type(model).__name__} is no module, and tl.wrap takes a torch.nn.Module",
            at=here(),
            instead="a module whose forward calls it; or tl.load(name) with the name of a model",
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise UnknownArchitectureError(
            f"a {type(model).__name__} runs without Python, so that its modules cannot be reached",
            at=here(),
            instead="the module before it was scripted or traced",
        )
    model = _with_adapters_inside(model)
    probe = probe and os.environ.get("TRACELENS_PROBE") != "0"
    reason = no_table(model)
    if reason is not None:
        return (derived(model, tokenizer) if probe else None) or PlainModel(model, reason)
    found = Model(model, tokenizer)
    with Blaming(here()):
        look_at(found.anatomy)
    if probe:
        held_to(found)
    return found


def _with_adapters_inside(model: nn.Module) -> nn.Module:
    """The language model in one of PEFT, which has the adapters in its modules; of others, the model itself."""
    adapters = getattr(model, "peft_config", None)
    inside = getattr(model, "get_base_model", None)
    if not isinstance(adapters, Mapping) or not callable(inside):
        return model
    if any(getattr(each, "is_prompt_learning", False) for each in adapters.values()):
        raise UnknownArchitectureError(
            "this model of PEFT puts learned tokens before each prompt, which its language model alone would not have",
            at=here(),
            instead="adapters in modules (LoRA, IA3, ...); or model.merge_and_unload(), where PEFT can",
        )
    found = inside()
    assert isinstance(found, nn.Module)
    return found
