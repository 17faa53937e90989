"""Where the parts of a model run, and which of their weights are kept elsewhere until they do.

accelerate spreads a model over devices by hooks of its own on modules, which move inputs and load weights as the
forward pass comes by. They are read here, and never changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from typing import Any, cast

import torch
from torch import nn

from tracelens.errors import MetaTensorError, SeveralDevicesError
from tracelens.memory import Lent

State = tuple[object, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Keeper:
    """A hook of accelerate that keeps the weights of a module, and loads them for the time of its forward.

    ``path``: the module's. ``part``: that of the hook which loads. ``places``: the tables of modules, and the names in
    them, where these weights stand.
    """

    path: str
    module: nn.Module
    hook: Any
    part: Any
    places: tuple[tuple[Mapping[str, Any], str], ...]

    @property
    def device(self) -> torch.device:
        """Where the weights are loaded to."""
        return _device(self.part.execution_device)

    @property
    def bytes(self) -> int:
        """What is loaded, beyond what lies in memory there anyway."""
        inside = _kept_by(self.part, self.module)
        return sum(
            table[last].nbytes
            for (table, last), name in zip(self.places, inside, strict=True)
            if _fleeting(self.part, name, self.device) is not False
        )

    @property
    def loaded(self) -> bool:
        """Are the weights there now?"""
        return any(not table[name].is_meta for table, name in self.places)

    def unload(self) -> None:
        """Does what accelerate does when the module's forward has ended."""
        self.hook.post_forward(self.module, None)


class Loading:
    """The weights that are loaded during a run. :meth:`remove` can be called at any time, and again.

    A run that leaves the forward pass early leaves modules in the middle of their forward, whose weights accelerate
    would unload at its end. Weights that were loaded before the run stay.
    """

    def __init__(self, keepers: Sequence[Keeper]) -> None:
        self._keepers = [keeper for keeper in keepers if not keeper.loaded]

    def remove(self) -> None:
        """Unloads what is still loaded."""
        for keeper in self._keepers:
            if keeper.loaded:
                keeper.unload()


@dataclass(frozen=True, eq=False)
class Spread:
    """Where the parts of one model run, as it was when this was found out.

    ``devices``: all on which anything runs, in the order in which a forward pass comes to their modules. ``inputs``:
    where the model is best given its inputs, which is where it returns its outputs. ``hooked``: by hooks of accelerate.
    ``keepers``: the hooks among these that load weights.
    """

    devices: tuple[torch.device, ...]
    inputs: torch.device
    hooked: bool
    keepers: tuple[Keeper, ...]
    state: State
    own: Mapping[str, torch.device] = field(repr=False)
    """The devices of modules by path; a module that is not named is where the one around it is."""
    kept: Mapping[str, tuple[Any, str]] = field(repr=False)
    """The offloaded parameters and buffers by path: the hook that keeps each, and its name there."""

    @property
    def key(self) -> object:
        """What compiled programs depend on: no longer the same when the model has been moved or spread anew."""
        return self if self.hooked else self.devices

    def device_of(self, path: str) -> torch.device:
        """The device on which a module computes; a parameter or buffer is where its module is."""
        while path and path not in self.own:
            path = path.rpartition(".")[0]
        return self.own[path]

    def offloaded(self, path: str) -> bool:
        """Is a parameter or buffer, or any in a module, kept elsewhere while the module does not run?"""
        inside = f"{path}." if path else ""
        return any(name == path or name.startswith(inside) for name in self.kept)

    def weight(self, path: str) -> torch.Tensor | None:
        """An offloaded parameter or buffer, where it is kept; ``None`` for others."""
        hook, name = self.kept.get(path, (None, ""))
        return None if hook is None else hook.weights_map[name]

    @cached_property
    def brought(self) -> frozenset[str]:
        """The offloaded parameters and buffers that come into memory of their own when they are loaded."""
        return frozenset(path for path, fleeting in self._loading.items() if fleeting is not False)

    @cached_property
    def fleeting(self) -> frozenset[str]:
        """Those among :attr:`brought` of which we know that nobody has the memory but who loaded them."""
        return frozenset(path for path, fleeting in self._loading.items() if fleeting)

    @cached_property
    def _loading(self) -> Mapping[str, bool | None]:
        return {path: _fleeting(hook, name, self.device_of(path)) for path, (hook, name) in self.kept.items()}

    def __str__(self) -> str:
        names = [str(device) for device in self.devices]
        words = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
        return f"{words}, {len(self.kept)} weights offloaded" if self.kept else words


