"""``model.lens(value)``: what a value inside the model says about the next token, as a value of the language."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import nn

from tracelens.errors import Blaming, LensError
from tracelens.ir.ops import IndexItem, Ref
from tracelens.ir.rules_lens import DISTANCE, LENS
from tracelens.ir.sites import Site
from tracelens.location import here
from tracelens.mapped import MappedValue
from tracelens.operand import Operand
from tracelens.recorder import Recorder
from tracelens.subject import HeadOf
from tracelens.token_texts import one_token
from tracelens.values import Value

Token = int | str | torch.Tensor | Operand
"""A token: its id, a text that is one token, or ids that broadcast to the rows of the value."""


class Translator(Protocol):
    """A lens that is more than the model's own head, such as a tuned lens."""

    def translate(self, value: Any, layer: int, component: str | None = None) -> Any:
        """What the head is to read in place of ``value`` [..., D], which is of layer ``layer``.

        ``component``: the name of its site; ``None`` for a value that knows its site itself.
        """
        ...

    def check(self, model: Any) -> None:
        """Raises a named error if the lens was made for another model."""
        ...


class Top(NamedTuple):
    """The most likely tokens: log-probabilities and token ids, both [..., k], the likeliest first."""

    values: Any
    indices: Any

    def save(self, name: str | None = None, **options: Any) -> Top:
        """Lets both leave the run; with a name they are ``t["name.values"]`` and ``t["name.indices"]`` too."""
        names = (None, None) if name is None else (f"{name}.values", f"{name}.indices")
        return Top(self.values.save(names[0], **options), self.indices.save(names[1], **options))


