"""Models in two ways: on ranks of the tests' pools or over devices, and in one process; fixtures of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import PreTrainedModel

import tracelens as tl
from tests.parallel.cells import knows_ep
from tests.support.more_families import ALL, EAGER_ALONE
from tests.support.pretend import device_map
from tests.support.ranks import PoolOf


@dataclass(frozen=True)
class Both:
    """One model that is spread, and the same on one device of this process, which is what is right."""

    spread: tl.Model
    one: tl.Model
    hf: PreTrainedModel

    def close(self) -> None:
        """Has the ranks let go of their parts; the ranks stay."""
        self.spread.close()


def both(
    family: str,
    folder: Path,
    ranks_of: PoolOf,
    *,
    tp: int = 1,
    pp: int = 1,
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> Both:
    """A tiny model, stored in ``folder`` and loaded from there by ``tp * pp`` ranks, and in one process."""
    hf = stored(family, folder, settings)
    return Both(
        tl.load(folder, tp=tp, pp=pp, ranks=ranks_of(tp * pp), **kernel(family), **more), tl.wrap(hf), hf
    )


def over_devices(family: str, folder: Path, settings: Mapping[str, Any] | None = None) -> Both:
    """A tiny model whose layers accelerate has spread over the pretend devices, and the same on the CPU."""
    hf = stored(family, folder, settings)
    layers = ["pretend:1", "pretend:0", "pretend:2"][: hf.config.get_text_config().num_hidden_layers]
    where = device_map(hf, layers, embedding="pretend:0", norm="pretend:2")
    # What transformers takes for experts on GPUs is not there for the CPU, on which the pretend devices compute.
    mixtures = getattr(hf.config.get_text_config(), "num_experts_per_tok", None) is not None
    experts: dict[str, Any] = {"experts_implementation": "eager"} if mixtures else {}
    return Both(tl.load(folder, device_map=where, **experts, **kernel(family)), tl.wrap(hf), hf)


def kernel(family: str) -> dict[str, Any]:
    """What computes attention, where it is not what transformers would choose in all of its versions."""
    return {"attn_implementation": "eager"} if family in EAGER_ALONE else {}


def stored(family: str, folder: Path, settings: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """A tiny model, which now lies in ``folder`` too."""
    attn = kernel(family).get("attn_implementation", "sdpa")
    hf = ALL[family].build(attn=attn, **(settings or {}))
    hf.save_pretrained(folder)
    return hf


EVERY_WAY: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "device_map": ("llama", {}),
    "tp2": ("llama", {"tp": 2}),
    "pp2": ("llama", {"pp": 2}),
}
"""A tiny model that is spread in each of the ways that there are."""


def fixture_of(
    spreads: Mapping[str, tuple[str, Mapping[str, Any]]], settings: Mapping[str, Any] | None = None
) -> Any:
    """A fixture of a module: one model after another, by family and what :func:`both` takes beside ``settings``.

    Where there is nothing beside, the model lies over devices, for which the module has ``pretend_throughout``.
    """

    @pytest.fixture(
        scope="module",
        params=[
            pytest.param(name, marks=knows_ep if {"tp", "pp"} <= more.keys() else ())
            for name, (_, more) in spreads.items()
        ],
    )
    def models(
        request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, ranks_of: PoolOf
    ) -> Iterator[Both]:
        family, more = spreads[request.param]
        folder = tmp_path_factory.mktemp(family)
        if not more:
            request.getfixturevalue("pretend_throughout")
            yield over_devices(family, folder, settings)
            return
        found = both(family, folder, ranks_of, **{"settings": settings, **more})
        yield found
        found.close()

    return models


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest number; infinite where shapes, dtypes or places of a mask differ."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    # A mask puts the lowest number there is, and that would hide all others.
    floor = expected.abs() > 1e30
    if not actual[floor].equal(expected[floor]):
        return float("inf")
    difference = (actual - expected)[~floor].abs().max() / expected[~floor].abs().max()
    return difference.item() if difference == difference else float("inf")
