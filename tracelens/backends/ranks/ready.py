"""The line that says what ranks take long for, their start or a model that they load, where somebody is looking."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from tracelens.view import in_notebook


class Ready:
    """A bar that grows as ranks are ready, and goes when all are; nothing where nobody is looking."""

    def __init__(self, world: int, doing: str) -> None:
        self._bar: Any = None
        terminal = sys.stderr is not None and sys.stderr.isatty()
        if not (terminal or in_notebook()):
            return
        try:
            from tqdm import tqdm
        except ImportError:  # it comes with transformers, which may change its mind
            return
        self._bar = tqdm(total=world, desc=f"tracelens: {doing}", unit="rank", leave=False, mininterval=0)

    def ready(self) -> None:
        """One more rank is ready."""
        if self._bar is not None:
            self._bar.update(1)

    def __enter__(self) -> Ready:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