class Lens:
    """What a value [..., D] of the model says about the next token, read through the model's own head.

    Made by :meth:`tracelens.Model.lens`. Each method gives a value [...], without the last axis: it can be saved,
    computed with and written. No logits are kept: the vocabulary is gone through in chunks, where the head lies, and
    under tensor parallelism every rank goes through its own part. All numbers are float32 (float64 for models in
    float64), with the soft-max over the whole vocabulary; divergences and entropies are in nats.

    >>> with model.trace("The capital of France is"):                                # doctest: +SKIP
    ...     lens = model.lens(model.layers[20].resid_post)
    ...     top = lens.topk(5).save()                                                # values and indices, [1, 5, 5]
    ...     paris = lens.log_prob(" Paris")[:, -1].save()                            # [1]
    """

    __slots__ = ("_head", "_options", "_state", "_tokenizer", "_value")

    def __init__(self, value: Any, state: Any, head: HeadOf, tokenizer: Any, options: dict[str, Any]) -> None:
        self._value, self._state, self._head = value, state, head
        self._tokenizer, self._options = tokenizer, options

    def __repr__(self) -> str:
        return f"<lens on {self._value!r}>"

    # --- what it says --------------------------------------------------------------------------------------------

    def topk(self, k: int) -> Top:
        """The ``k`` most likely tokens: log-probabilities and ids, both [..., k]."""
        if isinstance(k, bool) or not isinstance(k, int) or not 0 < k <= self._head.vocabulary:
            raise LensError(
                f"topk({k!r}) of a vocabulary of {self._head.vocabulary} tokens", at=here(), instead="topk(5)"
            )
        return Top(*self._ask(("topk", k)))

    def max_prob(self) -> Any:
        """The probability of the most likely token."""
        return self.topk(1).values[..., 0].exp()

    def log_prob(self, token: Token) -> Any:
        """The log-probability of a token (natural logarithm); nan where an id is negative, which names no token."""
        return self._ask(("log_prob", 0), token)

    def prob(self, token: Token) -> Any:
        """The probability of a token."""
        return self.log_prob(token).exp()

    def cross_entropy(self, tokens: Token) -> Any:
        """Minus the log-probability of the tokens, in nats."""
        return -self.log_prob(tokens)

    def logit(self, token: Token) -> Any:
        """The logit of a token, as the model would give it."""
        return self._ask(("logit", 0), token)

    def rank(self, token: Token) -> Any:
        """How many tokens are more likely: 0 for the most likely one; -1 where an id is negative. Whole numbers."""
        return self._ask(("rank", 0), token)

    def log_prob_difference(self, token: Token, other: Token) -> Any:
        """The log-probability of one token less that of another, which is also the difference of their logits."""
        return self.logit(token) - self.logit(other)

    def entropy(self) -> Any:
        """The entropy of the distribution, in nats."""
        return self._ask(("entropy",))

    def logsumexp(self) -> Any:
        """The logarithm of the sum of the exponentials of all logits."""
        return self._ask(("logsumexp",))

    def kl(self, other: Lens | None = None) -> Any:
        """KL(other || this) in nats: what is lost by taking this distribution for the other one.

        ``other``: a lens on a value with the same last axes; default the model's own output, ``model.final_norm``, at
        the same tokens, for a site, what is indexed from one, and what has the axes of one.
        """
        reference = self._final() if other is None else other._state
        return self._ask(("kl",), reference=reference)

    def js(self, other: Lens | None = None) -> Any:
        """The Jensen-Shannon divergence in nats: 0 for the same distribution, at most log 2, either way round the same.

        Half of KL(this || m) and KL(other || m), where m is the mean of both. ``other``: as for :meth:`kl`.
        """
        return self._distance("js", other)

    def tv(self, other: Lens | None = None) -> Any:
        """The total variation: half the sum of the absolute differences of all probabilities, from 0 to 1.

        ``other``: as for :meth:`kl`.
        """
        return self._distance("tv", other)

    def logits(self) -> Any:
        """All logits [..., V] in the dtype of the model. They are kept whole: V is large."""
        first, head = _member(self._state), self._head
        weight: Any = _parameter(first, head.weight)
        bias: Any = None if head.bias is None else _parameter(first, head.bias)
        found = torch.nn.functional.linear(self._state, weight, bias)
        found = found if head.scale is None else found * head.scale
        return found if head.softcap is None else torch.tanh(found / head.softcap) * head.softcap

    # --- how -----------------------------------------------------------------------------------------------------

    def _ask(self, ask: tuple[Any, ...], *targets: Token, reference: Any = None, state: Any = None) -> Any:
        first, head, given = self._head_and_options()
        aims = tuple(self._token(target) for target in targets)
        state = self._state if state is None else state
        return first._apply(LENS, (state, *head, reference, aims, (ask,)), given)

    def _distance(self, kind: str, other: Lens | None) -> Any:
        first, head, given = self._head_and_options()
        reference = self._final() if other is None else other._state
        totals = self.logsumexp(), self._ask(("logsumexp",), state=reference)
        return first._apply(DISTANCE, (self._state, *head, reference, *totals, kind), given)

    def _head_and_options(self) -> tuple[Value, tuple[Any, Any], dict[str, Any]]:
        first, head = _member(self._state), self._head
        weight = _parameter(first, head.weight)
        bias = None if head.bias is None else _parameter(first, head.bias)
        options = {"scale": head.scale, "softcap": head.softcap, **self._options}
        return first, (weight, bias), {key: value for key, value in options.items() if value is not None}

    def _token(self, token: Token) -> Any:
        if isinstance(token, str):
            with Blaming(here()):
                token = one_token(token, self._tokenizer)
        if isinstance(token, int) and not isinstance(token, bool):
            if not 0 <= token < self._head.vocabulary:
                raise LensError(
                    f"there is no token {token}: the vocabulary has {self._head.vocabulary}",
                    at=here(),
                    instead="an id from 0 on, as model.tokens(prompt) shows them",
                )
            return token
        if isinstance(token, torch.Tensor | Operand):
            return token
        raise LensError(f"{token!r} is no token", at=here(), instead='" Paris", 4649, or a tensor of ids')

    def _final(self) -> Any:
        """What the head itself reads, at the tokens that the value has been narrowed to."""
        value = _member(self._value)
        recorder: Recorder = value._recorder
        site = Site("final_norm")
        if recorder.generating:
            site = site.during(recorder.steps_of(value._id))
        found = Value.of_site(recorder, site)
        for index in _narrowing(value):
            found = found._indexed(index, by_token=True)
        shape, own = found._type.shape, value._type.shape
        # Not by their numbers: as many prompts as tokens, or as layers, would pass for each other.
        if own[len(own) - len(shape) :] != shape:
            raise LensError(
                f"what this lens is on, {value._type}, was computed with, so that nobody knows at which tokens it is "
                f"to be compared with the model's output, {found._type}",
                at=here(),
                instead="the same on both: model.lens(h[:, -1] * 2).kl(model.lens(model.final_norm[:, -1]))",
            )
        return found


