"""Conversations as prompts: what the tokenizer's chat template makes of messages, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tracelens as tl
from tests.errors import LLAMA, refused
from tests.support.families import FAMILIES
from tests.support.tokenizers import byte_level_bpe
from tracelens.batch import prepare
from tracelens.errors import NoTokenizerError, PromptError

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ASK = [{"role": "user", "content": "The capital of France is"}]
TOLD = [*ASK, {"role": "assistant", "content": "Paris"}]


def chatting(template: str | None = TEMPLATE) -> tl.Model:
    """A model whose tokenizer puts a token of its own before each text, as Llama's does."""
    tokenizer = byte_level_bpe(bos=True)
    tokenizer.chat_template = template
    return tl.wrap(FAMILIES["llama"].build(vocab_size=len(tokenizer)), tokenizer)


model = chatting()


def ids(rendered: str) -> list[int]:
    tokenizer: Any = model.tokenizer
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def tokens(prompt: Any) -> list[list[int]]:
    return [[token.id for token in row] for row in model.tokens(prompt)]


def test_the_answer_is_opened_and_special_tokens_stand_once() -> None:
    assert len(ids("x")) < len(model.tokenizer("x")["input_ids"]), "the tokenizer adds none of its own"
    assert tokens(ASK) == [ids("<|user|>The capital of France is\n<|assistant|>")]
    tokenizer: Any = model.tokenizer
    theirs = tokenizer.apply_chat_template(ASK, add_generation_prompt=True, return_dict=True)
    assert tokens(ASK) == [theirs["input_ids"]]


def test_after_the_assistant_none_is_opened() -> None:
    assert tokens(TOLD) == [ids("<|user|>The capital of France is\n<|assistant|>Paris\n")]


def test_several_conversations_are_rows() -> None:
    assert tokens([ASK, TOLD]) == [*tokens(ASK), *tokens(TOLD)]
    assert tokens((tuple(ASK),)) == tokens(ASK)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["system", "user", "assistant", "tool"]),
            st.text(st.characters(codec="ascii"), min_size=1),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_messages_are_what_the_template_makes_of_them(said: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in said]
    tokenizer: Any = model.tokenizer
    theirs = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=said[-1][0] != "assistant"
    )
    batch = prepare(messages, tokenizer, max_positions=None)
    assert batch.texts == (theirs,)
    assert batch.tokens(0) == ids(theirs)


def test_blocks_over_conversations() -> None:
    with model.trace(ASK):
        h = model.layers[1].resid_post.tok["France"].save()
        logits = model.logits.save()
    rendered = ids("<|user|>The capital of France is\n<|assistant|>")
    with model.trace([rendered]):
        expected = model.logits.save()
        there = model.layers[1].resid_post.tok["France"].save()
    assert torch.equal(logits.value, expected.value)
    assert torch.equal(h.value, there.value)
    with model.trace([ASK, TOLD]) as t:
        part = t.prompts[1].layers[1].resid_post.tok["Paris"].save()
    assert part.value.shape[0] == 1


def test_text_follows_a_conversation() -> None:
    with model.generate(ASK, max_new_tokens=4, eos_token_id=None) as one:
        model.layers[1].resid_post += 0.0
    with model.generate([ASK, TOLD], max_new_tokens=4, eos_token_id=None) as several:
        model.layers[1].resid_post += 0.0
    assert isinstance(one.text, str)
    assert isinstance(several.text, list)
    assert several.tokens[0] == one.tokens


def test_the_tokens_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    model.show(ASK)
    assert '"' in capsys.readouterr().out


def test_characters_count_in_what_was_rendered() -> None:
    start = "<|user|>The capital of France is\n<|assistant|>".index(" France")
    with model.trace(ASK):
        h = model.embed.tok[tl.chars(start, start + 7)].save()
        same = model.embed.tok[" France"].save()
    assert torch.equal(h.value, same.value)


# --- what is refused -------------------------------------------------------------------------------------------------

SAYS: dict[str, tuple[Any, str, str]] = {
    "a role": ([{"role": "usr", "content": "x"}], "message 0 has the role 'usr'", "one of system"),
    "no content": ([{"role": "user"}], "message 0 holds 'role'", '"content": "What'),
    "another key": ([{**ASK[0], "tools": []}], "message 0 holds", "apply_chat_template(messages, ..."),
    "a number": ([{"role": "user", "content": 3}], "the content of message 0 is a int", '"content": "What'),
    "parts": ([{"role": "user", "content": [{"type": "text"}]}], "is a list, not a text", '"content": "What'),
    "a text beside": ([ASK[0], "x"], "message 1 is a str", '"content": "What'),
    "a text before": (["x", ASK[0]], "message 0 is a str", '"content": "What'),
    "a text among": ([ASK, "x"], "entry 1 is none", "a list of conversations alone"),
    "of the second": ([ASK, [{"role": "no", "content": "x"}]], "message 0 of conversation 1", "one of"),
}


@pytest.mark.parametrize(("prompt", "says", "instead"), SAYS.values(), ids=SAYS)
def test_what_is_no_conversation(prompt: Any, says: str, instead: str) -> None:
    LLAMA.tokenizer.chat_template = TEMPLATE
    try:
        with refused(PromptError, says, instead=instead):
            LLAMA.model.trace(prompt)  # <-
    finally:
        LLAMA.tokenizer.chat_template = None


def test_without_a_template() -> None:
    with refused(PromptError, "has no chat template", instead="the text itself"):
        LLAMA.model.trace(ASK)  # <-


def test_without_a_tokenizer() -> None:
    bare = tl.wrap(FAMILIES["llama"].build())
    with pytest.raises(NoTokenizerError, match="the prompt is a conversation"):
        bare.trace(ASK)


def test_a_template_that_refuses() -> None:
    strict = chatting("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(PromptError, match="refuses these messages: roles must alternate") as caught:
        strict.trace(ASK)
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__


def test_a_template_that_leaves_a_message_out() -> None:
    """As that of a model which knows no system messages: what they say would have no effect, and nobody would know."""
    deaf = chatting(
        "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(PromptError, match="leaves out message 0, which has the role 'system'"):
        deaf.trace([{"role": "system", "content": "Be brief."}, *ASK])
    assert len(deaf.tokens(ASK)) == 1
