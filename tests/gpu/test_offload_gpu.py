"""Offloaded models whose modules run on a GPU: the numbers of the model that is there as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tracelens as tl
from tests.support.families import FAMILIES
from tests.support.offloading import WAYS, loaded
from tests.support.plain import untouched
from tests.test_offload import WORK

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; `make gpu` on a machine with one"),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_offloaded_model_gives_the_numbers_of_the_model_on_the_gpu(
    family: str, way: str, tmp_path: Path
) -> None:
    expected = tl.wrap(FAMILIES[family].build(attn="eager").cuda())
    hf = WAYS[way](FAMILIES[family].build(attn="eager"), tmp_path, "cuda:0")
    kept = loaded(hf)
    model = tl.wrap(hf)
    assert model.anatomy.device == torch.device("cuda:0")
    for name, work in WORK.items():
        with untouched(hf):
            found = work(model)
        for key, tensor in work(expected).items():
            _close(found[key], tensor, f"{name}: {key}")
        assert loaded(hf) == kept, name


def _close(found: Any, wanted: Any, what: str) -> None:
    if isinstance(wanted, list):
        for one, other in zip(found, wanted, strict=True):
            _close(one, other, what)
    else:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, msg=lambda text: f"{what}: {text}")
