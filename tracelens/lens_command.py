"""``tracelens lens PROMPT``: the logit lens in a terminal, as a page, as a file."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracelens.lens.result import LensResult

_WORDS = ("all", "prompt", "generated", "last")
_PART = re.compile(r"(\d+)(?:(-)(\d*))?")


def add_options(lens: argparse.ArgumentParser) -> None:
    """What can be asked for. Nothing here needs torch: --help answers at once."""
    lens.add_argument("prompt", help="the text")
    lens.add_argument(
        "--model", default="smollm2-135m", help="a hub id, a local folder, or smollm2-135m (default)"
    )
    lens.add_argument("--layers", default="all", metavar="RANGES", help='"0-20,25-": both ends count; or all')
    lens.add_argument(
        "--components",
        nargs="+",
        default=["resid_post"],
        metavar="SITE",
        help="sites of a layer, such as attn_out mlp_out resid_post (default: resid_post)",
    )
    lens.add_argument(
        "--positions",
        default="all",
        metavar="RANGES",
        help=f'{", ".join(_WORDS)}, or tokens of the prompt: "0-3,5-" (default: all)',
    )
    lens.add_argument(
        "--generate", type=int, default=0, metavar="N", help="look at N new tokens while they are made"
    )
    lens.add_argument(
        "--temperature", type=float, help="draw the new tokens, at this temperature (default: greedy)"
    )
    lens.add_argument("--seed", type=int, help="of tokens that are drawn")
    lens.add_argument("--top-k", type=int, default=10, metavar="K", help="likeliest tokens of each cell (10)")
    lens.add_argument(
        "--track",
        action="append",
        default=[],
        metavar="TEXT",
        help='a token to follow, " Paris"; may be repeated',
    )
    lens.add_argument(
        "--metric", metavar="NAME", help="beside each token in the table: prob, entropy, kl, rank, ..."
    )
    lens.add_argument("--lens", metavar="FOLDER", help="a tuned lens, in place of the model's own head alone")
    lens.add_argument(
        "--device-map", metavar="MAP", help='spreads the model over devices: auto, "cuda:1", ...'
    )
    lens.add_argument("--tp", type=int, default=1, metavar="N", help="so many processes share each layer")
    lens.add_argument("--pp", type=int, default=1, metavar="N", help="so many stages of layers, in processes")
    lens.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page to look around in, and no table"
    )
    lens.add_argument(
        "--save", type=Path, metavar="FILE", help="write all numbers: .parquet .csv .json .safetensors"
    )


def run(options: argparse.Namespace) -> str:
    """What the command prints; files are written on the way."""
    # What is wrong by itself is found before a large model is loaded.
    metrics = _metrics(options.metric)
    for spec in (options.layers, options.positions):
        if spec not in _WORDS:
            _parts(spec)
    _writable(options)

    from tracelens.lens.tuned import TunedLens
    from tracelens.loading import load

    tuned = None if options.lens is None else TunedLens.load(options.lens)
    with load(options.model, device_map=options.device_map, tp=options.tp, pp=options.pp) as model:
        length = len(model.tokens(options.prompt)[0])
        found: Any = model.logit_lens(
            options.prompt,
            components=options.components,
            layers=chosen("--layers", options.layers, model.n_layers, "layers", ("all",)),
            positions=chosen("--positions", options.positions, length, "tokens of the prompt", _WORDS),
            top_k=options.top_k,
            track=options.track,
            metrics=metrics,
            lens=tuned,
            generate=options.generate,
            **_drawing(options),
        )
    return _told(found, options)


def _told(lens: LensResult, options: argparse.Namespace) -> str:
    lines = [] if options.html is not None else [lens.table(options.metric) if options.metric else repr(lens)]
    if options.html is not None:
        lines.append(f"wrote {lens.to_html(options.html)}")
    if options.save is not None:
        lines.append(f"wrote {lens.save(options.save)}")
    return "\n".join(lines)


def _drawing(options: argparse.Namespace) -> dict[str, Any]:
    """How tokens are drawn, if they are."""
    from tracelens.errors import LensError

    if options.temperature is None:
        if options.seed is not None:
            raise LensError(
                "--seed has no effect: without --temperature the likeliest token is taken",
                instead="--generate 100 --temperature 0.8 --seed 0",
            )
        return {}
    return {"do_sample": True, "temperature": options.temperature, "seed": options.seed}


def _metrics(metric: str | None) -> tuple[str, ...]:
    """What is to be computed, so that the table has its number."""
    from tracelens.errors import LensError
    from tracelens.lens.logit_lens import METRICS
    from tracelens.lens.statistics import DERIVED, STORED
    from tracelens.lens_value import Lens

    if metric is None or metric in DERIVED:
        return METRICS
    known = [name for name in STORED if hasattr(Lens, name)]
    if metric not in known:
        raise LensError(
            f"--metric {metric}: there is none of that name", instead=", ".join([*DERIVED, *known])
        )
    return tuple(dict.fromkeys([*METRICS, metric]))


def _writable(options: argparse.Namespace) -> None:
    """Raises for files that could not be written in the end, before anything takes time."""
    from tracelens.errors import LensFileError
    from tracelens.lens.files import form

    for file in (options.html, options.save):
        if file is not None and not file.absolute().parent.is_dir():
            raise LensFileError(
                f"{file}: there is no folder {file.parent}", instead="a file in a folder that is there"
            )
    if options.save is not None:
        form(options.save)


# --- ranges ----------------------------------------------------------------------------------------------------------


def _parts(spec: str) -> list[tuple[int, int | None]]:
    """First and last of each part of ``0-20,25-``, both included; no last one where it is open."""
    from tracelens.errors import LensError

    found: list[tuple[int, int | None]] = []
    for part in spec.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise LensError(f"{part.strip()!r} in {spec!r} is no range", instead='"0-20,25-", "7" or "all"')
        first, open_, last = match.groups()
        end = int(first) if open_ is None else int(last) if last else None
        if end is not None and end < int(first):
            raise LensError(f"{part.strip()!r} in {spec!r} ends before it begins", instead=f'"{end}-{first}"')
        found.append((int(first), end))
    return found


def chosen(option: str, spec: str, count: int, what: str, words: tuple[str, ...]) -> str | list[int]:
    """The numbers that a text names, of ``count``; or a word as it is."""
    from tracelens.errors import LensError

    if spec in words:
        return spec
    found: set[int] = set()
    for first, last in _parts(spec):
        end = count - 1 if last is None else last
        if first >= count or end >= count:
            raise LensError(
                f"{option} {spec}: there are {count} {what}, 0 to {count - 1}",
                instead=f'{option} "0-{count - 1}"',
            )
        found.update(range(first, end + 1))
    return sorted(found)
