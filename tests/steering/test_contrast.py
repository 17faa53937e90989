"""Contrast data: what files and pairs become, letters that tell nothing, and splits that a seed decides."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracelens.errors import ContrastError, ContrastFileError
from tracelens.steering import Contrast, ContrastRow, load_contrast

DATA = Path(__file__).parents[1] / "data"
CHOICES, WORDS = DATA / "contrast_choices.jsonl", DATA / "contrast_words.jsonl"
AS_WRITTEN = load_contrast(CHOICES, letters="as_written")
PAIRS = [(f"Prompt {number}:", " yes", " no") for number in range(20)]


def choice(row: ContrastRow, answer: str) -> str:
    """What stands in the prompt under the letter of an answer, read in the simplest way there is."""
    letter = answer.strip()
    assert row.prompt.count(f"\n {letter} ") == 1
    return row.prompt.split(f"\n {letter} ")[1].split("\n")[0]


@pytest.mark.parametrize("letters", ["balanced", "as_written"])
def test_the_matching_answer_is_the_one_that_the_file_means(letters: str) -> None:
    """In the file, whoever shows the behaviour stays; whatever letter that has, in whatever order."""
    data = load_contrast(CHOICES, letters=letters)
    assert len(data) == 11
    for row in data:
        assert choice(row, row.positive).startswith("stay")
        assert not choice(row, row.negative).startswith("stay")
        others = [choice(row, option) for option in row.options if option != row.positive]
        assert not any(text.startswith("stay") for text in others)


def test_options_beyond_two_are_kept_with_their_letters() -> None:
    """A reader that takes every letter but A for B has two rows wrong, and does not notice."""
    naive = [" (A)" if "A" in row.positive else " (B)" for row in AS_WRITTEN]
    assert naive != [row.positive for row in AS_WRITTEN]
    balanced = load_contrast(CHOICES)
    three = [row for row in balanced if len(row.options) == 3]
    assert [(row.positive, row.negative, row.options) for row in three] == [
        (" (C)", " (A)", (" (A)", " (B)", " (C)")),
        (" (A)", " (B)", (" (A)", " (B)", " (C)")),
    ]
    assert [row.source for row in three] == [9, 10]
    assert [row.prompt for row in three] == [row.prompt for row in AS_WRITTEN if len(row.options) == 3]


def test_rows_that_do_not_qualify_are_told_with_their_lines() -> None:
    assert [(entry.row, entry.reason) for entry in AS_WRITTEN.refused] == [
        (11, "the answer (D) is not among the 2 choices"),
        (12, "choice (C) stands where (B) belongs"),
        (13, "both answers are the same"),
    ]
    assert "3 left out" in repr(AS_WRITTEN)


def test_a_choice_may_have_several_lines() -> None:
    row = load_contrast(CHOICES)[-1]
    assert "stay in 13\nand work" in row.prompt
    assert "go to 13\nby the sea" in row.prompt


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("path", [CHOICES, WORDS], ids=["choices", "words"])
def test_letters_tell_neither_behaviour_nor_word(path: Path, seed: int) -> None:
    data = load_contrast(path, seed=seed, split=(0.5, 0.25, 0.25))
    written = load_contrast(path, letters="as_written")
    was = {row.source: row.positive for row in written}
    for part in (data.train, data.validation, data.test):
        rows = [row for row in part if len(row.options) == 2]
        counts = Counter(row.positive for row in rows)
        assert abs(counts[" (A)"] - counts[" (B)"]) <= 1
        for word in set(was.values()):
            mine = Counter(row.positive for row in rows if was[row.source] == word)
            assert abs(mine[" (A)"] - mine[" (B)"]) <= 1, "the letter says nothing about the word"


def test_swapping_every_second_row_would_tie_letters_to_words() -> None:
    """The trap of files in which Yes and No alternate: then A would always stand for Yes."""
    written = load_contrast(WORDS, letters="as_written")
    assert [row.positive for row in written[:4]] == [" Yes", " No", " Yes", " No"]
    data = load_contrast(WORDS)
    told = Counter((choice(row, row.positive), row.positive) for row in data.train)
    assert min(told.values()) >= 1
    assert len(told) == 4
    for row, was in zip(data, written, strict=True):
        assert choice(row, row.positive) == was.positive.strip()
        assert row.prompt.startswith(was.prompt)


def test_words_stay_words_as_they_were_written() -> None:
    row = load_contrast(WORDS, letters="as_written")[1]
    assert (row.positive, row.negative, row.options) == (" No", " Yes", (" No", " Yes"))
    assert "Choices" not in row.prompt


def test_the_question_does_not_ask_for_its_answer_twice() -> None:
    for row in AS_WRITTEN:
        rendered = AS_WRITTEN.rendered(row)
        assert isinstance(rendered, str)
        assert rendered.count("Answer:") == 1
        assert rendered.endswith("\n\nAnswer:")


def test_templates() -> None:
    row = AS_WRITTEN[0]
    plain = load_contrast(CHOICES, system="Be brief.", instruction="One letter.", letters="as_written")
    assert plain.rendered(row) == f"Be brief.\n\n{row.prompt}\n\nOne letter.\n\nAnswer:"
    chat = load_contrast(CHOICES, template="chat", system="Be brief.", letters="as_written")
    assert chat.rendered(row) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": row.prompt},
    ]
    assert load_contrast(CHOICES, template="chat").rendered(row) == [{"role": "user", "content": row.prompt}]
    own = load_contrast(CHOICES, template=lambda row: f"Q: {row.prompt}\nA:")
    assert own.rendered(row) == f"Q: {row.prompt}\nA:"
    assert Contrast.pairs(PAIRS).rendered(Contrast.pairs(PAIRS)[3]) == "Prompt 3:"
    with pytest.raises(ContrastError, match="the template made a int of row 1"):
        load_contrast(CHOICES, template=lambda row: 3).rendered(row)


# --- splits ----------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 60), st.integers(0, 5), st.sampled_from([(0.4, 0.1, 0.5), (0.4, 0, 0.6), (0.2, 0.2, 0.2)])
)
def test_parts_have_no_row_in_common(count: int, seed: int, split: tuple[float, float, float]) -> None:
    data = Contrast.pairs([(f"{number}:", " a", " b") for number in range(count)], seed=seed, split=split)
    numbers: list[int] = []
    for name, share in zip(("train", "validation", "test"), split, strict=True):
        if share * count < 0.5:
            continue
        part = getattr(data, name)
        assert abs(len(part) - share * count) <= 1
        assert part.parent == data.digest
        assert [data[number] for number in part.numbers] == list(part)
        numbers += part.numbers
    assert len(set(numbers)) == len(numbers)
    if sum(split) == 1 and count >= 20:
        assert sorted(numbers) == list(range(count))


def test_the_split_of_a_seed_is_the_same_everywhere() -> None:
    data = Contrast.pairs(PAIRS)
    assert data.train.numbers == (15, 3, 12, 7, 5, 2, 8, 11)
    assert Contrast.pairs(PAIRS, seed=1).train.numbers != data.train.numbers
    assert len(Contrast.pairs(PAIRS * 17, split=(0.4, 0, 0.6)).train) == 136


def test_a_part_stays_what_it_is() -> None:
    data = Contrast.pairs(PAIRS)
    assert data.test[:3].part == "test"
    assert data[:3].part == "some"
    assert data.test[:3].parent == data.digest
    assert data.test[:3].numbers == data.test.numbers[:3]
    for wrong in (lambda: data.test.train, lambda: data[:3].train):
        with pytest.raises(ContrastError, match="are a part of the data already"):
            wrong()
    with pytest.raises(ContrastError, match="no row is left for validation"):
        Contrast.pairs(PAIRS[:2]).validation
    with pytest.raises(ContrastError, match="no row is chosen"):
        data[5:5]
    assert "20 rows (8 train, 2 validation, 10 test; seed 0)" in repr(data)
    assert "10 rows for test" in repr(data.test)


def test_the_digest_is_that_of_what_the_model_is_given() -> None:
    base = load_contrast(CHOICES)
    assert base.digest == load_contrast(CHOICES).digest
    others = [
        load_contrast(CHOICES, letters="as_written"),
        load_contrast(CHOICES, template="chat"),
        load_contrast(CHOICES, system="x"),
        load_contrast(CHOICES, instruction="x"),
        load_contrast(CHOICES, template=lambda row: row.prompt),
        load_contrast(CHOICES, template=lambda row: row.prompt + " "),
        load_contrast(WORDS),
        base.train,
        base.test,
    ]
    assert len({base.digest, *(other.digest for other in others)}) == 10


# --- what is refused -------------------------------------------------------------------------------------------------

GOOD = {"question": "Is it?", "answer_matching_behavior": " Yes", "answer_not_matching_behavior": " No"}


def test_a_json_list_is_read_too(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text(json.dumps([GOOD, {**GOOD, "answer_not_matching_behavior": [" No", " Never"]}], indent=1))
    assert [row.source for row in load_contrast(file, letters="as_written")] == [1, 2]
    assert load_contrast(file, letters="as_written")[1].negative == " No"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "line 1 of .* is no JSON"),
        (json.dumps(GOOD) + "\n\n3", "line 3 of .* has no 'question'"),
        (json.dumps({**GOOD, "question": None}) + "\n" + "[]", "line 2 of .* has no 'question'"),
        ("[1", "is no JSON"),
        ('[{"question": "x"}]', "entry 1 of .* has no 'answer_matching_behavior'"),
    ],
)
def test_files_of_another_form(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(text)
    with pytest.raises(ContrastFileError, match=says) as caught:
        load_contrast(file)
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ContrastFileError, match="cannot be read"):
        load_contrast(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer_matching_behavior": [" Yes", " Sure"]}, "answer_matching_behavior is not one text"),
        ({"question": 3}, "question is not one text"),
        ({"answer_matching_behavior": " (A)"}, "one answer is a letter and the other is not"),
        (
            {"answer_matching_behavior": " (A)", "answer_not_matching_behavior": " (B)"},
            "the question lists no choices",
        ),
    ],
)
def test_rows_that_are_left_out(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD | change))
    data = load_contrast(file)
    assert [(entry.row, entry.reason) for entry in data.refused] == [(2, reason)]
    file.write_text(json.dumps(GOOD | change))
    with pytest.raises(ContrastError, match=f"no rows that qualify: line 1: {reason}"):
        load_contrast(file)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"letters": "random"}, "no way with letters"),
        ({"template": "jinja"}, "is no template"),
        ({"split": (0.5, 0.5)}, "is no shares"),
        ({"split": (0.5, 0.5, 0.5)}, "is no shares"),
        ({"split": (-0.5, 0.5, 0.5)}, "is no shares"),
    ],
)
def test_settings_that_are_none(options: dict[str, object], says: str) -> None:
    with pytest.raises(ContrastError, match=says):
        load_contrast(CHOICES, **options)


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ([("a", " b")], "row 0 is two texts, without the prompt"),
        ([("", " b", " c")], "the prompt of row 0 is empty"),
        (["abc"], "row 0 is not three texts"),
        ([("a", " b", "")], "row 0 is not three texts"),
        ([("a", " b", " c"), ("a", " b", " b")], "row 1 has the same answer twice"),
        ([], "there are no rows"),
    ],
)
def test_pairs_that_are_none(pairs: list[tuple[str, ...]], says: str) -> None:
    with pytest.raises(ContrastError, match=says):
        Contrast.pairs(pairs)
