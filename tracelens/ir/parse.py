"""Reads the text form of a graph back: ``parse(text(graph)) == graph``."""

from __future__ import annotations

import math
import re

from tracelens.errors import GraphSyntaxError
from tracelens.ir import dims
from tracelens.ir.graph import Graph, Pin
from tracelens.ir.line import Line
from tracelens.ir.module_sites import INPUT, OUTPUT, ModuleSite, module_site
from tracelens.ir.ops import (
    Apply,
    Arg,
    Call,
    Const,
    Grad,
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
    Ref,
    Save,
    Scalar,
    Slice,
    Special,
    TokenAt,
    TokenChars,
    TokenId,
    TokenList,
    TokenSelector,
    TokenSlice,
    TokenText,
    Write,
)
from tracelens.ir.sites import Site, parse_site
from tracelens.ir.types import DTYPE_BY_SHORT, DType, TensorType, parse_type
from tracelens.ir.windows import StepWindow, parse_window


def parse(source: str) -> Graph:
    """The graph that ``source`` describes; :class:`GraphSyntaxError` names the first line that is wrong."""
    lines = [Line(line, number) for number, line in enumerate(source.splitlines(), 1) if line.strip()]
    if len(lines) < 2:
        raise GraphSyntaxError("the text is not a graph: it has no lines between 'graph {' and '}'")
    pins = _header(lines[0])
    if lines[-1].tokens != ["}"]:
        raise lines[-1].error("expected '}'")
    return Graph(tuple(_op(line) for line in lines[1:-1]), pins)


def _header(line: Line) -> tuple[Pin, ...]:
    line.take("graph")
    pins: list[Pin] = []
    while line.accept("pin"):
        line.take("(")
        symbol = line.take()
        line.take("=")
        size = line.integer()
        line.take("by")
        pins.append(Pin(symbol, size, line.integer()))
        line.take(")")
    line.take("{")
    return tuple(pins)


def _op(line: Line) -> Op:
    if line.next == "write":
        line.take()
        site, version = _versioned(line)
        line.take("<-")
        value = _scalar_or_ref(line)
        instead = None
        if line.accept("instead"):
            line.take("of")
            instead = _module_site(line)
        return _end(line, Write(site, version, value, instead))
    if line.next == "save":
        line.take()
        return _end(line, _save(line))
    outs = [line.value()]
    while line.accept(","):
        outs.append(line.value())
    line.take("=")
    head = line.take()
    if head == "call":
        function = line.take()
        args, kwargs = _arguments(line)
        return _end(line, Call(tuple(outs), _types(line), function, args, kwargs))
    if head == "apply":
        entry = line.entry()
        args, kwargs = _arguments(line)
        if kwargs:
            raise line.error("apply has no keyword arguments")
        return _end(line, Apply(tuple(outs), _types(line), entry, args))
    if head == "grad":
        return _end(line, _grad(line, tuple(outs)))
    if len(outs) != 1:
        raise line.error(f"{head} has one result")
    (out,) = outs
    match head:
        case "const":
            entry = line.entry()
            name = line.string() if line.next.startswith('"') else None
            op: Op = Const(out, _type(line), entry, name)
        case "param":
            path = line.string()
            op = Param(out, _type(line), path)
        case "read":
            site, version = _versioned(line)
            op = Read(out, _type(line), site, version)
        case "index":
            base, index = line.value(), _index(line)
            op = Index(out, _type(line), base, index)
        case "put":
            base, index = line.value(), _index(line)
            line.take("<-")
            value = _scalar_or_ref(line)
            op = IndexPut(out, _type(line), base, index, value)
        case _:
            raise line.error(f"unknown operation {head!r}")
    return _end(line, op)


def _end(line: Line, op: Op) -> Op:
    if line.next:
        raise line.error(f"unexpected {line.next!r}")
    return op


def _save(line: Line) -> Save:
    name = line.string()
    line.take("<-")
    stacked = line.accept("stack")
    if stacked:
        line.take("(")
    values = [line.value()]
    while line.accept(","):
        values.append(line.value())
    if stacked:
        line.take(")")
    keep, dtype, to = Keep.CPU, None, None
    while line.next:
        option = line.take()
        line.take("=")
        if option == "device":
            line.take("keep")
            keep = Keep.DEVICE
        elif option == "dtype":
            dtype = _dtype(line)
        elif option == "to":
            to = line.string()
        else:
            raise line.error(f"unknown option {option!r}")
    return Save(name, tuple(values), stacked, keep, dtype, to)


