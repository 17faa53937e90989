"""The inputs of a model that is no language model: whatever its forward takes, in place of a prompt."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, NoReturn, cast

import torch

from tracelens.errors import NotALanguageModelError
from tracelens.ir.ops import Selector
from tracelens.prompted import Prompt
from tracelens.subject import INPUTS


class Inputs(Prompt):
    """The arguments of one forward pass. What is recorded on them is right for others of the same shapes only."""

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.args = args
        self.kwargs = dict(kwargs)
        self.signature = (
            f"({', '.join([*map(_shown, args), *(f'{k}={_shown(v)}' for k, v in kwargs.items())])})"
        )
        self.sizes = {INPUTS: zlib.crc32(self.signature.encode())}
        self.ragged = False
        self.tokenizer = None
        self.owner = None

    def holds(self, prompt: object) -> bool:
        return False

    def select(self, selector: Selector) -> NoReturn:
        raise NotALanguageModelError(
            "these inputs have no tokens that could be addressed",
            instead="plain indices: value[:, 3]",
        )

    width = repeats = mask_indices = select  # pyright: ignore[reportAssignmentType]  # all of them ask for tokens

    @property
    def lengths_digest(self) -> int:
        return 0

    def __repr__(self) -> str:
        return f"inputs {self.signature}"


def _shown(value: Any) -> str:
    """What decides about shapes: of tensors their own, of plain data the data, of other things their kind."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Mapping):
        parts = (f"{name!r}: {_shown(part)}" for name, part in cast("Mapping[Any, Any]", value).items())
        return "{" + ", ".join(parts) + "}"
    if isinstance(value, list | tuple):
        shown = ", ".join(map(_shown, cast("list[Any]", value)))
        return f"[{shown}]" if isinstance(value, list) else f"({shown},)"
    if value is None or isinstance(value, bool | int | float | complex | str | torch.dtype | torch.device):
        return repr(value)
    return f"<{type(value).__qualname__}>"
