"""The sides of a model's modules: what there is at each, learned once and kept."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import nn

from tracelens.backends.hooks import seat_of
from tracelens.backends.meta_copy import meta_copy
from tracelens.backends.survey import SIZES, HookPoints, Leaf, ModuleCall, Survey, survey
from tracelens.errors import (
    MetaForwardError,
    ModuleCallError,
    ModuleTensorError,
    NestedTraceError,
    UnknownModuleError,
    VerificationError,
)
from tracelens.ir.module_sites import INPUT, Key, ModuleSite
from tracelens.ir.sites import near
from tracelens.ir.types import TensorType

Pass = Callable[[nn.Module], object]


class ModuleSides:
    """What the modules of one model receive and return, learned on first use, and again for another ``state``."""

    def __init__(
        self,
        model: nn.Module,
        passes: Callable[[], Sequence[Sequence[Pass]]],
        hook_points: Callable[[], HookPoints],
        state: Callable[[], Hashable],
        *,
        pretended: str | None = None,
        named: bool = True,
    ) -> None:
        """``pretended``: the argument that ``passes`` give in another form than runs. ``named``: has it named sites?"""
        self.model = model
        self._passes = passes
        self._hook_points = hook_points
        self._state = state
        self._pretended = pretended
        self._named = named
        self._known: dict[Hashable, Survey] = {}
        self._lock = threading.Lock()

    def survey(self) -> Survey:
        """The survey of the model as it is; :class:`MetaForwardError` where there can be none."""
        state = (self.model.training, self._state())
        known = self._known.get(state)
        if known is None:
            with self._lock:
                known = self._known.get(state)
                if known is None:
                    known = self._known[state] = self._learned()
        return known

    def _learned(self) -> Survey:
        failure: MetaForwardError | None = None
        for passes in self._passes():
            try:
                return survey(
                    copied(self.model, self._instead),
                    passes,
                    self._hook_points(),
                    pretended=self._pretended,
                    instead=self._instead,
                )
            except MetaForwardError as error:
                failure = failure or error
        assert failure is not None
        raise failure

    @property
    def _instead(self) -> str:
        """What to use where nothing can be learned."""
        if self._named:
            return "named sites, which need no such pass (model.sites()); or hooks of your own on model.hf"
        return "the arguments that the module's forward takes; where these are right, hooks of your own on model.hf"

    # --- what there is -------------------------------------------------------------------------------------------

    def paths(self) -> tuple[str, ...]:
        """The modules that a pass calls, in the order in which it does so first."""
        return tuple(self.survey().calls)

    def path_of(self, path: str) -> str:
        """The path under which the survey knows a module; raises :class:`UnknownModuleError`."""
        known = self.survey().own_path.get(path)
        if known is None:
            raise unknown_module(self.model, path)
        return known

    def call_of(self, path: str, number: int | None) -> ModuleCall:
        """One call of a module, or the only one; :class:`ModuleCallError` where there is none, or no such."""
        calls = self.survey().calls.get(self.path_of(path), ())
        if not calls:
            raise ModuleCallError(
                f"module {path!r} is not called in a forward pass of this model",
                instead=self._called_near(path),
            )
        if number is None and len(calls) > 1:
            raise ModuleCallError(
                f"module {path!r} is called {len(calls)} times in a forward pass",
                instead=f"model.module({path!r}).call(0), up to .call({len(calls) - 1})",
            )
        if number is not None and not 0 <= number < len(calls):
            raise ModuleCallError(
                f"module {path!r} has no call {number}: a forward pass calls it {_times(len(calls))}",
                instead=f".call({len(calls) - 1}) is the last call",
            )
        return calls[number or 0]

    def _called_near(self, path: str) -> str:
        """Modules that are called, for one that is not: some of those inside, and the nearest around it."""
        called = self.paths()
        inside = [repr(other) for other in called if other.startswith(path + ".")][:3]
        around = max(
            (other for other in called if path.startswith(other + ".") or not other), key=len, default=None
        )
        parts = [f"those inside that are called, such as {', '.join(inside)}"] if inside else []
        parts += [f"the module around it, {around!r}"] if around is not None else []
        parts += ["model.modules() lists those that are called"] if self._named else []
        return "; ".join(parts)

    def type_of(self, site: ModuleSite) -> TensorType:
        """The type of a site, which has to be one of this very model."""
        leaf = self.leaf(site)
        if leaf.type is None:
            raise ModuleTensorError(
                f"{site} cannot be read or written: it {leaf.problem}",
                instead=leaf.instead or "another tensor of that module, or a module before or after it",
            )
        return leaf.type

    def calls_of(self, site: ModuleSite) -> int:
        """How often a forward pass calls the module of a site."""
        return len(self.survey().calls[site.path])

    def leaf(self, site: ModuleSite) -> Leaf:
        """What is known of a site; :class:`VerificationError` where this model has none such."""
        if self.survey().own_path.get(site.path) is None:
            raise unknown_module(self.model, site.path)
        leaf = self.survey().leaf(site)
        if leaf is None:
            raise VerificationError(
                f"this model has no {site}", instead="a graph that was recorded for this model"
            )
        if leaf.site != site.always:
            raise VerificationError(
                f"this model reaches {leaf.site.text}; the graph has {site.text}",
                instead="a graph that was recorded for this model",
            )
        return leaf


def copied(model: nn.Module, instead: str) -> nn.Module:
    """A copy without data, made while no run has anything on the model."""
    seat = seat_of(model)
    sitting = seat.run
    if sitting is not None and sitting.thread == get_ident():
        raise NestedTraceError(
            "the modules of this model cannot be looked at from inside a run of it",
            instead="name the module in a block once before, outside of functions that tl.apply runs",
        )
    with seat.lock:
        try:
            return without_data_of_experts(meta_copy(model))
        except Exception as error:
            raise MetaForwardError(
                "what this model's modules receive and return cannot be learned: the model cannot be copied without "
                f"its data ({type(error).__name__}: {error})",
                instead=instead,
            ) from error


def without_data_of_experts(copy: nn.Module) -> nn.Module:
    """The copy with experts that compute without data: what they receive and return is of the same sizes.

    So is what passes the modules inside of them, unless each expert computes alone (``eager``): these are called as
    often as there are experts with tokens then, which a run finds out.
    """
    config, put = getattr(copy, "config", None), getattr(copy, "set_experts_implementation", None)
    if callable(put) and getattr(config, "_experts_implementation", None) in ("grouped_mm", "eager"):
        put("batched_mm")
    return copy


def language_model_passes(model: nn.Module) -> list[list[Pass]]:
    """Forward passes of a language model as blocks make them, in the order in which they are tried."""
    takes = inspect.signature(model.forward).parameters
    # Whether padding is masked is looked up in the data of a [B, P] mask; one of [B, 1, P, P] is taken as it is.
    masks: list[Callable[[int, int], tuple[int, ...]] | None] = [_square, _rows, None]
    return [[partial(_language_pass, sizes, mask, takes) for sizes in SIZES] for mask in masks]


def _square(rows: int, positions: int) -> tuple[int, ...]:
    return (rows, 1, positions, positions)


def _rows(rows: int, positions: int) -> tuple[int, ...]:
    return (rows, positions)


def _language_pass(
    sizes: Mapping[str, int],
    mask: Callable[[int, int], tuple[int, ...]] | None,
    takes: Mapping[str, object],
    model: Any,
) -> object:
    rows, positions = sizes["B"], sizes["P"]
    ids = torch.empty((rows, positions), dtype=torch.int64, device="meta")
    inputs = {"input_ids": ids}
    if "position_ids" in takes:
        inputs["position_ids"] = torch.empty_like(ids)
    if mask is not None:
        dtype = torch.bool if mask is _square else torch.int64
        inputs["attention_mask"] = torch.empty(mask(rows, positions), dtype=dtype, device="meta")
    return model(**inputs, use_cache=False)


def unknown_module(model: nn.Module, path: object) -> UnknownModuleError:
    """The error for a path that leads nowhere, with near ones."""
    paths = tuple(name for name, _ in model.named_modules(remove_duplicate=False))
    candidates = near(str(path), paths)
    return UnknownModuleError(
        f"the model has no module {path!r}",
        instead="did you mean " + ", ".join(map(repr, candidates)) + "?"
        if candidates
        else "model.modules() lists all",
    )


def shown(side: str, leaves: Mapping[Key, Leaf]) -> str:
    """The tensors on a side that can be read, as one writes them, with their types."""
    word = ".inputs" if side == INPUT else ".output"
    return ", ".join(
        f"{word}{''.join(f'[{part!r}]' for part in key)} {leaf.type}"
        for key, leaf in leaves.items()
        if leaf.type is not None
    )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