def _grad(line: Line, outs: tuple[int, ...]) -> Grad:
    loss = line.value()
    line.take("wrt")
    wrt = [line.value()]
    while line.accept(","):
        wrt.append(line.value())
    types = _types(line)
    if not len(outs) == len(wrt) == len(types):
        raise line.error(f"{len(outs)} results and {len(types)} types for {len(wrt)} sites")
    return Grad(outs, types, loss, tuple(wrt))


def _versioned(line: Line) -> tuple[Site, int]:
    site = _module_site(line) if line.next == "module" else _named_site(line)
    line.take("@")
    version = line.integer()
    return (site.during(_window(line)) if line.accept("steps") else site), version


def _window(line: Line) -> StepWindow:
    """``(5:10)``, ``(1:)``"""
    line.take("(")
    text = f"{line.integer()}{line.take(':')}"
    text += "" if line.next == ")" else str(line.integer())
    line.take(")")
    try:
        return parse_window(text)
    except ValueError as error:
        raise line.error(str(error)) from None


def _named_site(line: Line) -> Site:
    try:
        return parse_site(line.take())
    except ValueError as error:
        raise line.error(str(error)) from None


def _module_site(line: Line) -> ModuleSite:
    """``module("lm_head").call(1).inputs[0] after final_norm+2``."""
    line.take("module")
    line.take("(")
    path = line.string()
    line.take(")")
    line.take(".")
    call = None
    if line.accept("call"):
        line.take("(")
        call = line.integer()
        line.take(")")
        line.take(".")
    side = line.take()
    key: list[int | str] = []
    while line.accept("["):
        key.append(line.string() if line.next.startswith('"') else line.integer())
        line.take("]")
    if side not in (INPUT, OUTPUT, "inputs") or (side == "inputs") != (bool(key) and side != OUTPUT):
        raise line.error(f"{side!r} is no side of a module")
    amid = line.accept("amid")
    if not amid:
        line.take("after")
    after = None if line.accept("start") else _named_site(line)
    line.take("+")
    side = OUTPUT if side == OUTPUT else INPUT
    return module_site(path, side, tuple(key), call, after=after, number=line.integer(), amid=amid)


def _type(line: Line) -> TensorType:
    return _types(line, single=True)[0]


def _types(line: Line, *, single: bool = False) -> tuple[TensorType, ...]:
    """Types run to the end of the line; they are cut out of its source, where they are unambiguous."""
    line.take(":")
    line.position = len(line.tokens)
    source = line.source.rpartition(" : ")[2].strip()
    try:
        found = tuple(parse_type(part) for part in re.split(r", ", source))
    except ValueError as error:
        raise line.error(str(error)) from None
    if single and len(found) != 1:
        raise line.error("expected one type")
    return found


def _dtype(line: Line) -> DType:
    word = line.take()
    if word not in DTYPE_BY_SHORT:
        raise line.error(f"unknown dtype {word!r}")
    return DTYPE_BY_SHORT[word]


def _arguments(line: Line) -> tuple[tuple[Arg, ...], tuple[tuple[str, Arg], ...]]:
    line.take("(")
    args: list[Arg] = []
    kwargs: list[tuple[str, Arg]] = []
    while not line.accept(")"):
        following = line.tokens[line.position + 1] if line.position + 1 < len(line.tokens) else ""
        if following == "=":
            name = line.take()
            line.take("=")
            kwargs.append((name, _arg(line)))
        elif kwargs:
            raise line.error("a positional argument follows a keyword")
        else:
            args.append(_arg(line))
        if line.next != ")":
            line.take(",")
    return tuple(args), tuple(kwargs)


