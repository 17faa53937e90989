"""Steering vectors: ``tl.steering``. Directions in a model's activations that are made, applied, measured and kept."""

from tracelens.steering.activation_addition import ActivationAddition
from tracelens.steering.choosing import Choice, choose
from tracelens.steering.contrast import Contrast, ContrastRow, Refusal
from tracelens.steering.contrast_files import load_contrast
from tracelens.steering.curve import SteeringCurve, SweepFacts
from tracelens.steering.damage import Damage
from tracelens.steering.extraction import extract
from tracelens.steering.facts import Facts
from tracelens.steering.interchange import from_repeng, from_steering_vectors, to_repeng, to_steering_vectors
from tracelens.steering.intervals import Interval
from tracelens.steering.labels import Labelled, LabelledRow
from tracelens.steering.measuring import SteeringCurves, sweep
from tracelens.steering.reading import Reading, read
from tracelens.steering.steered import Steered
from tracelens.steering.unpaired import Unpaired
from tracelens.steering.vector import SteeringVector
from tracelens.steering.vector_files import load

__all__ = [
    "ActivationAddition",
    "Choice",
    "Contrast",
    "ContrastRow",
    "Damage",
    "Facts",
    "Interval",
    "Labelled",
    "LabelledRow",
    "Reading",
    "Refusal",
    "Steered",
    "SteeringCurve",
    "SteeringCurves",
    "SteeringVector",
    "SweepFacts",
    "Unpaired",
    "choose",
    "extract",
    "from_repeng",
    "from_steering_vectors",
    "load",
    "load_contrast",
    "read",
    "sweep",
    "to_repeng",
    "to_steering_vectors",
]


def __dir__() -> list[str]:
    return sorted(__all__)