def lens_of(
    value: Any,
    hf: nn.Module,
    tokenizer: Any,
    *,
    recorder: Recorder,
    head: HeadOf,
    translate: Callable[..., Any] | None = None,
    layer: int | None = None,
    norm: bool | None = None,
    workspace: int | None = None,
) -> Lens:
    """The lens on a value: translated if asked, normed by the model's last norm unless it already is."""
    if isinstance(value, torch.Tensor):
        found = recorder.argument(value)
        assert isinstance(found, Ref)
        value = Value(recorder, found.id)
    if not isinstance(value, Value | MappedValue):
        raise LensError(
            f"a lens is put on a value of the model, and this is {type(value).__name__}",
            at=here(),
            instead="model.lens(model.layers[20].resid_post)",
        )
    type_ = _member(value)._type
    if not type_.dtype.is_floating or type_.ndim < 1 or type_.shape[-1] != head.width:
        raise LensError(
            f"a lens reads what the model's last norm does, {head.width} wide, and this is {type_}",
            at=here(),
            instead="a site of the residual stream's width, such as resid_post, attn_out or mlp_out",
        )
    state = value
    if translate is not None:
        state = _translated(value, translate, layer)
    if norm is None:
        norm = not _is_normed(value)
    if norm:
        state = _normed(state, hf.get_submodule(head.norm), head.norm)
    return Lens(value, state, head, tokenizer, {"workspace": workspace})


def _translated(value: Any, translate: Callable[..., Any], layer: int | None) -> Any:
    if isinstance(value, MappedValue):
        if layer is not None:
            raise LensError(
                f"layer={layer} for values of several layers, each of which has its own translator",
                at=here(),
                instead="model.lens(model.layers[:].resid_post, lens=tuned)",
            )
        members = [translate(one, at) for at, one in zip(value.layers, value._members, strict=True)]
        return MappedValue(value.layers, tuple(members))
    if layer is None:
        site = value._root()._site
        if site is None or site.layer is None:
            raise LensError(
                "this value was computed, so that nobody knows which layer's translator it needs",
                at=here(),
                instead="model.lens(value, lens=tuned, layer=20)",
            )
        return translate(value, site.layer)
    # What was computed stands for the state after the layer that the user names.
    return translate(value, layer, None if value._root()._site is not None else "resid_post")


def _is_normed(value: Any) -> bool:
    site = None if isinstance(value, MappedValue) else value._root()._site
    return site is not None and site.name == "final_norm"


def _normed(state: Any, norm: nn.Module, path: str) -> Any:
    """The norm applied with the model's parameters as values of the graph: they may be offloaded, or on other ranks."""
    first = _member(state)
    stand_in = copy.copy(norm)
    stand_in.__dict__ = {**norm.__dict__, "_parameters": {}, "_buffers": {}}
    for name, parameter in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
        stand_in.__dict__[name] = None if parameter is None else _parameter(first, f"{path}.{name}")
    for name, parameter in norm._parameters.items():
        if parameter is None:
            stand_in.__dict__[name] = None
    # The class's own: accelerate and others put another forward on the module itself.
    return type(norm).forward(stand_in, state)


def _member(value: Any) -> Value:
    """The value, or the first of several layers'."""
    return cast("Value", value._members[0] if isinstance(value, MappedValue) else value)


def _parameter(value: Value, path: str) -> Value:
    recorder = value._recorder
    return Value(recorder, recorder.parameter(path))


def _narrowing(value: Value) -> Sequence[tuple[IndexItem, ...]]:
    """How a value was made of a site by indexing alone."""
    found: list[tuple[IndexItem, ...]] = []
    step = value
    while step._parent is not None:
        assert step._index is not None
        found.insert(0, step._index)
        step = step._parent
    return found
