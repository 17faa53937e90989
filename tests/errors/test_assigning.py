"""Assigning to a name that a splice, a program or a plain model does not have, which would change nothing."""

# ruff: noqa: SIM117 - a block in a block is how splices are written

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import tracelens as tl
from tests.errors import IDS, LLAMA, D, refused
from tracelens.errors import UnknownAttributeError

model = LLAMA.model


class Halves(nn.Module):
    """An autoencoder that misses something."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(D, 8, generator=torch.Generator().manual_seed(0)) / D**0.5)

    def encode(self, x: Any) -> Any:
        return torch.relu(x @ self.down)

    def decode(self, features: Any) -> Any:
        return features @ self.down.T


SAE = Halves()


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("feature", "s.features = new"),
        ("latents", "s.features = new"),
        ("acts", "s.features = new"),
        ("keep_error", "keep_error=False"),
        ("error", "keep_error=False"),
        ("reconstruction", "s.features = new"),
        ("input", "before the splice"),
        ("scale", "s.features[..., 17] = 0"),
    ],
)
def test_a_splice_has_features_to_assign_to_and_nothing_else(name: str, instead: str) -> None:
    with (
        refused(UnknownAttributeError, name.replace("_", ".*"), instead=instead)
        if name != "keep_error"
        else refused(UnknownAttributeError, "where it is made", instead=instead)
    ):
        with model.trace(IDS):
            with tl.splice(model.layers[0].resid_post, SAE) as s:
                setattr(s, name, 0.0)  # <-
            model.logits.save()
    with model.trace(IDS):
        with tl.splice(model.layers[0].resid_post, SAE) as s:
            s.features = 0.0
        changed = model.logits.save()
    assert not torch.equal(changed.value, LLAMA.logits)


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("feature", "s.features"),
        ("latents", "s.features"),
        ("residual", "s.error"),
        ("recon", "s.reconstruction"),
        ("keep_error", "keep_error=False"),
        ("weights", "s.features, s.input, s.reconstruction and s.error"),
    ],
)
def test_a_splice_says_what_there_is_to_read(name: str, instead: str) -> None:
    with refused(UnknownAttributeError, instead=instead):
        with model.trace(IDS):
            with tl.splice(model.layers[0].resid_post, SAE) as s:
                getattr(s, name).save()  # <-
    assert not hasattr(s, name)


def test_a_splice_shows_itself() -> None:
    with model.trace(IDS):
        s = tl.splice(model.layers[0].mlp_in, SAE, to=model.layers[0].mlp_out, keep_error=False)
        assert repr(s) == (
            "<splice of Halves at layers.0.mlp_in to layers.0.mlp_out, without the error, not open yet>"
        )
        with s:
            assert "features f32[B,P,8], without the error, open>" in repr(s)
        model.logits.save()
    assert repr(s).endswith("its block has ended>")
    assert "&lt;splice of Halves" in s._repr_html_()


# --- programs --------------------------------------------------------------------------------------------------------


def program() -> tl.Program:
    with model.record() as r:
        model.layers[0].resid_post += tl.constant(torch.zeros(D), name="s")
        model.logits[:, -1].save("logits")
    return model.compile(r)


def test_a_program_takes_other_constants_in_its_call_only() -> None:
    p = program()
    with refused(UnknownAttributeError, "program.s", instead="program(prompt, s=value)"):
        p.s = torch.ones(D)  # <-
    with refused(UnknownAttributeError, "program.v", instead='tl.constant(tensor, name="v")'):
        p.v = torch.ones(D)  # <-
    with refused(UnknownAttributeError, "does not change", instead="program(prompt"):
        p.graph = p.graph  # <-
    with refused(UnknownAttributeError, "'logits'", instead='program(prompt)["logits"]'):
        p.logits  # <-
    with refused(UnknownAttributeError, "'explian'", instead="did you mean program.explain?"):
        p.explian()  # <-
    assert not torch.equal(p(IDS, s=torch.ones(D))["logits"], p(IDS)["logits"])
    assert copy.copy(p)(IDS)["logits"].shape == p(IDS)["logits"].shape


def test_a_program_shows_its_graph_in_a_notebook() -> None:
    p = program()
    assert repr(p) == f"<program: {len(p.graph.ops)} operations, saves ['logits']>"
    shown = p._repr_html_()
    assert "&lt;program: " in shown
    assert "<summary>graph (as recorded)</summary>" in shown
    assert "<summary>plan</summary>" in shown


# --- plain models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("output", 'model.module("").output = value'),
        ("input", 'model.module("").input = value'),
        ("fc", 'model.module("fc").output = value'),
        ("hf", 'model.module("").output'),
        ("logits", 'model.module("").output'),
    ],
)
def test_a_plain_model_is_changed_at_its_modules(name: str, instead: str) -> None:
    net = tl.wrap(nn.Sequential())
    net.hf.add_module("fc", nn.Linear(3, 3))
    x = torch.ones(2, 3)
    with refused(UnknownAttributeError, repr(name), instead=instead):
        with net.trace(x):
            setattr(net, name, 0.0)  # <-
    with net.trace(x) as t:
        net.module("").output = 0.0
        net.module("").output.save("y")
    assert torch.equal(t["y"], torch.zeros(2, 3))


def test_a_plain_models_program_does_not_change_either() -> None:
    net = tl.wrap(nn.Linear(3, 3))
    with net.record(torch.ones(2, 3)) as r:
        (net.module("").output * tl.constant(1.0, name="k")).save("y")
    p = net.compile(r)
    with refused(UnknownAttributeError, "program.k", instead="program(prompt, k=value)"):
        p.k = 2.0  # <-
    assert torch.equal(p(torch.ones(2, 3), k=0.0)["y"], torch.zeros(2, 3))
    assert "<summary>plan</summary>" in p._repr_html_()
    assert repr(p).startswith("<program: ")


def test_models_show_what_they_have_in_a_notebook() -> None:
    net = tl.wrap(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    assert "<summary>3 modules</summary>" in net._repr_html_()
    assert "<td>0</td><td>Linear</td>" in net._repr_html_()
    assert repr(net) == "<tracelens model without named sites: Sequential>"
    assert "<summary>sites</summary>" in model._repr_html_()
    assert "resid_post" in model._repr_html_()
    assert repr(model) == f"<tracelens model: {model.describe()}>"


def test_copies_of_plain_models_are_models() -> None:
    net = tl.wrap(nn.Linear(3, 3))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(tl.wrap(nn.Linear(3, 3))))):
        with other.trace(torch.ones(1, 3)) as t:
            other.module("").output.save("y")
        assert t["y"].shape == (1, 3)
