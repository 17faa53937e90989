"""The state of autograd around a run, whatever the user's own grad or inference mode is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def plain_mode() -> AbstractContextManager[object]:
    """Without autograd, and without inference mode even inside the user's: saved tensors are fit for training on."""
    return _without_either() if torch.is_inference_mode_enabled() else torch.no_grad()


@contextmanager
def _without_either() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def with_autograd() -> Iterator[None]:
    """With autograd; the parameters are frozen elsewhere."""
    with outside_inference(), torch.enable_grad():
        yield


def outside_inference() -> AbstractContextManager[object]:
    """Without the user's inference mode, whose tensors autograd cannot use."""
    # Only where it is on: leaving it also turns on threads for backward passes, which the user may have turned off.
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
