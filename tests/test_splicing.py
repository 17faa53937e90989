"""Splices: features to read and to change, against a block edited by hand and against closed forms."""

# ruff: noqa: SIM117 - a block in a block is how splices are written

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tracelens as tl
from tests.errors import IDS, LLAMA, D, refused
from tests.support.batches import RAGGED, random_batch, random_rows
from tests.support.families import FAMILIES, NEURONS, WITH_NEURONS
from tests.support.plain import edited, plain_logits
from tracelens.errors import LostUpdateError, ShapeError, SpliceError, StaleValueError, WriteTargetError
from tracelens.ir.sites import Site

model = LLAMA.model
WIDTH = 64


class Autoencoder(nn.Module):
    """A small SAE with random weights, some of whose features are zero anywhere."""

    def __init__(self, into: int = D, out: int = D, width: int = WIDTH, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.down = nn.Parameter(torch.randn(into, width, generator=generator) / into**0.5)
        self.up = nn.Parameter(torch.randn(width, out, generator=generator) / width**0.5)
        self.bias = nn.Parameter(torch.randn(width, generator=generator) / 4)

    def encode(self, x: Any) -> Any:
        return torch.relu(x @ self.down + self.bias)

    def decode(self, features: Any) -> Any:
        return features @ self.up


SAE = Autoencoder()
RAMP = torch.arange(WIDTH) / 9
Edit = Callable[[Tensor], Tensor]


def off(features: Tensor) -> Tensor:
    changed = features.clone()
    changed[..., 7:20] = 0
    return changed


EDITS: dict[str, tuple[Callable[[Any], None], Edit]] = {
    "off": (lambda s: s.features.__setitem__((..., slice(7, 20)), 0), off),
    "scaled": (lambda s: setattr(s, "features", s.features * 3), lambda f: f * 3),
    "number": (lambda s: setattr(s, "features", 1.0), torch.ones_like),
    "tensor": (lambda s: setattr(s, "features", RAMP), lambda f: RAMP.expand_as(f)),
}


def in_place(s: tl.Splice) -> None:
    s.features *= 2
    s.features[..., :5] += 1
    s.features[:, -1][..., 3] = 4.0
    s.features.tok[1] = 0.5


def in_place_by_hand(f: Tensor) -> Tensor:
    f = f * 2
    f[..., :5] += 1
    f[:, -1, 3] = 4.0
    f[:, 1] = 0.5
    return f


EDITS["in place"] = (in_place, in_place_by_hand)
SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", WITH_NEURONS)
def test_a_spliced_block_is_the_block_edited_by_hand(
    family: str, site: str, edit: tuple[Callable[[Any], None], Edit]
) -> None:
    hf, batch = FAMILIES[family].build(attn="eager"), random_batch((6, 6))
    change, by_hand = edit
    m = tl.wrap(hf)

    def reconstructed(x: Tensor) -> Tensor:
        features = SAE.encode(x)
        return SAE.decode(by_hand(features)) + (x - SAE.decode(features))

    with torch.no_grad():
        plain = plain_logits(hf, batch)
        with edited(hf, Site(site, 1), reconstructed):
            wanted = plain_logits(hf, batch)
    with m.trace(batch.input_ids) as t:
        with tl.splice(getattr(m.layers[1], site), SAE) as s:
            change(s)
        m.logits.save("logits")
    assert not torch.allclose(wanted, plain, atol=1e-2)
    # The error is added in another order, which rounds otherwise.
    torch.testing.assert_close(t["logits"], wanted, rtol=0, atol=2e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", WITH_NEURONS)
def test_without_a_change_nothing_changes(family: str, dtype: torch.dtype) -> None:
    m, rows = tl.wrap(FAMILIES[family].build(dtype=dtype)), random_rows(RAGGED)
    with m.trace(rows):
        plain = m.logits.save()
    with m.trace(rows):
        with tl.splice(m.layers[1].resid_post, SAE) as s:
            features = s.features.save()
        logits = m.logits.save()
    for one, other in zip(plain.value, logits.value, strict=True):
        assert torch.equal(one, other)
    assert [part.dtype for part in features.value] == [torch.float32] * 3
    assert features.value[0].shape == (1, RAGGED[0], WIDTH)


def test_without_the_error_the_site_is_the_reconstruction() -> None:
    with model.trace(IDS):
        h = model.layers[1].resid_post.save()
    with model.trace(IDS):
        with tl.splice(model.layers[1].resid_post, SAE, keep_error=False) as s:
            error = s.error.save()
            reconstruction = s.reconstruction.save()
            given = s.input.save()
        after = model.layers[1].resid_post.save()
    with torch.no_grad():
        wanted = SAE.decode(SAE.encode(h.value))
    assert torch.equal(given.value, h.value)
    torch.testing.assert_close(after.value, wanted)
    assert torch.equal(after.value, reconstruction.value)
    torch.testing.assert_close(error.value, h.value - wanted)
    assert not torch.allclose(after.value, h.value, atol=0.1)


def test_a_change_of_one_feature_moves_the_stream_along_its_direction() -> None:
    """The closed form: adding c to feature i adds c times row i of the decoder."""
    with model.trace(IDS):
        h = model.layers[1].resid_post.save()
    with model.trace(IDS):
        with tl.splice(model.layers[1].resid_post, SAE) as s:
            s.features[..., 17] += 3.0
        after = model.layers[1].resid_post.save()
    torch.testing.assert_close(
        after.value - h.value, (3.0 * SAE.up[17]).detach().expand_as(h.value), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("keep_error", [True, False])
def test_a_transcoder_reads_one_site_and_writes_another(keep_error: bool) -> None:
    transcoder = Autoencoder(seed=3)
    with model.trace(IDS):
        x, y = model.layers[1].mlp_in.save(), model.layers[1].mlp_out.save()
    with model.trace(IDS):
        with tl.splice(
            model.layers[1].mlp_in, transcoder, to=model.layers[1].mlp_out, keep_error=keep_error
        ) as s:
            s.features[..., :9] = 0
        after, untouched = model.layers[1].mlp_out.save(), model.layers[1].mlp_in.save()
    with torch.no_grad():
        features = transcoder.encode(x.value)
        changed = features.clone()
        changed[..., :9] = 0
        wanted = transcoder.decode(changed) + (y.value - transcoder.decode(features)) * keep_error
    assert torch.equal(untouched.value, x.value)
    torch.testing.assert_close(after.value, wanted)


def test_splices_in_several_layers_and_of_other_widths() -> None:
    saes = [Autoencoder(seed=layer) for layer in range(3)]
    neurons = Autoencoder(NEURONS, NEURONS, seed=9)
    with model.trace(IDS) as t:
        for layer, sae in enumerate(saes):
            with tl.splice(model.layers[layer].resid_post, sae) as s:
                s.features[..., layer] = 2.0
                s.features[..., :3].save(f"f{layer}")
        with (
            tl.splice(model.layers[2].mlp_act, neurons) as s,
            tl.splice(model.layers[2].resid_mid, SAE) as s2,
        ):
            s.features *= 2
            s2.features *= 2
        model.logits.save("logits")
    for layer in range(3):
        assert (t[f"f{layer}"][..., layer] == 2.0).all()
    assert not torch.allclose(t["logits"], LLAMA.logits, atol=1e-2)


def test_reads_before_and_after_the_block() -> None:
    with model.trace(IDS) as t:
        with tl.splice(model.layers[1].resid_post, SAE) as s:
            before = s.features.save()
            s.features[..., 0] = 5.0
            model.layers[1].resid_post.save("inside")
        s.features.save("after")
        model.layers[1].resid_post.save("outside")
    assert (t["after"][..., 0] == 5.0).all()
    assert torch.equal(t["after"][..., 1:], before.value[..., 1:])
    assert not torch.equal(t["inside"], t["outside"])


def test_gradients_pass_through_the_features_alone() -> None:
    """The error is a constant, so that the derivative is that of the reconstruction, and not one."""
    with model.trace(IDS):
        h = model.layers[1].resid_post
        with tl.splice(h, SAE) as s:
            s.features[..., 7:20] = 0
        loss = (model.layers[1].resid_post[..., 0]).sum()
        gradient = tl.grad(loss, h).save()
        stream = h.save()
    x = stream.value.clone().requires_grad_()
    SAE.decode(off(SAE.encode(x)))[..., 0].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0.1
    torch.testing.assert_close(gradient.value, x.grad)


def test_it_works_in_programs_sweeps_and_generation() -> None:
    with model.record() as r:
        with tl.splice(model.layers[1].resid_post, SAE) as s:
            s.features[..., 17] += tl.constant(0.0, name="strength")
        model.logits[:, -1].save("logits")
    program = model.compile(r)
    sweep = tl.sweep(program, IDS, strength=[0.0, 1.0, 2.0])
    assert sweep.one_by_one is None
    assert torch.equal(program(IDS)["logits"], LLAMA.logits[:, -1])
    with model.trace(IDS) as t:
        with tl.splice(model.layers[1].resid_post, SAE) as s:
            s.features[..., 17] += 2.0
        model.logits[:, -1].save("logits")
    torch.testing.assert_close(sweep["logits"][2], t["logits"], rtol=0, atol=1e-4)
    with model.generate(IDS, max_new_tokens=3) as g, tl.splice(model.layers[1].resid_post, SAE) as s:
        s.features[..., 17] = 0
    assert len(g.tokens) == 3


def test_an_exception_in_the_block_writes_nothing() -> None:
    with model.trace(IDS) as t:
        try:
            with tl.splice(model.layers[1].resid_post, SAE) as s:
                s.features[...] = 0
                raise KeyError("mine")
        except KeyError:
            pass
        model.logits.save("logits")
    assert torch.equal(t["logits"], LLAMA.logits)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_modules_that_cannot_be_spliced() -> None:
    with refused(SpliceError, "a Linear cannot be spliced", "no encode and no decode", instead="encode(x)"):
        with model.trace(IDS):
            tl.splice(model.layers[1].resid_post, nn.Linear(D, D))  # <-
    wide = Autoencoder(D, D + 1)
    with (
        refused(
            ShapeError, "decode gives f32[B,P,49]", "layers.1.resid_post is f32[B,P,48]", instead="this width"
        ),
        model.trace(IDS),
        tl.splice(model.layers[1].resid_post, wide),  # <-
    ):
        pass

    class Two(Autoencoder):
        def encode(self, x: Any) -> Any:
            return super().encode(x), x

    with refused(SpliceError, "encode gave a tuple", instead="one tensor"), model.trace(IDS):
        with tl.splice(model.layers[1].resid_post, Two()):  # <-
            pass


def test_what_is_no_site() -> None:
    says = ("one whole site of an open block",)
    with refused(SpliceError, *says, "a part of a site", instead="model.layers[8]"), model.trace(IDS):
        tl.splice(model.layers[1].resid_post[:, -1], SAE)  # <-
    with refused(SpliceError, *says, "several layers", instead="a loop"), model.trace(IDS):
        tl.splice(model.layers[0:2].resid_post, SAE)  # <-
    with refused(SpliceError, *says, "a Tensor", instead="model.layers[8]"), model.trace(IDS):
        tl.splice(torch.ones(1, 4, D), SAE)  # <-
    with refused(SpliceError, *says, "a computed value", instead="model.layers[8]"), model.trace(IDS):
        tl.splice(model.layers[1].mlp_in, SAE, to=model.layers[1].mlp_out * 2)  # <-
    with model.trace(IDS):
        done = model.layers[1].resid_post.save()
    with refused(SpliceError, "a finished block", instead="the open block"), model.trace(IDS):
        tl.splice(done, SAE)  # <-


def test_a_splice_that_is_never_opened() -> None:
    with refused(SpliceError, "never opened", instead="with tl.splice"), model.trace(IDS):
        tl.splice(model.layers[1].resid_post, SAE)  # <-
        model.logits.save()
    with refused(SpliceError, "once the splice is open", instead="with tl.splice"), model.trace(IDS):
        s = tl.splice(model.layers[1].resid_post, SAE)
        s.features[..., 17] = 0  # <-
    with refused(SpliceError, "opened before", instead="for each block"), model.trace(IDS):
        s = tl.splice(model.layers[1].resid_post, SAE)
        with s:
            pass
        with s:  # <-
            pass


def test_changes_that_would_be_lost() -> None:
    with refused(LostUpdateError, "on features", instead="s.features += v"), model.trace(IDS):
        with tl.splice(model.layers[1].resid_post, SAE) as s:
            f = s.features
            f += 1  # <-
    with refused(LostUpdateError, "on features", instead="s.features += v"), model.trace(IDS):
        with tl.splice(model.layers[1].resid_post, SAE) as s:
            f = s.features[..., 3]
            f *= 2
            f *= 2  # <-
    with refused(SpliceError, "in the model already", instead="inside"), model.trace(IDS):
        with tl.splice(model.layers[1].resid_post, SAE) as s:
            pass
        s.features[..., 3] = 0  # <-
    with refused(StaleValueError, "was written through", instead="again"), model.trace(IDS):
        with tl.splice(model.layers[1].resid_post, SAE) as s:
            f = s.features
            f[..., 3] = 0
            f[..., 4] = 0  # <-
    with (
        refused(StaleValueError, "changed after this value was read", instead="s.features"),
        model.trace(IDS),
        tl.splice(model.layers[1].resid_post, SAE) as s,
    ):
        f = s.features
        s.features = 0
        f[..., 4] = 0  # <-
    with refused(WriteTargetError, "was computed", instead="torch.where"), model.trace(IDS):
        with tl.splice(model.layers[1].resid_post, SAE) as s:
            (s.features * 2)[..., 4] = 0  # <-
    with model.trace(IDS) as t, tl.splice(model.layers[1].resid_post, SAE) as s:
        part = s.features[..., 3]
        part *= 2
        part += 1
        s.features[..., 3] = part
        s.features[..., 3].save("part")
        s.features[..., 4].save("other")
    with model.trace(IDS), tl.splice(model.layers[1].resid_post, SAE) as s:
        plain = s.features.save()
    torch.testing.assert_close(t["part"], plain.value[..., 3] * 2 + 1)
    assert torch.equal(t["other"], plain.value[..., 4])


def test_a_write_that_the_splice_would_undo() -> None:
    with refused(StaleValueError, "layers.1.resid_post was written after", instead="before the splice"):
        with model.trace(IDS):
            with tl.splice(model.layers[1].resid_post, SAE) as s:  # <-
                model.layers[1].resid_post += 1
                s.features[..., 3] = 0
    with refused(ShapeError, "does not broadcast", instead="a value"), model.trace(IDS):
        with tl.splice(model.layers[1].resid_post, SAE) as s:
            s.features = torch.ones(WIDTH + 1)  # <-
