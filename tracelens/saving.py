"""The saves of a recording: what may leave a run, under which names, and where it will be found."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tracelens.advice import another_name
from tracelens.destination import require_writable
from tracelens.draft import Delivery, Draft
from tracelens.errors import (
    Blaming,
    DtypeError,
    DuplicateNameError,
    OptionError,
    SaveInGenerationError,
    TracelensError,
)
from tracelens.ir.infer import dtype_of
from tracelens.ir.ops import Keep, Save
from tracelens.ir.step_flow import unsavable
from tracelens.ir.types import DType
from tracelens.ir.windows import StepWindow
from tracelens.location import here


class SavingDraft(Draft):
    """A recording with what it saves."""

    def steps_of(self, value: int) -> StepWindow | None:
        """In a generation, the steps in which a value is there; ``None`` for what is made of constants."""
        origin = self._origins[value]
        return None if origin is None else origin.steps

    def save(
        self,
        values: tuple[int, ...],
        *,
        name: str | None,
        stacked: bool,
        keep: Keep,
        dtype: DType | None,
        to: str | os.PathLike[str] | None,
    ) -> Delivery:
        """Lets values leave the run; returns where their tensor will be found."""
        self.require_open()
        location = here()
        if self.generating:
            with Blaming(location):
                self._require_savable(values)
        if name is None:
            name = f"#{len(self.saves)}"
        elif not isinstance(name, str) or not name or name.startswith("#"):  # pyright: ignore[reportUnnecessaryIsInstance]  # users may not be typed
            raise OptionError(
                f"{name!r} is not a name for a saved value: a name is a text, not empty, that does not begin with #",
                at=location,
                instead='value.save("name")',
            )
        if name in self.saves:
            raise DuplicateNameError(
                f"the name {name!r} is used by two saves of this trace",
                at=location,
                also=(("first used at", self.saves[name]),),
                instead=another_name(name, self.saves[name], location),
            )
        if to is not None:
            if keep is Keep.DEVICE:
                raise OptionError(
                    f"to={str(to)!r} writes the value to a file, from which it is read into the memory of the CPU, and "
                    'device="keep" would leave it on its device',
                    at=location,
                    instead=f'value.save(to={str(to)!r}), or value.save(device="keep"); or both, as two saves',
                )
            with Blaming(location):
                to = require_writable(to)
        self.saves[name] = location
        key = (name, values, stacked, keep is Keep.CPU, dtype, to)
        step = self._at.next.get(key) or self._add(key, Save(name, values, stacked, keep, dtype, to))
        self._take(step, location)
        delivery = Delivery(name)
        self.awaiting.append(weakref.ref(delivery))
        return delivery

    def _require_savable(self, values: tuple[int, ...]) -> None:
        """Refuses what the steps of a generation make, and what could not be put together."""
        windows = {self.steps_of(value) for value in values}
        if len(windows) > 1:
            raise SaveInGenerationError(
                "values of different steps cannot be stacked",
                instead="one save for each, or values of the same steps",
            )
        (window,) = windows
        rows = 1 if self.prompt is None else self.prompt.sizes["B"]
        problem = unsavable(self.types[values[0]], window, rows=rows)
        if problem is not None:
            raise SaveInGenerationError(
                problem,
                instead="one step, t.steps[3] or t.prefill; or a value of each row and position alone",
            )

    def deliver(self, tensors: Mapping[str, Callable[[], Any]]) -> None:
        """Gives every handle its tensor. The recording itself keeps none, so that a dropped handle frees its memory."""
        for reference in self.awaiting:
            delivery = reference()
            if delivery is not None:
                delivery.fetch = tensors[delivery.name]
        self.awaiting.clear()


def keep_of(device: str) -> Keep:
    """Where a save was asked to stay; raises :class:`OptionError` for a place that is none."""
    if device == "cpu":
        return Keep.CPU
    try:
        return Keep(device)
    except ValueError:
        raise OptionError(
            f"device={device!r} is not a place for a saved value",
            at=here(),
            instead='device="cpu" or device="keep"',
        ) from None


def save_dtype(dtype: torch.dtype | None) -> DType | None:
    """The ``dtype`` that a save was given; raises :class:`DtypeError` for what is none."""
    if dtype is None:
        return None
    if isinstance(dtype, str):
        known = isinstance(getattr(torch, dtype.removeprefix("torch."), None), torch.dtype)
        raise DtypeError(
            f"dtype={dtype!r} is a text, and a save takes a dtype of torch",
            at=here(),
            instead=f"dtype=torch.{dtype.removeprefix('torch.')}" if known else "dtype=torch.float32",
        )
    try:
        return dtype_of(dtype)
    except TracelensError as error:
        error.at, error.instead = here(), "dtype=torch.float32, or another common dtype"
        raise
