"""Bad input: every mistake has its own error, which shows the guilty line and what to write instead.

Each test makes a mistake inside ``refused(...)``, which checks the error's class, line and words, that the model did
not run, that it is as it was, and that a correct trace on it works; then the test writes what the error said.
"""

from __future__ import annotations

import linecache
import re
import sys
from types import TracebackType
from typing import Any

import torch

import tracelens as tl
from tests.support.families import FAMILIES
from tests.support.tokenizers import byte_level_bpe
from tracelens.errors import TracelensError

IDS = [5, 6, 7, 8]
RAGGED = [[5, 6, 7, 8], [9, 10]]
TEXT = "The capital of France is Paris."
D, LAYERS = 48, 3
MARK = "# <-"
"""Stands at the end of the guilty line of a test."""


class Subject:
    """A tiny model that counts its forward passes and knows whether it was changed."""

    def __init__(self, family: str) -> None:
        self.tokenizer = byte_level_bpe()
        self.hf: Any = FAMILIES[family].build(vocab_size=len(self.tokenizer))
        self.model = tl.wrap(self.hf, self.tokenizer)
        self.forwards = 0
        self.hf.register_forward_pre_hook(self._count)
        self.logits = self._logits()
        self.state = self._state()

    def _count(self, module: torch.nn.Module, args: object) -> None:
        self.forwards += 1

    def _logits(self) -> torch.Tensor:
        with self.model.trace(IDS):
            model_logits = self.model.logits.save()
        return model_logits.value

    def _state(self) -> list[object]:
        """All that a run could leave behind in the model."""
        found: list[object] = [self.tokenizer.padding_side, self.hf.config.to_json_string()]
        for module in self.hf.modules():
            found += [sorted(vars(module)), module.training, len(module._forward_hooks)]
            found += [len(module._forward_pre_hooks), len(module._backward_hooks)]
        for parameter in self.hf.parameters():
            found += [parameter.data_ptr(), parameter._version, parameter.requires_grad, parameter.grad]
        return found

    def check(self) -> None:
        """The model is as it was, and runs as it did."""
        assert self._state() == self.state
        assert torch.equal(self._logits(), self.logits)


LLAMA = Subject("llama")
GPT2 = Subject("gpt2")


class refused:
    """``with refused(Error, "words", ..., instead="words"):`` the block raises exactly that, at the marked line.

    The words stand in the message, or match it as regular expressions; ``text``: a part of the guilty line, where it
    bears no mark; ``forwards``: how often the model has to have run; ``on``: the model of the test.
    """

    def __init__(
        self,
        error: type[TracelensError],
        *says: str,
        instead: str | None,
        text: str | None = None,
        forwards: int = 0,
        on: Subject = LLAMA,
    ) -> None:
        self.expected = error
        self.says = says
        self.instead = instead
        self.text = text
        self.forwards = forwards
        self.on = on
        self.error: Any = None

    def __enter__(self) -> refused:
        frame = sys._getframe(1)
        self.filename, self.line = frame.f_code.co_filename, frame.f_lineno
        self.before = self.on.forwards
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        assert error is not None, f"nothing was raised where {self.expected.__name__} belongs"
        if not isinstance(error, TracelensError):
            return False
        ran = self.on.forwards - self.before
        assert type(error) is self.expected, f"{type(error).__name__}: {error}"
        self.check_line(error)
        message = str(error)
        for words in self.says:
            assert words in message or re.search(words, message), f"{words!r} is not in\n{message}"
        assert not re.search(r"\bnan\b", message)
        if self.instead is None:
            assert error.instead is None
        else:
            assert error.instead is not None, message
            assert self.instead in error.instead, f"{self.instead!r} is not in\n{error.instead}"
        assert ran == self.forwards, f"the model ran {ran} times"
        self.on.check()
        self.error = error
        return True

    def check_line(self, error: TracelensError) -> None:
        assert error.at is not None, f"without a line: {error}"
        assert error.at.filename == self.filename, f"at {error.at}: {error}"
        if self.text is not None:
            assert self.text in error.at.text
        else:
            assert error.at.line == marked(self.filename, self.line), f"at {error.at}: {error.at.text}"
        # The message shows the line as it stands in the file.
        assert f"at {error.at}\n      {error.at.text}\n" in str(error) + "\n"


def marked(filename: str, start: int) -> int:
    """The first line from ``start`` on that bears the mark."""
    lines = linecache.getlines(filename)
    return next(number for number in range(start, len(lines) + 1) if MARK in lines[number - 1])
