"""Activation addition as published: the difference of two prompts, added token by token to the beginning of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tracelens.errors import Blaming, NoTokenizerError, OptionError, TokenMatchError
from tracelens.location import here
from tracelens.steering import applying
from tracelens.steering.directions import read_place
from tracelens.steering.facts import Facts, Place, written
from tracelens.view import Line, Shown, Stack, Table, View

if TYPE_CHECKING:
    from tracelens.model import Model


class ActivationAddition(Shown):
    """A sequence of directions that is added to the tokens at the beginning of a prompt, one to each.

    ``directions``: by place [K, width], float32, on the host. Made by :meth:`of`. ActAdd, Turner et al. 2023
    (arXiv:2308.10248), algorithm 1: in the pass over the prompt, ``h[start + i] += strength * directions[i]``.

    >>> love = tl.steering.ActivationAddition.of(model, "Love", "Hate", layer=6)         # doctest: +SKIP
    >>> with model.generate("I hate you because", max_new_tokens=30) as t:               # doctest: +SKIP
    ...     love.apply(t, 5.0)
    """

    __slots__ = ("directions", "facts", "tokens", "words")

    directions: Mapping[Place, Tensor]
    facts: Facts
    tokens: tuple[tuple[int, ...], tuple[int, ...]]
    """The ids of both prompts, which are equally many."""
    words: tuple[tuple[str, ...], tuple[str, ...]] | None
    """What they spell, where that is known."""

    def __init__(
        self,
        directions: Mapping[Place, Tensor],
        facts: Facts,
        tokens: tuple[tuple[int, ...], tuple[int, ...]],
        words: tuple[tuple[str, ...], tuple[str, ...]] | None = None,
    ) -> None:
        self.directions = MappingProxyType(dict(directions))
        self.facts = facts
        self.tokens = tokens
        self.words = words

    @classmethod
    def of(
        cls,
        model: Model,
        positive: Any,
        negative: Any,
        *,
        layer: int,
        site: str = "resid_pre",
        padding: int | str = " ",
    ) -> ActivationAddition:
        """What a layer holds for one prompt less what it holds for another, at each token.

        ``positive``, ``negative``: texts, or token ids. The shorter is filled up behind its end with ``padding``, a
        token by its text or id; as published that is a space. ``site``: as published what enters the layer.

        Raises :class:`~tracelens.errors.TokenMatchError` for a padding that is not one token.
        """
        with Blaming(here()):
            if not isinstance(layer, int) or not -model.n_layers <= layer < model.n_layers:
                raise OptionError(
                    f"layer={layer!r} is none of the model's {model.n_layers}",
                    instead="layer=6, counted from 0",
                )
            place = read_place((site, layer % model.n_layers))
            one, other = ([token.id for token in model.tokens(given)[0]] for given in (positive, negative))
            length = max(len(one), len(other))
            if len(one) != len(other):
                fill = _one_token(model, padding)
                one, other = (ids + [fill] * (length - len(ids)) for ids in (one, other))
            with model.trace([one, other]):
                found = getattr(model.layers[place[1]], place[0]).save(dtype=torch.float32)
            facts = Facts.of(model, method="actadd", positions=f"the first {length} tokens", rows=1)
            words = None if model.tokenizer is None else (_spelt(model, one), _spelt(model, other))
            difference = found.value[0] - found.value[1]
            return cls({place: difference}, facts, (tuple(one), tuple(other)), words)

    def save(self, path: str | Path) -> Path:
        """Writes the directions, the tokens and the facts to a safetensors file; gives its path.

        Raises :class:`~tracelens.errors.SteeringFileError` for another ending.
        """
        from tracelens.steering import vector_files

        with Blaming(here()):
            vector_files.save(self, Path(path))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path, model: Model | None = None) -> ActivationAddition:
        """Reads what :meth:`save` wrote; ``model``: the model that it has to be one for.

        Raises :class:`~tracelens.errors.SteeringMismatchError` where it is not, and
        :class:`~tracelens.errors.SteeringFileError` for a file that is not whole, or of something else.
        """
        from tracelens.steering import vector_files

        with Blaming(here()):
            return vector_files.load_addition(Path(path), model)

    def __len__(self) -> int:
        """How many tokens of a prompt are changed."""
        return len(self.tokens[0])

    def check(self, model: Model) -> None:
        """Raises :class:`~tracelens.errors.SteeringMismatchError` unless it was made for this model."""
        with Blaming(here()):
            self.facts.check(model)

    def apply(self, t: Any, strength: Any = 1.0, *, start: int = 0) -> None:
        """Adds the sequence to the prompt of an open block, from its token ``start`` on; a generation's tokens are not.

        ``strength``: a number, or one for each row. Tokens are counted in each prompt by itself, a token that the
        tokenizer puts before the text included. Raises :class:`~tracelens.errors.TokenRangeError` or
        :class:`~tracelens.errors.RaggedSelectionError` for prompts with fewer tokens, which is left open as published.
        """
        with Blaming(here()):
            if type(start) is not int or start < 0:
                raise OptionError(
                    f"start={start!r} is no token", instead="start=0, the first token of the prompt"
                )
            applying.add_in_order(self, t, strength, list(range(start, start + len(self))))

    def _view(self) -> View:
        words = f"activation addition for {self.facts.model or 'an unknown model'}: {len(self)} tokens"
        one, other = self.words or tuple(tuple(map(str, ids)) for ids in self.tokens)
        rows = tuple(
            (written(place), str(token), one[token], other[token], f"{direction.double().norm().item():.4g}")
            for place, directions in self.directions.items()
            for token, direction in enumerate(directions)
        )
        return Stack((Line(words), Table(("place", "token", "of", "less", "norm"), rows)))


def _spelt(model: Model, ids: Sequence[int]) -> tuple[str, ...]:
    return tuple(repr(str(model.tokenizer.decode([one]))) for one in ids)  # pyright: ignore[reportOptionalMemberAccess]  # asked before


def _one_token(model: Model, padding: int | str) -> int:
    if isinstance(padding, int):
        return padding
    if model.tokenizer is None:
        raise NoTokenizerError(
            "the prompts have unequally many tokens, and this model has no tokenizer to fill one up with a space",
            instead="padding= with the id of a token",
        )
    ids: list[int] = model.tokenizer.encode(padding, add_special_tokens=False)
    if len(ids) != 1:
        raise TokenMatchError(
            f"padding={padding!r} is {len(ids)} tokens of this tokenizer, {ids}, and has to be one",
            instead="padding= with another text or the id of a token; or prompts of equally many tokens",
        )
    return ids[0]
