"""Models in training mode: what is random there, and what changes the model for good, is refused."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import tracelens as tl
from tracelens.errors import TrainingModeError

CHANGES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (4, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (2, 3, 4, 4)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(3), (2, 3, 4, 4, 4)),
    "without momentum": (lambda: nn.BatchNorm1d(3, momentum=0.0), (4, 3)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(3, track_running_stats=True), (2, 3, 4)),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(32, 32)), (4, 32)),
    "the older spectral norm": (lambda: nn.utils.spectral_norm(nn.Linear(32, 32)), (4, 32)),
}
RANDOM: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dropout": (lambda: nn.Dropout(0.5), (4, 3)),
    "RReLU": (nn.RReLU, (4, 3)),
    "LSTM": (lambda: nn.LSTM(3, 3, num_layers=2, dropout=0.5), (4, 2, 3)),
}
HARMLESS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "without statistics": (lambda: nn.BatchNorm1d(3, track_running_stats=False), (4, 3)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(3), (2, 3, 4)),
    "LayerNorm": (lambda: nn.LayerNorm(3), (4, 3)),
    "dropout of nothing": (lambda: nn.Dropout(0.0), (4, 3)),
}


@pytest.mark.parametrize("made", CHANGES.values(), ids=CHANGES)
def test_what_learns_in_training_mode_is_refused(
    made: tuple[Callable[[], nn.Module], tuple[int, ...]],
) -> None:
    build, shape = made
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older spectral norm is announced to go
        net = nn.Sequential(build())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net(x)
    assert any(not torch.equal(value, before[name]) for name, value in net.state_dict().items())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = tl.wrap(net)
    with pytest.raises(TrainingModeError, match="would change the model for good") as caught, model.trace(x):
        model.module("").output.save()
    assert caught.value.instead == "model.hf.eval() before the block"
    assert caught.value.at is not None
    with model.record(x) as r:
        model.module("").output.save("y")
    with pytest.raises(TrainingModeError):
        model.compile(r)(x)
    model.hf.eval()
    with model.trace(x) as t:
        model.module("").output.save("y")
    assert torch.equal(t["y"], net(x).detach())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("made", RANDOM.values(), ids=RANDOM)
def test_what_is_random_in_training_mode_is_refused(
    made: tuple[Callable[[], nn.Module], tuple[int, ...]],
) -> None:
    build, shape = made
    model, x = tl.wrap(nn.Sequential(build())), torch.ones(shape)
    with pytest.raises(TrainingModeError, match="is random"), model.trace(x):
        model.module("0").input.save()


@pytest.mark.parametrize("made", HARMLESS.values(), ids=HARMLESS)
def test_what_neither_learns_nor_is_random_runs(
    made: tuple[Callable[[], nn.Module], tuple[int, ...]],
) -> None:
    build, shape = made
    net, x = nn.Sequential(build()), torch.randn(shape)
    model = tl.wrap(net)
    with model.trace(x):
        y = model.module("").output.save()
    torch.testing.assert_close(y.value, net(x).detach(), rtol=0, atol=0)


def test_no_other_module_of_torch_changes_its_buffers() -> None:
    """Of all modules in torch.nn only the norms have buffers that a forward pass writes: losses read theirs."""
    found = {
        name
        for name, kind in vars(nn).items()
        if inspect.isclass(kind) and issubclass(kind, nn.Module) and kind is not nn.Module
        if any(
            "self.register_buffer(" in inspect.getsource(base)
            for base in kind.__mro__[:-2]
            if base is not nn.Module
        )
    }
    norms = {name for name in found if "BatchNorm" in name or "InstanceNorm" in name}
    assert len(norms) == 13
    # Random in eval mode as well, where there is no hint to give; and a loss under its old name.
    others = {"FractionalMaxPool2d", "FractionalMaxPool3d", "NLLLoss2d"}
    assert {name for name in found - norms if not name.endswith("Loss")} == others
