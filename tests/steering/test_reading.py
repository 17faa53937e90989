"""Reading a text along a vector: dot products with the activations, and a picture of them."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import tracelens as tl
from tests.support.families import D_MODEL, FAMILIES
from tests.support.tokenizers import byte_level_bpe
from tracelens import errors
from tracelens.steering import SteeringVector, read

TEXT = "The city of Paris"


@pytest.fixture(scope="module")
def model() -> tl.Model:
    tokenizer = byte_level_bpe()
    return tl.wrap(FAMILIES["llama"].build(vocab_size=len(tokenizer)), tokenizer)


@pytest.fixture(scope="module")
def v() -> SteeringVector:
    generator = torch.Generator().manual_seed(0)
    places = (("resid_post", 0), ("attn_out", 2), ("resid_post", 2))
    return SteeringVector({place: 3 * torch.randn(D_MODEL, generator=generator) for place in places})


def test_projections_are_dot_products_with_the_activations(model: tl.Model, v: SteeringVector) -> None:
    found = read(model, v, TEXT)
    assert found.tokens == tuple(token.spelt for token in model.tokens(TEXT)[0])
    assert found.places == v.places
    for row, (site, layer) in enumerate(v.places):
        with model.trace(TEXT):
            h = getattr(model.layers[layer], site)[0].save()
        a, direction = h.value.double(), v[site, layer].double()
        expected = (a @ direction) / direction.norm()
        np.testing.assert_allclose(found.projections[row], expected.numpy(), atol=1e-5)
        np.testing.assert_allclose(found[site, layer], found.projections[row])
        cosines = torch.nn.functional.cosine_similarity(a, direction[None], dim=-1)
        np.testing.assert_allclose(found.cosines[row], cosines.numpy(), atol=1e-6)
        assert np.ptp(found.cosines[row]) > 1e-3


def test_it_shows_every_token_and_place(model: tl.Model, v: SteeringVector, tmp_path: Path) -> None:
    found = read(model, v, TEXT)
    text = repr(found)
    for token, cosine in zip(found.tokens, found.cosines[1], strict=True):
        assert repr(token) in text
        assert f"{cosine:.3f}" in text
    svg = found.to_svg()
    words = " ".join(str(element.text) for element in ElementTree.fromstring(svg).iter())
    for site in ("resid_post", "attn_out"):
        assert site in words
    assert words.count(f"{found.cosines[0, 0]:.2f}") >= 1
    assert found.save(tmp_path / "text.svg").read_text(encoding="utf-8") == svg
    assert svg in found._repr_html_()


def test_one_text_at_a_time(model: tl.Model, v: SteeringVector) -> None:
    with pytest.raises(errors.PromptError, match="2 texts"):
        read(model, v, [TEXT, TEXT])
    with pytest.raises(errors.SteeringMismatchError):
        read(model, SteeringVector({("resid_post", 9): torch.ones(D_MODEL)}), TEXT)
