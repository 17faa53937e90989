"""Shows that the tests can fail: breaks a copy of the library on purpose, one line at a time, and runs them.

A mutant that survives, or whose line is no longer there, fails the run. ``python tests/mutants/run.py [words]`` runs
the mutants whose names hold one of the words. ``--tested`` says that all tests have just passed without any mutant.
``--part=2/4`` takes every fourth mutant, from number 2 on, and first says that every mutant's line is still there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.mutants.mutants import MUTANTS, Mutant  # noqa: E402  # the checkout is on the path only now

AT_ONCE = 2
SECONDS = 600


def copy_of_the_project(folder: Path) -> None:
    """What the tests need, without anything built or cached."""
    ignore = shutil.ignore_patterns("__pycache__", ".hypothesis", "*.pyc")
    for part in ("tracelens", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)


def tests_pass(folder: Path, tests: tuple[str, ...]) -> tuple[bool, str]:
    """Runs the tests on the copy; gives whether they passed, and the end of what they printed."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "HYPOTHESIS_PROFILE": "ci",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    # 0: all passed, 1: some failed. Anything else (nothing collected, a usage error) says nothing about the mutant.
    if done.returncode not in (0, 1):
        raise RuntimeError(
            f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.returncode == 0, done.stdout[-600:]


def stands(mutant: Mutant) -> bool:
    """Does the line that a mutant changes stand in its file, once?"""
    return (ROOT / "tracelens" / mutant.file).read_text().count(mutant.right) == 1


def survives(mutant: Mutant) -> str | None:
    """The reason why a mutant counts against the tests, or ``None`` if it was killed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_of_the_project(folder)
        target = folder / "tracelens" / mutant.file
        target.write_text(target.read_text().replace(mutant.right, mutant.wrong))
        passed, _ = tests_pass(folder, mutant.tests)
        return "the tests passed all the same" if passed else None


def unbroken(tests: tuple[str, ...]) -> str | None:
    """The tests must pass without a mutant, or their failing would prove nothing."""
    with tempfile.TemporaryDirectory() as name:
        copy_of_the_project(Path(name))
        passed, said = tests_pass(Path(name), tests)
        return None if passed else f"the tests fail without any mutant:\n{said}"


def main(words: list[str]) -> int:
    tested = "--tested" in words
    part = next((word.partition("=")[2] for word in words if word.startswith("--part=")), "0/1")
    words = [word for word in words if not word.startswith("--")]
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    gone = [mutant.name for mutant in chosen if not stands(mutant)]
    if gone:
        print("the lines of these mutants do not stand there once: " + "; ".join(gone))
        return 1
    first, each = map(int, part.split("/"))
    chosen = chosen[first % each :: each]
    failures = 0
    started = time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        selections = [] if tested else list(dict.fromkeys(mutant.tests for mutant in chosen))
        for tests, problem in zip(selections, pool.map(unbroken, selections), strict=True):
            if problem is not None:
                print(f"{' '.join(tests)}: {problem}")
                failures += 1
        if failures:
            return 1
        for mutant, problem in zip(chosen, pool.map(survives, chosen), strict=True):
            print(
                f"{'killed  ' if problem is None else 'SURVIVED'}  {mutant.name}"
                + (f": {problem}" if problem else "")
            )
            failures += problem is not None
    print(f"{len(chosen) - failures} of {len(chosen)} mutants killed in {time.monotonic() - started:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
