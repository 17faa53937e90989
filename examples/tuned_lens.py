"""The tuned lens: what each layer says next, read through a map that was trained for it.

Trains one for SmolLM2 on text that every Python brings, the language reference behind ``help("yield")``, and compares
it with the logit lens on chapters that it has not seen::

    python -m examples.tuned_lens --steps 250 --tokens 2048 --folder my-lens

An interrupted training goes on where it was. Each token takes 3.4 GFLOP here, most of them for the unembedding, which
every layer needs twice: on a GPU the published plan takes minutes, on a small CPU a few thousand tokens do.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from pydoc_data.topics import topics

import torch

import tracelens as tl
from tracelens.lens.evaluation import LensEvaluation


def texts() -> tuple[list[str], list[str]]:
    """The chapters to train on, and every fifth one to compare on, without paragraphs that the others have too."""
    chapters = [topics[name] for name in sorted(topics)]
    seen = [text for number, text in enumerate(chapters) if number % 5]
    known = {paragraph for text in seen for paragraph in text.split("\n\n")}
    held_out = (text.split("\n\n") for text in chapters[::5])
    return seen, ["\n\n".join(part for part in parts if part not in known) for parts in held_out]


def main(
    model: tl.Model,
    *,
    steps: int,
    tokens: int,
    context: int,
    most: int,
    folder: Path | None = None,
    **options: float,
) -> tuple[tl.TunedLens, LensEvaluation]:
    """Trains a lens, keeps it in ``folder``, and compares it on the first ``most`` windows of unseen text."""
    seen, held_out = texts()
    lens = tl.TunedLens.train(
        model,
        seen,
        steps=steps,
        tokens_per_step=tokens,
        context=context,
        checkpoint=folder,
        checkpoint_every=5,
        **options,
    )
    if folder is not None:
        lens.save(folder)
    # The tokens are cut here, so that the comparison takes no longer than asked for.
    assert model.tokenizer is not None
    ids = [id for text in held_out for id in model.tokenizer(text, verbose=False)["input_ids"]]
    return lens, lens.evaluate(model, [ids[: most * context]], context=context)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of one step")
    parser.add_argument("--context", type=int, default=128, help="tokens of one window")
    parser.add_argument("--windows", type=int, default=64, help="windows of unseen text to compare on")
    parser.add_argument("--rate", type=float, default=1.0, help="the learning rate")
    parser.add_argument("--clip", type=float, default=1.0, help="the largest norm of a step's gradient")
    parser.add_argument("--dtype", default="float32", help="of the model")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the lens and its checkpoint are kept"
    )
    parser.add_argument("--results", type=Path, default=None, help="a JSON file for what was found")
    chosen = parser.parse_args()
    small = tl.load("smollm2-135m", dtype=getattr(torch, chosen.dtype))
    trained, found = main(
        small,
        steps=chosen.steps,
        tokens=chosen.tokens,
        context=chosen.context,
        most=chosen.windows,
        folder=chosen.folder,
        learning_rate=chosen.rate,
        clip=chosen.clip,
    )
    print(found)
    if chosen.results is not None:
        assert trained.training is not None
        values = {
            name: [round(value, 5) for value in getattr(found, name).tolist()]
            for name in ("kl", "kl_error", "identity_kl", "identity_kl_error")
        }
        results = {
            "model": small.describe(),
            "plan": trained.training.plan,
            "windows": trained.training.windows,
            "bits_per_byte": trained.training.bits_per_byte,
            "tokens": found.tokens,
            **values,
        }
        chosen.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
