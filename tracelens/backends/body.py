"""Writes the steps of one hook point as one Python function.

A hook runs between two modules of the model, whose code has just filled the processor's caches: there, every Python
call that is not made counts several times. So what can be decided before the run is decided once (which function, where
its operands lie, what is plain data), and the steps become the source of a function whose lines are the torch calls.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch

from tracelens.backends.devices import Devices
from tracelens.backends.differentiate import Gradients
from tracelens.backends.enduring import Enduring, Part
from tracelens.backends.execute import (
    State,
    applied,
    fitted,
    full,
    kept,
    mismatch,
    plain_item,
    plain_number,
    read_parameter,
    rows_axis,
    selector_place,
    sent,
)
from tracelens.backends.selecting import put_tokens, take_tokens
from tracelens.backends.views import Put, Take, TakeSized
from tracelens.ir import dims
from tracelens.ir.infer import resolve, torch_dtype
from tracelens.ir.layout import WHOLE_EVERYWHERE, OwnType, Partial
from tracelens.ir.ops import (
    Apply,
    Arg,
    Call,
    Const,
    Grad,
    Hold,
    Index,
    IndexItem,
    IndexPut,
    Keep,
    Op,
    Param,
    PromptRow,
    PromptTokens,
    Read,
    Redistribute,
    Ref,
    Save,
    Slice,
    Special,
    Transfer,
    Write,
    results,
)
from tracelens.ir.rules_lens import KNOWS_RANK
from tracelens.ir.sites import TEXT
from tracelens.ir.types import DType, TensorType
from tracelens.own_part import own_picks
from tracelens.program import Side, Step

# A name inside the package, so that no line of a generated function is taken for the user's.
_FILE = str(Path(__file__).with_name("<hook>"))


@dataclass(frozen=True, slots=True)
class Body:
    """What is done at one hook point: ``run(state, tensor)`` gives the tensor that goes on."""

    run: Callable[[State, Any], Any]
    source: str
    numbers: tuple[int, ...]  # of the operation that each source line belongs to

    def number(self, error: BaseException) -> int:
        """The number, in the planned graph, of the operation in which ``error`` was raised."""
        return self.numbers[self.line(error) - 1]

    def line(self, error: BaseException) -> int:
        """The line of the source in which ``error`` was raised."""
        run = self.run.body.run if isinstance(self.run, Enduring) else self.run
        code = run.__code__ if isinstance(run, FunctionType) else None
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code is not code:
            trace = trace.tb_next
        return trace.tb_lineno if trace is not None else len(self.numbers)


@lru_cache(maxsize=4096)
def _compiled(source: str) -> CodeType:
    """Layers with the same steps have the same source: it is compiled once."""
    module = compile(source, _FILE, "exec")
    return next(const for const in module.co_consts if isinstance(const, CodeType))


def body(
    steps: Sequence[Step],
    types: Mapping[int, TensorType],
    fresh: frozenset[int],
    shapes: dict[TensorType | OwnType, int],
    gradients: Mapping[int, Gradients],
    devices: Devices,
    view: tuple[Take | TakeSized, Put] | None = None,
    cuts: bool = False,
    sized: bool = False,
) -> Body:
    """The function for some steps.

    ``devices``: where values are. ``fresh``: the values that no one else holds, so that a write need not copy them.
    ``shapes`` numbers the types whose sizes the run has to know, in ``state.shapes``; types that are new to it are
    added. ``gradients``: what takes the gradients of the program, by the numbers of the operations. ``view`` finds the
    site in the module's tensor, and makes a new one of it; ``cuts``: there is more in that tensor; ``sized``: it has to
    know the sizes of the pass.
    """
    writer = _Writer(steps, types, fresh, shapes, gradients, devices)
    if cuts:
        writer.views |= {step.op.out for step in steps if isinstance(step.op, Read)}
    if view is not None:
        writer.line("whole = tensor")
        writer.line(f"tensor = {writer.name(view[0])}(tensor{', state.sizes' if sized else ''})")
    for step in steps:
        writer.write(step)
    if view is not None and any(isinstance(step.op, Write) for step in steps):
        writer.line(f"return {writer.name(view[1])}(whole, tensor)")
    else:
        writer.line("return tensor")
    source = "\n".join(writer.lines) + "\n"
    found = Body(FunctionType(_compiled(source), writer.names), source, tuple(writer.numbers))
    return found if devices.mesh is None else replace(found, run=Enduring(found, writer.parts))


class _Writer:
    """The source under construction, and the things that it names."""

    def __init__(
        self,
        steps: Sequence[Step],
        types: Mapping[int, TensorType],
        fresh: frozenset[int],
        shapes: dict[TensorType | OwnType, int],
        gradients: Mapping[int, Gradients],
        devices: Devices,
    ) -> None:
        self.types = types
        self.devices = devices
        self.views = devices.views
        self.fresh = fresh
        self.shapes = shapes
        self.gradients = gradients
        self.lines = ["def body(state, tensor):"]
        self.number = steps[0].number if steps else 0
        self.numbers = [self.number]
        # Builtins, because what torch calls may import something, which looks for them here.
        self.names: dict[str, Any] = {"__builtins__": builtins, "Tensor": torch.Tensor}
        self._by_identity: dict[int, str] = {}
        self._variables: dict[int, str] = {}
        made = {value for step in steps for value, _ in results(step.op)}
        # Values that do not outlive this hook stay in its own variables.
        self._here = made & {value for step in steps for value in step.frees}
        self.parts: list[Part] = []
        """What other ranks wait for."""
        self.line("values = state.values")

    def line(self, text: str) -> None:
        self.lines.append("    " + text)
        self.numbers.append(self.number)

    def _part(self, take: Callable[[State], object]) -> None:
        """Says that others wait for the line that comes next, and how a rank that has failed takes part in it."""
        self.parts.append(Part(len(self.lines) + 1, take))

    def name(self, thing: Any) -> str:
        """The name under which the function finds ``thing``."""
        known = self._by_identity.get(id(thing))
        if known is None:
            known = self._by_identity[id(thing)] = f"c{len(self._by_identity)}"
            self.names[known] = thing
        return known

    def _variable(self, value: int) -> str:
        """The function's own variable for a new value."""
        variable = self._variables[value] = f"a{len(self._variables)}"
        return variable

    def _keep(self, value: int) -> None:
        """Puts a new value among the run's, if another hook needs it."""
        if value not in self._here:
            self.line(f"values[{value}] = {self._variables[value]}")

    def _new(self, value: int, expression: str) -> None:
        self.line(f"{self._variable(value)} = {expression}")
        self._keep(value)

    def ref(self, value: int) -> str:
        return self._variables.get(value) or f"values[{value}]"

    def arg(self, arg: Arg | IndexItem) -> str:
        """The expression for an argument."""
        match arg:
            case Ref():
                return self.ref(arg.id)
            case tuple():
                return "(" + "".join(self.arg(part) + ", " for part in arg) + ")"
            case dims.Sym():
                return f"{self.name(dims.evaluate)}({self.name(arg)}, state.sizes)"
            case DType():
                return self.name(torch_dtype(arg))
            case Special():
                return self.name(arg.number)
            case Slice() | PromptRow() | PromptTokens():
                return self.name(plain_item(arg))
            case bool() | None:
                return repr(arg)
            case _:
                return self.name(arg)

    def write(self, step: Step) -> None:
        """The lines of one step."""
        self.number = step.number
        match step.op:
            case Save():
                for part in step.parts:
                    self._save(step.op, part)
            case Grad() if step.side is Side.ARRIVE:
                pass  # autograd has brought them
            case Transfer() if self.devices.mesh is not None:
                self._travel(step.op, step.side)
            case _:
                self._operation(step.op)
        for value in step.frees:
            if value in self._variables:
                self.line(f"{self._variables[value]} = None")
            if value not in self._here:
                self.line(f"values[{value}] = None")

    def _operation(self, op: Op) -> None:
        match op:
            case Const():
                place = self.devices.home[op.out]
                self._new(op.out, f"state.constants[{self.name((op.index, place))}]")
            case Transfer():
                device = self.devices.places[op.target]
                self._new(
                    op.out,
                    f"{self.name(sent)}(state, {self.ref(op.value)}, {self.name(device)})",
                )
            case Redistribute():
                self._redistribute(op)
            case Hold() if op.part is not None:
                key = self.name((op.index, op.place))
                self.line(f"state.deferred[{key}][{op.part}].copy_({self.ref(op.value)})")
            case Hold():
                # A copy: the model may go on to change what lies in its own memory.
                key = self.name((op.index, op.place))
                self.line(f"state.constants[{key}] = {self.ref(op.value)}.clone()")
            case Param():
                self._new(op.out, f"{self.name(read_parameter)}(state, {self.name(op.path)})")
            case Read():
                self._read(op)
            case Call():
                self._call(op)
            case Index():
                self._index(op)
            case IndexPut():
                self._put(op)
            case Write():
                self._write(op)
            case Apply():
                given = "".join(self.arg(arg) + ", " for arg in op.args)
                given_types = [self.types[arg.id] if isinstance(arg, Ref) else None for arg in op.args]
                self._several(op.outs, f"{self.name(applied(op, given_types))}(state, ({given}))")
            case Grad():
                wrt = "".join(self.ref(value) + ", " for value in op.wrt)
                gradients = self.gradients[self.number]
                if mesh := self.devices.mesh:
                    # Autograd communicates on its own; nobody goes in without all others.
                    gradients = partial(mesh.together, gradients)
                    self._part(mesh.apart)
                self._several(op.outs, f"{self.name(gradients)}({self.ref(op.loss)}, ({wrt}))")

    def _save(self, op: Save, part: int) -> None:
        value = op.values[part]
        saved = self.ref(value)
        if self.devices.gathers:
            self.line(f"state.into[{self.name(op.name)}][{part}].copy_({saved})")
            return
        if op.stacked and op.keep is Keep.DEVICE:
            self.line(f"state.put({self.name(op)}, {self.name(part)}, {saved})")
            return
        if op.dtype is not None or value in self.views:
            dtype = None if op.dtype is None else torch_dtype(op.dtype)
            self.line(f"saved = {self.name(kept)}({saved}, {self.name(dtype)})")
            saved = "saved"
        # With its version, by which changes made after the save are found.
        member = f"({saved}, {saved}._version)"
        name = self.name(op.name)
        if len(op.values) == 1:
            self.line(f"state.saved[{name}] = [{member}]")
        else:
            members = f"state.saved.setdefault({name}, [None] * {len(op.values)})"
            self.line(f"{members}[{self.name(part)}] = {member}")
        if departing := self.devices.departing.get((self.number, part)):
            self.line(f"state.depart(*{self.name(departing)})")

    def _travel(self, op: Transfer, side: Side) -> None:
        """One side of a transfer between places that processes of their own have."""
        mesh = self.devices.mesh
        assert mesh is not None
        assert mesh.pipeline is not None
        pipeline = mesh.pipeline
        own = self.devices.local(op.type, self.devices.layouts.get(op.out, WHOLE_EVERYWHERE))
        if side is Side.SEND:
            self._part(lambda state: pipeline.send(mesh.zeros(own, state.sizes), op.target))
            self.line(f"{self.name(pipeline.send)}({self.ref(op.value)}, {op.target})")
            return
        there = self.devices.places[op.target]
        dtype = torch_dtype(own.dtype)
        self._part(lambda state: pipeline.receive(own.sizes(state.sizes), dtype, op.source, there))
        what = f"{self.name(own.sizes)}(state.sizes), {self.name(dtype)}"
        self._new(op.out, f"{self.name(pipeline.receive)}({what}, {op.source}, {self.name(there)})")

    def _redistribute(self, op: Redistribute) -> None:
        mesh = self.devices.mesh
        assert mesh is not None
        own = self.devices.local(op.type, op.source)

        def take(state: State) -> None:
            whole = op.type.sizes(state.sizes)
            mesh.redistributed(mesh.zeros(own, state.sizes), whole, op.source, op.target)

        self._part(take)
        sizes = f"{self.name(op.type.sizes)}(state.sizes)"
        layouts = f"{self.name(op.source)}, {self.name(op.target)}"
        self._new(op.out, f"{self.name(mesh.redistributed)}({self.ref(op.value)}, {sizes}, {layouts})")

    def _read(self, op: Read) -> None:
        own = self.devices.local(op.type, self.devices.layouts.get(op.out, WHOLE_EVERYWHERE))
        shape = self.shapes.setdefault(own, len(self.shapes))
        dtype = torch_dtype(op.type.dtype)
        if op.site.kind.scope in TEXT:
            self.line(f"tensor = state.inputs[{self.name(op.site.name)}]")
        self.line(f"if tensor.shape != state.shapes[{shape}] or tensor.dtype is not {self.name(dtype)}:")
        self.line(f"    raise {self.name(mismatch)}(state, tensor, {self.name(op)})")
        self._new(op.out, "tensor")

    def _call(self, op: Call) -> None:
        mesh, layouts = self.devices.mesh, self.devices.layouts
        if mesh is not None and (picks := own_picks(op, layouts, self.types, mesh.ranks, mesh.rank)):
            self._new(op.outs[0], f"{self.name(picks)}({self.ref(picks.base)}, {self.ref(picks.index)})")
            return
        args = [self.arg(arg) for arg in op.args] + [f"{key}={self.arg(arg)}" for key, arg in op.kwargs]
        if op.function in KNOWS_RANK and mesh is not None:
            args.append(f"rank={mesh.rank}")
        call = f"{self.name(resolve(op.function))}({', '.join(args)})"
        if len(op.outs) != 1:
            self._several(op.outs, call)
            return
        out = op.outs[0]
        variable = self._variable(out)
        self.line(f"{variable} = {call}")
        # Functions such as split give a tuple even of one.
        self.line(f"if not isinstance({variable}, Tensor): ({variable},) = {variable}")
        self._keep(out)

    def _several(self, outs: Sequence[int], call: str) -> None:
        self.line(f"[{', '.join([self._variable(out) for out in outs])}] = {call}")
        for out in outs:
            self._keep(out)

    def _subscript(self, index: Sequence[IndexItem]) -> str:
        if not any(isinstance(item, Ref) for item in index):
            return self.name(tuple(plain_item(item) for item in index))
        return self._subscript_items(index)

    def _subscript_items(self, index: Sequence[IndexItem]) -> str:
        return "".join(self.arg(item) + ", " for item in index)

    def _index(self, op: Index) -> None:
        base = self.ref(op.base)
        own = self.devices.own_part(op, self.types)
        if own is not None:
            self._new(op.out, f"{self.name(own)}.take({base}, ({self._subscript_items(op.index)}))")
            return
        place = selector_place(op.index)
        if place is None:
            self._new(op.out, f"{base}[{self._subscript(op.index)}]")
            return
        batch = rows_axis(op.index[place], self.types[op.base])
        selected = f"state.select({self.name(op.index[place])})"
        self._new(op.out, f"{self.name(take_tokens)}({base}, {selected}, {batch}, {place})")

    def _put(self, op: IndexPut) -> None:
        value = self.arg(op.value)
        if isinstance(op.value, Ref) and self.types[op.value.id].dtype is not self.types[op.base].dtype:
            value += f".to({self.ref(op.base)}.dtype)"  # torch casts for slices alone
        own = self.devices.own_part(op, self.types)
        if own is not None:
            items = self._subscript_items(op.index)
            self._new(op.out, f"{self.name(own)}.put({self.ref(op.base)}, ({items}), {value})")
            return
        place = selector_place(op.index)
        subscript = self._subscript(op.index) if place is None else ""
        self._new(op.out, f"{self.ref(op.base)}.clone()")
        new = self.ref(op.out)
        if place is None:
            self.line(f"{new}[{subscript}] = {value}")
            return
        batch = rows_axis(op.index[place], self.types[op.base])
        selected = f"state.select({self.name(op.index[place])})"
        self.line(f"{self.name(put_tokens)}({new}, {selected}, {batch}, {place}, {value})")

    def _write(self, op: Write) -> None:
        if not isinstance(op.value, Ref):
            number = plain_number(op.value)
            mesh = self.devices.mesh
            if mesh is not None and not mesh.leads and isinstance(self.devices.layout_of(op.site), Partial):
                number = 0  # the first rank's is added to it
            self.line(f"tensor = {self.name(full)}(tensor, {self.name(number)})")
            return
        new = self.ref(op.value.id)
        fit = f"{self.name(fitted)}({new}, tensor)"
        if op.value.id in self.fresh:
            self.line(
                f"tensor = {new} if {new}.dtype is tensor.dtype and {new}.shape == tensor.shape else {fit}"
            )
        else:
            self.line(f"tensor = {fit}")
