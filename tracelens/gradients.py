"""``tl.grad``: the derivative of a number with respect to sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, overload

from tracelens.errors import (
    GradientInGenerationError,
    GradientTargetError,
    LossError,
    NestedGradientError,
    NoTraceError,
    TracelensError,
    UnusedGradientError,
)
from tracelens.ir.gradients import Sources, is_computed, is_one_number, sources
from tracelens.ir.ops import OwnTokens, Param, PromptRow, Read, TokenSelector
from tracelens.ir.sites import Effect
from tracelens.ir.text import index_text
from tracelens.location import here
from tracelens.mapped import MappedValue
from tracelens.operand import Operand
from tracelens.recorder import Recorder
from tracelens.selection import written
from tracelens.splicing import Features, SavedFeatures
from tracelens.subject import spelling
from tracelens.values import Value

V = TypeVar("V", Value, MappedValue)


@overload
def grad(loss: Value, wrt: V) -> V: ...
@overload
def grad(loss: Value, wrt: list[Any]) -> list[Any]: ...
@overload
def grad(loss: Value, wrt: tuple[Any, ...]) -> tuple[Any, ...]: ...
def grad(loss: Value, wrt: Any) -> Any:
    """The derivative of ``loss`` with respect to sites: one value for each, of the site's shape and dtype.

    ``loss``: one floating number, computed from sites that the forward pass reaches after (or at) those of ``wrt``.
    ``wrt``: a site as it was read, also one mapped over layers or that of one of ``t.prompts``, the features of a
    splice (:func:`tracelens.splice`), or a list or tuple of them, in any order; what comes back is of the same kind.
    All of them take one backward pass, which is run as soon as the loss is there.

    It is the derivative at the version that was read: before a later write to the site, and through it. Gradients can
    be computed on and saved like any value. They cannot be written into the same forward pass
    (:class:`~tracelens.errors.CausalityError`), nor differentiated again (``g.detach()`` makes a constant of one).

    Raises :class:`~tracelens.errors.LossError`, :class:`~tracelens.errors.GradientTargetError`,
    :class:`~tracelens.errors.UnusedGradientError` (here where the order of the sites tells, else when the model runs),
    :class:`~tracelens.errors.NestedGradientError` and :class:`~tracelens.errors.GradientInGenerationError`.

    >>> with model.trace("The capital of France is") as t:                             # doctest: +SKIP
    ...     streams = model.layers[:].resid_post
    ...     loss = model.logits[0, -1, paris] - model.logits[0, -1, rome]
    ...     tl.grad(loss, streams).save("g")                          # [layers, 1, P, D]
    """
    try:
        return _grad(loss, wrt)
    except TracelensError as error:
        error.at = error.at or here()
        raise


def _grad(loss: Any, wrt: Any) -> Any:
    recorder, number = _loss(loss)
    several: Sequence[Any] = wrt if isinstance(wrt, list | tuple) else (wrt,)
    if not several:
        raise GradientTargetError(
            "there is nothing that the gradient is with respect to", instead="tl.grad(loss, [h1, h2])"
        )
    made_of = sources(recorder.ops, number)
    if made_of.gradient:
        raise NestedGradientError(
            "the loss is made of a gradient, and gradients of gradients are not computed",
            instead="g.detach() in place of the gradient g, which is then a constant of the loss",
        )
    members = [list(part._members) if isinstance(part, MappedValue) else [part] for part in several]
    flat = tuple(_target(recorder, made_of, _of_all_prompts(member)) for part in members for member in part)
    values = iter([Value(recorder, out) for out in recorder.grad(number, flat)])
    found: list[Any] = []
    for part, own in zip(several, members, strict=True):
        each = tuple(_of_prompt(next(values), member) for member in own)
        found.append(MappedValue(part.layers, each) if isinstance(part, MappedValue) else each[0])
    return tuple(found) if isinstance(wrt, tuple) else found if isinstance(wrt, list) else found[0]


def _of_all_prompts(value: Any) -> Any:
    """The whole site for a part of it that is one prompt's."""
    return value._parent if _is_prompts(value) else value


def _of_prompt(gradient: Value, value: Any) -> Value:
    """The part of a site's gradient that belongs to the prompt whose part of the site ``value`` is."""
    return gradient._indexed(value._index, by_token=True) if _is_prompts(value) else gradient


def _is_prompts(value: Any) -> bool:
    index = value._index if isinstance(value, Value) else None
    return bool(index) and isinstance(index[0], PromptRow)


