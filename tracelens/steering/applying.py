"""``v.apply(t)``: a steering vector as writes of the open block, the ones that a user could have written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from tracelens.errors import (
    NotALanguageModelError,
    NoTraceError,
    OptionError,
    SteeringSelectionError,
    TokenMatchError,
)
from tracelens.ir.sites import Site
from tracelens.model import Model
from tracelens.open_recordings import open_recorder
from tracelens.operand import Operand
from tracelens.prompts import PromptPart
from tracelens.scopes import StepScope
from tracelens.steering.operators import operator_named
from tracelens.tracing import Recording

if TYPE_CHECKING:
    from tracelens.recorder import Recorder
    from tracelens.steering.activation_addition import ActivationAddition
    from tracelens.steering.vector import SteeringVector

_WHOLE = object()
"""All positions that the scope has."""
POSITIONS = ("all", "prompt", "last_prompt_token", "generated", "newest")
ELSEWHERE = {
    "last": '"last_prompt_token" is the last one of the prompt, "newest" that of each step',
    "decision": '"last_prompt_token", where the next token is decided upon',
    "label": "a number of the token, as in positions=-3",
    "mean": '"all" for each token',
}
"""Words of :func:`extract` and :func:`sweep`, which are no text that is looked for in the prompt."""


def apply(
    vector: SteeringVector,
    t: Any,
    strength: Any,
    positions: Any,
    operator: str,
    steps: int | slice | None,
    settings: Mapping[str, Any],
) -> None:
    """Writes a vector to the model of an open block, at each of its layers."""
    model, recorder = _open(t)
    vector.check(model)
    (site, *others) = vector.sites
    if others and operator != "ablate":
        raise SteeringSelectionError(
            f"the vector has directions at {len(others) + 1} sites, and they are not meant to be added together",
            instead=f'v.at(sites="{site}").apply(t, ...), or another of {", ".join(vector.sites)}',
        )
    change = operator_named(operator).prepared(vector, settings)
    scope, key = _selected(t, model, positions, steps, generating=recorder.generating)
    prompt = recorder.prompt
    rows = 1 if isinstance(scope, PromptPart) else None if prompt is None else prompt.sizes["B"]
    factor = _strength(strength, rows)
    try:
        _write(vector, change, scope, key, factor)
    except TokenMatchError as error:
        if not isinstance(positions, str):
            raise
        words = f"a text that stands in the prompt, or one of {', '.join(map(repr, POSITIONS))}"
        raise TokenMatchError(error.problem, at=error.at, instead=words) from None


def _write(vector: SteeringVector, change: Callable[..., Any], scope: Any, key: Any, factor: Any) -> None:
    """The writes at all places, in the order of the forward pass."""
    for place in sorted(vector, key=lambda place: Site(*place).sequence):
        site = place[0]
        layer = scope.layers[place[1]]
        whole = getattr(layer, site)
        if key is _WHOLE:
            setattr(layer, site, change(whole, place, _along(factor, whole, None)))
            continue
        if _is_recorded(key):  # a mask that the run makes: what is chosen is known only then
            whole.tok[key] = change(whole, place, _along(factor, whole, None))
            continue
        part = whole.tok[key]
        whole.tok[key] = change(part, place, _along(factor, part, key))


def add_in_order(added: ActivationAddition, t: Any, strength: Any, tokens: list[int]) -> None:
    """Adds one direction to each of some tokens of the prompt, in the pass over it."""
    model, recorder = _open(t)
    added.check(model)
    factor = _strength(strength, None if recorder.prompt is None else recorder.prompt.sizes["B"])
    for (site, layer), directions in added.directions.items():
        whole = getattr(model.layers[layer], site)
        part = whole.tok[tokens]
        whole.tok[tokens] = part + _along(factor, part, tokens) * directions


def _open(t: Any) -> tuple[Model, Recorder]:
    model = _model_of(t)
    recorder = open_recorder(model.anatomy)
    if recorder is None or (isinstance(t, Recording) and t._recorder is not recorder):
        raise NoTraceError(
            "a steering vector was applied outside its block, where there is nothing to change",
            instead="with model.generate(prompt, max_new_tokens=20) as t: v.apply(t, 2.0)",
        )
    return model, recorder


def _model_of(t: Any) -> Model:
    model = t._model if isinstance(t, Recording) else t
    if isinstance(model, Model):
        return model
    if isinstance(t, Recording):
        raise NotALanguageModelError(
            "a steering vector belongs to a site of a layer, and this model has modules alone",
            instead="model.module(path).output += 2.0 * direction",
        )
    if isinstance(t, StepScope | PromptPart):
        raise OptionError(
            f"a vector is applied in a block, and {t!r} is a part of one",
            instead=f"v.apply(t, positions={t!r})",
        )
    raise OptionError(
        f"a vector is applied in a block, and a {type(t).__name__} is none",
        instead="with model.trace(prompt) as t: v.apply(t, 2.0)",
    )


# --- where -----------------------------------------------------------------------------------------------------------


def _selected(
    t: Any, model: Model, positions: Any, steps: int | slice | None, *, generating: bool
) -> tuple[Any, Any]:
    """What has the layers that are written to (the model, some steps, one prompt), and what ``.tok`` is given there."""
    if callable(positions):
        positions = cast("Callable[[Any], Any]", positions)(t)
    scope: Any = model
    if steps is not None:
        scope = _block(t, "steps=").steps[steps]
    if isinstance(positions, StepScope | PromptPart):
        if steps is not None:
            raise OptionError(
                f"steps={steps!r} and positions={positions!r} both say in which steps",
                instead="one of them",
            )
        return positions, _WHOLE
    if isinstance(positions, str) and positions in POSITIONS:
        if positions == "all":
            return scope, _WHOLE
        if positions == "newest":
            return scope, -1
        if steps is not None:
            raise OptionError(
                f"steps={steps!r} and positions={positions!r} both say in which steps",
                instead='positions="all" for all that these steps have, or "newest" for the last token of each',
            )
        if positions == "generated":
            if not generating:
                raise OptionError(
                    'positions="generated" are those of a generation, and this block has one forward pass',
                    instead='with model.generate(prompt, max_new_tokens=20) as t: v.apply(t, positions="generated")',
                )
            return _block(t, "positions=").decode, _WHOLE
        if generating:
            scope = _block(t, "positions=").prefill
        return scope, _WHOLE if positions == "prompt" else -1
    if isinstance(positions, str) and positions in ELSEWHERE:
        raise OptionError(
            f"positions={positions!r} says where a vector is read or measured, and not where it is applied",
            instead=f"one of {', '.join(map(repr, POSITIONS))}; {ELSEWHERE[positions]}",
        )
    if positions is None or isinstance(positions, bool):
        raise OptionError(
            f"positions={positions!r} are none",
            instead=f"one of {', '.join(POSITIONS)}; or a number, "
            "a slice, a list, a text or a mask, as site.tok[...] takes them",
        )
    return scope, positions


def _block(t: Any, word: str) -> Any:
    if isinstance(t, Model):
        raise OptionError(
            f"{word} names steps, which are those of a block, and a model was given in its place",
            instead="with model.generate(...) as t: v.apply(t, ...)",
        )
    return t


# --- how much --------------------------------------------------------------------------------------------------------


def _strength(strength: Any, rows: int | None) -> Any:
    """The strength as a tensor: of no axis, or of one number a row. Of a value of the block, the value."""
    if _is_recorded(strength):
        if strength.ndim > 2:
            raise OptionError(
                f"a strength is a number, one for each row or one for each token, and {strength!r} has more axes",
                instead="a value [rows] or [rows, positions]",
            )
        return strength
    if isinstance(strength, Operand):
        strength = strength._result()
    try:
        given = strength if isinstance(strength, torch.Tensor) else torch.as_tensor(np.asarray(strength))
    except (TypeError, ValueError):
        given = torch.tensor(True)
    if given.dtype is torch.bool or given.dtype.is_complex or given.ndim > 1:
        raise OptionError(f"strength={strength!r} is no strength", instead=_STRENGTH)
    found = given.detach().to(torch.float32)
    if not torch.isfinite(found).all():
        raise OptionError(f"strength={strength!r} is not finite", instead=_STRENGTH)
    if found.ndim and rows is not None and len(found) != rows:
        raise OptionError(
            f"there are {len(found)} strengths for {rows} row{'s' if rows > 1 else ''}", instead=_STRENGTH
        )
    return found.reshape(()) if found.ndim and rows == 1 else found


_STRENGTH = "a number such as 2.0, or one for each row of the batch: torch.linspace(-1, 1, rows)"


def _along(factor: Any, part: Any, key: Any) -> Any:
    """The strength with the axes of what is changed: [B, 1, 1] for [B, P, D], one for each token of a mask."""
    if factor.ndim == 0:
        return factor
    if factor.ndim == 2:
        if key is not None:
            raise OptionError(
                "a strength for each token goes with all positions, and only some were chosen",
                instead='positions="all", with a strength of 0.0 at the others; or a mask of the run, '
                "positions=model.positions >= 5",
            )
        return factor[..., None]
    if (mask := _mask(key)) is not None:
        rows = mask.nonzero()[:, 0]
        return factor[rows][:, None]
    return (
        factor.reshape((len(factor), *[1] * (part.ndim - 1)))
        if isinstance(factor, torch.Tensor)
        else _opened(factor, part.ndim - 1)
    )


def _opened(value: Any, axes: int) -> Any:
    for _ in range(axes):
        value = value[..., None]
    return value


def _mask(key: Any) -> torch.Tensor | None:
    """A mask of tokens that is known now."""
    if isinstance(key, Operand):
        key = key._result()
    if isinstance(key, torch.Tensor | np.ndarray) and str(key.dtype).rpartition(".")[2] == "bool":
        return torch.as_tensor(key)
    return None


def _is_recorded(value: Any) -> bool:
    return isinstance(value, Operand) and value._is_recording()
