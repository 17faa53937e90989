"""Brings everything generated in the documentation up to date: ``.venv/bin/python -m docs.refresh``.

Outputs of code blocks, the tables of sites, and the pictures. The tests refuse pages that are not up to date. With the
names of pages, ``python -m docs.refresh coverage.md how-to/sweep.md``, it is these alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from docs import coverage_table, names_tables, pages, parallel_table, pictures, site_tables, tuned_curve

GENERATED: dict[str, Callable[[], str]] = {
    "vocabulary": site_tables.vocabulary,
    "families": site_tables.families,
    "names": names_tables.names,
    "no_sites": names_tables.no_sites,
    "matrix": parallel_table.matrix,
    "coverage_sites": coverage_table.sites,
    "coverage_spread": coverage_table.spread,
    "tuned_lens": tuned_curve.table,
    "tuned_lens_run": tuned_curve.run,
}
_SECTION = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)


def with_sections(text: str) -> str:
    """A page with its generated sections made anew."""
    return _SECTION.sub(lambda match: f"{match[1]}\n{GENERATED[match[2]]()}\n\n{match[3]}", text)


def main(names: Sequence[str] = ()) -> None:
    """Rewrites the pages and pictures in place; ``names``: of pages in ``docs``, if it is not to be all."""
    chosen = [pages.ROOT / "docs" / name for name in names]
    for page in chosen or sorted((pages.ROOT / "docs").rglob("*.md")):
        _replace(page, with_sections(page.read_text(encoding="utf-8")))
    for page in pages.pages():
        if chosen and page not in chosen:
            continue
        if (reason := pages.lacking(page)) is not None:
            print(f"left as it is: {page.relative_to(pages.ROOT)} ({reason})")
            continue
        _replace(page, pages.refreshed(page))
    for picture, content in () if chosen else pictures.make():
        _replace(picture, content)


def _replace(file: Path, content: str) -> None:
    if not file.exists() or file.read_text(encoding="utf-8") != content:
        file.write_text(content, encoding="utf-8")
        print(f"rewrote {file.relative_to(pages.ROOT)}")


if __name__ == "__main__":
    main(sys.argv[1:])
