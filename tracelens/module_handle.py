"""``model.module(path)``: what any module of the model receives and returns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from tracelens.backends.module_sides import shown
from tracelens.backends.replacing import output_site
from tracelens.backends.survey import Leaf, ModuleCall
from tracelens.errors import Blaming, ModuleTensorError, OptionError, ReplacementError, UnknownSiteError
from tracelens.handles import recorder_of
from tracelens.ir.module_sites import INPUT, OUTPUT, Key
from tracelens.ir.windows import StepWindow
from tracelens.location import here
from tracelens.operand import Operand
from tracelens.values import Value

if TYPE_CHECKING:
    from tracelens.backends.anatomy import ModelAnatomy


class ModuleHandle:
    """One module of the model; made by :meth:`tracelens.Model.module`.

    ``.output`` is the tensor that the module returns, ``.output[0]`` or ``.output["logits"]`` one of several;
    ``.input`` is the first positional argument that is a tensor; ``.inputs[0]`` and ``.inputs["hidden_states"]``
    choose. They are read and written as named sites are.
    """

    __slots__ = ("_anatomy", "_number", "_path", "_steps")

    def __init__(
        self, anatomy: ModelAnatomy, path: str, number: int | None = None, steps: StepWindow | None = None
    ) -> None:
        if not isinstance(path, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # users may not be typed
            raise OptionError(
                f"a module is named by its path, not by {path!r}",
                at=here(),
                instead='model.module("model.layers.3.mlp.down_proj")',
            )
        with Blaming(here()):
            known = anatomy.sides.path_of(path)
        for name, value in (("_anatomy", anatomy), ("_path", known), ("_number", number), ("_steps", steps)):
            object.__setattr__(self, name, value)

    if TYPE_CHECKING:
        _anatomy: ModelAnatomy
        _path: str
        _number: int | None
        _steps: StepWindow | None

    def call(self, number: int) -> ModuleHandle:
        """One of several calls of the module in a forward pass, counted from 0."""
        if isinstance(number, bool) or not isinstance(number, int):  # pyright: ignore[reportUnnecessaryIsInstance]  # users may not be typed
            raise OptionError(
                f"a call of a module is chosen by its number, not by {number!r}",
                at=here(),
                instead=f"model.module({self._path!r}).call(0) is the first",
            )
        handle = ModuleHandle(self._anatomy, self._path, number, self._steps)
        handle._call()
        return handle

    def _call(self) -> ModuleCall:
        with Blaming(here()):
            return self._anatomy.sides.call_of(self._path, self._number)

    # --- tensors -------------------------------------------------------------------------------------------------

    @property
    def output(self) -> Any:
        """The tensor that the module returns; of a tuple or dict, what is indexed: ``.output[0]``."""
        return self._side(OUTPUT, self._call().outputs).at(())

    @output.setter
    def output(self, new: Any) -> None:
        self._side(OUTPUT, self._call().outputs).write((), new)

    @property
    def inputs(self) -> Any:
        """The tensors among the arguments, by position or by name: ``.inputs[0]``, ``.inputs["hidden_states"]``."""
        return self._side(INPUT, self._call().inputs).at(())

    @property
    def input(self) -> Any:
        """The first positional argument that is a tensor."""
        return self._side(INPUT, self._call().inputs).at(self._first())

    @input.setter
    def input(self, new: Any) -> None:
        self._side(INPUT, self._call().inputs).write(self._first(), new)

    def replace(self, new: Any) -> None:
        """Does not run the module, and goes on with ``new`` in place of the tensor that it would have returned.

        ``new`` has to be there before the module would run, and follows the rules of a write. Nothing inside of the
        module can be read or written then. Raises :class:`~tracelens.errors.ReplacementError` for modules that return
        more than one tensor, :class:`~tracelens.errors.CausalityError` for values that come later, and
        :class:`~tracelens.errors.SkippedSiteError` where the block has looked inside.
        """
        if self._steps is not None:
            raise ReplacementError(
                "a module is left out in every step of a generation, or in none",
                at=here(),
                instead=f"model.module({self._path!r}).replace(...); or a write of its output in these steps",
            )
        call = self._call()
        recorder = recorder_of(self._anatomy, f"{self!r}.replace")
        with Blaming(here()):
            site = output_site(self._anatomy, call)
            begins = self._anatomy.begins(site)
        recorder.replace(site, begins, new)

    def _side(self, side: str, leaves: Mapping[Key, Leaf]) -> _Side:
        return _Side(self, side, leaves)

    def _first(self) -> Key:
        leaves = self._call().inputs
        first = next((key for key in leaves if len(key) == 1 and isinstance(key[0], int)), None)
        if first is None:
            choices = shown(INPUT, leaves)
            raise ModuleTensorError(
                f"{self!r} is given no tensor by position, so it has no .input",
                at=here(),
                instead=f"one of its arguments: {choices}" if choices else "its .output",
            )
        return first

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        if name == "skip":
            named = self._anatomy.named_at(self._path, OUTPUT)
            layer = next((site.layer for site in named if site.name == "resid_post"), None)
            raise UnknownSiteError(
                f"{self!r} has no 'skip': only a whole layer can return what it received",
                at=here(),
                instead=f"model.layers[{layer}].skip()"
                if layer is not None
                else "what goes on in place of the output: .replace(value)",
            )
        if "hook" in name:
            raise UnknownSiteError(
                f"{self!r} has no {name!r}: hooks are set by tracelens, for the length of a run",
                at=here(),
                instead=f"{self!r}.output.save() to read, {self!r}.output = new to change; "
                f"model.hf.get_submodule({self._path!r}) is the module itself",
            )
        raise UnknownSiteError(
            f"{self!r} has no {name!r}",
            at=here(),
            instead=".input, .inputs, .output, .call(i), .replace(value); for a parameter "
            f"model.param({self._path + '.' + name!r})",
        )

    def __setattr__(self, name: str, new: Any) -> None:
        if name not in ("input", "output"):
            raise OptionError(
                f"{self!r} has no {name!r} that could be assigned to",
                at=here(),
                instead=".output = value, .input = value, .inputs[0] = value",
            )
        object.__setattr__(self, name, new)

    def __repr__(self) -> str:
        which = "" if self._number is None else f".call({self._number})"
        return f"model.module({self._path!r}){which}"


class _Side:
    """The tensors on one side of a call."""

    def __init__(self, handle: ModuleHandle, side: str, leaves: Mapping[Key, Leaf]) -> None:
        self.handle = handle
        self.side = side
        self.leaves = leaves

    def at(self, key: Key) -> Any:
        """The value at this place, or where several tensors lie, what chooses one."""
        leaf = self.leaves.get(key)
        if leaf is None:
            if not any(known[: len(key)] == key for known in self.leaves):
                raise self.no_tensor(key)
            return _Choice(self, key)
        return Value.of_site(
            recorder_of(self.handle._anatomy, self.spelled(key)), leaf.site.during(self.handle._steps)
        )

    def write(self, key: Key, new: Any) -> None:
        """Replaces the tensor at this place."""
        leaf = self.leaves.get(key)
        if leaf is None:
            raise (
                self.several(key)
                if any(known[: len(key)] == key for known in self.leaves)
                else self.no_tensor(key)
            )
        recorder_of(self.handle._anatomy, self.spelled(key)).write(leaf.site.during(self.handle._steps), new)

    def extended(self, key: Key, part: Any) -> Key:
        """The place one step further in; the names of arguments and their positions are the same thing."""
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise ModuleTensorError(
                f"{self.spelled(key)}[{part!r}] does not name a tensor: places are numbers and names",
                at=here(),
                instead=self.choices(key),
            )
        here_ = {
            known[len(key)] for known in self.leaves if known[: len(key)] == key and len(known) > len(key)
        }
        if part not in here_ and self.side == INPUT and not key:
            other = self._other_name(part)
            if other in here_:
                return (other,)
        fields = self.handle._call().fields.get((self.side, key), ())
        if isinstance(part, str) and part in fields and part not in here_:
            part = fields.index(part)
        return (*key, part)

    def _is_argument(self, part: int | str) -> bool:
        """Does the module's forward take an argument of this name, or at this position?"""
        if isinstance(part, int):
            return 0 <= part < len(self.handle._call().names)
        try:
            return (
                part in inspect.signature(self.handle._anatomy.module(self.handle._path).forward).parameters
            )
        except (TypeError, ValueError):
            return False

    def _other_name(self, part: int | str) -> int | str | None:
        """An argument's position for its name, and its name for its position."""
        names = self.handle._call().names
        if isinstance(part, str):
            return names.index(part) if part in names else None
        return names[part] if 0 <= part < len(names) else None

    def spelled(self, key: Key) -> str:
        word = "inputs" if self.side == INPUT else "output"
        return f"{self.handle!r}.{word}{''.join(f'[{part!r}]' for part in key)}"

    def choices(self, key: Key = ()) -> str:
        found = {known: leaf for known, leaf in self.leaves.items() if known[: len(key)] == key}
        return shown(self.side, found or self.leaves) or "another module: there is no tensor here"

    def no_tensor(self, key: Key) -> ModuleTensorError:
        given = self.side == INPUT and len(key) == 1 and self._is_argument(key[0])
        return ModuleTensorError(
            f"there is no tensor at {self.spelled(key)}"
            + (": that argument is no tensor here, so that nothing can be read or written" if given else ""),
            at=here(),
            instead=self.choices(),
        )

    def several(self, key: Key) -> ModuleTensorError:
        return ModuleTensorError(
            f"{self.spelled(key)} is not one tensor, so it has to be said which is meant",
            at=here(),
            instead=self.choices(key),
        )


class _Choice(Operand):
    """What stands for several tensors: an index chooses one, and anything else is refused."""

    __slots__ = ("_key", "_side")

    def __init__(self, side: _Side, key: Key) -> None:
        self._side = side
        self._key = key

    def __getitem__(self, part: Any) -> Any:
        return self._side.at(self._side.extended(self._key, part))

    def __setitem__(self, part: Any, new: Any) -> None:
        self._side.write(self._side.extended(self._key, part), new)

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("__", "_repr_", "_ipython_")):
            raise AttributeError(name)
        self._refuse()

    def save(self, *_: Any, **__: Any) -> NoReturn:
        """Refused like the rest; said here because other libraries give every object a method of this name."""
        self._refuse()

    def _is_recording(self) -> bool:
        return True

    def _result(self) -> NoReturn:
        self._refuse()

    def _apply(self, name: str, args: object, kwargs: object) -> NoReturn:
        self._refuse()

    def _updated(self, result: Any) -> NoReturn:
        self._refuse()

    def _branch(self, what: str, instead: str) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise self._side.several(self._key)

    def __repr__(self) -> str:
        return f"<{self._side.spelled(self._key)}: {self._side.choices(self._key)}>"
