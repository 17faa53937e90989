"""The model's parts as one names them in a block: ``model.layers[3].resid_post``, ``model.layers[2:10]``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast, overload

import numpy as np

from tracelens.errors import (
    Blaming,
    LayerMappingError,
    LayerRangeError,
    NoTraceError,
    TracelensError,
    UnknownSiteError,
    WriteTargetError,
)
from tracelens.experts import ExpertHandle, ExpertsOfLayers
from tracelens.heads import Headed, HeadHandle, HeadsOfLayers, head_out, read_only
from tracelens.ir.dims import bounds_text
from tracelens.ir.module_sites import ModuleSite
from tracelens.ir.sites import CANONICAL, KIND, LAYER_KINDS, Scope, Site, near
from tracelens.location import here
from tracelens.mapped import MappedValue, each_layer, slice_text
from tracelens.open_recordings import open_recorder, open_recorders
from tracelens.operand import Operand
from tracelens.porting import elsewhere_called
from tracelens.recorder import Recorder
from tracelens.refusing import (
    one_layer_only,
    parameter_target,
    replace_names_sites,
    require_replacement,
    skip_takes_nothing,
)
from tracelens.subject import Anatomy
from tracelens.values import Value

_LAYER_NAMES = frozenset(name for name, kind in CANONICAL.items() if KIND[kind].scope is Scope.LAYER)
_GLOBAL_NAMES = frozenset(kind.name for kind in KIND.values() if kind.scope is not Scope.LAYER)


class Described(Anatomy, Headed, Protocol):
    """An anatomy that can also say which sites it has."""

    def has(self, site: Site) -> bool: ...

    def begins(self, site: Site) -> ModuleSite:
        """The moment before the module that makes a site."""
        ...

    def stream_input(self, site: Site) -> ModuleSite:
        """The side of a module at which a site is what the module receives."""
        ...


def recorder_of(anatomy: Anatomy, what: str) -> Recorder:
    """The open recording of the model; :class:`NoTraceError` outside a block."""
    recorder = open_recorder(anatomy)
    if recorder is None and (others := open_recorders()):
        raise NoTraceError(
            f"{what} was used in a block of another model; no block of its own model is open",
            at=here(),
            also=(("the open block was opened at", others[0].opened),),
            instead="the model of the open block, or a block of its own: with its_model.trace(prompt) as t: ...",
        )
    if recorder is None:
        raise NoTraceError(
            f"{what} was used outside a block, where there is nothing to read or change",
            at=here(),
            instead="with model.trace(prompt) as t: ...",
        )
    return recorder


@lru_cache(maxsize=65536)
def _layer_site(name: str, layer: int) -> Site:
    """One object for each site, which look-ups find by identity."""
    return Site(name, layer)


class LayerHandle:
    """One layer of the model; its attributes are its sites.

    Two things differ for the layers of a part of a run (one prompt of several, some steps of a generation): which site
    a name stands for there (``_site``), and what is read and written of it (``_read``, ``_write``).
    """

    __slots__ = ("_anatomy", "_index")

    if TYPE_CHECKING:

        def _read(self, recorder: Recorder, site: Site) -> Value: ...

        def _write(self, recorder: Recorder, site: Site, new: Any) -> None: ...

    else:  # every line of a block would pay for a method around these
        _read = staticmethod(Value.of_site)
        _write = staticmethod(Recorder.write)

    def __init__(self, anatomy: Described, index: int) -> None:
        object.__setattr__(self, "_anatomy", anatomy)
        object.__setattr__(self, "_index", index)

    def __getattr__(self, name: str) -> Value:
        if name not in _LAYER_NAMES and name.startswith("_"):
            raise AttributeError(name)  # Python asks for such names while it copies an object
        if name == "head_out":
            return (
                self.z
            )  # which says why there is none: Python asks here because the property has failed on it
        site = self._site(name)
        recorder = open_recorder(self._anatomy) or recorder_of(self._anatomy, f"{self!r}.{name}")
        return self._read(recorder, site)

    def __setattr__(self, name: str, new: Any) -> None:
        site = self._site(name)
        if type(new) is MappedValue:
            raise LayerMappingError(
                f"a value mapped over layers {list(new.layers)} was assigned to one layer",
                at=here(),
                instead=f"{slice_text(new.layers)}.{name} = value, or value.stack()[i] for one of them",
            )
        recorder = open_recorder(self._anatomy) or recorder_of(self._anatomy, f"{self!r}.{name}")
        self._write(recorder, site, new)

    def head(self, heads: int | Sequence[int]) -> HeadHandle:
        """One head, or several: ``.head(3).z`` is [B, P, d], ``.head([1, 4]).pattern`` [B, 2, P, S].

        All sites with an axis for heads, and ``head_out``. Keys and values are those that serve the head. Assigning
        changes these heads alone. Raises :class:`~tracelens.errors.HeadRangeError` for heads that there are not, and
        :class:`~tracelens.errors.SharedHeadError` for writing a key or value that other heads use too.

        >>> model.layers[8].head(3).z = 0                                            # doctest: +SKIP
        """
        return HeadHandle(self._anatomy, self, self._index, heads)

    def expert(self, number: int) -> ExpertHandle:
        """One expert by its number: ``.expert(5).out`` is [B, P, D], what it returned of the tokens that went to it.

        ``.chosen`` says which did, ``.weight`` how much it counts there; ``.mask()`` and ``.force()`` change who does.
        Raises :class:`~tracelens.errors.ExpertRangeError` for experts that there are not.

        >>> model.layers[8].expert(5).out = 0                                        # doctest: +SKIP
        """
        return ExpertHandle(self._anatomy, self, number)

    @property
    def head_out(self) -> Value:
        """What each head adds to ``attn_out`` (without the bias): [B, P, H, D], computed from ``z``. Read-only."""
        return head_out(self._anatomy, self.z, self._index)

    def skip(self, *given: Any) -> None:
        """Does not run this layer: it returns what it received, ``resid_post := resid_pre``, after all writes so far.

        Later writes to what it receives are refused (:class:`~tracelens.errors.SkippedSiteError`).

        >>> model.layers[5].skip()                                                   # doctest: +SKIP
        """
        if given:
            raise skip_takes_nothing(repr(self))
        recorder = recorder_of(self._anatomy, f"{self!r}.skip")
        site = _layer_site("resid_post", self._index)
        with Blaming(here()):
            begins = self._anatomy.begins(site)
            received = _layer_site("resid_pre", self._index)
            at_module = self._anatomy.stream_input(received)
        # Written by the module's path, it holds more than the site that is named.
        received = at_module if recorder.is_written(at_module) else received
        recorder.replace(site, begins, Value.of_site(recorder, received))

    def replace(self, *unnamed: Any, **new: Any) -> None:
        """Does not run the modules that make these sites: ``model.layers[5].replace(mlp_add=value)`` skips the MLP.

        A site names the module whose output it is: ``attn_add`` attention, ``mlp_add`` the MLP, ``resid_post`` the
        layer, ``attn_out`` and ``mlp_out`` the last projection alone, ``attn_norm`` and ``mlp_norm`` a norm. Raises
        :class:`~tracelens.errors.ReplacementError` for other sites, and as :meth:`tracelens.ModuleHandle.replace` does.
        """
        if unnamed:
            raise replace_names_sites(repr(self))
        require_replacement(new, self)
        for name, value in new.items():
            site = self._site(name)
            if type(value) is MappedValue:
                raise one_layer_only(value)
            recorder = recorder_of(self._anatomy, f"{self!r}.replace")
            with Blaming(here()):
                begins = self._anatomy.begins(site)
            recorder.replace(site, begins, value)

    def _site(self, name: str) -> Site:
        if name not in _LAYER_NAMES:
            raise _unknown(name, repr(self), tuple(_LAYER_NAMES))
        return _layer_site(CANONICAL[name], self._index)

    def __dir__(self) -> list[str]:
        return _present(self._anatomy, self._index)

    def __repr__(self) -> str:
        return f"model.layers[{self._index}]"


class LayersSlice:
    """Several layers; its sites are values mapped over them."""

    __slots__ = ("_handles", "_layers")

    def __init__(self, handles: tuple[LayerHandle, ...], layers: tuple[int, ...]) -> None:
        object.__setattr__(self, "_handles", handles)
        object.__setattr__(self, "_layers", layers)

    def __getattr__(self, name: str) -> MappedValue:
        if name.startswith("_"):
            raise AttributeError(name)
        name = "z" if name == "head_out" else name  # as in one layer
        self._require_site(name)
        return MappedValue(self._layers, tuple(getattr(handle, name) for handle in self._handles))

    def __setattr__(self, name: str, new: Any) -> None:
        self._require_site(name)
        for handle, part in zip(self._handles, each_layer(new, self._layers), strict=True):
            setattr(handle, name, part)

    def head(self, heads: int | Sequence[int]) -> HeadsOfLayers:
        """The same heads in each of the layers; see :meth:`LayerHandle.head`."""
        return HeadsOfLayers(tuple(handle.head(heads) for handle in self._handles), self._layers)

    def expert(self, number: int) -> ExpertsOfLayers:
        """The same number's expert in each of the layers; see :meth:`LayerHandle.expert`."""
        return ExpertsOfLayers(tuple(handle.expert(number) for handle in self._handles), self._layers)

    @property
    def head_out(self) -> MappedValue:
        """What each head adds to ``attn_out``, in each of the layers: [B, P, H, D]. Read-only."""
        return MappedValue(self._layers, tuple(handle.head_out for handle in self._handles))

    def skip(self, *given: Any) -> None:
        """Does not run these layers: each returns what it received."""
        if given:
            raise skip_takes_nothing(repr(self))
        for handle in self._handles:
            handle.skip()

    def replace(self, *unnamed: Any, **new: Any) -> None:
        """Does not run the modules that make these sites, in each of the layers."""
        if unnamed:
            raise replace_names_sites(repr(self))
        require_replacement(new, self)
        for name, value in new.items():
            for handle, part in zip(self._handles, each_layer(value, self._layers), strict=True):
                handle.replace(**{name: part})

    def _require_site(self, name: str) -> None:
        if name not in _LAYER_NAMES:
            raise _unknown(name, repr(self), tuple(_LAYER_NAMES))

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[LayerHandle]:
        return iter(self._handles)

    def __dir__(self) -> list[str]:
        return dir(self._handles[0])

    def __repr__(self) -> str:
        return slice_text(self._layers)


