"""The text form of a graph: one line per operation, stable, and parsed back by :mod:`tracelens.ir.parse`.

::

    graph {
      %0 = read layers.3.resid_post@0 : f32[B,P,576]
      %1 = const #0 : f32[576]
      %2 = call torch.add(%0, %1) : f32[B,P,576]
      write layers.3.resid_post@1 <- %2
      save "h" <- %2
    }
"""

from __future__ import annotations

import json
from types import EllipsisType

from tracelens.ir.dims import Sym, bounds_text
from tracelens.ir.graph import Graph
from tracelens.ir.layout import Layout, Partial, Replicate, Shard
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
    OwnTokens,
    Param,
    PromptRow,
    PromptTokens,
    Read,
    Redistribute,
    Ref,
    Save,
    Slice,
    Special,
    TokenAt,
    TokenChars,
    TokenId,
    TokenList,
    TokenSelector,
    TokenSlice,
    TokenText,
    Transfer,
    Write,
)
from tracelens.ir.sites import Site
from tracelens.ir.types import DType, TensorType


def text(graph: Graph) -> str:
    """The whole graph."""
    pins = "".join(f" pin({pin.symbol}={pin.size} by {pin.op})" for pin in graph.pins)
    return "\n".join([f"graph{pins} {{", *("  " + op_text(op) for op in graph.ops), "}"])


def op_text(op: Op) -> str:
    """One operation."""
    match op:
        case Const():
            name = f" {_quote(op.name)}" if op.name is not None else ""
            return f"%{op.out} = const #{op.index}{name} : {op.type}"
        case Param():
            return f"%{op.out} = param {_quote(op.path)} : {op.type}"
        case Read():
            return f"%{op.out} = read {op.site.text}@{op.version}{_steps(op.site)} : {op.type}"
        case Call():
            parts = [arg_text(arg) for arg in op.args] + [
                f"{name}={arg_text(arg)}" for name, arg in op.kwargs
            ]
            return f"{_outs(op.outs)} = call {op.function}({', '.join(parts)}) : {_types(op.types)}"
        case Index():
            return f"%{op.out} = index %{op.base}[{index_text(op.index)}] : {op.type}"
        case IndexPut():
            return f"%{op.out} = put %{op.base}[{index_text(op.index)}] <- {arg_text(op.value)} : {op.type}"
        case Write():
            instead = "" if op.instead is None else f" instead of {op.instead.text}"
            return f"write {op.site.text}@{op.version}{_steps(op.site)} <- {arg_text(op.value)}{instead}"
        case Save():
            values = ", ".join(f"%{value}" for value in op.values)
            return f"save {_quote(op.name)} <- {f'stack({values})' if op.stacked else values}{_options(op)}"
        case Apply():
            return f"{_outs(op.outs)} = apply #{op.index}({', '.join(map(arg_text, op.args))}) : {_types(op.types)}"
        case Grad():
            return f"{_outs(op.outs)} = grad %{op.loss} wrt {_outs(op.wrt)} : {_types(op.types)}"
        case Transfer():
            return f"%{op.out} = transfer %{op.value} from place {op.source} to place {op.target} : {op.type}"
        case Redistribute():
            return f"%{op.out} = {redistribution(op.source, op.target)} %{op.value} : {op.type}"
        case Hold():
            if op.part is None:
                return f"hold #{op.index} <- %{op.value} at place {op.place} for later steps"
            return f"hold #{op.index}[{op.part}] <- %{op.value} at place {op.place}, behind earlier positions"


def redistribution(source: Layout, target: Layout) -> str:
    """What is done to a value's layout, as a verb."""
    match source, target:
        case Shard(), Replicate():
            return f"gather (axis {source.dim})"
        case Partial(), Replicate():
            return f"reduce ({source.joined.value})"
        case Replicate(), Shard():
            return f"own part (axis {target.dim})"
        case Replicate(), Partial():
            return "once"
        case _:
            return f"redistribute ({source} to {target})"


def member_text(op: Save, part: int) -> str:
    """The save of one member of a stack."""
    return f"save {_quote(op.name)}[{part}] <- %{op.values[part]}{_options(op)}"


def _options(op: Save) -> str:
    options = " device=keep" if op.keep is Keep.DEVICE else ""
    options += f" dtype={op.dtype.short}" if op.dtype else ""
    return options + (f" to={_quote(op.to)}" if op.to is not None else "")


def arg_text(arg: Arg) -> str:
    """One argument of an operation."""
    match arg:
        case Ref():
            return f"%{arg.id}"
        case bool() | None | int() | float():
            return repr(arg)
        case complex():
            return f"complex({arg.real!r}, {arg.imag!r})"
        case str():
            return _quote(arg)
        case DType():
            return f"dtype({arg.short})"
        case Special():
            return arg.value
        case EllipsisType():
            return "..."
        case Sym():
            return f"<{arg}>"
        case Slice():
            return f"slice({arg.start}, {arg.stop}, {arg.step})"
        case tuple():
            return "(" + "".join(arg_text(part) + ", " for part in arg).rstrip(" ") + ")"


def index_text(index: tuple[IndexItem, ...]) -> str:
    """The entries of an index, as Python would write them."""
    return ", ".join(_item_text(item) for item in index)


def _item_text(item: IndexItem) -> str:
    match item:
        case None:
            return "None"
        case int():
            return str(item)
        case Ref():
            return f"%{item.id}"
        case Slice():
            return bounds_text(item.start, item.stop, item.step)
        case PromptRow():
            return f"prompt({item.row})"
        case PromptTokens():
            return f"prompt({item.row}{_given('length', item.length)})"
        case OwnTokens():
            own = _given("prompt", item.row) + _given("length", item.length)
            return f"tok({_selector_text(item.selector)}{own})"
        case _:
            return f"tok({_selector_text(item)})"


def _selector_text(selector: TokenSelector) -> str:
    match selector:
        case TokenAt():
            return str(selector.index)
        case TokenSlice():
            return bounds_text(selector.start, selector.stop, selector.step) + _given("width", selector.width)
        case TokenList():
            return f"[{', '.join(map(str, selector.indices))}]"
        case TokenText():
            pick = "" if selector.pick is None else f", {selector.pick}"
            return f"{_quote(selector.text)}{pick}{_given('width', selector.width)}"
        case TokenId():
            return f"id {selector.id}"
        case TokenChars():
            return f"chars {selector.start}:{selector.stop}{_given('width', selector.width)}"


def _given(name: str, number: int | None) -> str:
    return "" if number is None else f" {name}={number}"


def _steps(site: Site) -> str:
    return "" if site.steps is None else f" steps({site.steps})"


def _quote(string: str) -> str:
    return json.dumps(string)


def _outs(outs: tuple[int, ...]) -> str:
    return ", ".join(f"%{out}" for out in outs)


def _types(types: tuple[TensorType, ...]) -> str:
    return ", ".join(map(str, types))
