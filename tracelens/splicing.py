"""``tl.splice``: a sparse autoencoder or a transcoder in the model's path, its features to read and to change."""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from tracelens.errors import (
    Blaming,
    LostUpdateError,
    ShapeError,
    SpliceError,
    StaleValueError,
    UnknownAttributeError,
)
from tracelens.ir.ops import IndexItem, Ref
from tracelens.ir.sites import near
from tracelens.location import Location, here
from tracelens.operand import Operand
from tracelens.recorder import Recorder
from tracelens.refusing import unknown_attribute
from tracelens.spliced_module import Coder
from tracelens.subject import spelling
from tracelens.values import Saved, Value
from tracelens.view import Line, Shown, View

_LOST = "to change the model:   s.features += v\nto compute a new value: f = f + v"


class Features(Value):
    """The features of an open splice, or a part of them: a value that can be assigned into."""

    __slots__ = ("_splice",)

    def __init__(self, recorder: Recorder, id: int, splice: Splice) -> None:
        super().__init__(recorder, id)
        self._splice = splice

    def _indexed(self, index: tuple[IndexItem, ...], *, by_token: bool = False) -> Value:
        number = self._recorder.index(self._id, index, by_token=by_token)
        if any(isinstance(item, Ref) for item in index):
            return Value(self._recorder, number)
        part = Features(self._recorder, number, self._splice)
        part._parent, part._index = self, index
        return part

    def _assign(self, index: tuple[IndexItem, ...], new: Any, *, by_token: bool = False) -> None:
        splice, recorder = self._splice, self._recorder
        splice._require_current(self._root())
        value = recorder.put(self._id, index, new, by_token=by_token)
        step: Value = self
        while step._parent is not None:
            assert step._index is not None
            value = recorder.put(step._parent._id, step._index, Value(recorder, value), by_token=True)
            step = step._parent
        at, changed = here(), self
        splice._change(value, new)
        while changed is not None:
            changed._stale, changed = at, changed._parent

    def _updated(self, result: Any) -> Any:
        return self._splice._expect(result, None)

    def save(
        self,
        name: str | None = None,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        to: str | os.PathLike[str] | None = None,
    ) -> Saved:
        """Lets the features leave the run; as :meth:`tracelens.Value.save`."""
        plain = super().save(name, device=device, dtype=dtype, to=to)
        handle = SavedFeatures(self._recorder, self._id)
        handle._parent, handle._index, handle._delivery = plain._parent, plain._index, plain._delivery
        return handle


class SavedFeatures(Saved):
    """Features that leave the run: a gradient can be taken with respect to them all the same."""

    __slots__ = ()


class _Update(Value):
    """What ``+=`` made of features: it has to be handed back to them."""

    __slots__ = ("_splice",)

    def __init__(self, recorder: Recorder, id: int, splice: Splice) -> None:
        super().__init__(recorder, id)
        self._splice = splice

    def _updated(self, result: Any) -> Any:
        return self._splice._expect(result, self._id)


_PARTS = ("features", "input", "reconstruction", "error")
_CALLED = {
    **dict.fromkeys(
        ("activations", "acts", "codes", "encoded", "f", "feature_acts", "hidden", "latent", "latents", "z"),
        "features",
    ),
    **dict.fromkeys(("decoded", "output", "out", "recon"), "reconstruction"),
    **dict.fromkeys(("error_term", "residual", "sae_error"), "error"),
    **dict.fromkeys(("inputs", "site", "value", "x"), "input"),
}
"""What other libraries, and people, call the parts of a splice."""