class Layers:
    """All layers: ``model.layers[3]``, ``model.layers[-1]``, ``model.layers[2:10]``, ``model.layers[[0, 4]]``."""

    __slots__ = ("_handles",)

    def __init__(self, handles: Iterable[LayerHandle]) -> None:
        object.__setattr__(self, "_handles", tuple(handles))

    if not TYPE_CHECKING:  # type checkers know the attributes that there are

        def __getattr__(self, name: str) -> NoReturn:
            if name.startswith("_"):
                raise AttributeError(name)
            raise _of_which_layer(name)

    def __setattr__(self, name: str, new: Any) -> None:
        raise _of_which_layer(name)

    @overload
    def __getitem__(self, key: int) -> LayerHandle: ...
    @overload
    def __getitem__(self, key: slice | Sequence[int]) -> LayersSlice: ...
    def __getitem__(self, key: Any) -> LayerHandle | LayersSlice:
        if type(key) is int and 0 <= key < len(self._handles):
            return self._handles[key]
        if isinstance(key, int | np.integer) and not isinstance(key, bool):
            return self._handles[self._checked(key)]
        if isinstance(key, slice) and all(
            part is None or type(part) is int for part in (key.start, key.stop, key.step)
        ):
            chosen = self._span(key)
        elif isinstance(key, list | tuple | range):
            chosen = tuple(self._checked(index) for index in cast("Sequence[int]", key))
            if len(set(chosen)) < len(chosen):
                raise LayerRangeError(
                    f"model.layers[{_written(key)}] names a layer twice, and a write to it would count once",
                    at=here(),
                    instead="each layer once",
                )
        else:
            raise LayerRangeError(
                f"layers cannot be chosen with {key!r}",
                at=here(),
                instead="model.layers[3], model.layers[2:10] or model.layers[[0, 4]]",
            )
        if not chosen:
            raise LayerRangeError(
                f"model.layers[{_written(key)}] chooses no layer: the model has {len(self)} layers, "
                f"0 to {len(self) - 1}",
                at=here(),
                instead="model.layers[:] is all layers",
            )
        return LayersSlice(tuple(self._handles[index] for index in chosen), chosen)

    def _span(self, key: slice) -> tuple[int, ...]:
        """The layers of a slice. Python would clip it: who writes 1:9 may believe that there is a layer 8."""
        count = len(self._handles)
        if key.step == 0:
            raise LayerRangeError(
                f"model.layers[{_written(key)}] has a step of 0",
                at=here(),
                instead="model.layers[::2], or no step",
            )
        top = count if key.step is None or key.step > 0 else count - 1
        start, stop = (
            bound if bound is None or -count <= bound <= top else ... for bound in (key.start, key.stop)
        )
        if start is ... or stop is ...:
            open_ended = slice(None if start is ... else start, None if stop is ... else stop, key.step)
            raise LayerRangeError(
                f"model.layers[{_written(key)}] goes beyond the model, which has {count} layers, 0 to {count - 1}",
                at=here(),
                instead=f"model.layers[{_written(open_ended)}]: an open end is the model's own",
            )
        return tuple(range(count)[key])

    def _checked(self, index: Any) -> int:
        if isinstance(index, Operand | bool) or not isinstance(index, int | np.integer):
            raise LayerRangeError(
                f"a layer is chosen with a number, not with {index!r}", at=here(), instead="model.layers[3]"
            )
        count = len(self._handles)
        if not -count <= index < count:
            raise LayerRangeError(
                f"there is no layer {index}: the model has {count} layers, 0 to {count - 1}",
                at=here(),
                instead="model.layers[-1] is the last layer",
            )
        return int(index) % count

    def __setitem__(self, key: Any, new: Any) -> None:
        raise WriteTargetError(
            "a layer is not a tensor, so nothing can be assigned to it",
            at=here(),
            instead=f"one of its sites: model.layers[{_written(key)}].resid_post = value",
        )

    def __len__(self) -> int:
        return len(self._handles)

    def __iter__(self) -> Iterator[LayerHandle]:
        return iter(self._handles)

    def __repr__(self) -> str:
        return f"model.layers (0 to {len(self) - 1})"


