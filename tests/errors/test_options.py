"""Options of a generation that transformers cannot use: named, at the block's line, before the model runs."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from tests.errors import IDS, LLAMA, Subject, refused
from tracelens.errors import OptionError

model = LLAMA.model
SAMPLED: dict[str, Any] = {"do_sample": True}


@pytest.fixture(scope="module")
def own() -> Subject:
    """A model that keeps what transformers leaves on it, as it does with a static cache."""
    return Subject("llama")


def never(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
    return torch.zeros(input_ids.shape[0], dtype=torch.bool)


TRANSFORMERS: list[tuple[dict[str, Any], str]] = [
    ({"unknown_option": 1}, "not used by the model"),
    ({"temperature": 0.0, **SAMPLED}, "strictly positive float"),
    ({"top_k": -1, **SAMPLED}, "strictly positive integer"),
    ({"min_p": 3.0, **SAMPLED}, "[0, 1] interval"),
    ({"repetition_penalty": -1.0}, "strictly positive float"),
    ({"cache_implementation": "nope"}, "Choose one of"),
    ({"bad_words_ids": [1]}, "list of lists"),
    ({"min_new_tokens": "a"}, "TypeError"),
    ({"suppress_tokens": 3}, "not iterable"),
    ({"pad_token_id": "x"}, "TypeError"),
    ({"num_beams": "3"}, "TypeError"),
    ({"num_beams": 0}, "ZeroDivisionError"),
]
"""What transformers refuses, with some of its own words."""
OURS: list[tuple[dict[str, Any], str, str]] = [
    ({"eos_token_id": "x"}, "no token id", "eos_token_id"),
    ({"eos_token_id": [1, "x"]}, "no token id", "stop_strings"),
    ({"max_time": "x"}, "no number of seconds", "max_time=60.0"),
    ({"stopping_criteria": 3}, "no list of callables", "[lambda"),
    ({"stopping_criteria": never}, "no list of callables", "[lambda"),
    ({"logits_processor": [3]}, "no list of callables", "[lambda"),
    ({"prefix_allowed_tokens_fn": 3}, "no callable", "lambda"),
    ({"stop_strings": 3}, "no text or list of texts", "stop_strings=["),
    ({"stop_strings": ["a", 3]}, "no text or list of texts", "stop_strings=["),
    ({"num_return_sequences": "a"}, "no number of texts", "num_return_sequences=4"),
    ({"num_return_sequences": 0}, "no number of texts", "num_return_sequences=4"),
    ({"num_return_sequences": True}, "no number of texts", "num_return_sequences=4"),
    ({"generation_config": 7}, "no transformers.GenerationConfig", "GenerationConfig("),
    ({"top_p": 7}, "no share", "top_p=0.9"),
    ({"top_p": 7, **SAMPLED}, "no share", "top_p=0.9"),
    ({"typical_p": -0.5, **SAMPLED}, "no share", "typical_p=0.9"),
    ({"do_sample": "yes"}, "neither True nor False", "do_sample=True"),
]
"""What transformers would raise a bare error for, or leave out in silence."""
RIGHT: list[dict[str, Any]] = [
    {"eos_token_id": [1, 2]},
    {"eos_token_id": torch.tensor([1, 2])},
    {"eos_token_id": np.int64(3)},
    {"eos_token_id": None},
    {"do_sample": np.bool_(True)},
    {"do_sample": None},
    {"top_p": 0, "top_k": 0, "temperature": 0.7, **SAMPLED},
    {"top_p": 1.0, "typical_p": 0.5, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, **SAMPLED},
    {"top_p": torch.tensor(0.9), **SAMPLED},
    {"max_time": 100},
    {"generation_config": GenerationConfig(num_beams=1)},
    {"stopping_criteria": [never]},
    {"stopping_criteria": (criterion for criterion in [never])},
    {"logits_processor": []},
    {"stop_strings": "a"},
    {"stop_strings": ("a", "b")},
    {"num_return_sequences": None},
    {"num_return_sequences": np.int64(2), **SAMPLED},
    {"repetition_penalty": 1.2, "bad_words_ids": [[1]], "cache_implementation": "static"},
]


def named(case: Any) -> str:
    """The same in every process: addresses of functions are not."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(case))


@pytest.mark.parametrize(("options", "says"), TRANSFORMERS, ids=named)
def test_what_transformers_refuses_is_told_in_its_words(options: dict[str, Any], says: str) -> None:
    name = next(iter(options))
    with refused(OptionError, name, instead="transformers' generate takes") as caught:  # noqa: SIM117  # the guilty line is the inner one
        with model.generate(IDS, max_new_tokens=2, **options):  # <-
            model.layers[0].resid_post.save()
    assert "transformers cannot generate with" in caught.error.problem
    assert says in caught.error.problem
    assert "max_new_tokens" not in caught.error.problem.partition(":")[0]
    with refused(OptionError, name, instead="transformers' generate takes") as streamed:
        events = model.stream(IDS, max_new_tokens=2, **options)  # <-
        next(events)
    # Of which of two operands Python says that they do not compare is no matter.
    assert streamed.error.problem.partition(": ")[0] == caught.error.problem.partition(": ")[0]


@pytest.mark.parametrize(("options", "says", "instead"), OURS, ids=named)
def test_values_that_are_none_of_an_option(options: dict[str, Any], says: str, instead: str) -> None:
    name = next(iter(options))
    with refused(OptionError, f"{name}=", instead=instead) as caught:  # noqa: SIM117  # the guilty line is the inner one
        with model.generate(IDS, max_new_tokens=2, **options):  # <-
            model.layers[0].resid_post.save()
    assert says in caught.error.problem


@pytest.mark.parametrize("options", RIGHT, ids=named)
@pytest.mark.filterwarnings("ignore")
def test_what_transformers_takes_is_not_refused(own: Subject, options: dict[str, Any]) -> None:
    with own.model.generate(IDS, max_new_tokens=2, **options) as t:
        pass
    assert t.tokens


def test_what_the_model_raises_is_no_matter_of_options() -> None:
    """A criterion of the user's that fails, and a hook on the model."""

    def failing(*_: Any, **__: Any) -> Any:
        raise ValueError("of the user's own")

    with (
        pytest.raises(ValueError, match="own") as caught,
        model.generate(IDS, max_new_tokens=2, stopping_criteria=[failing]),
    ):
        pass
    assert not isinstance(caught.value, OptionError)
    handle = LLAMA.hf.model.layers[0].register_forward_pre_hook(failing)
    try:
        with pytest.raises(ValueError, match="own") as caught, model.generate(IDS, max_new_tokens=2):
            pass
    finally:
        handle.remove()
    assert not isinstance(caught.value, OptionError)