class Splice(Shown):
    """A module in the model's path while its block is open: ``with tl.splice(...) as s:``.

    ``s.features`` are what ``encode`` gives, to read, save and change: ``s.features[..., 17] = 0``,
    ``s.features *= 2``, ``s.features = other``. The model is changed where the block ends.
    """

    def __init__(self, source: Value, target: Value, module: Any, keep_error: bool) -> None:
        self._recorder: Recorder = source._recorder
        self._source, self._target = source, target
        self._coder, self._keep_error = Coder(module, source._recorder), keep_error
        self._features: Features | None = None
        self._decoded: Value | None = None
        self._first: Features | None = None
        self._closed: Location | None = None
        self._pending: dict[int, Location] = {}
        # The line of the splice itself: of a `with` over several lines, Python knows only the first afterwards.
        self._made = here()
        self._recorder.unfinished[self] = SpliceError(
            "a splice was made and never opened, so nothing of it is in the model",
            at=self._made,
            instead="with tl.splice(model.layers[i].resid_post, sae) as s: s.features[..., 17] = 0",
        )

    # --- the block ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> Splice:
        if self._first is not None:
            raise SpliceError(
                "this splice has been opened before", at=here(), instead="tl.splice(...) for each block"
            )
        try:
            self._require_unwritten()
            with Blaming(self._made):
                value = self._coder.encode(Value(self._recorder, self._source._id))
                self._first = self._features = Features(self._recorder, value._id, self)
                if self._keep_error:
                    self._require_shape(self.reconstruction)
        except BaseException:
            self._recorder.unfinished.pop(self, None)  # it has said what is wrong
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._recorder.unfinished.pop(self, None)
        self._closed = here()
        if error is not None:
            return  # nothing is written, and the user's own exception goes on
        if self._pending:
            raise LostUpdateError(
                "the result of an in-place operator on features was never handed back, so nothing changed",
                at=next(iter(self._pending.values())),
                instead=_LOST,
            )
        self._require_unwritten()
        site, features = self._target._site, self._features
        assert site is not None
        assert features is not None
        with Blaming(self._made):
            new = self._coder.decode(features)
            self._require_shape(new)
            if self._keep_error:
                # x + (decode(edited) - decode(features)), not decode(edited) + (x - decode(features)): without an edit
                # the difference is exactly zero, and the model computes what it computed before, to the last bit.
                new = self._target.detach() + (new - self.reconstruction.detach())
            self._recorder.write(site, new)

    def _require_unwritten(self) -> None:
        for value in (self._source, self._target):
            site = value._site
            assert site is not None
            if not self._recorder.is_current(site, value._id):
                raise StaleValueError(
                    f"{site} was written after it had been spliced, so the splice would undo that write",
                    at=self._made,
                    instead=f"write {spelling(site)} before the splice, or after its block",
                )

    def _require_shape(self, decoded: Value) -> None:
        wanted, found = self._target._type, decoded._type
        if found.shape != wanted.shape:
            raise ShapeError(
                f"the module's decode gives {found}, and {self._target._site} is {wanted}",
                instead="a module for activations of this width",
            )

    # --- what can be read --------------------------------------------------------------------------------------------

    @property
    def features(self) -> Features:
        """What ``encode`` gives, after the changes so far; assigning to it or into it changes it."""
        if self._features is None:
            raise SpliceError(
                "the features are there only once the splice is open",
                at=here(),
                instead="with tl.splice(site, module) as s: s.features",
            )
        return self._features

    @features.setter
    def features(self, new: Any) -> None:
        self._require_current(self.features)
        if new is self._features:
            return
        same = isinstance(new, Value) and new._is_recording() and new._type == self.features._type
        value = self._recorder.own(new) if same else self._recorder.put(self.features._id, (), new)
        self._change(value, new)

    @property
    def input(self) -> Value:
        """The site's value that ``encode`` reads."""
        return self._source

    @property
    def reconstruction(self) -> Value:
        """What ``decode`` makes of the features before any change."""
        if self._decoded is None:
            first = self.features if self._first is None else self._first
            with Blaming(self._made):
                self._decoded = self._coder.decode(first)
        return self._decoded

    @property
    def error(self) -> Value:
        """What the reconstruction misses of the site that is written: that site less :attr:`reconstruction`."""
        return Value(self._recorder, self._target._id) - self.reconstruction

    if not TYPE_CHECKING:  # type checkers know the attributes that there are

        def __getattr__(self, name: str) -> NoReturn:
            if name.startswith("_"):
                raise AttributeError(name)
            raise _no_part(name)

    def __setattr__(self, name: str, new: Any) -> None:
        if name != "features" and not name.startswith("_"):
            raise _not_assigned(name)
        object.__setattr__(self, name, new)

    def _view(self) -> View:
        state = (
            "not open yet"
            if self._first is None
            else "open"
            if self._closed is None
            else "its block has ended"
        )
        to = f" to {self._target._site}" if self._target is not self._source else ""
        features = "" if self._features is None else f", features {self._features._type}"
        error = "with" if self._keep_error else "without"
        what = f"{type(self._coder.module).__name__} at {self._source._site}{to}"
        return Line(f"<splice of {what}{features}, {error} the error, {state}>")

    # --- changes -----------------------------------------------------------------------------------------------------

    def _require_current(self, features: Value) -> None:
        if self._closed is not None:
            raise SpliceError(
                "this splice is in the model already, so changing its features would change nothing",
                at=here(),
                also=(("its block ended at", self._closed),),
                instead="change the features inside of the block of the splice",
            )
        features._require_fresh()
        if features is not self._features:
            raise StaleValueError(
                "the features were changed after this value was read, so assigning through it would undo that",
                at=here(),
                instead="s.features[...] = new",
            )

    def _change(self, value: int, new: Any) -> None:
        self._features = Features(self._recorder, value, self)
        if isinstance(new, Value):
            self._pending.pop(new._id, None)

    def _expect(self, result: Any, replaces: int | None) -> Any:
        if not isinstance(result, Value):
            return result
        if replaces is not None:
            self._pending.pop(replaces, None)
        if self._closed is None:
            self._pending[result._id] = here()
        return _Update(self._recorder, result._id, self)


