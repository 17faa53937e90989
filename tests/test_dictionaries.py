"""``model.splice``: dictionaries of SAELens' shape at the sites that their metadata names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import tracelens as tl
from tests.support.families import D_MODEL, FAMILIES
from tracelens.errors import NoTraceError, SpliceError, UnknownSiteError

IDS = [[3, 4, 5, 9]]
FEATURES = 64


class Dictionary(nn.Module):
    """What SAELens' SAEs are to us: encode, decode, and metadata beside them."""

    def __init__(self, seed: int = 0, *, width: int = D_MODEL, heads: bool = False, **metadata: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.encoder = nn.Parameter(0.3 * torch.randn(width, FEATURES, generator=generator))
        self.decoder = nn.Parameter(0.3 * torch.randn(FEATURES, width, generator=generator))
        self.heads = heads
        normed = metadata.pop("normalize_activations", "none")
        self.cfg = SimpleNamespace(metadata=SimpleNamespace(**metadata), normalize_activations=normed)

    def before(self, x: Tensor) -> Tensor:
        return x

    def encode(self, x: Tensor) -> Tensor:
        if self.heads:
            self.head_width = x.shape[-1]
            x = x.flatten(-2)
        return torch.relu(self.before(x) @ self.encoder)

    def decode(self, features: Tensor) -> Tensor:
        found = features @ self.decoder
        return found.unflatten(-1, (-1, self.head_width)) if self.heads else found


class Normed(Dictionary):
    """Keeps the scale of its input until it has decoded once, as SAELens does."""

    def before(self, x: Tensor) -> Tensor:
        self.scale = x.norm(dim=-1, keepdim=True)
        return x / self.scale

    def decode(self, features: Tensor) -> Tensor:
        found = super().decode(features) * self.scale
        del self.scale
        return found


class TopK(Dictionary):
    """Fills zeros in place, which no value allows."""

    def encode(self, x: Tensor) -> Tensor:
        most = super().encode(x).topk(5, dim=-1)
        found = torch.zeros(*x.shape[:-1], FEATURES, dtype=x.dtype, device=x.device)
        return found.scatter_(-1, most.indices, most.values)


CASES: dict[str, tuple[Dictionary, str, str]] = {
    "stream": (Dictionary(hook_name="blocks.1.hook_resid_post"), "resid_post", "resid_post"),
    "normed": (Normed(hook_name="blocks.1.hook_resid_pre"), "resid_pre", "resid_pre"),
    "top k": (TopK(hook_name="blocks.1.hook_mlp_out"), "mlp_add", "mlp_add"),
    "heads": (Dictionary(heads=True, hook_name="blocks.1.attn.hook_z"), "z", "z"),
    "transcoder": (
        Dictionary(hook_name="blocks.1.ln2.hook_out", hook_name_out="blocks.1.mlp.hook_out"),
        "mlp_norm",
        "mlp_out",
    ),
}


@pytest.fixture(scope="module")
def model() -> tl.Model:
    return tl.wrap(FAMILIES["llama"].build())


@pytest.mark.parametrize("case", CASES)
def test_a_dictionary_stands_where_its_metadata_says(model: tl.Model, case: str) -> None:
    sae, source, target = CASES[case]
    layer = model.layers[1]
    with model.trace(IDS):
        x, y = getattr(layer, source).save(), getattr(layer, target).save()
        plain = model.logits.save()
    with torch.no_grad():
        features = sae.encode(x.value)
        decoded = sae.decode(features)
        edited = features.clone()
        edited[..., 7] += 3.0
        sae.encode(x.value)
        change = sae.decode(edited) - decoded

    with model.trace(IDS):
        with model.splice(sae) as s:
            found = s.features.save()
            error = s.error.save()
        same = model.logits.save()
    assert_close(found.value, features, atol=1e-5, rtol=1e-5)
    assert_close(error.value, y.value - decoded, atol=1e-5, rtol=1e-5)
    assert_close(same.value, plain.value, atol=0, rtol=0)
    assert not [name for name, each in vars(sae).items() if isinstance(each, tl.Value)]

    with model.trace(IDS):
        with model.splice(sae) as s:
            s.features[..., 7] += 3.0
        steered = model.logits.save()
    with model.trace(IDS):
        setattr(layer, target, getattr(layer, target) + change)
        by_hand = model.logits.save()
    assert not torch.allclose(by_hand.value, plain.value, atol=1e-2)
    assert_close(steered.value, by_hand.value, atol=1e-4, rtol=1e-4)

    with model.trace(IDS):
        with model.splice(sae, keep_error=False):
            pass
        replaced = model.logits.save()
    with model.trace(IDS):
        setattr(layer, target, decoded)
        by_hand = model.logits.save()
    assert_close(replaced.value, by_hand.value, atol=1e-4, rtol=1e-4)


def test_a_site_that_is_given_counts_and_not_the_metadata(model: tl.Model) -> None:
    for site in ("blocks.2.hook_resid_pre", tl.Site("resid_pre", 2)):
        with model.trace(IDS), model.splice(CASES["stream"][0], site=site) as s:
            x = s.input.save()
        with model.trace(IDS):
            wanted = model.layers[2].resid_pre.save()
        assert_close(x.value, wanted.value, atol=0, rtol=0)
    with model.trace(IDS), model.splice(CASES["stream"][0], site=model.layers[2].resid_pre) as s:
        x = s.input.save()
    assert_close(x.value, wanted.value, atol=0, rtol=0)


def test_older_metadata_and_modules_with_a_name_of_their_own(model: tl.Model) -> None:
    older, own = Dictionary(), Dictionary()
    older.cfg = SimpleNamespace(hook_name="blocks.0.hook_resid_post")
    del own.cfg
    vars(own)["hook_name"] = "layers_output[0]"
    for sae in (older, own):
        with model.trace(IDS), model.splice(sae) as s:
            assert str(s.input._site) == "layers.0.resid_post"
            s.features.save()


@pytest.mark.parametrize(
    ("metadata", "kind", "says"),
    [
        ({}, SpliceError, "does not say where it belongs"),
        ({"hook_name": "blocks.1.hook_resid_middle"}, UnknownSiteError, "did you mean"),
        ({"hook_name": "blocks.1.attn.hook_z", "hook_head_index": 2}, SpliceError, "of head 2"),
        (
            {"hook_name": "blocks.1.hook_resid_post", "normalize_activations": "expected_average_only_in"},
            SpliceError,
            "a factor that is not in its weights",
        ),
        (
            {
                "hook_name": "blocks.1.hook_resid_post",
                "model_from_pretrained_kwargs": {"center_writing_weights": True},
            },
            SpliceError,
            "center_writing_weights=True",
        ),
        (
            {
                "hook_name": "blocks.1.attn.hook_z",
                "model_from_pretrained_kwargs": {"fold_value_biases": True},
            },
            SpliceError,
            "fold_value_biases=True",
        ),
    ],
)
def test_what_is_refused(model: tl.Model, metadata: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says) as caught, model.trace(IDS), model.splice(Dictionary(**metadata)):
        pass
    assert "test_dictionaries.py" in str(caught.value)


def test_changed_weights_may_be_meant_all_the_same(model: tl.Model) -> None:
    centred = Dictionary(
        hook_name="blocks.1.hook_resid_post", model_from_pretrained_kwargs={"center_writing_weights": True}
    )
    with model.trace(IDS), model.splice(centred, site="layers.1.resid_post") as s:
        s.features.save("features")
    # Inside of the MLP no weight of theirs was centred.
    centred.cfg.metadata.hook_name = "blocks.1.ln2.hook_out"
    with model.trace(IDS), model.splice(centred) as s:
        s.features.save("features")


def test_outside_of_a_block(model: tl.Model) -> None:
    with pytest.raises(NoTraceError):
        model.splice(CASES["stream"][0])
