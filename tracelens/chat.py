"""Conversations as prompts: lists of messages become the text that the tokenizer's chat template makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from tracelens.errors import NoTokenizerError, PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Who says something in a conversation."""

_MESSAGE = '[{"role": "user", "content": "What is the capital of France?"}]'


def rendered(prompt: object, tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, ...] | None:
    """The text of each conversation, special tokens included; ``None`` for a prompt that is none.

    ``prompt``: a list of messages, ``{"role": ..., "content": ...}``, or a list of such lists. What opens the answer is
    added, unless the last message is the assistant's. Raises :class:`~tracelens.errors.PromptError` for messages that
    are none, and where the template is missing, refuses them or leaves one out.
    """
    conversations = _conversations(prompt)
    if conversations is None:
        return None
    if tokenizer is None:
        raise NoTokenizerError(
            "the prompt is a conversation, and the model was given no tokenizer",
            instead="tl.wrap(model, tokenizer), or a prompt of token ids",
        )
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            "the prompt is a conversation, and the tokenizer has no chat template that would make a text of it",
            instead="the text itself; or tokenizer.chat_template = that of the model's own authors",
        )
    return tuple(
        _rendered(conversation, tokenizer, "" if len(conversations) == 1 else f" of conversation {number}")
        for number, conversation in enumerate(conversations)
    )


def _conversations(prompt: object) -> Sequence[Sequence[object]] | None:
    if not isinstance(prompt, list | tuple) or not prompt:
        return None
    entries = cast("Sequence[object]", prompt)
    if any(isinstance(entry, Mapping) for entry in entries):
        return [entries]
    nested = [_are_messages(entry) for entry in entries]
    if not any(nested):
        return None
    if not all(nested):
        raise PromptError(
            f"the prompt mixes conversations with other things: entry {nested.index(False)} is none",
            instead=f"a list of conversations alone: [{_MESSAGE}, ...]",
        )
    return cast("Sequence[Sequence[object]]", entries)


def _are_messages(entry: object) -> bool:
    return isinstance(entry, list | tuple) and any(
        isinstance(part, Mapping) for part in cast("Sequence[object]", entry)
    )


def _rendered(conversation: Sequence[object], tokenizer: PreTrainedTokenizerBase, of: str) -> str:
    messages = [_message(entry, f"message {number}{of}") for number, entry in enumerate(conversation)]
    try:
        text = str(
            cast(Any, tokenizer).apply_chat_template(
                messages, tokenize=False, add_generation_prompt=messages[-1]["role"] != "assistant"
            )
        )
    except Exception as error:  # whatever the authors of the template have thought of
        raise PromptError(
            f"the tokenizer's chat template refuses these messages: {error}",
            instead="messages in the order that the template has: user and assistant in turn, as a rule",
        ) from error
    for number, message in enumerate(messages):
        # Templates leave out what an assistant was thinking, and write what tools gave as JSON.
        if message["role"] not in ("assistant", "tool") and message["content"].strip() not in text:
            raise PromptError(
                f"the tokenizer's chat template leaves out message {number}{of}, which has the role "
                f"{message['role']!r}",
                instead="what it says in a message of the user's",
            )
    return text


def _message(entry: object, what: str) -> dict[str, str]:
    if not isinstance(entry, Mapping):
        raise PromptError(f"{what} is a {type(entry).__name__}, not a message", instead=_MESSAGE)
    message = dict(cast("Mapping[Any, Any]", entry))
    if set(message) != {"role", "content"}:
        held = ", ".join(map(repr, message)) or "nothing"
        raise PromptError(
            f"{what} holds {held}, where a role and a content belong",
            instead=f"{_MESSAGE}; for tools and the like, token ids: "
            'tokenizer.apply_chat_template(messages, ..., return_dict=True)["input_ids"]',
        )
    if message["role"] not in ROLES:
        raise PromptError(
            f"{what} has the role {message['role']!r}, which is none", instead=f"one of {', '.join(ROLES)}"
        )
    if not isinstance(message["content"], str):
        raise PromptError(
            f"the content of {what} is a {type(message['content']).__name__}, not a text", instead=_MESSAGE
        )
    return message