def is_hooked(module: nn.Module) -> bool:
    """Has accelerate put a hook on this very module?"""
    return "_hf_hook" in vars(module)


def state_of(model: nn.Module, first: nn.Module | None, tensor: torch.Tensor | None) -> State:
    """What changes when a model is moved, or when accelerate spreads it anew; cheap enough to be asked in every run.

    ``first``: the module with the first weights that run, ``tensor``.
    """
    own = vars(model)
    root: Any = own.get("_hf_hook")
    hook: Any = None if first is None else vars(first).get("_hf_hook")
    # Offloaded weights come and go.
    device = None if tensor is None or _moves(root) or _moves(hook) else tensor.device
    return root, own.get("hf_device_map"), hook, device


def spread_of(model: nn.Module, state: State, head: str | None) -> Spread:
    """Finds out where the parts of a model run. ``head``: the path of the module whose output is the largest.

    Raises :class:`SeveralDevicesError` for a model in parts that nobody connects, and :class:`MetaTensorError` for one
    with weights that nobody loads.
    """
    if not any(is_hooked(module) for module in model.modules()):
        device = _single_device(model)
        return Spread((device,), device, False, (), state, {"": device}, {})
    keepers, kept = _keepers(model)
    main = _main_device(model)
    if main.type != "meta":
        _refuse_unloaded(model, kept)
    own: dict[str, torch.device] = {}
    found = _Devices(own, [])
    found.find(model, "", main)
    devices = tuple(dict.fromkeys(found.met)) or (main,)
    spread = Spread(devices, devices[0], True, keepers, state, own, kept)
    returning = any(getattr(part, "io_same_device", False) for part in _parts(vars(model).get("_hf_hook")))
    if head is not None:
        own[""] = spread.device_of(head)  # where what the model returns is made
    if returning:
        # The model returns its outputs to where its inputs were; inputs are small, logits are not.
        own[""] = own[""] if head is not None else spread.inputs
        spread = replace(spread, inputs=own[""])
    return spread


@dataclass(frozen=True, slots=True)
class _Devices:
    """Finds the devices of modules by path, and those that a pass meets, in the order in which modules are registered.

    A module that neither has a hook nor weights of its own only passes on what it is given: it is where the first
    module inside it is, or else where the one around it is.
    """

    own: dict[str, torch.device]
    met: list[torch.device]

    def find(self, module: nn.Module, path: str, around: torch.device) -> torch.device | None:
        """Fills in a module and those inside; gives the first device that is known of them for sure."""
        hook = _aligning(vars(module).get("_hf_hook"))
        if hook is not None:
            said = _device(hook.execution_device)
        else:
            tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            said = next((tensor.device for tensor in tensors if not tensor.is_meta), None)
        if said is not None and path:
            self.met.append(said)
        self.own[path] = around  # modules stand before those inside them
        first = said
        for name, child in module.named_children():
            inside = self.find(child, f"{path}.{name}" if path else name, said or around)
            first = first or inside
        self.own[path] = first or around
        return first


# --- models that accelerate has not touched --------------------------------------------------------------------------


def _single_device(model: nn.Module) -> torch.device:
    devices = {tensor.device for tensor in model.parameters()}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise SeveralDevicesError(
            f"parts of the model lie on {names}, and no hooks of accelerate lead the forward pass from one to the next",
            instead='tl.load(name, device_map="auto"), accelerate.dispatch_model(model, device_map), or one device for '
            "all of it: model.hf.to(device)",
        )
    found = next(iter(devices), None) or next((buffer.device for buffer in model.buffers()), None)
    return torch.device("cpu") if found is None else found


# --- accelerate's hooks ----------------------------------------------------------------------------------------------


def _parts(hook: Any) -> Iterator[Any]:
    """A hook, or those that it consists of."""
    if type(hook).__name__ == "SequentialHook":
        for part in hook.hooks:
            yield from _parts(part)
    elif hook is not None:
        yield hook


def _aligning(hook: Any) -> Any:
    """The part of a module's hook that moves its inputs, if there is one: the last, where there are several."""
    found = [part for part in _parts(hook) if getattr(part, "execution_device", None) is not None]
    return found[-1] if found else None


def _moves(hook: Any) -> bool:
    """Does a hook move the module's weights from time to time?"""
    return hook is not None and any(
        getattr(part, "offload", False) or type(part).__name__ == "CpuOffload" for part in _parts(hook)
    )


