"""Parts of a generation by their steps: ``t.prefill``, ``t.decode``, ``t.steps[5:10]``, with the sites of the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from tracelens.errors import OptionError, ReplacementError
from tracelens.handles import (
    Described,
    LayerHandle,
    Layers,
    global_site,
    no_target,
    recorder_of,
    unknown_global,
)
from tracelens.ir.sites import GLOBAL_KINDS, TEXT_KINDS, Site
from tracelens.ir.windows import DECODE, EVERY_STEP, PREFILL, StepWindow
from tracelens.location import here
from tracelens.module_handle import ModuleHandle
from tracelens.values import Value

if TYPE_CHECKING:
    from tracelens.backends.anatomy import ModelAnatomy


class LayerInSteps(LayerHandle):
    """One layer in some steps of a generation; its attributes are its sites."""

    __slots__ = ("_steps",)

    def __init__(self, anatomy: Described, index: int, steps: StepWindow) -> None:
        super().__init__(anatomy, index)
        object.__setattr__(self, "_steps", steps)

    def _site(self, name: str) -> Site:
        return super()._site(name).during(self._steps)

    def skip(self, *given: Any) -> None:
        """Refused: a layer runs in every step, or in none."""
        _refuse_leaving_out(self)

    def replace(self, *unnamed: Any, **new: Any) -> None:
        """Refused: a module runs in every step, or in none."""
        _refuse_leaving_out(self)

    def __repr__(self) -> str:
        return f"{written(self._steps)}.layers[{self._index}]"


def _refuse_leaving_out(layer: LayerInSteps) -> NoReturn:
    raise ReplacementError(
        "a module is left out in every step of a generation, or in none",
        at=here(),
        instead=f"model.layers[{layer._index}].skip() or .replace(...); or a write in these steps: "
        f"{layer!r}.resid_post = value",
    )


class StepScope:
    """Some steps of a generation: ``t.prefill`` (over the prompt), ``t.decode`` (all others), ``t.steps[2:5]``.

    ``.layers``, the sites of the model (``.logits``, ``.embed``, ...) and ``.module(path)`` are those of these steps
    alone: reads are made, and writes hold, in no other. What was read in one step can be used in later ones.
    """

    __slots__ = ("_anatomy", "_steps", "layers")

    if TYPE_CHECKING:
        _anatomy: ModelAnatomy
        _steps: StepWindow
        layers: Layers

    def __init__(self, anatomy: ModelAnatomy, steps: StepWindow) -> None:
        layers = Layers(LayerInSteps(anatomy, index, steps) for index in range(anatomy.n_layers))
        for name, value in (("_anatomy", anatomy), ("_steps", steps), ("layers", layers)):
            object.__setattr__(self, name, value)

    def module(self, path: str) -> ModuleHandle:
        """A module by its path in these steps, as :meth:`tracelens.Model.module` gives it for all."""
        return ModuleHandle(self._anatomy, path, steps=self._steps)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        site = global_site(name)
        if site is None:
            raise unknown_global(name, _PUBLIC)
        return Value.of_site(recorder_of(self._anatomy, f"{self!r}.{name}"), site.during(self._steps))

    def __setattr__(self, name: str, new: Any) -> None:
        site = global_site(name)
        if site is None:
            raise no_target(name, _PUBLIC)
        recorder_of(self._anatomy, f"{self!r}.{name}").write(site.during(self._steps), new)

    def __dir__(self) -> list[str]:
        present = [kind.name for kind in GLOBAL_KINDS if self._anatomy.has(Site(kind.name))]
        return sorted({*_PUBLIC, *present, *(kind.name for kind in TEXT_KINDS)})

    def __repr__(self) -> str:
        return written(self._steps)


_PUBLIC = ("layers", "module")


class GenerationSteps:
    """``t.steps``: the steps of a generation by number, ``t.steps[0]`` the prompt's, ``t.steps[5:10]`` a window."""

    __slots__ = ("_anatomy",)

    def __init__(self, anatomy: ModelAnatomy) -> None:
        self._anatomy = anatomy

    def __getitem__(self, key: Any) -> StepScope:
        return StepScope(self._anatomy, _window(key))

    def __iter__(self) -> NoReturn:
        raise OptionError(
            "a loop over t.steps would have no end: how many steps there are is not known before the run",
            at=here(),
            instead="t.steps[:], which is every step; or for k in range(5): t.steps[k]",
        )

    def __repr__(self) -> str:
        return "t.steps"


def _window(key: Any) -> StepWindow:
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        if key >= 0:
            return StepWindow(int(key), int(key) + 1)
        raise _no_end(key)
    if isinstance(key, slice) and key.step in (None, 1):
        start, stop = key.start or 0, key.stop
        if all(
            type(end) is int or isinstance(end, np.integer) for end in (start, 0 if stop is None else stop)
        ):
            if start < 0 or (stop is not None and stop < 0):
                raise _no_end(start if start < 0 else stop)
            if stop is None or stop > start:
                return StepWindow(int(start), None if stop is None else int(stop))
            raise OptionError(
                f"t.steps[{start}:{stop}] has no steps",
                at=here(),
                instead="t.steps[5:10], of which the first is 5",
            )
    raise OptionError(
        f"steps cannot be chosen with {key!r}",
        at=here(),
        instead="t.steps[3], t.steps[5:10], t.steps[5:] or t.steps[:]",
    )


def _no_end(step: Any) -> OptionError:
    return OptionError(
        f"t.steps counts from the beginning, and {step} would count from the end, which is not known before the run",
        at=here(),
        instead="t.steps[:], and value[-1] after the block; t.decode for all steps but the prompt's",
    )


def written(steps: StepWindow) -> str:
    """The steps as one writes them in a block."""
    if steps == PREFILL:
        return "t.prefill"
    if steps == DECODE:
        return "t.decode"
    if steps == EVERY_STEP:
        return "t.steps[:]"
    return f"t.steps[{steps.start if steps.single else steps}]"