def splice(site: Any, module: Any, *, keep_error: bool = True, to: Any = None) -> Splice:
    """Puts a module with ``encode`` and ``decode`` into the model's path, its features open to reading and writing.

    ``site``: a site that is read, such as ``model.layers[8].resid_post`` [B, P, D]; ``to``: the site that is written,
    by default the same one (for a transcoder ``site`` is ``mlp_in`` and ``to`` is ``mlp_out``). Where the block ends,
    the site gets ``decode(features)`` plus, with ``keep_error``, what the module missed before any change: the site
    less ``decode(encode(site))``. So without a change of the features nothing changes, to the last bit. In gradients
    that error is a constant, as is usual: they reach the model through the features alone. The site is given to
    ``encode`` in the dtype of the module's parameters where that is the wider one, and cast back once, by the write.

    Raises :class:`~tracelens.errors.SpliceError` for a module without ``encode`` and ``decode``, for what is no site,
    and for a splice that is never opened; :class:`~tracelens.errors.ShapeError` for a module of another width, and
    :class:`~tracelens.errors.LostUpdateError` for ``f += v`` on features that is not handed back.

    >>> with model.trace("The capital of France is") as t:                           # doctest: +SKIP
    ...     with tl.splice(model.layers[8].resid_post, sae) as s:
    ...         s.features[..., 17] = 0
    ...         s.features.save("features")
    ...     model.logits[:, -1].save("logits")
    """
    target = site if to is None else to
    for value in (site, target):
        if isinstance(value, Operand) and not value._is_recording():
            raise SpliceError(
                "a splice was made of what a finished block saved",
                at=here(),
                instead="a site of the open block",
            )
        if not isinstance(value, Value) or value._site is None or value._parent is not None:
            raise SpliceError(
                f"a splice stands at one whole site of an open block, not at {_named(value)}",
                at=here(),
                instead="tl.splice(model.layers[8].resid_post, sae); a loop over layers opens one for each",
            )
        value._require_fresh()
    if isinstance(module, type):
        raise SpliceError(
            f"{module.__name__} is a class, and a splice takes one of its objects",
            at=here(),
            instead=f"sae = {module.__name__}(...); tl.splice(site, sae)",
        )
    missing = [name for name in ("encode", "decode") if not callable(getattr(module, name, None))]
    if missing:
        raise SpliceError(
            f"a {type(module).__name__} cannot be spliced: it has no {' and no '.join(missing)}",
            at=here(),
            instead="a module with encode(x) that gives features, and decode(features) that gives x again",
        )
    return Splice(site, target, module, keep_error)


_ASSIGNED = "s.features = new, s.features[..., 17] = 0: the features are what a splice opens to changes"


def _no_part(name: str) -> UnknownAttributeError:
    """The error for ``s.name``."""
    if name == "keep_error":
        return _not_assigned(name)
    meant = _CALLED.get(name)
    return unknown_attribute(
        "a splice",
        name,
        "s",
        () if meant else _PARTS,
        f"s.{meant}" if meant else "s.features, s.input, s.reconstruction and s.error",
    )


def _not_assigned(name: str) -> UnknownAttributeError:
    """The error for ``s.name = new``."""
    if name == "keep_error":
        return UnknownAttributeError(
            "whether a splice keeps the error is said where it is made",
            at=here(),
            instead="tl.splice(site, module, keep_error=False)",
        )
    if name not in _PARTS:
        known = near(name, ("features",)) or _CALLED.get(name) == "features"
        return unknown_attribute("a splice", name, "s", (), "s.features = new" if known else _ASSIGNED)
    return UnknownAttributeError(
        f"the {name} of a splice can be read, and nothing can be assigned to it",
        at=here(),
        instead={
            "error": "keep_error=False leaves the error away; s.features = new changes the features",
            "input": "an assignment to the site before the splice",
        }.get(name, _ASSIGNED),
    )


def _named(value: Any) -> str:
    if isinstance(value, Operand):
        return "a part of a site, or a computed value" if isinstance(value, Value) else "several layers"
    return f"a {type(value).__name__}"