def _device(named: Any) -> torch.device:
    """A device as the tensors on it call it."""
    device = named if isinstance(named, torch.device) else torch.device(named)
    if device.index is None and device.type not in ("cpu", "meta"):
        device = torch.empty(0, device=device).device
    return device


def _main_device(model: nn.Module) -> torch.device:
    """Where modules compute of which no hook and no weight of theirs says it."""
    for module in model.modules():  # the whole model is the first
        hook = _aligning(vars(module).get("_hf_hook"))
        if hook is not None:
            return _device(hook.execution_device)
    return _single_device(model)


def _keepers(model: nn.Module) -> tuple[tuple[Keeper, ...], dict[str, tuple[Any, str]]]:
    """The hooks that keep weights, innermost modules first, and what they keep, by path."""
    keepers: list[Keeper] = []
    kept: dict[str, tuple[Any, str]] = {}
    for path, module in model.named_modules():
        for hook in _parts(vars(module).get("_hf_hook")):
            if not getattr(hook, "offload", False):
                continue
            places: list[tuple[Mapping[str, Any], str]] = []
            for name in _kept_by(hook, module):
                within, _, last = name.rpartition(".")
                owner = module.get_submodule(within)
                table = owner._parameters if last in owner._parameters else owner._buffers
                places.append((table, last))
                kept[f"{path}.{name}" if path else name] = (hook, name)
            if places:
                keepers.append(Keeper(path, module, module._hf_hook, hook, tuple(places)))
    return tuple(reversed(keepers)), kept


def _kept_by(hook: Any, module: nn.Module) -> Iterator[str]:
    """The names of what a hook keeps: parameters, and buffers on request if they belong to the model's state."""
    deep: bool = hook.place_submodules
    for name, _ in module.named_parameters(recurse=deep):
        yield name
    if hook.offload_buffers:
        for name, _ in module.named_buffers(recurse=deep):
            within, _, last = name.rpartition(".")
            if last not in module.get_submodule(within)._non_persistent_buffers_set:
                yield name


def _fleeting(hook: Any, name: str, device: torch.device) -> bool | None:
    """Does what a hook keeps under ``name`` get memory of its own when it is loaded to a device?

    It does not if a tensor on that very device is kept. ``None`` for what is kept in ways that we do not know.
    """
    known: Any = hook.weights_map
    while type(known).__name__ == "PrefixedDataset":
        known, name = known.dataset, f"{known.prefix}{name}"
    loader = type(known).__name__ == "OffloadedWeightsLoader"
    kept: object = known.state_dict if loader else known
    if type(kept) is not dict:
        return None
    tensor = cast("dict[str, object]", kept).get(name)
    if isinstance(tensor, torch.Tensor):
        return tensor.device != device
    return True if loader else None  # read from disk


def lent_to(keepers: Sequence[Keeper], functions: Sequence[object]) -> dict[int, tuple[Lent, ...]]:
    """What accelerate loads while modules of the model are called that a graph applies, by their numbers there."""
    if not keepers:
        return {}
    own: dict[int, list[Keeper]] = {}
    for keeper in keepers:
        own.setdefault(id(keeper.module), []).append(keeper)
    found: dict[int, tuple[Lent, ...]] = {}
    for number, function in enumerate(functions):
        module: object = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
        if not isinstance(module, nn.Module):
            continue
        most = _most_at_once(module, own)
        if most:
            name = _common([keeper.path for part in module.modules() for keeper in own.get(id(part), ())])
            found[number] = tuple(Lent(name, str(device), size) for device, size in most.items())
    return found


def _most_at_once(module: nn.Module, own: Mapping[int, Sequence[Keeper]]) -> dict[torch.device, int]:
    """The most bytes that are loaded at any moment of a module's forward: its own and those of one module inside."""
    most: dict[torch.device, int] = {}
    for child in module.children():
        for device, size in _most_at_once(child, own).items():
            most[device] = max(most.get(device, 0), size)
    for keeper in own.get(id(module), ()):
        if size := keeper.bytes:
            most[keeper.device] = most.get(keeper.device, 0) + size
    return most


def _common(paths: Sequence[str]) -> str:
    """The innermost module that all of these are in, or are."""
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels))


def _refuse_unloaded(model: nn.Module, kept: Mapping[str, object]) -> None:
    for path, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        if tensor.is_meta and path not in kept:
            raise MetaTensorError(
                f"{path!r} has no data (it is on the meta device), and no hook of accelerate loads it: the model would "
                "compute with whatever is in memory",
                instead="load the model with all of its weights: tl.load(name, device_map=...)",
            )
