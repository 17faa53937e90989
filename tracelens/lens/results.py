"""The lens results of several prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracelens.errors import LensResultError
from tracelens.extras import required
from tracelens.lens.result import LensResult
from tracelens.location import here

if TYPE_CHECKING:
    import pandas

_SHOWN = 4
"""So many prompts a terminal shows."""


@dataclass(frozen=True, eq=False, repr=False)
class LensResults(Sequence[LensResult]):
    """What a lens read of several prompts: ``results[i]`` is the :class:`LensResult` of one."""

    prompts: tuple[LensResult, ...]

    def __post_init__(self) -> None:
        if not self.prompts or not all(isinstance(prompt, LensResult) for prompt in self.prompts):  # pyright: ignore[reportUnnecessaryIsInstance]  # users may not be typed
            raise LensResultError(
                "lens results are a tuple of at least one LensResult",
                at=here(),
                instead="LensResults((first, second))",
            )

    def __getitem__(self, index: int) -> LensResult:  # pyright: ignore[reportIncompatibleMethodOverride]  # one prompt, not slices
        """The result of one prompt."""
        return self.prompts[index]

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[LensResult]:
        return iter(self.prompts)

    def _repr_html_(self) -> str:
        from tracelens.viz.lens_page import embedded, shown

        return embedded([shown(result, str(number)) for number, result in enumerate(self.prompts)])

    def to_html(self, path: str | Path) -> Path:
        """Writes a page as :meth:`LensResult.to_html` does, on which one chooses the prompt."""
        from tracelens.viz.lens_page import page, shown

        views = [shown(result, str(number)) for number, result in enumerate(self.prompts)]
        Path(path).write_text(page(views), encoding="utf-8")
        return Path(path)

    def to_pandas(self) -> pandas.DataFrame:
        """The tables of all prompts, one below the other, with a column ``prompt`` for the number of each."""
        pandas: Any = required("pandas", extra="pandas", what="results.to_pandas()")
        frames = [result.to_pandas() for result in self.prompts]
        for number, frame in enumerate(frames):
            frame.insert(0, "prompt", number)
            frame.attrs = {}
        return pandas.concat(frames, ignore_index=True)

    def __repr__(self) -> str:
        lines: list[str] = []
        for number, result in enumerate(self.prompts[:_SHOWN]):
            lines += [f"prompt {number}: {result!r}", ""]
        more = len(self.prompts) - _SHOWN
        if more > 0:
            lines.append(f"left out: {more} more prompt{'s' * (more > 1)}; results[i] is one")
        return "\n".join(lines).rstrip()