def _loss(loss: Any) -> tuple[Recorder, int]:
    if isinstance(loss, MappedValue):
        raise LossError(
            "the loss is mapped over layers, so it is one number for each of them",
            instead="loss.stack().sum() for their sum, or tl.grad for the loss of each layer",
        )
    if isinstance(loss, Operand) and not loss._is_recording():
        raise NoTraceError("tl.grad is for values inside a block", instead="torch.autograd.grad on tensors")
    if not isinstance(loss, Value):
        raise LossError(
            f"the loss is a {type(loss).__name__}, which does not depend on the model",
            instead="one number computed from sites: model.logits[0, -1, token]",
        )
    recorder: Recorder = loss._recorder
    if recorder.generating:
        raise GradientInGenerationError(
            "gradients are not computed while the model generates",
            instead="generate first, then trace the whole text: with model.trace(prompt + t.text) as t2: ...",
        )
    number = recorder.own(loss)
    type_ = recorder.types[number]
    if not is_one_number(type_):
        one = bool(type_.dtype.is_floating)
        raise LossError(
            f"a loss is one floating number, and this is {type_}",
            instead=(
                "loss.sum(): rows do not see each other, so each row's part of the gradient is that of its own loss"
                if one
                else "a loss computed from floating values"
            ),
        )
    return recorder, number


def _target(recorder: Recorder, made_of: Sources, value: Any) -> int:
    """The number of a value that a gradient can be taken with respect to."""
    if not isinstance(value, Value) or not value._is_recording():
        raise GradientTargetError(
            f"a gradient is with respect to sites, not to {_called(value)}",
            instead="a site as it was read in this block: h = model.layers[i].resid_post; tl.grad(loss, h)",
        )
    number = recorder.own(value)
    op = recorder.ops[value._defined_by()]
    if isinstance(value, Features | SavedFeatures) and value._parent is None and is_computed(op):
        if value.is_floating_point():
            return number
        raise GradientTargetError(
            f"there is no gradient with respect to features that are {value._type}",
            instead="a module whose encode gives floating numbers",
        )
    if not isinstance(op, Read):
        raise _no_site(value, isinstance(op, Param))
    site = op.site
    if not op.type.dtype.is_floating or site.kind.effect is Effect.NONE:
        why = "can only be read" if op.type.dtype.is_floating else f"is {op.type}"
        raise GradientTargetError(
            f"there is no gradient with respect to {site}, which {why}",
            instead="a floating site that can be written; model.sites() lists them",
        )
    if not made_of.may_use(number, op):
        late = sorted({str(read.site) for read in made_of.reads if read.version == 0})
        made = f"it is made of {', '.join(late)}" if late else "it is made of no site of the model"
        raise UnusedGradientError(
            f"the loss does not depend on {site} as it was read: {made}",
            also=(("the site was read at", recorder.locations[value._defined_by()]),),
            instead=f"a loss computed from a site that comes after {spelling(site)}, or from its own value",
        )
    return number


def _no_site(value: Value, parameter: bool) -> GradientTargetError:
    root = value._root()
    if isinstance(root, Features):
        part = f"[{index_text(value._index)}]" if value._index and value._parent is root else "[...]"
        return GradientTargetError(
            "a gradient is with respect to the features of a splice as a whole, as they were read from it",
            instead=f"f = s.features; tl.grad(loss, f){part}"
            if root is not value
            else "f = s.features; tl.grad(loss, f)",
        )
    if root is not value and root._site is not None:
        index = value._index or ()
        selector = next((item for item in index if isinstance(item, TokenSelector | OwnTokens)), None)
        part = f"[{index_text(index)}]" if selector is None else written(selector)
        if value._parent is not root:
            part = "[...]"
        return GradientTargetError(
            f"a gradient is with respect to a whole site, and this is a part of {root._site}",
            instead=f"h = {spelling(root._site)}; tl.grad(loss, h){part}",
        )
    if parameter:
        return GradientTargetError(
            "a gradient is with respect to sites, not to parameters of the model",
            instead="a site; loss.backward() on the transformers model itself gives gradients of its parameters",
        )
    return GradientTargetError(
        "a gradient is with respect to sites, and this value was computed from them",
        instead="the site that it was computed from: h = model.layers[i].resid_post; tl.grad(loss, h); "
        "or the features of a splice: tl.grad(loss, s.features)",
    )


def _called(value: Any) -> str:
    return "a value of a block that has ended" if isinstance(value, Operand) else f"a {type(value).__name__}"
