"""``tracelens steer extract | sweep | generate``: a steering vector from files to a report, in a terminal."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracelens.model import Model
    from tracelens.steering import Contrast, SteeringVector

_PARTS = ("train", "validation", "test")


def add_options(steer: argparse.ArgumentParser) -> None:
    """What can be asked for. Nothing here needs torch: --help answers at once."""
    commands = steer.add_subparsers(dest="steer", required=True)

    extract = commands.add_parser("extract", help="make a vector from a file of questions with two answers")
    _data(extract)
    extract.add_argument(
        "--sites", nargs="+", default=["resid_post"], metavar="SITE", help="default: resid_post"
    )
    extract.add_argument(
        "--layers", default="all", metavar="RANGES", help='"8-20,25-": both ends count; or all'
    )
    extract.add_argument(
        "--method", default="mean_difference", help="mean_difference (default), pca, logistic, lda, ..."
    )
    extract.add_argument("--positions", default="label", help="label (default), decision, last, mean")
    extract.add_argument(
        "--save", type=Path, required=True, metavar="FILE", help="the vector: .safetensors or .gguf"
    )

    sweep = commands.add_parser(
        "sweep", help="choose a place on validation rows, and measure it on test rows"
    )
    sweep.add_argument("vector", type=Path, help="a file of steer extract")
    _data(sweep)
    sweep.add_argument(
        "--multipliers", nargs="+", type=float, metavar="K", help="default: -1.5 -1 -0.5 0 0.5 1 1.5"
    )
    sweep.add_argument(
        "--by",
        default="slope",
        help="what is largest at the chosen place: slope (default), interval, relative_slope",
    )
    sweep.add_argument(
        "--controls", type=int, default=20, metavar="N", help="random and shuffled vectors (20 of each)"
    )
    sweep.add_argument(
        "--damage", type=Path, metavar="FILE", help="neutral texts, one a line: KL and perplexity"
    )
    sweep.add_argument("--html", type=Path, metavar="FILE", help="write a page: the figure and all numbers")
    sweep.add_argument("--save", type=Path, metavar="FILE", help="write all numbers: .json")
    sweep.add_argument(
        "--save-vector", type=Path, metavar="FILE", help="write the vector of the chosen place: .safetensors"
    )

    generate = commands.add_parser("generate", help="write a text with a vector")
    generate.add_argument("vector", type=Path, help="a file of steer extract")
    generate.add_argument("prompt", help="the text")
    generate.add_argument(
        "--strength", type=float, nargs="+", default=[0.0, 1.0], help="one text for each (0 1)"
    )
    generate.add_argument("--site", help="of the vector's sites, where it has several")
    generate.add_argument("--layers", default="all", metavar="RANGES", help="of the vector's layers")
    generate.add_argument(
        "--positions", default="all", help="all (default), prompt, last_prompt_token, generated"
    )
    generate.add_argument("--operator", default="add", help="add (default), norm_relative, ablate, ...")
    generate.add_argument("--max-new-tokens", type=int, default=40, metavar="N")
    for command in (extract, sweep, generate):
        command.add_argument(
            "--model", default="smollm2-135m", help="a hub id, a local folder, or smollm2-135m (default)"
        )
        command.add_argument(
            "--device-map", metavar="MAP", help='spreads the model over devices: auto, "cuda:1", ...'
        )
        command.add_argument(
            "--tp", type=int, default=1, metavar="N", help="so many processes share each layer"
        )
        command.add_argument(
            "--pp", type=int, default=1, metavar="N", help="so many stages of layers, in processes"
        )


def _data(command: argparse.ArgumentParser) -> None:
    """How a file of contrast data is read: the same words for making and for measuring, or the rows are others."""
    command.add_argument("data", type=Path, help="a file of the model-written evaluations, or of CAA")
    command.add_argument("--template", default="plain", help="plain (default) or chat")
    command.add_argument("--letters", default="balanced", help="balanced (default) or as_written")
    command.add_argument("--seed", type=int, default=0, help="of the split and of draws")
    command.add_argument("--rows", type=int, metavar="N", help="so many of each part at most")
    command.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts in a pass (8)")


def run(options: argparse.Namespace) -> str:
    """What the command prints; files are written on the way."""
    _writable(options)
    from tracelens.loading import load

    with load(options.model, device_map=options.device_map, tp=options.tp, pp=options.pp) as model:
        return {"extract": _extract, "sweep": _sweep, "generate": _generate}[options.steer](model, options)


def _writable(options: argparse.Namespace) -> None:
    """Raises for files that are not there, or could not be written in the end, before anything takes time."""
    from tracelens.errors import SteeringFileError

    for name in ("data", "vector", "damage"):
        given: Path | None = getattr(options, name, None)
        if given is not None and not given.exists():
            raise SteeringFileError(f"there is no file {str(given)!r}", instead="the path of a file")
    endings = {"extract": (".safetensors", ".gguf"), "sweep": (".json",)}
    kept: Path | None = getattr(options, "save", None)
    if kept is not None and kept.suffix.lower() not in endings[options.steer]:
        words = " or ".join(endings[options.steer])
        raise SteeringFileError(
            f"{kept.name!r} does not end in {words}", instead=f"--save FILE, ending in {words}"
        )
    for name in ("save", "save_vector", "html"):
        file: Path | None = getattr(options, name, None)
        if file is not None and not file.absolute().parent.is_dir():
            raise SteeringFileError(
                f"{file}: there is no folder {file.parent}", instead="a file in a folder that is there"
            )


def _part(options: argparse.Namespace, part: str) -> Contrast:
    from tracelens.steering import load_contrast

    data = load_contrast(options.data, template=options.template, letters=options.letters, seed=options.seed)
    found: Contrast = getattr(data, part)
    return found if options.rows is None else found[: options.rows]


def _extract(model: Model, options: argparse.Namespace) -> str:
    from tracelens.lens_command import chosen
    from tracelens.steering import extract

    vector = extract(
        model,
        _part(options, "train"),
        sites=options.sites,
        layers=chosen("--layers", options.layers, model.n_layers, "layers", ("all",)),  # pyright: ignore[reportArgumentType]  # a word that it knows
        method=options.method,
        positions=options.positions,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    if options.save.suffix == ".gguf":
        vector.to_gguf(options.save)
    else:
        vector.save(options.save)
    return f"{vector.report()}\nwrote {options.save}"


def _sweep(model: Model, options: argparse.Namespace) -> str:
    from tracelens.steering import SteeringCurve, choose, load, sweep
    from tracelens.steering.measuring import MULTIPLIERS

    vector = load(options.vector, model)
    common: dict[str, Any] = {"batch_size": options.batch_size, "seed": options.seed}
    grid = options.multipliers or MULTIPLIERS
    lines: list[str] = []
    how = f"template {options.template}, letters {options.letters}, seed {options.seed}"
    told: list[Any] = [vector.report(), f"{options.data.name}: {how}"]
    if len(vector) > 1:
        best = choose(model, vector, _part(options, "validation"), grid, by=options.by, **common)
        lines += [repr(best), ""]
        told.append(best)
        vector = best.vector
    texts = None
    if options.damage is not None:
        texts = [line for line in options.damage.read_text(encoding="utf-8").splitlines() if line.strip()]
    curve = sweep(
        model, vector, _part(options, "test"), grid, controls=options.controls, damage=texts, **common
    )
    assert isinstance(curve, SteeringCurve)
    lines.append(repr(curve))
    if options.html is not None:
        lines.append(f"wrote {curve.to_html(options.html, *told)}")
    if options.save is not None:
        lines.append(f"wrote {curve.save(options.save)}")
    if options.save_vector is not None:
        lines.append(f"wrote {vector.save(options.save_vector)}")
    return "\n".join(lines)


def _generate(model: Model, options: argparse.Namespace) -> str:
    from tracelens.lens_command import chosen
    from tracelens.steering import load

    vector: SteeringVector = load(options.vector, model)
    layers = chosen("--layers", options.layers, model.n_layers, "layers", ("all",))
    if options.site is not None:
        vector = vector.at(sites=options.site)
    if isinstance(layers, list):
        vector = vector.at(layers=layers)
    lines: list[str] = []
    if len(vector) > 1:
        words = f"{', '.join(vector.sites)} of {len(vector.layers)} layers"
        lines.append(f"steered at {words} at once; --layers and --site choose some")
    for strength in options.strength:
        with model.generate(options.prompt, max_new_tokens=options.max_new_tokens) as t:
            if strength:
                vector.apply(t, strength, positions=options.positions, operator=options.operator)
        lines.append(f"{strength:g}: {options.prompt}{t.text}")
    return "\n".join(lines)
