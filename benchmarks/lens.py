"""What a logit lens of every layer costs while text is generated: ours, by hand in four ways, and that of peers.

    python -m benchmarks.lens --peer-python nnsight=PYTHON --peer-python transformer_lens=PYTHON --out FOLDER

All of this process take turns step by step (see peers/laps.py), and first all have to agree on the likeliest tokens and
their log-probabilities. Measurements are added to those that the folder has: ``--new 64 128``, then ``--new 256 --only
plain tracelens afterwards``. ``--sample`` measures some steps of a long text, ``--reference`` the loop without a cache,
``--memory`` what tensors take.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the package is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file, save_file

from benchmarks.lens_gpu import on_a_gpu
from benchmarks.lens_report import floor, peer_row, reference_fit, row, sampled_row, table, write
from benchmarks.live_memory import most_live
from benchmarks.models import SmolLM2, Tiny, write_inputs
from benchmarks.ours_lens import ours
from benchmarks.peers import lens_text
from benchmarks.peers.client import PeerFailedError
from benchmarks.peers.laps import Laps, in_turns
from benchmarks.peers.text import WRITTEN, Text, plain
from benchmarks.settings import PEERS, Settings, add_options, load, peer_pythons, say, told

DEFAULT = ("log_prob", "rank", "entropy", "kl")
"""What ``model.logit_lens`` computes beside the likeliest tokens unless it is told otherwise."""
CONTESTANTS: dict[str, Callable[[Text], WRITTEN]] = {
    "plain": plain,
    "product": lens_text.product,
    "product-together": partial(lens_text.product, together=16),
    "last-only": lens_text.last_only,
    "per-step": lens_text.per_step,
    "afterwards": lens_text.afterwards,
    "tracelens": ours,
    "tracelens-metrics": partial(ours, metrics=DEFAULT),
}
ANSWERING = tuple(name for name in CONTESTANTS if not name.startswith(("plain", "product")))
NEAR = 1e-4
"""By how much a log-probability may differ, in nats."""
WARMUP = 3


@dataclass(frozen=True)
class Measurement:
    """One generation: a prompt of ``model.tokens`` tokens and ``new`` more, for these contestants."""

    name: str
    model: Tiny | SmolLM2
    new: int
    rounds: int
    only: tuple[str, ...] = tuple(CONTESTANTS)
    sample: tuple[tuple[int, ...], int] | None = None
    """Lengths of the text, and so many steps after each, in place of all."""


def open_text(model: Tiny | SmolLM2, folder: Path, tokens: int | None = None) -> Text:
    """The model with a prompt of its length, or of another."""
    length = model.tokens if tokens is None else tokens
    model_folder, inputs = model.write(folder), folder / f"inputs{length}.safetensors"
    write_inputs(model_folder, inputs, length)
    return Text.load(model_folder, inputs)


def disagreement(found: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> float:
    """How far log-probabilities are apart, in nats, at the last positions that both read; raises for another token."""
    columns = found["top_1"].shape[1]
    if not torch.equal(found["tokens"], right["tokens"]):
        raise AssertionError("another text was written")
    if not torch.equal(found["top_1"], right["top_1"][:, -columns:]):
        raise AssertionError("another token is the likeliest somewhere")
    error = (found["top_log_probs"] - right["top_log_probs"][:, -columns:]).abs().max().item()
    if not error <= NEAR:
        raise AssertionError(f"log-probabilities are {error} nats apart")
    return error


def measure(
    measurement: Measurement, folder: Path, shuffle: random.Random, tell: Callable[[str], None]
) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor] | None]:
    """The rows of this process, and the answer that peers are compared with."""
    text = open_text(measurement.model, folder)
    answers = {name: CONTESTANTS[name](text) for name in measurement.only}
    for answer in answers.values():
        answer(WARMUP, lambda: None)
    made: list[dict[str, Laps]] = []
    errors: dict[str, float] = {}
    right: dict[str, torch.Tensor] | None = None
    for number in range(measurement.rounds):
        tell(f"{measurement.new} tokens, round {number + 1} of {measurement.rounds}, {len(answers)} in turns")
        laps = in_turns({name: partial(each, measurement.new) for name, each in answers.items()}, shuffle)
        if number == 0:
            by_hand = next((name for name in ("per-step", "afterwards") if name in laps), None)
            right = laps[by_hand].results if by_hand else None
            for name in set(laps) & set(ANSWERING) if right else ():
                assert right is not None
                errors[name] = disagreement(laps[name].results, right)
        made.append({name: replace(each, results=None) for name, each in laps.items()})
    rows = [row(name, made, text, measurement.new) | {"error": errors.get(name)} for name in measurement.only]
    return rows, right


def sampled(
    measurement: Measurement, folder: Path, shuffle: random.Random, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Rows of steps after some lengths of the text; what stands before them are random tokens."""
    assert measurement.sample is not None
    lengths, steps = measurement.sample
    made: dict[int, dict[str, Laps]] = {}
    ways: dict[str, Callable[[Text], WRITTEN]] = {
        **CONTESTANTS,
        # The pass over the tokens before is no step.
        "tracelens": partial(ours, positions="generated"),
        "tracelens-metrics": partial(ours, metrics=DEFAULT, positions="generated"),
    }
    # At the end it would read the tokens that stand before the steps as well.
    named = [name for name in measurement.only if name != "afterwards"]
    for length in lengths:
        text = open_text(measurement.model, folder, length)
        answers = {name: ways[name](text) for name in named}
        tell(f"{steps} steps after {length} tokens")
        made[length] = in_turns({name: partial(each, steps + 1) for name, each in answers.items()}, shuffle)
    return [sampled_row(name, made, measurement.new) for name in named]


