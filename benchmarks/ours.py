"""tracelens' own answers to the cases: the block as users write it, with all layers at once, and as a program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tracelens as tl
from benchmarks.peers.subject import HEAD, Answer, Results, Subject


def traces(subject: Subject) -> dict[str, Answer]:
    """A trace for each case, on a newly wrapped model; layers are named in a Python loop."""
    model = tl.wrap(subject.model)
    return _answers(model, subject, _blocks(subject)) | {"attribution": _attribution(model, subject)}


def mapped_traces(subject: Subject) -> dict[str, Answer]:
    """The cases over all layers, with ``model.layers[:]`` in place of the loop."""
    return _answers(tl.wrap(subject.model), subject, _mapped_blocks(subject))


def programs(subject: Subject) -> dict[str, Answer]:
    """A program for each case, recorded and compiled when it is first called."""
    model = tl.wrap(subject.model)
    ids = subject.ids

    def answer_with(case: str, block: Callable[[Any], None]) -> Answer:
        program: tl.Program | None = None

        def answer() -> Results:
            nonlocal program
            if program is None:
                with model.record() as recording:
                    block(model)
                program = model.compile(recording)
            return dict(program(ids))

        return answer

    answers = {case: answer_with(case, block) for case, block in _blocks(subject).items()}
    return answers | {"sweep": _sweep(model, subject)}


def _attribution(model: tl.Model, subject: Subject) -> Answer:
    """Two traces: the activations on the other prompt, then gradients times differences, all layers in one backward."""
    right, wrong = subject.tokens

    def answer() -> Results:
        with model.trace(subject.other_ids):
            there = model.layers[:].resid_post.save()
        with model.trace(subject.ids) as trace:
            last = model.logits[0, -1]
            here = model.layers[:].resid_post
            gradients = tl.grad(last[right] - last[wrong], here)
            ((tl.per_layer(there) - here) * gradients).sum(-1).save("attribution")
        return {"attribution": trace["attribution"][:, 0]}

    return answer


def _sweep(model: tl.Model, subject: Subject) -> Answer:
    """One program over all strengths, which it runs as the rows of batches."""
    (middle,) = subject.layers("edit-one")
    program: tl.Program | None = None

    def answer() -> Results:
        nonlocal program
        if program is None:
            with model.record() as recording:
                strength = tl.constant(0.0, name="strength")
                model.layers[middle].resid_post += strength * subject.vector
                model.logits[:, -1].save("last")
            program = model.compile(recording)
        points = tl.sweep(program, subject.ids, strength=subject.strengths)
        return {"last": points["last"][:, 0]}

    return answer


def _answers(
    model: tl.Model, subject: Subject, blocks: dict[str, Callable[[Any], None]]
) -> dict[str, Answer]:
    ids = subject.ids

    def answer_with(block: Callable[[Any], None]) -> Answer:
        def answer() -> Results:
            with model.trace(ids) as trace:
                block(model)
            return dict(trace.results)

        return answer

    return {case: answer_with(block) for case, block in blocks.items()}


def _blocks(subject: Subject) -> dict[str, Callable[[Any], None]]:
    """What stands inside the block, case by case."""
    vector, n_layers = subject.vector, subject.n_layers
    middle = subject.layers("read-one")[0]

    def read_one(model: Any) -> None:
        model.layers[middle].resid_post.save(f"h{middle}")
        model.logits.save("logits")

    def read_all(model: Any) -> None:
        for layer in range(n_layers):
            model.layers[layer].resid_post.save(f"h{layer}")
        model.logits.save("logits")

    def edit_one(model: Any) -> None:
        model.layers[middle].resid_post += vector
        model.logits.save("logits")

    def edit_all(model: Any) -> None:
        for layer in range(n_layers):
            model.layers[layer].resid_post += vector
        model.logits.save("logits")

    def stop(model: Any) -> None:
        model.layers[0].resid_post.save("h0")

    def pattern(model: Any) -> None:
        for layer in range(n_layers):
            model.layers[layer].pattern.save(f"h{layer}")
        model.logits.save("logits")

    def z(model: Any) -> None:
        for layer in range(n_layers):
            model.layers[layer].z.save(f"h{layer}")
        model.logits.save("logits")

    def ablate(model: Any) -> None:
        for layer in range(n_layers):
            model.layers[layer].head(HEAD).z = 0
        model.logits.save("logits")

    return {
        "read-one": read_one,
        "read-all": read_all,
        "edit-one": edit_one,
        "edit-all": edit_all,
        "stop": stop,
        "pattern": pattern,
        "z": z,
        "ablate": ablate,
    }


def _mapped_blocks(subject: Subject) -> dict[str, Callable[[Any], None]]:
    vector = subject.vector

    def read_all(model: Any) -> None:
        model.layers[:].resid_post.save("h")
        model.logits.save("logits")

    def edit_all(model: Any) -> None:
        model.layers[:].resid_post += vector
        model.logits.save("logits")

    def pattern(model: Any) -> None:
        model.layers[:].pattern.save("h")
        model.logits.save("logits")

    def z(model: Any) -> None:
        model.layers[:].z.save("h")
        model.logits.save("logits")

    def ablate(model: Any) -> None:
        model.layers[:].head(HEAD).z = 0
        model.logits.save("logits")

    return {"read-all": read_all, "edit-all": edit_all, "pattern": pattern, "z": z, "ablate": ablate}
