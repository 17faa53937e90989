"""Attribution patching, the example, where it has to agree with patching."""

from __future__ import annotations

import pytest
import torch

import tracelens as tl
from examples.attribution_patching import attribute
from tests.support.families import D_MODEL, FAMILIES, LAYERS
from tests.test_gradients import ROWS


@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
def test_attribution_patching_is_exact_where_the_metric_is_linear(site: str) -> None:
    """After layer 0 nothing but the stream itself is left, so the metric is linear in it."""
    hf = FAMILIES["llama"].build()
    for layer in hf.model.layers[1:]:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.zeros_(projection.weight)
    model = tl.wrap(hf)
    clean, corrupt = (torch.tensor([row]) for row in ROWS[:2])
    weights = torch.randn(7, D_MODEL, generator=torch.Generator().manual_seed(5))

    def metric(model: tl.Model) -> tl.Value:
        return (model.layers[-1].resid_post * weights).sum((1, 2))

    estimate = attribute(model, clean, corrupt, metric, site)
    with model.trace(clean):
        donors = getattr(model.layers[:], site).save()
    with model.trace(corrupt):
        base = metric(model).save()
    for layer in range(LAYERS):
        for position in range(7):
            with model.trace(corrupt):
                getattr(model.layers[layer], site)[:, position] = donors[layer][:, position]
                patched = metric(model).save()
            change = (patched.value - base.value).item()
            if site == "resid_post" or layer == 0:
                assert abs(change) > 1e-2
            assert estimate[layer, position].item() == pytest.approx(change, rel=1e-4, abs=1e-4)
