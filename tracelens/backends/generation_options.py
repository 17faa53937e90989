"""What transformers' generation may be asked for in a block, and what would not be what the block says."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tracelens.backends.transfer import on_cpu
from tracelens.errors import NoTokenizerError, OptionError

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
    config.update(**changes)
    return config


def require_own(options: Mapping[str, Any]) -> None:
    """Raises :class:`~tracelens.errors.OptionError` for what the block itself takes care of."""
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
        found.append(Watched(StopStringCriteria(given, stops)))
    if found:
        options["stopping_criteria"] = list(found)
    return found
