"""The page on errors has one entry per error, and each entry is true: its wrong code raises it, its right code runs.

They are run one by one, on a tiny model: sixty blocks on the embedded model would take a minute.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tracelens as tl
from docs.pages import READER_FILE, ROOT
from tests.support.families import FAMILIES
from tests.support.tokenizers import byte_level_bpe
from tracelens import errors, lens_errors, naming_errors, steering_errors

PAGE = ROOT / "docs" / "errors.md"
SOURCE = PAGE.read_text(encoding="utf-8")
FILES = (naming_errors, errors, lens_errors, steering_errors)
CLASSES = {
    name: found
    for file in FILES
    for name, found in vars(file).items()
    if inspect.isclass(found)
    and issubclass(found, errors.TracelensError)
    and found.__module__ == file.__name__
}


@dataclass(frozen=True)
class Entry:
    """One entry of the page, as it stands there."""

    name: str
    words: str
    wrong: str
    wrong_raises: str
    right: str


def entries() -> list[Entry]:
    """All entries; fails where one is not a sentence, wrong code and right code."""
    found: list[Entry] = []
    for part in re.split(r"^### ", SOURCE, flags=re.MULTILINE)[1:]:
        part = re.split(r"^## ", part, flags=re.MULTILINE)[0]
        shape = re.fullmatch(
            r"(\w+)\n\n(.+?)\n\n```python raises=(\w+)\n(.+?)```\n\n```python\n(.+?)```\s*",
            part,
            flags=re.DOTALL,
        )
        assert shape, f"this entry is not words, wrong code and right code:\n{part}"
        name, words, raises, wrong, right = shape.groups()
        found.append(Entry(name, words, wrong, raises, right))
    return found


ENTRIES = entries()
SETUP = re.findall(r"```python\n(.+?)```", SOURCE, flags=re.DOTALL)[0]


def test_every_error_has_an_entry_in_the_order_of_the_files() -> None:
    assert [entry.name for entry in ENTRIES] == list(CLASSES)


def test_all_errors_are_in_one_place() -> None:
    assert all(getattr(errors, name) is found for name, found in CLASSES.items())


def test_the_sections_are_those_of_the_files() -> None:
    source = "".join(map(inspect.getsource, FILES))
    commented = re.findall(r"^# --- ([^-]+?) -+$", source, flags=re.MULTILINE)
    headings = re.findall(r"^## (.+)$", SOURCE, flags=re.MULTILINE)
    assert [heading.lower() for heading in headings] == commented


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_an_entry_is_one_sentence(entry: Entry) -> None:
    assert entry.wrong_raises == entry.name
    assert entry.words.endswith(".")
    assert not re.search(r"[.!?] [A-Z]", entry.words), "one sentence"


@pytest.fixture(scope="module")
def hf() -> Any:
    return FAMILIES["llama"].build(vocab_size=len(byte_level_bpe()))


@pytest.fixture
def reader(hf: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What a reader has after the first block of the page, with a tiny model in place of the embedded one."""

    def load(name: str, *, weights: bool = True) -> tl.Model:
        assert name == "smollm2-135m"
        if weights:
            return tl.wrap(hf, byte_level_bpe())
        with torch.device("meta"):
            return tl.wrap(AutoModelForCausalLM.from_config(hf.config).eval(), byte_level_bpe())

    monkeypatch.setattr(tl, "load", load)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(SETUP, names)
    return names


def execute(code: str, filename: str, names: dict[str, Any]) -> None:
    linecache.cache[filename] = (len(code), None, code.splitlines(keepends=True), filename)
    exec(compile(code, filename, "exec"), names)


def test_the_page_shows_a_message_as_it_is(reader: dict[str, Any]) -> None:
    raises, wrong, shown = re.findall(
        r"```python raises=(\w+)\n(.+?)```\n\n```text\n(.+?)```", SOURCE, flags=re.DOTALL
    )[0]
    with pytest.raises(errors.TracelensError) as caught:
        execute(wrong, READER_FILE, reader)
    assert f"{type(caught.value).__name__}: {caught.value}\n" == shown
    assert raises == type(caught.value).__name__


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_the_wrong_code_raises_and_the_right_code_runs(entry: Entry, reader: dict[str, Any]) -> None:
    filename = f"<wrong code of {entry.name}>"
    with pytest.raises(errors.TracelensError) as caught:
        execute(entry.wrong, filename, reader)
    error = caught.value
    assert type(error) is CLASSES[entry.name]
    if error.at is not None:
        assert error.at.filename == filename
        assert error.at.text in entry.wrong
    assert not re.search(r"\bnan\b", str(error))
    execute(entry.right, f"<right code of {entry.name}>", reader)


# Their text has no line in a block, or their guilty line is in a file.
WITHOUT_A_LINE = {
    "VerificationError",
    "GraphSyntaxError",
    "GraphFileError",
    "GraphVersionError",
    "PlansDifferError",  # the line of the block is added when it is left
    "UntrustedApplyError",
    "EmbeddedModelError",
}
# A graph out of a file knows the names and numbers of its lines; the source may be elsewhere.
WITHOUT_SOURCE = {"ForbiddenFunctionError"}


# What ranks raise is raised outside of blocks, and to start ranks takes seconds.
IN_BLOCKS = [entry for entry in ENTRIES if not entry.name.startswith("Rank")]


@pytest.mark.parametrize("entry", IN_BLOCKS, ids=lambda entry: entry.name)
def test_errors_in_blocks_show_their_line(entry: Entry, reader: dict[str, Any]) -> None:
    with pytest.raises(errors.TracelensError) as caught:
        execute(entry.wrong, "<wrong code>", reader)
    has_line = caught.value.at is not None
    assert has_line == (entry.name not in WITHOUT_A_LINE)
    if has_line:
        source = caught.value.at.text
        assert bool(source) == (entry.name not in WITHOUT_SOURCE)
        quoted = f"\n      {source}" if source else ""
        assert f"at <wrong code>:{caught.value.at.line}{quoted}" in str(caught.value)


def test_the_base_class_is_never_raised_itself() -> None:
    """Every error is of a named class."""
    for file in (ROOT / "tracelens").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "TracelensError", f"{file.name}:{node.lineno}"