def _arg(line: Line) -> Arg:
    token = line.next
    if token == "(":
        line.take()
        parts: list[Arg] = []
        while not line.accept(")"):
            parts.append(_arg(line))
            if line.next != ")":
                line.take(",")
        return tuple(parts)
    if token.startswith("%"):
        return Ref(line.value())
    if token.startswith('"'):
        return line.string()
    if token.startswith("<"):
        line.take()
        try:
            dim = dims.parse(token[1:-1])
        except ValueError as error:
            raise line.error(str(error)) from None
        return dim
    if token == "...":
        line.take()
        return ...
    if token == "dtype":
        line.take()
        line.take("(")
        dtype = _dtype(line)
        line.take(")")
        return dtype
    if token == "slice":
        line.take()
        line.take("(")
        parts = [_arg(line)]
        for _ in range(2):
            line.take(",")
            parts.append(_arg(line))
        line.take(")")
        start, stop, step = (part if part is None or isinstance(part, int) else None for part in parts)
        return Slice(start, stop, step)
    if token == "None":
        line.take()
        return None
    return _scalar(line)


def _scalar_or_ref(line: Line) -> Ref | Scalar:
    return Ref(line.value()) if line.next.startswith("%") else _scalar(line)


def _scalar(line: Line) -> Scalar:
    token = line.take()
    if token == "complex":
        line.take("(")
        real = _float(line, line.take())
        line.take(",")
        imaginary = _float(line, line.take())
        line.take(")")
        return complex(real, imaginary)
    if token in ("True", "False"):
        return token == "True"
    if re.fullmatch(r"-?\d+", token):
        return int(token)
    if token == Special.NEGATIVE_ZERO.value:
        return Special.NEGATIVE_ZERO
    number = _float(line, token)
    return Special.NAN if math.isnan(number) else number


def _float(line: Line, token: str) -> float:
    try:
        return float(token)
    except ValueError:
        raise line.error(f"unreadable argument {token!r}") from None


def _index(line: Line) -> tuple[IndexItem, ...]:
    line.take("[")
    items: list[IndexItem] = []
    while not line.accept("]"):
        items.append(_item(line))
        if line.next != "]":
            line.take(",")
    return tuple(items)


def _item(line: Line) -> IndexItem:
    if line.accept("None"):
        return None
    if line.next.startswith("%"):
        return Ref(line.value())
    if line.accept("tok"):
        line.take("(")
        selector = _selector(line)
        row = _given(line, "prompt")
        item = selector if row is None else OwnTokens(row, _needed(line, "length"), selector)
        line.take(")")
        return item
    if line.accept("prompt"):
        line.take("(")
        row = line.integer()
        length = _given(line, "length")
        line.take(")")
        return PromptRow(row) if length is None else PromptTokens(row, length)
    found = _bounds(line)
    return found if isinstance(found, int) else Slice(*found)


def _selector(line: Line) -> TokenSelector:
    if line.next.startswith('"'):
        text = line.string()
        pick = line.integer() if line.accept(",") else None
        return TokenText(text, pick, _given(line, "width"))
    if line.accept("id"):
        return TokenId(line.integer())
    if line.accept("chars"):
        start = line.integer()
        line.take(":")
        return TokenChars(start, line.integer(), _given(line, "width"))
    if line.accept("["):
        indices: list[int] = []
        while not line.accept("]"):
            indices.append(line.integer())
            if line.next != "]":
                line.take(",")
        return TokenList(tuple(indices))
    found = _bounds(line)
    return TokenAt(found) if isinstance(found, int) else TokenSlice(*found, _given(line, "width"))


def _given(line: Line, name: str) -> int | None:
    """The number in ``width=3``, if it stands there."""
    return _needed(line, name) if line.next == name else None


def _needed(line: Line, name: str) -> int:
    line.take(name)
    line.take("=")
    return line.integer()


def _bounds(line: Line) -> int | tuple[int | None, int | None, int | None]:
    """``3`` or ``1:5:2``."""
    parts: list[int | None] = [None]
    while line.next not in ("]", ",", ")", "width", "prompt", ""):
        if line.accept(":"):
            parts.append(None)
        else:
            parts[-1] = line.integer()
    if len(parts) == 1 and parts[0] is not None:
        return parts[0]
    if len(parts) not in (2, 3):
        raise line.error("unreadable index")
    return (parts[0], parts[1], parts[2] if len(parts) == 3 else None)
