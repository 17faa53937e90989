"""What ranks cannot do with an older transformers is refused by name before anything is launched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig, Qwen3MoeConfig

import tracelens as tl
from tracelens.backends import rank_versions
from tracelens.errors import LayoutError
from tracelens.rank_loading import require_fit

SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
}
EVEN = LlamaConfig(**SIZES, vocab_size=64)
ODD = LlamaConfig(**SIZES, vocab_size=65)
EXPERTS = Qwen3MoeConfig(**SIZES, vocab_size=64, num_experts=4, moe_intermediate_size=16)
WAYS: dict[str, tuple[Any, dict[str, int]]] = {
    "pp with tp": (EVEN, {"pp": 2, "tp": 2}),
    "ep": (EXPERTS, {"tp": 2, "ep": 2}),
    "tp with a vocabulary that the ranks cannot share evenly": (ODD, {"tp": 2}),
}
FIRST = {
    "pp with tp": "5.23",
    "ep": "5.20",
    "tp with a vocabulary that the ranks cannot share evenly": "5.21",
}
"""As seen with each version, 5.18 to 5.23, by loading such a model on two or four ranks of a CPU."""
OLDER = {
    "5.23": ("5.17.0", "5.19.0", "5.22.1", "5.22.0.dev0"),
    "5.20": ("5.17.0", "5.18.1", "5.19.0"),
    "5.21": ("5.17.0", "5.19.0", "5.20.2"),
}
NEWER = {
    "5.23": ("5.23.0", "5.23.1", "6.0.0", "5.100.0"),
    "5.20": ("5.20.0", "5.22.0", "5.23.0", "6.0.0"),
    "5.21": ("5.21.0", "5.22.0", "5.23.0", "6.0.0"),
}


@pytest.fixture
def version(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    monkeypatch.setattr(rank_versions, "installed", lambda: request.param)
    return request.param


def fit(config: Any, **sizes: int) -> None:
    require_fit(config, {"tp": 1, "pp": 1, "ep": 1, **sizes})


@pytest.mark.parametrize(
    ("way", "version"),
    [(way, number) for way, first in FIRST.items() for number in OLDER[first]],
    indirect=["version"],
)
def test_a_way_that_fails_with_the_installed_version_is_refused(way: str, version: str) -> None:
    config, sizes = WAYS[way]
    with pytest.raises(LayoutError) as failure:
        fit(config, **sizes)
    assert failure.value.problem == f"{way} needs transformers {FIRST[way]} or newer; {version} is installed"
    assert str(failure.value.instead).startswith(f"transformers {FIRST[way]}; or ")


@pytest.mark.parametrize(
    ("way", "version"),
    [(way, number) for way, first in FIRST.items() for number in NEWER[first]],
    indirect=["version"],
)
def test_a_way_that_works_is_not_refused(way: str, version: str) -> None:
    config, sizes = WAYS[way]
    fit(config, **sizes)


@pytest.mark.parametrize("version", ["5.17.0", "5.19.0"], indirect=True)
def test_what_works_in_every_version_is_let_through(version: str) -> None:
    fit(EVEN, tp=2)
    fit(EXPERTS, tp=2)
    fit(ODD, pp=2)
    fit(ODD, tp=1)


@pytest.mark.parametrize("version", ["5.19.0"], indirect=True)
def test_a_model_whose_vocabulary_is_not_cut_may_have_an_odd_one(version: str) -> None:
    assert not rank_versions._cuts_vocabulary(GPT2Config())
    rank_versions.require_known_vocabulary(GPT2Config(vocab_size=65), 2)


@pytest.mark.parametrize("version", ["5.19.0"], indirect=True)
def test_nothing_is_launched_first(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(*_: object, **__: object) -> None:
        raise AssertionError("ranks were launched")

    monkeypatch.setattr("tracelens.backends.ranks.pool.Ranks", launched)
    EVEN.save_pretrained(tmp_path)
    with pytest.raises(LayoutError, match=r"pp with tp needs transformers 5\.23") as failure:
        tl.load(tmp_path, pp=2, tp=2)
    assert failure.value.at is not None
    assert failure.value.at.filename == __file__
