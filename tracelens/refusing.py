"""Says why a function cannot be recorded, and what to write instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import FrameType
from typing import NoReturn

import torch
from torch import nn

from tracelens.errors import (
    DynamicShapeError,
    FailedRunError,
    InPlaceError,
    LayerMappingError,
    OptionError,
    RandomFunctionError,
    ReplacementError,
    TracelensError,
    UnknownAttributeError,
    UnsupportedFunctionError,
    ValueBranchError,
    WriteTargetError,
)
from tracelens.ir.functions import nearest
from tracelens.ir.infer import refusal_of
from tracelens.ir.refused import Reason
from tracelens.ir.sites import near
from tracelens.location import frames_inside, here, raised_at

_ERRORS: dict[Reason, type[TracelensError]] = {
    Reason.IN_PLACE: InPlaceError,
    Reason.RANDOM: RandomFunctionError,
    Reason.DYNAMIC_SHAPE: DynamicShapeError,
    Reason.HOST_READ: ValueBranchError,
}


def refuse(function: object, name: str, args: Sequence[object] = ()) -> NoReturn:
    """Raises the named error for a function that a graph cannot hold."""
    refusal = refusal_of(function)
    if refusal is not None and refusal[0] is Reason.IN_PLACE:
        problem, instead = _in_place_words(name, args)
        raise InPlaceError(problem, at=here(), instead=instead)
    module = module_called()
    if module is not None and (refusal is None or refusal[0] not in (Reason.RANDOM, Reason.DYNAMIC_SHAPE)):
        raise UnsupportedFunctionError(
            f"{module} cannot be recorded in a graph: it calls {name}",
            at=here(),
            instead="tl.apply(module, value, like=value) runs the module on the real tensors",
        )
    if function is torch.autograd.grad or function is torch.autograd.backward:
        raise UnsupportedFunctionError(
            f"torch.autograd.{name.rpartition('.')[2]} needs tensors, and a value has numbers only in the run",
            at=here(),
            instead="tl.grad(loss, h), with h a site as it was read: h = model.layers[i].resid_post",
        )
    if refusal is None:
        candidates = nearest(name)
        hint = f"did you mean {', '.join(candidates)}? " if candidates else ""
        raise UnsupportedFunctionError(
            f"{name} cannot be recorded in a graph",
            at=here(),
            instead=hint
            + "tl.apply(function, value, like=value) runs any Python function on the real tensors",
        )
    reason, problem, hint = refusal
    namesakes = [known for known in nearest(name) if known.rpartition(".")[2] == name.rpartition(".")[2]]
    if reason is Reason.NO_SHAPE_RULE and namesakes:
        hint = f"{', '.join(namesakes)}; or {hint}"
    raise _ERRORS.get(reason, UnsupportedFunctionError)(f"{name}: {problem}", at=here(), instead=hint)


_SIGNS = {"add_": "+", "sub_": "-", "mul_": "*", "div_": "/", "floor_divide_": "//", "pow_": "**"}


def _in_place_words(name: str, args: Sequence[object]) -> tuple[str, str]:
    """What is wrong with an in-place function, and what to write instead."""
    word = name.rpartition(".")[2]
    plain = word.rstrip("_")
    has_plain = not word.startswith("__") and callable(getattr(torch.Tensor, plain, None))
    if args and isinstance(args[0], torch.Tensor):
        problem = (
            f"{name} would change a tensor of yours by a value, whose numbers do not exist before the run"
        )
        if word == "__setitem__":
            instead = "torch.stack, torch.cat or tl.where: they make a new value from tensors and values"
        elif word in _SIGNS:
            instead = f"tensor = tensor {_SIGNS[word]} value"
        else:
            instead = (
                f"tensor = tensor.{plain}(...)"
                if has_plain
                else "the value itself, which is as good as a tensor"
            )
        return problem, instead
    assign = "to change the model, assign to a site: model.layers[i].resid_post = new"
    return (
        f"{name} would change a value in place, and values never change",
        f"new = value.{plain}(...); {assign}" if has_plain else assign,
    )


def module_called() -> str | None:
    """The module of torch that the user called, if the refused function was called by one."""
    found: nn.Module | None = None
    for frame in frames_inside():
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            found = owner
    if found is None:
        return None
    if isinstance(found, torch.jit.ScriptModule):
        return f"the scripted module {found.original_name}"
    return f"the module {type(found).__name__}"


def module_that_failed(error: Exception) -> UnsupportedFunctionError | None:
    """The error for a module that was called on a value and stumbled over it; ``None`` if none was."""
    step = error.__traceback__
    while step is not None:
        frame = step.tb_frame
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and any(map(_is_operand, _given_to(frame))):
            return UnsupportedFunctionError(
                f"the module {type(owner).__name__} cannot be recorded in a graph: on a value it raised "
                f"{type(error).__name__}: {error}",
                at=raised_at(error),
                instead=(
                    "tl.apply(module, value, like=value) runs the module on the real tensors; where it needs more "
                    "arguments or returns a tuple: tl.apply(lambda h: module(h, ...)[0], value)"
                ),
            )
        step = step.tb_next
    return None


def sent_by_accelerate() -> bool:
    """Was it accelerate that wanted to move a value, on the way into a module that it has spread or offloaded?

    By then its hook has loaded the module's weights, for nothing: in the run they are loaded as parameters. The hook
    comes to the weights first, and nothing of ours is asked before it comes to the value. To keep it from loading them
    would take a change to its tables or to the modules while a block is open, which other threads, and the user's own
    calls of the model in the block, would meet: they would compute with weights that have no numbers.
    """
    return any(
        frame.f_code.co_name == "send_to_device"
        and str(frame.f_globals.get("__name__")).startswith("accelerate.")
        for frame in frames_inside()
    )


def _given_to(frame: FrameType) -> tuple[object, ...]:
    """The arguments of torch's call of a module."""
    args, named = frame.f_locals.get("args"), frame.f_locals.get("kwargs")
    return (*(args if isinstance(args, tuple) else ()), *(named.values() if isinstance(named, dict) else ()))


