"""Vectors of models over several devices and ranks: those of one device."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import tracelens as tl
from tests.support.pretend import Pretend, pretend, watched
from tests.support.spread_models import Both, fixture_of, over_devices
from tests.support.tokenizers import byte_level_bpe
from tracelens.steering import Contrast, SteeringVector, extract

__all__ = ["pretend"]

TOKENIZER = byte_level_bpe(answers=True)
SETTINGS = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 128}
SITES = ("post_ln", "resid_post", "mlp_act")
PAIRS = Contrast.pairs(
    [(f"{'So ' * count}is it? Answer:", " A", " B") for count in (0, 3, 1, 5, 2)]
    + [(f"{'So ' * count}is it not? Answer:", " B", " A") for count in (4, 0, 2)]
)


def made(model: tl.Model, method: str = "mean_difference", **options: Any) -> SteeringVector:
    return extract(model, PAIRS, sites=SITES, batch_size=3, method=method, **options)


def same(one: SteeringVector, spread: SteeringVector) -> None:
    assert one.places == spread.places
    for place in one:
        assert_close(spread[place], one[place], atol=1e-5 * one.facts.scale[place], rtol=0)
    told, expected = (dataclasses.asdict(vector.facts) for vector in (spread, one))
    for facts in (told, expected):
        for name in ("scale", "diagnostics", "model", "weights"):
            facts.pop(name)
    assert told == expected


def with_tokenizer(models: Both) -> tuple[tl.Model, tl.Model]:
    for model in (models.one, models.spread):
        object.__setattr__(model, "_tokenizer", TOKENIZER)
    return models.one, models.spread


SPREADS = {"llama tp2": ("llama", {"tp": 2}), "qwen3 pp2": ("qwen3", {"pp": 2})}


models = fixture_of(SPREADS, SETTINGS)


@pytest.mark.parametrize("positions", ["label", "mean"])
def test_ranks_make_the_vectors_of_one_process(models: Both, positions: str) -> None:
    one, spread = with_tokenizer(models)
    same(made(one, positions=positions), made(spread, positions=positions))


def test_devices_make_the_vectors_of_one_and_send_what_is_read_alone(
    pretend: Pretend, tmp_path_factory: pytest.TempPathFactory
) -> None:
    one, spread = with_tokenizer(over_devices("llama", tmp_path_factory.mktemp("devices"), SETTINGS))
    made(spread)  # which reads a few rows of the unembedding, by which the model is known
    with watched() as seen:
        vector = made(spread)
    same(made(one), vector)
    widths = sum(len(vector[place]) for place in vector)
    host = sum(size for (_, target), size in seen.moved().items() if target == "cpu")
    assert host == 2 * len(PAIRS) * widths * 4, "one position of each text, and nothing else"
    same(made(one, "lda"), made(spread, "lda"))
    assert torch.isfinite(vector["resid_post", 2]).all()
