"""``tl.grad`` with respect to the features of a splice, against autograd on plain transformers."""

# ruff: noqa: SIM117 - a block in a block is how splices are written

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tracelens as tl
from tests.errors import IDS, LLAMA, refused
from tests.support.batches import EVEN, RAGGED, batch, random_rows
from tests.support.families import FAMILIES, WITH_NEURONS
from tests.support.plain import edited_at, plain_logits, untouched
from tests.test_splicing import EDITS, SAE, WIDTH, Autoencoder
from tracelens.errors import GradientTargetError, UnusedGradientError
from tracelens.ir.sites import Site
from tracelens.reference import evaluate

model = LLAMA.model
OTHER = Autoencoder(seed=1)
Edit = Callable[[Tensor], Tensor]
Splices = dict[Site, tuple[Any, Edit, bool]]


def last_loss(logits: Any) -> Any:
    return (logits[:, -1] * torch.linspace(-1, 1, logits.shape[-1])).sum()


def whole(features: Tensor) -> Tensor:
    return features


def plain(hf: Any, rows: list[list[int]], splices: Splices, *, edited: bool = False) -> list[Tensor]:
    """Autograd's gradients with respect to the features, before their edit or, ``edited``, after it."""
    found: list[Tensor] = []

    def spliced(x: Tensor, sae: Any, edit: Edit, keep_error: bool) -> Tensor:
        features = sae.encode(x)
        features = features.clone() if found else features.detach().requires_grad_()
        changed = edit(features.clone())
        found.append(changed if edited else features)
        error = (x - sae.decode(features)).detach() if keep_error else 0.0
        return sae.decode(changed) + error

    edits = {site: lambda x, of=of: spliced(x, *of) for site, of in splices.items()}
    with edited_at(hf, edits):
        logits = plain_logits(hf, batch(rows))
    return list(torch.autograd.grad(last_loss(logits), found))