def _is_operand(given: object) -> bool:
    return getattr(type(given), "is_value", False) or getattr(type(given), "is_per_layer", False)


def parameter_target(what: str) -> WriteTargetError:
    """The error for assigning to a parameter, or into one."""
    return WriteTargetError(
        f"{what} is a parameter, and parameters cannot be written: a block changes activations",
        at=here(),
        instead=(
            "the site that follows: model.lm_head[..., token] = value after the unembedding, "
            "model.layers[i].mlp_out = value after an MLP; model.sites() lists them"
        ),
    )


def unknown_attribute(
    what: str, name: str, owner: str, candidates: Sequence[str], otherwise: str
) -> UnknownAttributeError:
    """The error for ``owner.name``, which there is not; ``otherwise``: what to write where no name is like it."""
    likely = near(name, tuple(candidates))
    return UnknownAttributeError(
        f"{what} has no {name!r}",
        at=here(),
        instead=f"did you mean {', '.join(f'{owner}.{other}' for other in likely)}?" if likely else otherwise,
    )


def require_replacement(new: Mapping[str, object], layer: object) -> None:
    """Refuses ``replace()`` with nothing to replace."""
    if not new:
        raise OptionError(
            f"{layer!r}.replace() does not say which site is to be made of what",
            at=here(),
            instead=f"{layer!r}.replace(mlp_add=value); or {layer!r}.skip(), which does not run the layer",
        )


def skip_takes_nothing(owner: str) -> ReplacementError:
    """The error for ``skip(something)``."""
    return ReplacementError(
        "skip() takes nothing: the layer returns what it received",
        at=here(),
        instead=f"{owner}.skip(); {owner}.replace(resid_post=value) for another value",
    )


def replace_names_sites(owner: str) -> ReplacementError:
    """The error for ``replace(value)``."""
    return ReplacementError(
        "replace() was given a value without the site that it stands for",
        at=here(),
        instead=f"{owner}.replace(resid_post=value) for the whole layer, {owner}.replace(mlp_add=value) for the MLP",
    )


def one_layer_only(thing: object) -> LayerMappingError:
    """The error for something with one part per layer where one value is needed."""
    return LayerMappingError(
        f"{thing!r} stands for one thing per layer, and was used where there is one layer or none",
        at=here(),
        instead="model.layers[a:b].resid_post on the other side too, or .stack()[i] for one of the layers",
    )


def failed_block(failure: BaseException | None, what: str) -> FailedRunError:
    """The error for asking a block that ended in ``failure`` for something."""
    known = isinstance(failure, TracelensError)
    said = str(failure)
    words = failure.problem if known else type(failure).__name__ + (f": {said}" if said else "")
    failed_at = (failure.at if known else None) or (None if failure is None else raised_at(failure))
    error = FailedRunError(
        f"the block failed, so there is no {what}: {words}",
        at=here(),
        also=(("it failed at", failed_at),) if failed_at is not None else (),
        instead="a new block, once the cause is mended",
    )
    error.__cause__ = failure
    return error
