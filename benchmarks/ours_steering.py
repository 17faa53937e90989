"""Steering vectors with tracelens: as one writes it, and the plain way, which computes nothing for several at once."""

from __future__ import annotations

from functools import partial

import torch

import tracelens as tl
from benchmarks.peers.steering import Answers, Pair, Steering, named
from benchmarks.peers.subject import Results
from tracelens.steering import Contrast, SteeringCurve, SteeringVector, Unpaired

SITES = ("post_ln", "resid_post")


def build(subject: Steering) -> Answers:
    """A function for each case."""
    model = tl.wrap(subject.model, subject.tokenizer)
    return {"extract": partial(extract, subject, model), "sweep": partial(sweep, subject, model)}


def plain(subject: Steering) -> Answers:
    """The same with a row in a batch for every text, and a pass for every multiplier."""
    model = tl.wrap(subject.model, subject.tokenizer)
    return {
        "extract": partial(extract_apart, subject, model),
        "sweep": partial(sweep, subject, model, quick=False),
    }


def extract(subject: Steering, model: tl.Model) -> Results:
    vector = tl.steering.extract(
        model, Contrast.pairs(subject.train), sites=SITES, batch_size=subject.batch, progress=False
    )
    return found(vector, subject)


def extract_apart(subject: Steering, model: tl.Model) -> Results:
    """Two classes of texts that end in the label, which do not come in pairs: what they share is not looked for."""
    classes = [[upto(subject, pair, which) for pair in subject.train] for which in (0, 1)]
    vector = tl.steering.extract(
        model,
        Unpaired(*classes),
        sites=SITES,
        method="unpaired",
        positions="last",
        batch_size=2 * subject.batch,
        progress=False,
    )
    return found(vector, subject)


def upto(subject: Steering, pair: Pair, which: int) -> str:
    """The text of a pair with one of its answers, up to and with the label."""
    return subject.tokenizer.decode(subject.row(pair)[which], clean_up_tokenization_spaces=False)


def found(vector: SteeringVector, subject: Steering) -> Results:
    layers = range(subject.n_layers)
    return named({site: torch.stack([vector[site, layer] for layer in layers]) for site in SITES})


def sweep(subject: Steering, model: tl.Model, *, quick: bool = True) -> Results:
    """With the label mass at every multiplier, and the unsteered model beside: that is what a curve holds."""
    curve = tl.steering.sweep(
        model,
        SteeringVector({("resid_post", subject.middle): subject.vector}),
        Contrast.pairs(subject.test),
        subject.multipliers,
        controls=False,
        batch_size=subject.batch,
        quick=quick,
        progress=False,
    )
    assert isinstance(curve, SteeringCurve)  # of one place
    return {"propensity": torch.from_numpy(curve.propensity).float()}
