"""tracelens: look inside and steer large language models.

>>> import tracelens as tl
>>> model = tl.load("smollm2-135m")                              # doctest: +SKIP
>>> with model.trace("The capital of France is") as t:           # doctest: +SKIP
...     model.layers[12].resid_post += 4.0 * v
...     h = model.layers[20].resid_post[:, -1].save("h")
>>> h.value.shape                                                # doctest: +SKIP
torch.Size([1, 576])
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING

from tracelens import einops_backend as _einops_backend  # einops finds the backend once it is defined
from tracelens import errors, families, sites
from tracelens.backends.ranks.pool import Ranks
from tracelens.bridge import run_with_nnsight
from tracelens.errors import TracelensError
from tracelens.generation import Generation
from tracelens.gradients import grad
from tracelens.ir.graph import Graph
from tracelens.ir.parse import parse
from tracelens.ir.sites import Site
from tracelens.ir.verify import verify
from tracelens.language import apply, chars, masked_mean, token_id, where
from tracelens.lens.comparison import LensComparison
from tracelens.lens.contributions import Contribution, LogitAttribution, LogitAttributions
from tracelens.lens.result import LensResult
from tracelens.lens.results import LensResults
from tracelens.lens.tuned import TunedLens
from tracelens.lens_value import Lens
from tracelens.loading import load, wrap
from tracelens.mapped import MappedValue, per_layer
from tracelens.model import Model
from tracelens.named import NamedConstant, NamedConstants, constant
from tracelens.parallel_check import ParallelReport, SiteCheck
from tracelens.plain_model import PlainModel
from tracelens.prompt_tokens import PromptTokens
from tracelens.results import Results, SavedTensor
from tracelens.site_table import SiteRow, SiteTable
from tracelens.splicing import Splice, splice
from tracelens.sweeping import Sweep, sweep
from tracelens.tracing import Program, Record, Trace
from tracelens.values import Saved, Value

if TYPE_CHECKING:
    from tracelens import steering

try:
    __version__ = version("tracelens")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

del _einops_backend

__all__ = [
    "Contribution",
    "Generation",
    "Graph",
    "Lens",
    "LensComparison",
    "LensResult",
    "LensResults",
    "LogitAttribution",
    "LogitAttributions",
    "MappedValue",
    "Model",
    "NamedConstant",
    "NamedConstants",
    "ParallelReport",
    "PlainModel",
    "Program",
    "PromptTokens",
    "Ranks",
    "Record",
    "Results",
    "Saved",
    "SavedTensor",
    "Site",
    "SiteCheck",
    "SiteRow",
    "SiteTable",
    "Splice",
    "Sweep",
    "Trace",
    "TracelensError",
    "TunedLens",
    "Value",
    "__version__",
    "apply",
    "chars",
    "constant",
    "errors",
    "families",
    "grad",
    "load",
    "masked_mean",
    "parse",
    "per_layer",
    "run_with_nnsight",
    "sites",
    "splice",
    "steering",
    "sweep",
    "token_id",
    "verify",
    "where",
    "wrap",
]


def __getattr__(name: str) -> ModuleType:
    """What most scripts do not need is imported by those that name it: ``tl.steering``."""
    if name == "steering":
        return import_module("tracelens.steering")
    raise AttributeError(f"module 'tracelens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
