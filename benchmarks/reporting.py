"""What the reports of the benchmarks share: names, ratios, verdicts, where it was measured, and files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TITLES = {
    "plain": "bare forward",
    "hooks": "hooks by hand",
    "nnsight": "nnsight",
    "transformer_lens": "TransformerLens",
    "steering_vectors": "steering-vectors",
}


def title(contestant: str) -> str:
    return TITLES.get(contestant, contestant)


def ratio_text(ratio: Mapping[str, float]) -> str:
    return f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def verdict(most: float, *ratios: Mapping[str, float]) -> str:
    """Whether all of them (of the clock and of the work) are at most that, by their intervals."""
    if max(ratio["high"] for ratio in ratios) <= most:
        return "met"
    # Neither's noise decides: one that is above with all of its interval is enough.
    return "missed" if max(ratio["low"] for ratio in ratios) > most else "within the spread"


def machine(about: Mapping[str, Any]) -> str:
    return (
        f"{about['date']}, {about['processor']}, {about['cores']} cores, {about['threads']} torch thread(s)"
    )


def load(about: Mapping[str, Any]) -> str:
    return f"load average {about['load_before']} before, {about['load_after']} after"


def versions(about: Mapping[str, Any]) -> str:
    return (
        f"Python {about['python']}, torch {about['torch']}, transformers {about['transformers']}, "
        f"tracelens {about['tracelens']}"
    )


def peers(report: Mapping[str, Any]) -> Iterator[str]:
    """Which peers there were."""
    for name, peer in report["peers"].items():
        yield (
            f"{title(name)}: absent ({peer['absent']})"
            if "absent" in peer
            else f"{title(name)} {peer['version']} on Python {peer['python']}, torch {peer['torch']}, "
            f"transformers {peer['transformers']}"
        )


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: int) -> list[str]:
    """The lines of a table; its first ``words`` columns are words, the others numbers."""
    return [
        "| " + " | ".join(columns) + " |",
        "| " + " | ".join(["---"] * words + ["---:"] * (len(columns) - words)) + " |",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def write_files(name: str, report: Mapping[str, Any], short: str, folder: Path) -> None:
    """The report as ``name``.json and, as Markdown, in ``name``.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(short, encoding="utf-8")


def write_page(page: Path, text: str) -> None:
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
