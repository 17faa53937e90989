"""Runs the code of a documentation page as a reader would: from top to bottom, in one session.

In a page, a fenced ``python`` block is run, and a ``text`` block right after it is what it prints. ``python
raises=Name`` is a block that must raise that error; the ``text`` block after it is then the error's message. ``python
not-run`` is for the rare line that needs something that is not there (a hub, a second model).

A page with the comment ``<!-- runs on 3 GPUs, or on pretend devices -->`` runs on the GPUs of the machine if there are
so many, and else on the pretend devices of the tests: ``cuda:`` is then read as ``pretend:``, and shown the other way.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What errors and explain() call the file that a block stands in.
READER_FILE = "example.py"

_DEVICES = re.compile(r"^<!-- runs on (\d+) GPUs, or on pretend devices -->$", re.MULTILINE)
_NUMBER = re.compile(r"-?\d+\.\d+(?:e[+-]?\d+)?")


@dataclass(frozen=True)
class Block:
    """A block of code in a page. ``line``: its first line in the page, from 0. ``shown``: the lines of its output."""

    line: int
    code: str
    raises: str | None
    shown: range | None

    def where(self, page: Path) -> str:
        return f"{page.relative_to(ROOT)}:{self.line + 1}"


class PageError(AssertionError):
    """A block did not do what the page says."""


# Its entries are run one by one, on a tiny model, by tests/docs/test_errors_page.py.
ON_THEIR_OWN = (ROOT / "docs" / "errors.md",)


def pages() -> list[Path]:
    """All pages with code to run from top to bottom."""
    found = [ROOT / "README.md", *sorted(set((ROOT / "docs").rglob("*.md")) - set(ON_THEIR_OWN))]
    return [page for page in found if "```python" in page.read_text(encoding="utf-8")]


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a page that are run, in order."""
    lines = text.splitlines()
    fences = [number for number, line in enumerate(lines) if line.lstrip().startswith("```")]
    if len(fences) % 2:
        raise PageError("a fence is not closed")
    spans = list(zip(fences[::2], fences[1::2], strict=True))
    for position, (start, end) in enumerate(spans):
        words = lines[start].strip().removeprefix("```").split()
        if words[:1] != ["python"] or "not-run" in words:
            continue
        options = words[1:]
        raises = next(
            (option.removeprefix("raises=") for option in options if option.startswith("raises=")), None
        )
        shown = None
        if position + 1 < len(spans):
            first, last = spans[position + 1]
            if lines[first].strip() == "```text" and not any(line.strip() for line in lines[end + 1 : first]):
                shown = range(first + 1, last)
        yield Block(start + 1, "\n".join(lines[start + 1 : end]) + "\n", raises, shown)


def run(page: Path) -> list[tuple[Block, str]]:
    """Runs a page in an empty directory; gives what each block printed, or the message of the error it raised."""
    done: list[tuple[Block, str]] = []
    names: dict[str, object] = {"__name__": "__main__"}
    text = page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch), _devices(text) as kind:
        for block in blocks(text):
            there = replace(block, code=block.code.replace("cuda:", kind))
            done.append((block, _run(there, names, page).replace(kind, "cuda:")))
        names.clear()  # what lies on pretend devices goes before they do
    return done


def lacking(page: Path) -> str | None:
    """Why a page cannot run on this machine, or ``None``."""
    if not _on_pretend_devices(page.read_text(encoding="utf-8")):
        return None
    from tests.support.pretend import device

    return device.missing()


def _on_pretend_devices(text: str) -> bool:
    import torch

    found = _DEVICES.search(text)
    return found is not None and torch.cuda.device_count() < int(found[1])


@contextlib.contextmanager
def _devices(text: str) -> Iterator[str]:
    """What ``cuda:`` stands for while a page runs."""
    if not _on_pretend_devices(text):
        yield "cuda:"
        return
    from tests.support.pretend import device

    with device.opened():
        yield "pretend:"


def _run(block: Block, names: dict[str, object], page: Path) -> str:
    source = block.code.splitlines(keepends=True)
    # No modification time: linecache then never looks for the file on disk.
    linecache.cache[READER_FILE] = (len(block.code), None, source, READER_FILE)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(block.code, READER_FILE, "exec"), names)
    except Exception as error:
        if type(error).__name__ != block.raises:
            raise PageError(f"{block.where(page)} raised {type(error).__name__}: {error}") from error
        return printed.getvalue() + f"{type(error).__name__}: {error}"
    if block.raises is not None:
        raise PageError(f"{block.where(page)} should have raised {block.raises}")
    return printed.getvalue()


def same(shown: str, printed: str) -> bool:
    """Is the output the one that the page shows?  Spacing is free; decimal numbers may differ by 2 % or 0.01.

    Machines and versions of torch round differently; words and whole numbers have to be the same.
    """
    if _NUMBER.sub("#", shown).split() != _NUMBER.sub("#", printed).split():
        return False
    pairs = zip(_NUMBER.findall(shown), _NUMBER.findall(printed), strict=True)
    return all(abs(float(a) - float(b)) <= max(0.01, 0.02 * abs(float(a))) for a, b in pairs)


def refreshed(page: Path) -> str:
    """The page with its outputs as they are now."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for block, printed in reversed(run(page)):
        if block.shown is not None:
            output = [line.rstrip() for line in printed.rstrip("\n").splitlines()]
            shown = "\n".join(lines[block.shown.start : block.shown.stop])
            if not same(shown, printed):
                lines[block.shown.start : block.shown.stop] = output
    return "\n".join(lines) + "\n"
