"""Runs the conformance suite against the transformers that is installed, and says which families changed there.

``make upstream`` calls it in an environment of its own with the newest transformers. A family has changed where a test
of its sites fails; the suite compares every site with an independent forward pass, so nothing else can be the reason.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

from tests.support.more_families import ALL

ROOT = Path(__file__).resolve().parents[1]
SUITE = ("tests/conformance",)
NO_FAMILY = "(no family)"


@dataclass
class Outcome:
    """What became of a family's tests."""

    passed: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list[str])


def family_of(test: str) -> str:
    """The family in the parameters of a test: ``test_reads[llama-single]`` is of llama."""
    parameters = test.partition("[")[2].rstrip("]").split("-")
    return next((part for part in parameters if part in ALL), NO_FAMILY)


def outcomes(report: Path) -> dict[str, Outcome]:
    """What became of the tests of a JUnit report, by family."""
    found: defaultdict[str, Outcome] = defaultdict(Outcome)
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("name", "")
        outcome = found[family_of(name)]
        if case.find("failure") is not None or case.find("error") is not None:
            outcome.failed.append(f"{case.get('classname', '')}::{name}")
        elif case.find("skipped") is not None:
            outcome.skipped += 1
        else:
            outcome.passed += 1
    return dict(found)


def table(found: dict[str, Outcome]) -> str:
    """A line for each family, the changed ones first, each with some of its tests that fail."""
    lines: list[str] = []
    for name, outcome in sorted(found.items(), key=lambda item: (-len(item[1].failed), item[0])):
        state = "CHANGED" if outcome.failed else "same"
        lines.append(
            f"{state:8} {name:20} {outcome.passed:5} passed {len(outcome.failed):4} failed {outcome.skipped:4} skipped"
        )
        lines += [f"           {test}" for test in outcome.failed[:5]]
    return "\n".join(lines)


def main(arguments: Iterable[str]) -> int:
    """Runs the suite, or what is named instead of it; 1 where a family changed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *(tuple(arguments) or SUITE)]
        done = subprocess.run(command, cwd=ROOT, check=False)
        if not report.exists():
            return done.returncode or 1
        found = outcomes(report)
    print(f"\ntransformers {version('transformers')}, torch {version('torch')}\n{table(found)}")
    return 1 if done.returncode or any(outcome.failed for outcome in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
