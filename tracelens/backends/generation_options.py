"""What transformers' generation may be asked for in a block, and what would not be what the block says."""

from __future__ import annotations

import copy
import inspect
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, cast

import torch

from tracelens.backends.transfer import on_cpu
from tracelens.errors import NoTokenizerError, OptionError, TracelensError
from tracelens.location import here

_OURS = {
    "return_dict_in_generate": "t.tokens and t.text; or model.hf.generate for what transformers itself returns",
    "streamer": "for event in model.stream(prompt, max_new_tokens=...): ...",
    "inputs": "the prompt as the first argument",
    "input_ids": "the prompt as the first argument",
    "inputs_embeds": "the prompt as the first argument, and a write to model.embed",
    "attention_mask": "a prompt that is a dict: model.generate({'input_ids': ..., 'attention_mask': ...})",
    "position_ids": "leave them out: real tokens count from 0",
    "past_key_values": "the whole text as the prompt",
    "max_length": "max_new_tokens=20",
    "logits_to_keep": "leave it out: the block says which logits it needs",
    "custom_generate": "transformers' own generation",
}
"""Options that the block takes care of, with what to write instead."""


def _several_beams(config: Any) -> str | None:
    if (config.num_beams or 1) > 1:
        return (
            f"num_beams={config.num_beams} follows several texts for a prompt and moves them from row to row"
        )
    return None


def _assisted(config: Any) -> str | None:
    for name in ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"):
        if getattr(config, name, None):
            return f"{name} has several tokens looked at in one pass, some of which are dropped again"
    return None


def _other_passes(config: Any) -> str | None:
    if getattr(config, "guidance_scale", None) not in (None, 1, 1.0):
        return "guidance_scale has a second pass made for each token, over another text"
    if getattr(config, "penalty_alpha", None) and (config.top_k or 0) > 1:
        return "penalty_alpha (contrastive search) has passes made over several candidates"
    if getattr(config, "dola_layers", None) is not None:
        return "dola_layers has tokens chosen by the logits of other layers, which the block does not see"
    if getattr(config, "prefill_chunk_size", None) is not None:
        return "prefill_chunk_size cuts the prompt into several passes, and step 0 is one pass over all of it"
    return None


_RULES: Sequence[Callable[[Any], str | None]] = (_several_beams, _assisted, _other_passes)


def resolved(hf: Any, options: Mapping[str, Any]) -> Any:
    """The generation configuration that these options lead to."""
    given = options.get("generation_config") or getattr(hf, "generation_config", None)
    if given is None:
        from transformers import GenerationConfig

        given = GenerationConfig()
    config: Any = copy.deepcopy(given)
    changes = {name: value for name, value in options.items() if name != "generation_config"}
    # transformers knows no generation of 0 tokens.
    changes["max_new_tokens"] = changes.get("max_new_tokens") or 1
    with refusing(options):
        config.update(**changes)
    _require_values(config)
    return config


_REFUSALS = (
    TypeError,
    ValueError,
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    ImportError,
)
"""How transformers says that it cannot use an option."""