def _of_which_layer(name: str) -> TracelensError:
    """The error for ``model.layers.<name>``, which does not say which layers are meant."""
    if name not in _LAYER_NAMES:
        return _unknown(name, "model.layers[i]", tuple(_LAYER_NAMES))
    return UnknownSiteError(
        f"model.layers.{name} does not say which layers are meant",
        at=here(),
        instead=f"model.layers[:].{name} for all layers, model.layers[3].{name} for one",
    )


def _written(key: Any) -> str:
    """A choice of layers as one writes it: ``2:10``."""
    return bounds_text(key.start, key.stop, key.step) if isinstance(key, slice) else repr(key)


def _present(anatomy: Described, layer: int) -> list[str]:
    """The names of the sites that this layer has, aliases included."""
    names: list[str] = []
    for kind in LAYER_KINDS:
        if anatomy.has(Site(kind.name, layer)):
            names += [kind.name, *kind.aliases]
    experts = ["expert"] if "expert_out" in names else []
    return sorted([*names, *experts, "head", "head_out", "replace", "skip"])


def global_site(name: str) -> Site | None:
    """The global site of this name, if there is one."""
    return Site(name) if name in _GLOBAL_NAMES else None


def _unknown(name: str, owner: str, names: tuple[str, ...]) -> TracelensError:
    if name == "head_out":  # it is there, so it was assigned to
        return read_only(f"{owner}.{name}")
    ported = elsewhere_called(name, owner)
    if ported is not None:
        return UnknownSiteError(f"{owner} has no site {name!r}", at=here(), instead=ported)
    candidates = near(name, names)
    elsewhere = "model." + name if name in _GLOBAL_NAMES else None
    return UnknownSiteError(
        f"{owner} has no site {name!r}",
        at=here(),
        instead=(
            f"did you mean {elsewhere}?"
            if elsewhere
            else f"did you mean {', '.join(candidates)}?"
            if candidates
            else "model.sites() lists all sites"
        ),
    )


def no_target(name: str, also: tuple[str, ...]) -> TracelensError:
    """The error for assigning to ``model.<name>``, which is no site."""
    if name not in also:
        return unknown_global(name, also)
    if name == "unembed":
        return parameter_target("model.unembed")
    return WriteTargetError(
        f"model.{name} is not a site, so nothing can be assigned to it",
        at=here(),
        instead="a site: model.layers[i].resid_post = value; model.sites() lists them",
    )


def unknown_global(name: str, also: tuple[str, ...]) -> TracelensError:
    """The error for ``model.<name>`` where there is neither a site nor an attribute of that name."""
    if name in _LAYER_NAMES:
        return UnknownSiteError(
            f"{name!r} is a site of a layer, not of the model", at=here(), instead=f"model.layers[i].{name}"
        )
    return _unknown(name, "the model", (*sorted(_GLOBAL_NAMES), *also))
