"""Pages run, show what they print, link to what exists; tables, pictures and the notebook are up to date."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import tracelens as tl
from docs import pages, pictures, refresh, token_grids
from docs.pages import ROOT, PageError, blocks, run, same

pytestmark = pytest.mark.smollm2

MARKDOWN = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOK = ROOT / "docs" / "tutorials" / "first_look.ipynb"
every_page = pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.mark.parametrize("page", pages.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_runs_and_shows_what_it_prints(page: Path) -> None:
    if (reason := pages.lacking(page)) is not None:
        pytest.skip(reason)
    lines = page.read_text(encoding="utf-8").splitlines()
    for block, printed in run(page):
        if block.shown is not None:
            shown = "\n".join(lines[block.shown.start : block.shown.stop])
            assert same(shown, printed), (
                f"{block.where(page)} printed\n{printed}\nand the page shows\n{shown}"
            )


@every_page
def test_generated_sections_are_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert refresh.with_sections(text) == text, "run: .venv/bin/python -m docs.refresh"


def test_the_sites_page_has_generated_sections() -> None:
    text = (ROOT / "docs" / "sites.md").read_text(encoding="utf-8")
    stale = text.replace("`layers[i].resid_mid`", "`layers[i].middle`")
    assert stale != text
    assert refresh.with_sections(stale) == text


def test_pictures_are_up_to_date() -> None:
    for file, content in pictures.make():
        # Shades and inks follow from the probabilities, which machines round differently; titles hold both.
        stored, drawn = (
            "\n".join(re.findall(r"<title>.*?</title>", svg))
            for svg in (file.read_text(encoding="utf-8"), content)
        )
        assert stored.count("<title>") >= 60
        assert same(stored, drawn), "run: .venv/bin/python -m docs.refresh"


@pytest.mark.parametrize(
    ("spelling", "first", "second"),
    [
        ("site.tok[1:4]", {1, 2, 3}, {1, 2, 3}),
        ("site[:, -1]", {5, 6, 7, 8}, {7, 8, 9, 10}),
        ("t.decode.site", {6, 7, 8}, {8, 9, 10}),
        ("t.steps[2:4].site", {7, 8}, {9, 10}),
        ("site.tok[model.positions >= 5]", {5, 6, 7, 8}, {5, 6, 7, 8, 9, 10}),
    ],
)
def test_the_grids_show_what_is_selected(spelling: str, first: set[int], second: set[int]) -> None:
    """Prompts of 6 and 8 tokens, and the 3 new ones that the model is given; with and without a cache."""
    assert spelling in token_grids.IN_A_GENERATION
    model = tl.load("smollm2-135m")
    found = token_grids.selected(model, spelling, generating=True)
    assert [{at for at, on in enumerate(row) if on} for row in found] == [first, second]
    assert [len(row) for row in found] == [9, 11]
    if "positions" in spelling:
        assert token_grids.selected(model, spelling, generating=True, use_cache=False) == found


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"`[^`]*`", "", text)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}"


def anchors(file: Path) -> set[str]:
    """What headings can be linked by, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_two_commands_of_the_readme_are_targets_of_make() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(
        r"^make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert commands == ["demo", "test"]
    for command in commands:
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE)


def test_every_decision_is_in_the_list() -> None:
    folder = ROOT / "docs" / "decisions"
    listed = re.findall(r"\((\d{4}-[\w-]+\.md)\)", (folder / "README.md").read_text(encoding="utf-8"))
    assert listed == sorted(file.name for file in folder.glob("[0-9]*.md"))


# The kernel of a notebook talks over sockets of its own; what its libraries warn of is not ours.
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs_and_shows_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One thread, as in the tests around it: several only get in each other's way.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    stored = nbformat.read(NOTEBOOK, as_version=4)
    fresh = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        fresh, timeout=180, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    cells = [
        (old, new) for old, new in zip(stored.cells, fresh.cells, strict=True) if old.cell_type == "code"
    ]
    assert len(cells) >= 8
    for old, new in cells:
        assert printed(old), f"the notebook shows no output of\n{old.source}"
        # What a model writes may hang on the last digit of a logit.
        if "output-varies" in old.metadata.get("tags", ()):
            continue
        assert same(printed(old), printed(new)), (
            f"{old.source}\nprinted\n{printed(new)}\nthe notebook shows\n{printed(old)}"
        )


def printed(cell: nbformat.NotebookNode) -> str:
    """What a cell wrote to its output, and what it displayed, as text."""
    found = ""
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            found += output.text
        elif output.output_type == "display_data":
            found += output.data["text/plain"]
    return found


def test_notebook_outputs_are_small() -> None:
    assert NOTEBOOK.stat().st_size < 60_000


# --- the runner itself ----------------------------------------------------------------------------------------------


def page_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Path:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


def test_a_block_that_fails_is_reported_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = page_of(tmp_path, monkeypatch, "# Title\n\n```python\n1 / 0\n```\n")
    with pytest.raises(PageError, match=r"page\.md:4 raised ZeroDivisionError"):
        run(page)


def test_a_block_that_should_fail_and_does_not_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = page_of(tmp_path, monkeypatch, "```python raises=KeyError\nx = 1\n```\n")
    with pytest.raises(PageError, match=r"should have raised KeyError"):
        run(page)


def test_a_page_for_gpus_runs_on_pretend_devices_that_it_calls_cuda(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "```python\nimport torch\nx = torch.ones(2, device='cuda:1')\nprint(x.device, x.is_cuda)\n```\n"
    note = "<!-- runs on 99 GPUs, or on pretend devices -->\n"
    page = page_of(tmp_path, monkeypatch, note + text)
    if (reason := pages.lacking(page)) is not None:
        pytest.skip(reason)
    ((_, printed),) = run(page)
    assert printed == "cuda:1 False\n"
    page.write_text(text, encoding="utf-8")
    assert pages.lacking(page) is None
    if not torch.cuda.is_available():
        with pytest.raises(PageError, match=r"page\.md:2 raised"):
            run(page)


def test_output_is_that_of_the_block_right_before_it() -> None:
    text = "```python\nprint(1)\n```\n\n```text\n1\n```\n\n```python\nprint(2)\n```\n\nwords\n\n```text\n3\n```\n"
    first, second = blocks(text)
    assert first.shown == range(5, 6)
    assert second.shown is None


@pytest.mark.parametrize(
    ("shown", "printed", "equal"),
    [
        ("p 0.50  x", "p 0.505 x", True),
        ("p 0.50", "p 0.60", False),
        ("100.0", "101.5", True),
        ("100.0", "110.0", False),
        ("[2, 576]", "[2, 577]", False),
        ("Paris", "Rome", False),
    ],
)
def test_outputs_are_compared_with_a_tolerance_for_decimals_only(
    shown: str, printed: str, equal: bool
) -> None:
    assert same(shown, printed) is equal
