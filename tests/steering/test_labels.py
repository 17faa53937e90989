"""Labels: found by comparing ids, behind prompts that end in every way, on the tokenizers that there are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

import tracelens as tl
from tests.support.families import FAMILIES
from tests.support.tokenizers import GPT4_SPLIT, byte_level_bpe, sentencepiece_like
from tracelens.errors import ContrastError, LabelError, NoTokenizerError, ZeroVectorError
from tracelens.steering import Contrast, LabelledRow, extract, load_contrast

DATA = Path(__file__).parents[1] / "data"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def asked(tokenizer: Any) -> tl.Model:
    own = copy.deepcopy(tokenizer)
    own.chat_template = TEMPLATE
    return tl.wrap(FAMILIES["llama"].build(vocab_size=len(own), max_position_embeddings=128), own)


MODELS = {
    "gpt-2": asked(byte_level_bpe(answers=True)),
    "gpt-4": asked(byte_level_bpe(answers=True, split=GPT4_SPLIT, bos=True)),
    "sentencepiece": asked(sentencepiece_like(answers=True)),
    "legacy sentencepiece": asked(sentencepiece_like(answers=True, legacy=True)),
}
ALL = tuple(MODELS)
PIECES = ("sentencepiece", "legacy sentencepiece")


def ids(model: tl.Model, text: str) -> list[int]:
    tokenizer: Any = model.tokenizer
    return tokenizer(text)["input_ids"]


def spelt(model: tl.Model, tokens: tuple[int, ...]) -> str:
    tokenizer: Any = model.tokenizer
    return tokenizer.decode(tokens, skip_special_tokens=True)


# The prompt's tail, the answers as they were written, how they are spelt behind it, and the tokenizers on which no
# spelling leaves the prompt's own tokens as they are.
TAILS: dict[str, tuple[str, tuple[str, str], dict[str, str], tuple[str, ...]]] = {
    "Answer:": ("Is it? Answer:", (" A", " B"), dict.fromkeys(ALL, " A"), ()),
    "Answer: without a space": (
        "Is it? Answer:",
        ("A", "B"),
        {"gpt-2": "A", **dict.fromkeys(ALL[1:], " A")},
        (),
    ),
    "Answer: with a space behind": ("Is it? Answer: ", (" A", " B"), dict.fromkeys(ALL, "A"), ALL),
    "parentheses behind a space": ("Is it? Answer: ", (" (A)", " (B)"), dict.fromkeys(ALL, "(A)"), ALL),
    "in parentheses": ("Is it? Answer:", (" (A)", " (B)"), dict.fromkeys(ALL, " (A)"), ()),
    "an open parenthesis": ("Is it? Answer: (", (" (A)", " (B)"), dict.fromkeys(ALL, "A)"), PIECES),
    "a new line": ("Is it? Answer:\n", (" A", " B"), dict.fromkeys(ALL, "A"), ()),
    "parentheses on a new line": ("Is it? Answer:\n", (" (A)", " (B)"), dict.fromkeys(ALL, "(A)"), ()),
    "words": ("Is it? Answer:", (" Yes", " No"), dict.fromkeys(ALL, " Yes"), ()),
}


@pytest.mark.parametrize("style", MODELS)
@pytest.mark.parametrize("tail", TAILS)
def test_the_label_is_where_the_ids_differ(style: str, tail: str) -> None:
    model = MODELS[style]
    prompt, answers, ways, joins = TAILS[tail]
    (row,) = Contrast.pairs([(prompt, *answers)]).tokens(model)
    # The prompt's own tokens stand as they are without an answer, special ones in front and all.
    own = ids(model, prompt)
    assert list(row.positive[: len(own)]) == own
    assert list(row.negative[: len(own)]) == own
    assert row.label >= len(own)
    # The texts are those that are meant, to the letter.
    assert spelt(model, row.positive) == prompt + ways[style]
    assert spelt(model, row.negative) == prompt + ways[style].replace("A", "B").replace("Yes", "No")
    # One token differs, and only one.
    differing = [at for at, (a, b) in enumerate(zip(row.positive, row.negative, strict=True)) if a != b]
    assert differing == [row.label]
    assert (row.positive_token, row.negative_token) == (row.positive[row.label], row.negative[row.label])
    assert row.options == (row.positive_token, row.negative_token)
    assert row.prompt == row.positive[: row.label]
    # Joined where, and only where, the text by itself has other tokens.
    assert row.joined is (style in joins)
    assert (ids(model, prompt + ways[style]) == list(row.positive)) is not row.joined


def test_letters_and_signs_grow_together_in_some_vocabularies() -> None:
    """What the tails above are about: without it, they would show nothing."""
    glued = {style: ids(model, "Is it? Answer:A") for style, model in MODELS.items()}
    alone = {style: ids(model, "Is it? Answer:") for style, model in MODELS.items()}
    whole = {style: glued[style][: len(alone[style])] == alone[style] for style in MODELS}
    assert whole == {"gpt-2": True, "gpt-4": False, **dict.fromkeys(PIECES, False)}


@pytest.mark.parametrize("style", MODELS)
@pytest.mark.parametrize("tail", TAILS)
def test_a_vector_is_made_at_the_label_and_one_token_before_there_is_none(style: str, tail: str) -> None:
    prompt, answers, _, _ = TAILS[tail]
    data = Contrast.pairs([(prompt, *answers), ("So it is? " + prompt, *answers)])
    vector = extract(MODELS[style], data, sites="resid_post", layers=[1])
    assert vector["resid_post", 1].norm() > 0.1 * vector.facts.scale["resid_post", 1]
    with pytest.raises(ZeroVectorError) as caught:
        extract(MODELS[style], data, sites="resid_post", layers=[1], positions="decision")
    assert "positions='decision'" in str(caught.value)


@pytest.mark.parametrize("style", MODELS)
def test_chat_templates(style: str) -> None:
    model = MODELS[style]
    data = Contrast.pairs([("Is it?", " (A)", " (B)")], template="chat", system="Be brief.")
    (row,) = data.tokens(model)
    text = "<|im_start|>system\nBe brief.\n<|im_start|>user\nIs it?\n<|im_start|>assistant\n"
    tokenizer: Any = model.tokenizer
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert list(row.prompt[: len(own)]) == own, "special tokens are those of the template alone"
    assert tokenizer.decode(row.positive[len(own) :]) == "(A)"
    assert not row.joined
    assert data.show(model).text == text


def test_options_of_a_row_have_their_labels() -> None:
    model = MODELS["gpt-2"]
    data = load_contrast(DATA / "contrast_choices.jsonl")
    labels = data.tokens(model)
    assert len(labels) == len(data)
    tokenizer: Any = model.tokenizer
    for row, label in zip(data, labels, strict=True):
        told = [f" ({tokenizer.decode([token])})" for token in label.options]
        assert tuple(told) == row.options
        assert f" ({tokenizer.decode([label.positive_token])})" == row.positive
        assert f" ({tokenizer.decode([label.negative_token])})" == row.negative
    assert [len(label.options) for label in labels].count(3) == 2


def test_rows_without_a_label_are_told_and_counted() -> None:
    model = MODELS["gpt-2"]
    pairs = [
        ("It is", " Paris", " Rome"),
        ("It is", " Paris then", " Rome now"),
        ("It is", " Paris", " Paris then"),
        ("It is", " Paris", " Rome", " Paris then"),
        ("word " * 80, " Paris", " Rome"),
        ("It is not", " Paris", " Rome and"),
    ]
    labels = Contrast.pairs(pairs).tokens(model)
    assert [row.row for row in labels] == [0]
    assert [entry.row for entry in labels.refused] == [1, 2, 3, 4, 5]
    assert labels.reasons == {
        "the answers differ in more than one token": 2,
        "one answer is the beginning of the other, or has the same tokens": 1,
        "an answer that the prompt offers differs from the others in more than one token": 1,
        "it is longer than the model's 128 positions": 1,
    }
    assert "2         the answers differ in more than one token" in repr(labels)
    with pytest.raises(
        LabelError, match=r"none of the 2 rows has a label: the answers .* \(2 rows\)"
    ) as caught:
        Contrast.pairs([pairs[1], pairs[5]]).tokens(model)
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__


def test_joined_rows_are_counted() -> None:
    data = Contrast.pairs([("It is: ", " A", " B"), ("It is:", " A", " B")])
    labels = data.tokens(MODELS["gpt-4"])
    assert labels.joined == 1
    assert "1 of ids put together" in repr(labels)
    assert labels.digest == data.digest


def test_a_model_without_a_tokenizer() -> None:
    with pytest.raises(NoTokenizerError):
        Contrast.pairs([("It is", " Paris", " Rome")]).tokens(tl.wrap(FAMILIES["llama"].build()))


def test_a_row_is_shown_with_its_marks() -> None:
    model = MODELS["gpt-4"]
    data = Contrast.pairs([("Is it? Answer:", " A", " B")])
    shown = data.show(model)
    at = shown.labelled.label
    text = repr(shown)
    assert f"the label is at position {at}" in text
    assert f"the decision is at {at - 1}" in text
    assert "the tokenizer puts 1 before the text" in text
    marks = text.splitlines()[-1]
    positions = next(line for line in text.splitlines() if "position" in line and "label" not in line)
    assert marks.index("decision") == positions.index(f" {at - 1} ") + 1
    assert marks.index("label") == positions.rindex(str(at))
    html = shown._repr_html_()
    assert html.count("<b>label</b>") == html.count("<b>decision</b>") == 1
    cell = html.split("<b>label</b>")[0].rsplit("<td", 1)[1]
    assert f"position {at}," in cell
    assert "ids were put together" in repr(Contrast.pairs([("It is ", " A", " B")]).show(model))
    with pytest.raises(ContrastError, match="no row 1 of 1"):
        data.show(model, row=1)
    with pytest.raises(LabelError, match="row 0 has no label"):
        Contrast.pairs([("It is", " Paris then", " Rome now")]).show(model)


def test_what_a_tokenizer_puts_behind_a_text_does_not_stand_before_the_answer() -> None:
    from tokenizers import processors

    tokenizer: Any = copy.deepcopy(byte_level_bpe(answers=True))
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>", special_tokens=[("<|im_start|>", 1), ("<|endoftext|>", 0)]
    )
    assert tokenizer("It")["input_ids"][-1] == 0
    model = tl.wrap(FAMILIES["llama"].build(vocab_size=len(tokenizer)), tokenizer)
    (row,) = Contrast.pairs([("Is it? Answer:", " A", " B")]).tokens(model)
    assert isinstance(row, LabelledRow)
    assert row.positive[0] == 1
    assert 0 not in row.positive
    assert spelt(model, row.positive) == "Is it? Answer: A"
    assert not row.joined
