"""Steering vectors: ``tl.steering``. Directions in a model's activations that are made, applied, measured and kept."""

from tracelens.steering.activation_addition import ActivationAddition
from tracelens.steering.contrast import Contrast, ContrastRow, Refusal
from tracelens.steering.contrast_files import load_contrast
from tracelens.steering.extraction import extract
from tracelens.steering.facts import Facts
from tracelens.steering.interchange import (
    from_repeng,
    from_steering_vectors,
    to_repeng,
    to_steering_vectors,
)
from tracelens.steering.labels import Labelled, LabelledRow
from tracelens.steering.steered import Steered
from tracelens.steering.unpaired import Unpaired
from tracelens.steering.vector import SteeringVector
from tracelens.steering.vector_files import load

__all__ = [
    "ActivationAddition",
    "Contrast",
    "ContrastRow",
    "Facts",
    "Labelled",
    "LabelledRow",
    "Refusal",
    "Steered",
    "SteeringVector",
    "Unpaired",
    "extract",
    "from_repeng",
    "from_steering_vectors",
    "load",
    "load_contrast",
    "to_repeng",
    "to_steering_vectors",
]


def __dir__() -> list[str]:
    return sorted(__all__)
