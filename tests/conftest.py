"""Settings that hold for every test: no network, one thread, no progress bars, hypothesis profiles; some fixtures."""

from __future__ import annotations

import os
import signal
import sys

# Before transformers is imported: it reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests wrap models that were changed on purpose, and count passes. Those of the probe at load ask for it.
os.environ["TRACELENS_PROBE"] = "0"

from typing import TYPE_CHECKING

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings

from tests.support.ranks import ranks_of as ranks_of  # fixtures for all tests
from tests.support.ranks import tiny_folder as tiny_folder

if TYPE_CHECKING:
    from tracelens.model import Model

# The models are tiny, and the tests run in several processes: more threads only get in each other's way.
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# A shell that starts them in the background has the signal ignored, and some tests send it to themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A forward pass inside a property takes milliseconds, and much longer the first time.
_SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large)
# The same examples each time, so that a failure on one machine is a failure on all.
settings.register_profile(
    "ci", deadline=None, derandomize=True, max_examples=60, print_blob=True, suppress_health_check=_SLOW
)
# New examples each time, to find what the fixed ones miss.
settings.register_profile(
    "dev", deadline=None, max_examples=300, print_blob=True, suppress_health_check=_SLOW
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture
def one_model(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Commands get the ``model`` of the module, which is there already; with what they asked for."""
    asked: list[dict[str, object]] = []

    def load(name: str, **options: object) -> Model:
        asked.append({"name": name, **options})
        return model

    monkeypatch.setattr("tracelens.loading.load", load)
    return asked


def pytest_runtest_setup() -> None:
    """nnsight gives every object of its process a ``save``. Our tests look at a Python without that."""
    extension = sys.modules.get("nnsight._c")
    if extension is not None and hasattr(object, "save"):
        extension.unmount("save")
