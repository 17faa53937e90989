"""Linear modules whose ``weight`` is not the matrix that they multiply by.

Quantised ones keep it packed: in a few bits, under names and in shapes of a library's own. Adapted ones (PEFT) show the
weight of the module inside, to which they add. Their sites are those of any linear module, since hooks see what goes in
and out. What reads the matrix itself (a head's share of the output, a lens through a quantised unembedding) gets the
one that the module multiplies by, whatever library made it: the module is given the rows of the identity. It is looked
at whether it does multiply by that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tracelens.errors import PackedWeightError, UnknownParameterError
from tracelens.ir.sites import near

_NEARLY = 0.02
"""Some libraries round the input too, to eight bits."""


def is_packed(module: nn.Module) -> bool:
    """Is it a linear module whose ``weight`` is not its matrix of floating-point numbers?"""
    if is_adapted(module):
        return True
    size = sizes(module)
    if size is None:
        return False
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return True
    if hasattr(weight, "placements"):
        return False  # a DTensor, in parts
    plain = weight.dtype.is_floating_point and weight.element_size() > 1
    own = hasattr(weight, "__tensor_flatten__")  # a tensor class of a library, which holds what it packed
    return own or not plain or tuple(weight.shape) != size


def is_adapted(module: nn.Module) -> bool:
    """Is it a linear module whose ``weight`` is that of a module in it? What it multiplies by is its own affair."""
    weight: Any = None if sizes(module) is None else getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return False
    own = {id(each) for each in (*module.parameters(recurse=False), *module.buffers(recurse=False))}
    inside = (each for child in module.children() for each in (*child.parameters(), *child.buffers()))
    return id(weight) not in own and any(each is weight for each in inside)


def packed_at(model: nn.Module, path: str) -> nn.Module | None:
    """The linear module that keeps its matrix packed or adapts it, if the path of a parameter names one's matrix."""
    owner, _, name = path.rpartition(".")
    if name != "weight":
        return None
    try:
        found = model.get_submodule(owner)
    except AttributeError:
        return None
    return found if is_packed(found) else None


def parameter_at(model: nn.Module, path: str) -> torch.Tensor:
    """A parameter or buffer as its module keeps it; :class:`UnknownParameterError` where there is none."""
    owner, _, name = path.rpartition(".")
    module = None
    try:
        module = model.get_submodule(owner)
        found = getattr(module, name)
    except AttributeError:
        found = None
    if not isinstance(found, torch.Tensor):
        candidates = near(path, tuple(name for name, _ in model.named_parameters()))
        raise UnknownParameterError(
            f"the model has no parameter or buffer {path!r}",
            instead="did you mean " + ", ".join(candidates) + "?" if candidates else None,
        )
    if name == "bias" and module is not None and is_adapted(module) and not found.is_meta:
        size = sizes(module)
        assert size is not None
        with torch.no_grad():  # an adapter may have a bias of its own
            return module.forward(found.new_zeros(1, size[1]))[0]
    return found


def require_one_process(module: nn.Module, path: str, mesh: object | None) -> None:
    """Refuses an adapted matrix of which ranks may have parts: those of its adapters are not put together."""
    if mesh is not None and is_adapted(module):
        raise PackedWeightError(
            f"{path!r} is adapted in a {type(module).__name__}, and ranks share the model: they do not make its matrix",
            instead="the adapter merged into the model before it is spread (merge_and_unload), or the sites around it",
        )


def sizes(module: nn.Module) -> tuple[int, int] | None:
    """The sizes (out, in) that a linear module says of itself."""
    found = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return found if all(isinstance(size, int) for size in found) else None  # pyright: ignore[reportReturnType]  # just asked


@torch.no_grad()
def unpacked(module: nn.Module, path: str, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [out, in] that a module multiplies by; :class:`PackedWeightError` where it does something else."""
    size = sizes(module)
    assert size is not None
    out, width = size
    what = f"{path!r} is {'adapted' if is_adapted(module) else 'packed'}"
    where = next((each for each in (*module.parameters(), *module.buffers())), None)
    if where is None or where.is_meta:
        raise PackedWeightError(f"{what}, and its numbers are not here (on the meta device, or offloaded)")
    zero = torch.zeros(1, width, dtype=dtype, device=where.device)
    rows = torch.eye(width, dtype=dtype, device=where.device)
    try:
        # What hooks do to a module's call is no part of its matrix.
        offset = module.forward(zero)
        matrix = (module.forward(rows) - offset).T.contiguous()
        tried = torch.linspace(-1, 1, width, dtype=dtype, device=where.device)[None]
        given = (module.forward(tried) - offset).double()
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise PackedWeightError(
            f"{what} in a {type(module).__name__}, which cannot be asked for its matrix: {error}",
            instead="the sites around the module, which are what it receives and returns",
        ) from error
    expected = tried.double() @ matrix.T.double()
    if (
        matrix.shape != (out, width)
        or not (given - expected).abs().max() <= _NEARLY * expected.abs().max() + 1e-6
    ):
        raise PackedWeightError(
            f"{what} in a {type(module).__name__}, which does not multiply by one matrix",
            instead="the sites around the module, which are what it receives and returns",
        )
    return matrix.to(dtype)