@pytest.mark.parametrize("keep_error", [True, False])
@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post"])
@pytest.mark.parametrize("name", WITH_NEURONS)
def test_the_gradient_at_features_is_that_of_autograd(name: str, site: str, keep_error: bool) -> None:
    hf, rows = FAMILIES[name].build(attn="eager"), random_rows(EVEN)
    m = tl.wrap(hf)
    with untouched(hf), m.trace(rows) as t:
        with tl.splice(getattr(m.layers[1], site), SAE, keep_error=keep_error) as s:
            f = s.features
        tl.grad(last_loss(m.logits), f).save("g")
    (wanted,) = plain(hf, rows, {Site(site, 1): (SAE, whole, keep_error)})
    assert wanted.abs().max() > 1e-4
    torch.testing.assert_close(t["g"], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("after", [False, True], ids=["before the edit", "after the edit"])
@pytest.mark.parametrize("keep_error", [True, False])
@pytest.mark.parametrize("kind", ["off", "scaled", "in place"])
def test_the_version_that_was_read_is_what_a_gradient_is_of(kind: str, keep_error: bool, after: bool) -> None:
    change, by_hand = EDITS[kind]
    rows = random_rows((6, 6))
    with model.trace(rows) as t:
        with tl.splice(model.layers[1].resid_post, SAE, keep_error=keep_error) as s:
            first = s.features.save("features")
            change(s)
        tl.grad(last_loss(model.logits), s.features if after else first).save("g")
        model.logits.save("logits")
    (wanted,) = plain(LLAMA.hf, rows, {Site("resid_post", 1): (SAE, by_hand, keep_error)}, edited=after)
    (other,) = plain(LLAMA.hf, rows, {Site("resid_post", 1): (SAE, by_hand, keep_error)}, edited=not after)
    assert not torch.allclose(wanted, other, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(t["g"], wanted, rtol=1e-4, atol=1e-6)
    # A gradient changes nothing of the run.
    with model.trace(rows) as alone:
        with tl.splice(model.layers[1].resid_post, SAE, keep_error=keep_error) as s:
            change(s)
        model.logits.save("logits")
    torch.testing.assert_close(t["logits"], alone["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep_error", [True, False])
def test_several_splices_take_one_backward_pass(keep_error: bool) -> None:
    rows = random_rows((5, 5))
    with model.trace(rows) as t:
        with tl.splice(model.layers[0].resid_post, SAE, keep_error=keep_error) as first:
            pass
        with tl.splice(model.layers[2].mlp_out, OTHER, keep_error=keep_error) as second:
            second.features[..., :9] *= 2
        wrt = {"b": second.features, "a": first.features, "site": model.layers[1].attn_out}
        for name, g in zip(wrt, tl.grad(last_loss(model.logits), list(wrt.values())), strict=True):
            g.save(name)
    assert t.explain().count("one backward pass") == 1
    assert "autograd starts at layers.0.resid_post" in t.explain()

    def doubled(f: Tensor) -> Tensor:
        return torch.cat([f[..., :9] * 2, f[..., 9:]], -1)

    splices: Splices = {
        Site("resid_post", 0): (SAE, whole, keep_error),
        Site("mlp_out", 2): (OTHER, doubled, keep_error),
    }
    for wanted, name in zip(plain(LLAMA.hf, rows, splices, edited=True), ("a", "b"), strict=True):
        torch.testing.assert_close(t[name], wanted, rtol=1e-4, atol=1e-6)
    # The site between them as it is without the features.
    with model.trace(rows) as alone:
        with tl.splice(model.layers[0].resid_post, SAE, keep_error=keep_error):
            pass
        with tl.splice(model.layers[2].mlp_out, OTHER, keep_error=keep_error) as second:
            second.features[..., :9] *= 2
        tl.grad(last_loss(model.logits), model.layers[1].attn_out).save("site")
    torch.testing.assert_close(t["site"], alone["site"], rtol=1e-5, atol=1e-6)


def test_a_transcoders_features() -> None:
    rows = random_rows((5, 5))
    with model.trace(rows) as t:
        with tl.splice(model.layers[1].mlp_in, SAE, to=model.layers[1].mlp_out) as s:
            pass
        g = tl.grad(last_loss(model.logits), s.features)
        g.save("g")
        (g * s.features).sum((0, 1)).save("attribution")
    with model.trace(rows) as by_site:
        tl.grad(last_loss(model.logits), model.layers[1].mlp_out).save("g")
    torch.testing.assert_close(t["g"], by_site["g"] @ SAE.up.detach().T, rtol=1e-4, atol=1e-6)
    assert t["attribution"].shape == (WIDTH,)


def test_prompts_of_different_lengths_and_programs(tmp_path: Path) -> None:
    rows = random_rows(RAGGED)
    with model.record() as r:
        with tl.splice(model.layers[1].resid_post, SAE) as s:
            s.features[..., 3] *= 2
        tl.grad(last_loss(model.logits), s.features).save("g")
    r.graph.to_json(tmp_path / "graph.json")
    program = model.compile(tl.Graph.from_json(tmp_path / "graph.json"))
    together = program(rows)["g"]
    for row, found in zip(rows, together, strict=True):
        torch.testing.assert_close(found, program(row)["g"], rtol=1e-4, atol=1e-6)
        with model.trace(row) as t:
            with tl.splice(model.layers[1].resid_post, SAE) as s:
                s.features[..., 3] *= 2
            tl.grad(last_loss(model.logits), s.features).save("g")
        torch.testing.assert_close(found, t["g"], rtol=1e-4, atol=1e-6)


def test_a_loss_of_the_features_themselves_inside_the_block() -> None:
    with model.trace(IDS) as t:
        with tl.splice(model.layers[1].resid_post, SAE) as s:
            f = s.features
            tl.grad((f * f).sum(), f).save("g")
            f.save("f")
    torch.testing.assert_close(t["g"], 2 * t["f"])
    assert t["f"].abs().max() > 0.1


def test_what_is_computed_alike_is_not_counted() -> None:
    """The gradient is that of the splice's own features: the same numbers, computed once more, are constants to it."""
    with model.trace(IDS) as t:
        with tl.splice(model.layers[1].resid_post, SAE) as s:
            again = SAE.encode(model.layers[1].resid_post)
            loss = (s.features * again).sum()
            tl.grad(loss, s.features).save("g")
            again.save("again")
    torch.testing.assert_close(t["g"], t["again"])


def test_the_evaluator_that_knows_no_plans_agrees() -> None:
    with model.trace(IDS) as t:
        with tl.splice(model.layers[1].resid_post, SAE) as s:
            first = s.features.save("f")
            s.features[..., :5] += 1
        tl.grad(last_loss(model.logits), [first, s.features, model.layers[0].mlp_out])[0].save("g")
    sites = (Site("mlp_out", 0), Site("resid_post", 1), Site("logits"))

    def forward(intercept: Any) -> None:
        edits = {site: lambda x, site=site: intercept(site, x) for site in sites[:2]}
        with edited_at(LLAMA.hf, edits):
            intercept(sites[2], plain_logits(LLAMA.hf, batch([IDS])))

    constants = [constant.tensor for constant in t.graph.constants]
    found = evaluate(t.graph, forward, constants=constants, sizes={"B": 1, "P": 4, "S": 4})
    torch.testing.assert_close(t["g"], found["g"], rtol=1e-4, atol=1e-6)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_has_no_gradient() -> None:
    with refused(GradientTargetError, "features of a splice as a whole", instead="tl.grad(loss, f)[:, :, 3]"):
        with model.trace(IDS):
            with tl.splice(model.layers[1].resid_post, SAE) as s:
                pass
            tl.grad(last_loss(model.logits), s.features[..., 3])  # <-
    with refused(GradientTargetError, "was computed from them", instead="tl.grad(loss, s.features)"):
        with model.trace(IDS):
            with tl.splice(model.layers[1].resid_post, SAE) as s:
                pass
            tl.grad(last_loss(model.logits), s.features * 2)  # <-
    with refused(UnusedGradientError, "the computed value", instead="behind the write", forwards=1):
        with model.trace(IDS):
            with tl.splice(model.layers[1].resid_post, SAE) as s:
                pass
            g = tl.grad(model.layers[0].resid_post.sum(), s.features)  # <-
            g.save()


class Whole(nn.Module):
    """Its features are whole numbers."""

    def encode(self, x: Any) -> Any:
        return (x * 100).to(torch.int64)

    def decode(self, features: Any) -> Any:
        return features.to(torch.float32) / 100


def test_whole_numbers_have_no_gradient() -> None:
    with refused(GradientTargetError, "features that are i64", instead="floating numbers"), model.trace(IDS):
        with tl.splice(model.layers[1].resid_post, Whole()) as s:
            pass
        tl.grad(last_loss(model.logits), s.features)  # <-
