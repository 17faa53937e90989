"""Ranks on GPUs: each has one of its own, and they reach each other."""

from __future__ import annotations

import pytest
import torch

from tracelens.backends.ranks.pool import Ranks
from tracelens.errors import OptionError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; `make gpu` on a machine with one"),
]


def test_each_rank_has_a_gpu_and_they_reach_each_other() -> None:
    world = min(2, torch.cuda.device_count())
    with Ranks(world, timeout=120) as ranks:
        assert ranks.device == "cuda"
        value = torch.randn(5)
        for number, reply in enumerate(ranks.ask("ping", tensors={"value": value})):
            assert reply.header["device"] == f"cuda:{number}"
            assert torch.equal(reply.tensors["value"], value)
        for reply in ranks.ask("collective", tensors={"value": value}):
            torch.testing.assert_close(reply.tensors["total"], value * (world * (world + 1) // 2))


def test_more_ranks_than_gpus_are_refused() -> None:
    with pytest.raises(OptionError, match="GPUs, and this process sees"):
        Ranks(torch.cuda.device_count() + 1)
