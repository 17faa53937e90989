"""A bar that grows while a long run goes on, where somebody is looking: on a terminal, or in a notebook."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tracelens.view import in_notebook

Part = TypeVar("Part")


def watched(
    parts: Sequence[Part], sizes: Sequence[int], unit: str, progress: bool | None = None
) -> Iterator[Part]:
    """The parts, one after the other, and a bar over ``sizes`` that grows when a part is done.

    ``progress``: with a bar or without; by default with one if there are several parts and somebody is looking.
    """
    if progress is None:
        progress = len(parts) > 1 and (sys.stderr.isatty() or in_notebook())
    if not progress:
        yield from parts
        return
    try:
        from tqdm import tqdm
    except ImportError:  # it comes with transformers, which may change its mind
        yield from parts
        return
    with tqdm(total=sum(sizes), unit=unit, leave=False) as bar:
        for part, size in zip(parts, sizes, strict=True):
            yield part
            bar.update(size)