@contextmanager
def refusing(options: Mapping[str, Any], begun: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Raises what transformers says of options as :class:`~tracelens.errors.OptionError`.

    ``begun``: does the model run already?  What it raises itself is no matter of options.
    """
    try:
        yield
    except _REFUSALS as error:
        if isinstance(error, TracelensError) or begun():
            raise
        given = ", ".join(
            f"{name}={_short.repr(value)}" for name, value in options.items() if _is_told(name, value)
        )
        raise OptionError(
            f"transformers cannot generate with {given or 'what this model has as its generation_config'}: "
            f"{type(error).__name__}: {error}",
            instead="options and values that transformers' generate takes: do_sample=True, temperature=0.7, top_p=0.9, "
            "eos_token_id=[...], stop_strings=[...]",
        ) from error


_short = reprlib.Repr()
_short.maxother = _short.maxstring = 60


def _is_told(name: str, value: object) -> bool:
    """Is it the user's, and not what a block has by default?"""
    if name == "pad_token_id":
        return type(value) is not int
    return value is not None and name != "max_new_tokens" and (name, value is False) != ("do_sample", True)


_SHARES = ("top_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Shares of the probability: transformers leaves one out that is too large, without a word."""


def _require_values(config: Any) -> None:
    """Raises :class:`~tracelens.errors.OptionError` for values that transformers would use, or leave out, unsaid."""
    if config.do_sample is not None and _number(config.do_sample) not in (0, 1):
        raise OptionError(
            f"do_sample={config.do_sample!r} is neither True nor False",
            instead="do_sample=True for tokens that are drawn",
        )
    for name in _SHARES:
        share = getattr(config, name, None)
        if share is not None and not 0 <= _number(share) <= 1:
            raise OptionError(
                f"{name}={share!r} is no share of the probability, which is a number from 0 to 1",
                instead=f"{name}=0.9, with do_sample=True",
            )
    if config.max_time is not None and not _number(config.max_time) >= 0:
        raise OptionError(f"max_time={config.max_time!r} is no number of seconds", instead="max_time=60.0")
    if not _are_ids(config.eos_token_id):
        raise OptionError(
            f"eos_token_id={_short.repr(config.eos_token_id)} is no token id, and no list of token ids",
            instead="eos_token_id=model.tokenizer.eos_token_id, eos_token_id=[13, 198]; stop_strings=[...] for texts",
        )


def _number(value: Any) -> float:
    """nan, which no comparison holds for, where it is none."""
    try:
        return float("nan") if isinstance(value, str) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return float("nan")


def _are_ids(given: Any) -> bool:
    members = cast("Sequence[object]", given if isinstance(given, list | tuple) else [given])
    return isinstance(given, torch.Tensor | None) or all(isinstance(member, Integral) for member in members)


def require_count(each: Any) -> int:
    """``num_return_sequences``; raises :class:`~tracelens.errors.OptionError` for what is no number of texts."""
    if each is None:
        return 1
    if not isinstance(each, Integral) or isinstance(each, bool) or int(each) < 1:
        raise OptionError(
            f"num_return_sequences={each!r} is no number of texts for each prompt",
            at=here(),
            instead="num_return_sequences=4, with do_sample=True",
        )
    return int(each)


def _are_callable(given: Any) -> bool:
    return isinstance(given, Iterable) and (not isinstance(given, Sequence) or all(map(callable, given)))


def _are_texts(given: Any) -> bool:
    return isinstance(given, Iterable) and (
        not isinstance(given, Sequence) or all(isinstance(part, str) for part in given)
    )


def _is_config(given: Any) -> bool:
    from transformers import GenerationConfig

    return isinstance(given, GenerationConfig)


_KINDS: Mapping[str, tuple[Callable[[Any], bool], str, str]] = {
    "stopping_criteria": (_are_callable, "list of callables", "[lambda input_ids, scores, **_: ...]"),
    "logits_processor": (_are_callable, "list of callables", "[lambda input_ids, scores: ...]"),
    "prefix_allowed_tokens_fn": (callable, "callable", "lambda row, input_ids: [...]"),
    "stop_strings": (_are_texts, "text or list of texts", '["\\n\\n"]'),
    "generation_config": (_is_config, "transformers.GenerationConfig", "GenerationConfig(do_sample=True)"),
}
"""Options that are no numbers: what each has to be, and an example."""


def require_own(options: Mapping[str, Any]) -> None:
    """Raises :class:`~tracelens.errors.OptionError` for what the block itself takes care of, or cannot use."""
    for name, (fits, kind, example) in _KINDS.items():
        if (given := options.get(name)) is not None and not fits(given):
            raise OptionError(f"{name}={_short.repr(given)} is no {kind}", instead=f"{name}={example}")
    for name, instead in _OURS.items():
        given = options.get(name)
        if given is not None and given is not False:
            raise OptionError(f"{name}= is not an option of model.generate", instead=instead)


def is_cached(config: Any, options: Mapping[str, Any]) -> bool:
    """Has a pass of a later step the new token alone?  ``config``: what the options lead to."""
    return config.use_cache is not False and options.get("max_new_tokens") != 0


def require_plain(config: Any, options: Mapping[str, Any]) -> None:
    """Raises :class:`~tracelens.errors.OptionError` for what is not one token after the other, row by row.

    ``config``: what the options lead to.
    """
    with refusing(options):
        problems = [rule(config) for rule in _RULES]
    if options.get("assistant_model") is not None:
        problems.append(
            "assistant_model has several tokens looked at in one pass, some of which are dropped again"
        )
    for problem in problems:
        if problem is not None:
            raise OptionError(
                f"{problem}, so that steps and rows of the block would not be those of the text",
                instead="greedy or sampled generation: do_sample=True, num_return_sequences=4; such options go with "
                "blocks that only write, to every position alike",
            )


def keeps_logits(model: Any) -> bool:
    """Can a model be told at how many positions to compute logits?"""
    return "logits_to_keep" in inspect.signature(type(model).forward).parameters


def tokenizer_of(source: str) -> Any:
    """The tokenizer of a model, on a rank, which has none as a rule."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source)


class Watched:
    """A stopping criterion that remembers in which step it ended each row; the tensors stay on their device."""

    def __init__(self, criterion: Callable[..., Any]) -> None:
        self._criterion = criterion
        self._ended: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        found = self._criterion(input_ids, scores, **kwargs)
        if not isinstance(found, torch.Tensor):
            found = torch.full((input_ids.shape[0],), bool(found), device=input_ids.device)
        self._ended.append(found)
        return found

    def newest(self) -> list[bool]:
        """For each row whether it was to end in the newest step."""
        return self._ended[-1].tolist()

    def steps(self, rows: int) -> list[int | None]:
        """For each row how many tokens it had when it was ended, ``None`` if it was not."""
        if not self._ended:
            return [None] * rows
        ended = on_cpu(torch.stack(self._ended))
        return [
            int(ended[:, row].nonzero()[0]) + 1 if bool(ended[:, row].any()) else None for row in range(rows)
        ]


def watched_criteria(options: dict[str, Any], tokenizer: Any) -> list[Watched]:
    """Takes stop strings and criteria of the user's out of the options, and puts those in that are watched."""
    from transformers import StopStringCriteria

    found = [Watched(criterion) for criterion in options.pop("stopping_criteria", None) or ()]
    stops = options.pop("stop_strings", None)
    given = options.pop("tokenizer", None) or tokenizer
    if stops is not None:
        if given is None:
            raise NoTokenizerError(
                "stop_strings= are texts, and the model was given no tokenizer",
                instead="tl.wrap(model, tokenizer), or eos_token_id=[...] with token ids",
            )
        with refusing({"stop_strings": stops}):
            found.append(Watched(StopStringCriteria(given, stops)))
    if found:
        options["stopping_criteria"] = list(found)
    return found
