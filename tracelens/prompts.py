"""``t.prompts``: each prompt of a batch for itself, without its padding."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn, overload

from tracelens.errors import (
    ForeignValueError,
    IndexingError,
    NotALanguageModelError,
    ReplacementError,
    SymbolicSizeError,
    UnknownSiteError,
    WriteTargetError,
)
from tracelens.handles import Described, LayerHandle, Layers, global_site, recorder_of, unknown_global
from tracelens.inputs import Inputs
from tracelens.ir import dims
from tracelens.ir.ops import WHOLE, IndexItem, PromptRow, PromptTokens
from tracelens.ir.sites import GLOBAL_KINDS, Site
from tracelens.ir.types import TensorType
from tracelens.location import here
from tracelens.prompted import Prompt
from tracelens.recorder import Recorder
from tracelens.values import Value


class Prompts:
    """The prompts of a block: ``t.prompts[1]``, ``a, b = t.prompts``, ``for p in t.prompts``.

    What is recorded with them is right for prompts of as many tokens, which a program holds its prompts to.
    """

    __slots__ = ("_anatomy", "_parts", "_prompt")

    def __init__(self, anatomy: Described, prompt: Prompt) -> None:
        self._anatomy = anatomy
        self._prompt = prompt
        self._parts: dict[int, PromptPart] = {}

    @overload
    def __getitem__(self, key: int) -> PromptPart: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[PromptPart, ...]: ...
    def __getitem__(self, key: int | slice) -> PromptPart | tuple[PromptPart, ...]:
        """One prompt, counted from 0 or from -1 at the end; for a slice a tuple of them."""
        count = len(self)
        if isinstance(key, slice):
            return tuple(self[row] for row in range(count)[key])
        number = None if isinstance(key, bool) or not hasattr(key, "__index__") else operator.index(key)
        if number is None or not -count <= number < count:
            raise IndexingError(
                f"a prompt is chosen with a number, not with {key!r}"
                if number is None
                else f"there is no prompt {number}: the block has {'one, 0' if count == 1 else f'0 to {count - 1}'}",
                at=here(),
                instead="t.prompts[0], t.prompts[-1], or for p in t.prompts",
            )
        row = number % count
        if row not in self._parts:
            self._parts[row] = PromptPart(self._anatomy, self._prompt, row)
        return self._parts[row]

    def __setitem__(self, key: Any, new: Any) -> NoReturn:
        raise _no_target(f"t.prompts[{key!r}]")

    def __len__(self) -> int:
        if isinstance(self._prompt, Inputs):
            raise NotALanguageModelError(
                "these inputs are no prompts, so there is none of them to be singled out",
                at=here(),
                instead="plain indices: value[1:2]",
            )
        return len(self._prompt.lengths)

    def __iter__(self) -> Iterator[PromptPart]:
        return (self[row] for row in range(len(self)))

    def __repr__(self) -> str:
        return f"t.prompts of {self._prompt}"


class PromptPart:
    """One prompt of a batch: its sites are [1, P_i, ...], without padding, and writing them changes its row alone.

    ``p.layers[3].resid_post``, ``p.layers[2:5].head(1).z``, ``p.logits``. What is written for one prompt means here
    what it means in a block over that prompt alone.
    """

    __slots__ = ("_anatomy", "_prompt", "_row", "layers")

    layers: Layers
    """The layers, as ``model.layers``."""

    def __init__(self, anatomy: Described, prompt: Prompt, row: int) -> None:
        layers = Layers(PromptLayer(anatomy, index, self) for index in range(anatomy.n_layers))
        for name, value in zip(PromptPart.__slots__, (anatomy, prompt, row, layers), strict=True):
            object.__setattr__(self, name, value)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Value:
            if name.startswith("_"):
                raise AttributeError(name)
            return self.read(recorder_of(self._anatomy, f"{self!r}.{name}"), self._site(name))

    def __setattr__(self, name: str, new: Any) -> None:
        if name == "layers":
            raise _no_target(f"{self!r}.layers")
        self.write(recorder_of(self._anatomy, f"{self!r}.{name}"), self._site(name), new)

    def _site(self, name: str) -> Site:
        site = global_site(name)
        if site is None and name in _OF_THE_MODEL:
            raise UnknownSiteError(
                f"{self!r} has no {name!r}: it is of the model, and the same for all prompts",
                at=here(),
                instead=f"model.{name}",
            )
        if site is None:
            raise unknown_global(name, ("layers",))
        return site

    def read(self, recorder: Recorder, site: Site) -> Value:
        """The prompt's own part of a site."""
        whole = Value.of_site(recorder, site)
        return whole._indexed(self._index(recorder, whole._type), by_token=True)

    def write(self, recorder: Recorder, site: Site, new: Any) -> None:
        """Replaces the prompt's own part of a site."""
        whole = Value.of_site(recorder, site)
        whole._assign(self._index(recorder, whole._type), new, by_token=True)

    def _index(self, recorder: Recorder, type_: TensorType) -> tuple[IndexItem, ...]:
        if recorder.prompt is not self._prompt:
            raise ForeignValueError(
                f"{self!r} of another block was used in this one, whose prompts are others",
                at=here(),
                also=(("the open block was opened at", recorder.opened),),
                instead="t.prompts of the open block",
            )
        row, length = PromptRow(self._row), PromptTokens(self._row, self._prompt.lengths[self._row])
        items = [
            row if dim == dims.B else length if dim in (dims.P, dims.S) else WHOLE for dim in type_.shape
        ]
        while items[-1] == WHOLE:
            items.pop()
        return tuple(items)

    def __dir__(self) -> list[str]:
        present = [kind.name for kind in GLOBAL_KINDS if self._anatomy.has(Site(kind.name))]
        return sorted(["layers", "token_mask", *present])

    def __repr__(self) -> str:
        return f"t.prompts[{self._row}]"


