"""Where in the user's code something was written: file, line and source text."""

from __future__ import annotations

import linecache
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

_PACKAGE = str(Path(__file__).resolve().parent) + "/"
# A recorded line may run through libraries before it reaches us (a tokenizer, copy.deepcopy): not the user's either.
_LIBRARIES = re.compile(r"/(site|dist)-packages/(torch|einops|numpy|transformers|accelerate)/")
_PACKAGES = re.compile(r"/(site|dist)-packages/")
_STANDARD = sysconfig.get_path("stdlib") + "/"
# The demo is user code that happens to be shipped: its lines are worth showing.
_is_internal: dict[str, bool] = {_PACKAGE + "demo.py": False}


@dataclass(frozen=True, slots=True)
class Location:
    """One line of the user's code.

    ``str(location)`` reads ``script.py:12``; :attr:`text` is the source line where it can still be had (files,
    notebook cells, doctests), else an empty string.
    """

    filename: str
    line: int
    function: str = ""

    def __str__(self) -> str:
        cell = _cell(self.filename)
        return f"{self.filename}:{self.line}" if cell is None else f"cell {cell}, line {self.line}"

    @property
    def text(self) -> str:
        return linecache.getline(self.filename, self.line).strip()

    @property
    def short(self) -> str:
        """The file's own name and the line, for places with little room."""
        return f"{_cell(self.filename) or Path(self.filename).name}:{self.line}"


def _cell(filename: str) -> str | None:
    """The name of a notebook's cell, ``In[3]``, which IPython keeps under the name of a file that is not there."""
    shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    named = getattr(getattr(shell, "compile", None), "format_code_name", None)
    found = None if named is None else named(filename)
    return None if found is None else str(found[1])


NOWHERE = Location("<unknown>", 0)


def _internal(filename: str) -> bool:
    known = _is_internal.get(filename)
    if known is None:
        known = (
            filename.startswith((_PACKAGE, "<frozen "))
            or _LIBRARIES.search(filename) is not None
            or (filename.startswith(_STANDARD) and _PACKAGES.search(filename) is None)
        )
        _is_internal[filename] = known
    return known


def frames_inside() -> Iterator[FrameType]:
    """The frames of tracelens and of libraries between the caller and the user's line, the innermost first."""
    frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]  # the only way to the caller
    while frame is not None and _internal(frame.f_code.co_filename):
        yield frame
        frame = frame.f_back


def here() -> Location:
    """The innermost line on the stack that belongs neither to tracelens nor to a library that it works with."""
    frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]  # the only cheap way to the caller
    known = _is_internal
    while frame is not None:
        code = frame.f_code
        filename = code.co_filename
        if filename not in known:
            _internal(filename)
        # What dataclasses write for us has our names around it, and no file.
        if not known[filename] and not (
            filename == "<string>" and str(frame.f_globals.get("__name__")).startswith("tracelens.")
        ):
            return Location(filename, frame.f_lineno, code.co_name)
        frame = frame.f_back
    return NOWHERE


def raised_at(error: BaseException) -> Location | None:
    """The innermost of the user's lines that an exception came through."""
    found: Location | None = None
    step = error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        if not _internal(code.co_filename):
            found = Location(code.co_filename, step.tb_lineno, code.co_name)
        step = step.tb_next
    return found
