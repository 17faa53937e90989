"""``torch.pretend``: what torch, accelerate and transformers ask of the module of an accelerator."""

from __future__ import annotations

import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch.storage import _StorageBase

from tests.support.pretend import kernels, memory

DEVICES = 8
MEMORY = 2**30
"""Bytes that each device says it has."""

_UNTIL = "until torch before 2.13 is no longer supported"
"""What ends a test's skip; with newer ones :mod:`tests.test_support_pretend` fails."""
_kept: list[Any] = []
_open = 0
_local = threading.local()


def missing() -> str | None:
    """Why this torch cannot have pretend devices, or None."""
    parts = getattr(torch._C, "_acc", None)
    wanted = ("PrivateUse1Hooks", "DeviceGuard", "register_python_privateuseone_hook")
    if parts is None or not all(hasattr(parts, name) for name in wanted):
        return f"torch {torch.__version__} has no backends written in Python (torch._C._acc); {_UNTIL}"
    if torch.cuda.is_available():
        # Torch knows one kind of accelerator in a process, and it would no longer be the real one.
        return "there is a real accelerator, as long as it is not hidden: CUDA_VISIBLE_DEVICES="
    name = torch._C._get_privateuse1_backend_name()
    if not _kept and name not in ("privateuseone", "pretend"):
        return f"another backend has taken the place, as long as it is loaded: {name}"
    return _broken()


@cache
def _broken() -> str | None:
    """What goes wrong at the first use; a torch of another version may have the parts and not join them."""
    try:
        with opened():
            there = torch.ones(2, 3, device="pretend:1").t()[1:]
            works = torch.equal((there + 1).cpu(), torch.full((2, 2), 2.0)) and there.device.index == 1
    except (RuntimeError, TypeError, AttributeError, AssertionError) as error:
        return f"torch {torch.__version__} has no devices of this kind: {error}; {_UNTIL}"
    return None if works else f"torch {torch.__version__} takes pretend tensors for something else; {_UNTIL}"


def register() -> None:
    """Makes the pretend devices known to torch: once in a process, harmless to all who do not name them."""
    if _kept:
        return
    acc: Any = torch._C._acc

    class Hooks(acc.PrivateUse1Hooks):
        def is_available(self) -> bool:
            return _is_available()

        def has_primary_context(self, device_index: int) -> bool:
            return True

        def is_built(self) -> bool:
            return True

    class Guard(acc.DeviceGuard):
        def type_(self) -> Any:
            return torch._C._autograd.DeviceType.PrivateUse1

    torch.utils.rename_privateuse1_backend("pretend")
    torch.utils.generate_methods_for_privateuse1_backend()
    torch._register_device_module("pretend", _module())
    hooks, guard = Hooks(), Guard()
    acc.register_python_privateuseone_hook(hooks)
    acc.register_python_privateuseone_device_guard(guard)
    _kept.extend((hooks, guard, *kernels.register()))


@contextmanager
def opened() -> Iterator[None]:
    """While this is open, the devices say that they are there, and the backward pass runs in the caller's thread.

    Torch counts one device of a backend written in Python, and has no backward thread for the others. And it lets no
    such backend name an allocator, so it would crash where a storage is made without a tensor: in ``copy.deepcopy``
    and ``torch.load``.
    """
    global _open
    register()
    _open += 1
    try:
        with torch.autograd.set_multithreading_enabled(False), _patched_storages():
            yield
    finally:
        _open -= 1


@contextmanager
def _patched_storages() -> Iterator[None]:
    clone, to = _StorageBase.clone, _StorageBase.to

    def new_clone(storage: Any) -> Any:
        return _copied(storage, storage.device) if storage.device.type == "pretend" else clone(storage)

    def new_to(storage: Any, *, device: Any, non_blocking: bool = False) -> Any:
        device = torch.device(device)
        if "pretend" not in (device.type, storage.device.type) or device == storage.device:
            return to(storage, device=device, non_blocking=non_blocking)
        return _copied(storage, device)

    with patch.object(_StorageBase, "clone", new_clone), patch.object(_StorageBase, "to", new_to):
        yield


def _copied(storage: Any, device: torch.device) -> Any:
    return memory.bytes_of(storage).to(device, copy=True).untyped_storage()


def _is_available() -> bool:
    return _open > 0


def _index(device: Any = None) -> int:
    if device is None:
        return _current_device()
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return _current_device() if index is None else index


def _current_device() -> int:
    return getattr(_local, "index", 0)


def _set_device(device: Any) -> None:
    _local.index = _index(device)


class _Device:
    """``with torch.pretend.device(1):``."""

    def __init__(self, device: Any) -> None:
        self.wanted = _index(device)

    def __enter__(self) -> None:
        self.before = _current_device()
        _set_device(self.wanted)

    def __exit__(self, *_: object) -> None:
        _set_device(self.before)


class _Stream(torch.Stream):
    """Work on a pretend device is done when the call returns: every stream is the one stream."""

    def __new__(cls, device: Any = None, priority: int = 0) -> _Stream:
        return super().__new__(cls, device=torch.device("pretend", _index(device)))

    def synchronize(self) -> None:
        """Done already."""

    def wait_stream(self, stream: Any) -> None:
        """Done already."""

    def wait_event(self, event: Any) -> None:
        """Done already."""

    def record_event(self, event: Any = None) -> Any:
        """An event of the past."""
        return event or _Event()

    def query(self) -> bool:
        """Nothing is under way."""
        return True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Event:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        """Happens now."""

    def wait(self, stream: Any = None) -> None:
        """Has happened."""

    def synchronize(self) -> None:
        """Has happened."""

    def query(self) -> bool:
        """Has happened."""
        return True


def _alive(device: Any = None) -> int:
    return memory.TOTAL.alive.get(_index(device), 0)


def _most(device: Any = None) -> int:
    return memory.TOTAL.peak.get(_index(device), 0)


def _reset_peak(device: Any = None) -> None:
    index = _index(device)
    memory.TOTAL.peak[index] = memory.TOTAL.alive.get(index, 0)


def _module() -> types.ModuleType:
    def nothing(*_: Any, **__: Any) -> None:
        return None

    def the_stream(device: Any = None) -> _Stream:
        return _Stream(device)

    module = types.ModuleType("torch.pretend")
    contents: dict[str, Any] = {
        "is_available": _is_available,
        "is_initialized": _is_available,
        "is_bf16_supported": lambda: True,
        "device_count": lambda: DEVICES if _open else 0,
        "current_device": _current_device,
        "set_device": _set_device,
        "device": _Device,
        "get_device_name": lambda device=None: f"pretend device {_index(device)}",
        "get_device_properties": lambda device=None: types.SimpleNamespace(
            name=f"pretend device {_index(device)}", total_memory=MEMORY
        ),
        "get_device_capability": lambda device=None: {},
        "get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16],
        "synchronize": nothing,
        "empty_cache": nothing,
        "ipc_collect": nothing,
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
        "_is_in_bad_fork": lambda: False,
        "memory_allocated": _alive,
        "memory_reserved": _alive,
        "max_memory_allocated": _most,
        "max_memory_reserved": _most,
        "reset_peak_memory_stats": _reset_peak,
        "mem_get_info": lambda device=None: (MEMORY - _alive(device), MEMORY),
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": the_stream,
        "default_stream": the_stream,
        "stream": lambda stream: stream,
    }
    for name, value in contents.items():
        setattr(module, name, value)
    return module