class PromptLayer(LayerHandle):
    """One layer as one prompt passes through it."""

    __slots__ = ("_part",)

    def __init__(self, anatomy: Described, index: int, part: PromptPart) -> None:
        super().__init__(anatomy, index)
        object.__setattr__(self, "_part", part)

    def _read(self, recorder: Recorder, site: Site) -> Value:
        return self._part.read(recorder, site)

    def _write(self, recorder: Recorder, site: Site, new: Any) -> None:
        self._part.write(recorder, site, new)

    def skip(self, *given: Any) -> None:
        """Refused: a layer runs for all prompts of a batch."""
        raise _runs_for_all(f"{self!r}.skip()", f"{self!r}.resid_post = {self!r}.resid_pre")

    def replace(self, *unnamed: Any, **new: Any) -> None:
        """Refused: a module runs for all prompts of a batch."""
        name = next(iter(new), "resid_post")
        raise _runs_for_all(f"{self!r}.replace({name}=...)", f"{self!r}.{name} = value")

    def __repr__(self) -> str:
        return f"{self._part!r}.layers[{self._index}]"


_OF_THE_MODEL = frozenset({"unembed", "param", "module", "modules", "hf", "config", "tokenizer", "n_layers"})


def _runs_for_all(what: str, instead: str) -> ReplacementError:
    return ReplacementError(
        f"{what} would leave a module out for one prompt, and a module runs for all prompts of the batch",
        at=here(),
        instead=f"{instead}, which changes this prompt alone; or a block of its own for the prompt",
    )


def _no_target(what: str) -> WriteTargetError:
    return WriteTargetError(
        f"{what} is not a tensor, so nothing can be assigned to it",
        at=here(),
        instead="one of its sites: t.prompts[0].layers[3].resid_post = value",
    )


def prompts_of(anatomy: Described, prompt: Prompt | None) -> Prompts:
    """The prompts of a block; :class:`SymbolicSizeError` for a recording that has none."""
    if prompt is None:
        raise SymbolicSizeError(
            "t.prompts are the prompts of a block, and this recording has none",
            at=here(),
            instead="model.record([prompt, other]) to record for prompts of as many tokens",
        )
    return Prompts(anatomy, prompt)
