"""The command-line tool: ``tracelens demo``, ``lens PROMPT``, ``steer extract | sweep | generate``, ``sites MODEL``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tracelens import lens_command, steer_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; gives the process's exit code."""
    parser = argparse.ArgumentParser(
        prog="tracelens", description="Look inside and steer large language models."
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("demo", help="look inside a small real model and steer it")
    lens_command.add_options(commands.add_parser("lens", help="what every layer of a model would say next"))
    steer_command.add_options(commands.add_parser("steer", help="make, measure and use a steering vector"))
    sites = commands.add_parser(
        "sites", help="list the sites of a model: names, shapes, what a write changes"
    )
    sites.add_argument("model", help='a hub id, a local folder, or "smollm2-135m"')
    options = parser.parse_args(argv)

    # torch and transformers are imported only now: --help and --version answer at once.
    from tracelens import TracelensError, __version__

    if options.version:
        print(f"tracelens {__version__}")
        return 0
    try:
        if options.command == "demo":
            from tracelens import demo

            _quiet()
            demo.run()
        elif options.command == "lens":
            _quiet()
            print(lens_command.run(options))
        elif options.command == "steer":
            _quiet()
            print(steer_command.run(options))
        elif options.command == "sites":
            from tracelens import load

            _quiet()
            print(load(options.model, weights=False).sites())
        else:
            parser.print_help()
    except TracelensError as error:
        if options.command in ("lens", "steer"):
            error.at = None  # of a command's user there is no line
        print(f"tracelens: {error}", file=sys.stderr)
        return 1
    return 0


def _quiet() -> None:
    """Keeps transformers' progress bars and advice out of the output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    raise SystemExit(main())