def with_peers(
    measurement: Measurement,
    settings: Settings[Measurement],
    folder: Path,
    right: Mapping[str, torch.Tensor],
    report: dict[str, Any],
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The rows of the peers, each in its process beside plain generation."""
    model_folder, reference = measurement.model.write(folder), folder / "right.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in right.items()}, reference)
    largest = load_file(reference)["top_log_probs"].abs().max().item()
    inputs = folder / f"inputs{measurement.model.tokens}.safetensors"
    rows: list[dict[str, Any]] = []
    peers = settings.processes("_lens")
    report["peers"] |= {name: told(peer) for name, peer in peers.items()}
    for name, peer in peers.items():
        if peer.absent is not None:
            continue
        tell(f"{measurement.new} tokens, {name}")
        replies: list[dict[str, Any]] = []
        try:
            peer.ask("open", folder=model_folder, inputs=str(inputs))
            peer.ask("time", case="lens", new=WARMUP, seed=0)
            for seed in range(measurement.rounds):
                replies.append(
                    peer.ask("time", case="lens", new=measurement.new, seed=seed, reference=str(reference))
                )
            rows.append(peer_row(name, replies, largest, NEAR))
        except PeerFailedError as failure:
            rows.append({"contestant": name, "absent": str(failure)})
        finally:
            peer.close()
    return rows


def reference_loop(
    model: Tiny | SmolLM2, folder: Path, lengths: Sequence[int], rounds: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """The time of a token in the loop without a cache, after texts of some lengths, and the curve through it."""
    times: dict[int, list[float]] = {length: [] for length in lengths}
    for _ in range(rounds):
        for length in lengths:
            tell(f"the reference loop after {length} tokens")
            text = open_text(model, folder, length)
            found = in_turns({"reference": partial(lens_text.reference(text), 1)}, random.Random(0))[
                "reference"
            ]
            right = lens_text.per_step(text)(1, lambda: None)
            disagreement(found.results, right)
            times[length].append(found.whole.work)
    return reference_fit(times, model.tokens)


def memory(model: Tiny | SmolLM2, folder: Path, new: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """What the tensors of a run take at most, and what is left of them in its result."""
    text = open_text(model, folder)
    config = text.model.config
    width = config.head_dim * config.num_key_value_heads if getattr(config, "head_dim", None) else 0
    positions = model.tokens + new - 1
    cache = 2 * config.num_hidden_layers * width * positions * 4
    ways: dict[str, tuple[WRITTEN, int]] = {
        "plain": (plain(text), new),
        "per-step": (lens_text.per_step(text), new),
        "afterwards": (lens_text.afterwards(text), new),
        "afterwards, half the rows": (lens_text.afterwards(text, rows=lens_text.ROWS // 2), new),
        "tracelens": (ours(text), new),
        "tracelens, workspace of 4 MiB": (ours(text, workspace=4 * 2**20), new),
        "tracelens, workspace of 2 MiB": (ours(text, workspace=2 * 2**20), new),
        "reference": (lens_text.reference(text), 1),
    }
    rows: list[dict[str, Any]] = []
    for name, (way, count) in ways.items():
        tell(f"memory of {name}")
        most, _, results = most_live(partial(way, count, lambda: None))
        left = sum(tensor.untyped_storage().nbytes() for tensor in results.values())
        held = 0 if name == "reference" else cache
        rows.append({"contestant": name, "new": count, "bytes": most - held, "result_bytes": left})
        del results
    return {
        "new": new,
        "prompt": model.tokens,
        "layers": config.num_hidden_layers,
        "d_model": config.hidden_size,
        "vocabulary": config.vocab_size,
        "rows_in_hand": lens_text.ROWS,
        "cache_bytes": cache,
        "rows": rows,
    }


def run(
    settings: Settings[Measurement],
    *,
    memory_of: int = 0,
    reference: Sequence[int] = (),
    tell: Callable[[str], None] = lambda text: None,
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Measures what is asked for; ``keep`` gets the report whenever there is more of it."""
    settings.prepare()
    report: dict[str, Any] = {"measurements": [], "peers": {}}
    shuffle = random.Random(settings.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for measurement in settings.measurements:
            before = load()
            found: dict[str, Any] = {
                "model": measurement.name,
                "new": measurement.new,
                "prompt": measurement.model.tokens,
            }
            if measurement.sample is None:
                found["rows"], right = measure(measurement, folder, shuffle, tell)
                if right is not None:
                    found["rows"] += with_peers(measurement, settings, folder, right, report, tell)
            else:
                found["rows"] = sampled(measurement, folder, shuffle, tell)
                found["sample"] = {"lengths": measurement.sample[0], "steps": measurement.sample[1]}
            found["floor"] = floor(open_text(measurement.model, folder))
            found["about"] = settings.about(before, NEAR)
            report["measurements"].append(found)
            keep(report)
        model = settings.measurements[0].model if settings.measurements else SmolLM2()
        if reference:
            report["reference"] = reference_loop(model, folder, reference, 2, tell)
            keep(report)
        if memory_of:
            report["memory"] = memory(model, folder, memory_of, tell)
            keep(report)
    report["gpu"] = on_a_gpu(tell)
    keep(report)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "smollm2"), default="smollm2")
    parser.add_argument("--new", nargs="*", type=int, default=[64, 128], help="how many tokens are generated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=tuple(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument(
        "--sample",
        nargs="+",
        type=int,
        metavar="N",
        help="steps, and the lengths of the text that they come after",
    )
    parser.add_argument(
        "--reference", nargs="*", type=int, default=[], help="lengths at which that loop is timed"
    )
    parser.add_argument(
        "--memory", type=int, default=0, metavar="NEW", help="count tensors while so many are made"
    )
    add_options(parser, "lens")
    options = parser.parse_args(arguments)
    model: Tiny | SmolLM2 = Tiny(new=2000) if options.model == "tiny" else SmolLM2()
    sample = (tuple(options.sample[1:]), options.sample[0]) if options.sample else None
    measurements = tuple(
        Measurement(options.model, model, new, options.rounds, tuple(options.only), sample)
        for new in options.new
    )
    assert set(options.peers) <= set(PEERS)
    report = run(
        Settings(measurements, peer_pythons(parser, options), options.threads, options.seed),
        memory_of=options.memory,
        reference=options.reference,
        tell=say,
        keep=lambda report: write(report, options.out, options.page),
    )
    print(table(report))


if __name__ == "__main__":
    main()
