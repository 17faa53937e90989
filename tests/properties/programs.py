"""Blocks as data: a small list of statements, with three meanings that have to agree.

:func:`source` writes a block as Python text; :func:`perform` does it against a tracelens model, statement by statement;
:mod:`tests.properties.plain_language` says what it ought to mean.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import tracelens as tl
from tests.support.families import D_MODEL, HEAD_DIM, LAYERS, NEURONS, VOCABULARY
from tracelens.ir.sites import Site

# --- keys: how a part of a value is named -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """``[..., :7]`` or ``.tok[-2:]``; ``shape`` says what it makes of a shape whose sizes are words and numbers."""

    text: str
    key: Any
    tok: bool = False
    aligned_only: bool = False

    def shape(self, shape: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.text == "[..., :7]":
            return (*shape[:-1], 7)
        if self.text == "[..., 3]":
            return shape[:-1]
        kept = {"[:, -1:]": (1,), ".tok[-2:]": (2,), ".tok[[1, 0]]": (2,)}.get(self.text, ())
        return (shape[0], *kept, *shape[2:])

    def fits(self, shape: tuple[Any, ...], *, aligned: bool) -> bool:
        if self.aligned_only and not aligned:
            return False
        if self.text.startswith("[..."):
            return isinstance(shape[-1], int) and shape[-1] > 7
        return shape[:2] == ("B", "P")

    def places(self, mask: Tensor) -> list[tuple[int, Any]]:
        """For a token key, each row's padded positions."""
        return [(row, mask[row].nonzero()[:, 0][self.key]) for row in range(len(mask))]

    def take(self, tensor: Tensor, mask: Tensor) -> Tensor:
        if not self.tok:
            return tensor[self.key]
        return torch.stack([tensor[row, columns] for row, columns in self.places(mask)])

    def put(self, tensor: Tensor, new: Tensor, mask: Tensor) -> Tensor:
        changed = tensor.clone()
        if not self.tok:
            changed[self.key] = new
            return changed
        whole = new.to(tensor.dtype).expand_as(self.take(tensor, mask))
        for row, columns in self.places(mask):
            changed[row, columns] = whole[row]
        return changed


_ALL = slice(None)
KEYS = (
    Key("[..., :7]", (..., slice(None, 7))),
    Key("[..., 3]", (..., 3)),
    Key("[:, -1]", (_ALL, -1)),
    Key("[:, -1:]", (_ALL, slice(-1, None))),
    Key("[:, 0]", (_ALL, 0), aligned_only=True),
    Key(".tok[-1]", -1, tok=True),
    Key(".tok[0]", 0, tok=True),
    Key(".tok[-2:]", slice(-2, None), tok=True),
    Key(".tok[[1, 0]]", [1, 0], tok=True),
)

# --- expressions and statements ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class At:
    """The site itself."""

    site: Site


@dataclass(frozen=True)
class Var:
    name: str


@dataclass(frozen=True)
class Num:
    number: float


@dataclass(frozen=True)
class Const:
    """A tensor of the user's: a name of :data:`CONSTANTS`."""

    name: str


@dataclass(frozen=True)
class Do:
    """A function of :data:`FUNCTIONS` applied."""

    function: str
    args: tuple[Expression, ...]


@dataclass(frozen=True)
class Part:
    base: Expression
    keys: tuple[Key, ...]


Expression = At | Var | Num | Const | Do | Part


@dataclass(frozen=True)
class Let:
    """``name = expression``."""

    name: str
    value: Expression


@dataclass(frozen=True)
class Change:
    """A write to a site or a part of it, in one of three spellings; ``operator=None`` assigns."""

    site: Site
    keys: tuple[Key, ...]
    operator: str | None
    value: Expression
    spelling: str = "augmented"


@dataclass(frozen=True)
class ChangeLayers:
    """A write to one site of several layers; ``value`` may be a site's name (paired) or ``per_layer``."""

    layers: tuple[int, int]
    name: str
    keys: tuple[Key, ...]
    operator: str | None
    value: Num | Const | str


@dataclass(frozen=True)
class Keep:
    """``expression.save(name)``."""

    value: Expression
    name: str


@dataclass(frozen=True)
class KeepLayers:
    layers: tuple[int, int]
    site: str
    name: str


Statement = Let | Change | ChangeLayers | Keep | KeepLayers
Program = tuple[Statement, ...]


def _numbers(seed: int, *shape: int) -> Tensor:
    return 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CONSTANTS: dict[str, Tensor] = {
    f"c{width}": _numbers(width, width) for width in (D_MODEL, NEURONS, VOCABULARY, HEAD_DIM, 7, 5)
}
CONSTANTS |= {
    f"m{width}": _numbers(width, width, 5) / 4 for width in (D_MODEL, NEURONS, VOCABULARY, HEAD_DIM)
}
CONSTANTS |= {f"rows{width}": _numbers(width + 1, LAYERS, width) for width in (D_MODEL, NEURONS, HEAD_DIM)}

FUNCTIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "add": ("{} + {}", operator.add),
    "sub": ("{} - {}", operator.sub),
    "mul": ("{} * {}", operator.mul),
    "tanh": ("torch.tanh({})", torch.tanh),
    "method": ("{}.sigmoid()", lambda x: x.sigmoid()),
    "leaky": ("tl.where({0} > 0, {0}, 0.1 * {0})", lambda x: torch.where(x > 0, x, 0.1 * x)),
    "softmax": ("{}.softmax(-1)", lambda x: x.softmax(-1)),
    "mean": ("{}.mean(-1, keepdim=True)", lambda x: x.mean(-1, keepdim=True)),
    "top": ("torch.topk({}, 3).values", lambda x: torch.topk(x, 3).values),
    "matmul": ("{}.to(torch.float32) @ {}", lambda x, matrix: x.to(torch.float32) @ matrix),
    "cast": ("{}.to(torch.float64)", lambda x: x.to(torch.float64)),
}
_SYMBOLS = {"add": "+", "sub": "-", "mul": "*"}

# --- as text ----------------------------------------------------------------------------------------------------------


def site_text(site: Site) -> str:
    return f"model.{site.name}" if site.layer is None else f"model.layers[{site.layer}].{site.name}"


def _keys(keys: Sequence[Key]) -> str:
    return "".join(key.text for key in keys)


def text_of(expression: Expression) -> str:
    match expression:
        case At():
            return site_text(expression.site)
        case Var() | Const():
            return expression.name
        case Num():
            return repr(expression.number)
        case Do():
            return f"({FUNCTIONS[expression.function][0].format(*map(text_of, expression.args))})"
        case Part():
            return text_of(expression.base) + _keys(expression.keys)


def lines_of(statement: Statement) -> list[str]:
    """A statement as Python text."""
    match statement:
        case Let():
            return [f"{statement.name} = {text_of(statement.value)}"]
        case Keep():
            return [f"{text_of(statement.value)}.save({statement.name!r})"]
        case KeepLayers(layers=(first, last)):
            return [f"model.layers[{first}:{last}].{statement.site}.save({statement.name!r})"]
        case ChangeLayers(layers=(first, last), value=value):
            target = f"model.layers[{first}:{last}].{statement.name}{_keys(statement.keys)}"
            if isinstance(value, str) and value.startswith("rows"):
                new = f"tl.per_layer({value}[{first}:{last}])"
            elif isinstance(value, str):
                new = f"model.layers[{first}:{last}].{value}{_keys(statement.keys)}"
            else:
                new = text_of(value)
            return [f"{target} {_SYMBOLS.get(statement.operator or '', '')}= {new}"]
        case Change(site=site, keys=keys, operator=None):
            target, new = site_text(site) + _keys(keys), text_of(statement.value)
            if statement.spelling == "handle" and keys:
                return [f"h = {site_text(site)}", f"h{_keys(keys)} = {new}"]
            return [f"{target} = {new}"]
        case Change(site=site, keys=keys):
            target, new = site_text(site) + _keys(keys), text_of(statement.value)
            symbol = _SYMBOLS[statement.operator or ""]
            if statement.spelling == "spelled out":
                return [f"{target} = {target} {symbol} {new}"]
            if statement.spelling == "handle" and keys:
                return [f"h = {site_text(site)}", f"h{_keys(keys)} {symbol}= {new}"]
            if statement.spelling == "handle":
                return [f"h = {target}", f"h {symbol}= {new}", f"{target} = h"]
            return [f"{target} {symbol}= {new}"]


def source(program: Program) -> str:
    """The block's body as Python text."""
    return "\n".join(line for statement in program for line in lines_of(statement))


def names(model: tl.Model) -> dict[str, Any]:
    """What the text of a block may use."""
    return {"tl": tl, "torch": torch, "model": model, **CONSTANTS}


# --- against a tracelens model ----------------------------------------------------------------------------------------


def _owner(model: tl.Model, site: Site) -> Any:
    return model if site.layer is None else model.layers[site.layer]


def perform(program: Program, model: tl.Model) -> None:
    """Does the statements one by one inside an open block, without any source text."""
    found: dict[str, Any] = {}

    def value(expression: Expression) -> Any:
        match expression:
            case At():
                return getattr(_owner(model, expression.site), expression.site.name)
            case Var():
                return found[expression.name]
            case Num():
                return expression.number
            case Const():
                return CONSTANTS[expression.name]
            case Do():
                return FUNCTIONS[expression.function][1](*map(value, expression.args))
            case Part():
                return _taken(value(expression.base), expression.keys)

    for statement in program:
        match statement:
            case Let():
                found[statement.name] = value(statement.value)
            case Keep():
                value(statement.value).save(statement.name)
            case KeepLayers(layers=(first, last)):
                getattr(model.layers[first:last], statement.site).save(statement.name)
            case Change():
                owner, new = _owner(model, statement.site), value(statement.value)
                _change(owner, statement.site.name, statement.keys, statement.operator, new)
            case ChangeLayers(layers=(first, last), value=given):
                owner = model.layers[first:last]
                if isinstance(given, str) and given.startswith("rows"):
                    new = tl.per_layer(CONSTANTS[given][first:last])
                elif isinstance(given, str):
                    new = _taken(getattr(owner, given), statement.keys)
                else:
                    new = value(given)
                _change(owner, statement.name, statement.keys, statement.operator, new)


def _taken(value: Any, keys: Sequence[Key]) -> Any:
    for key in keys:
        value = value.tok[key.key] if key.tok else value[key.key]
    return value


def _change(owner: Any, name: str, keys: tuple[Key, ...], symbol: str | None, new: Any) -> None:
    old = getattr(owner, name)
    if not keys:
        setattr(owner, name, new if symbol is None else FUNCTIONS[symbol][1](old, new))
        return
    part = _taken(old, keys[:-1])
    if symbol is not None:
        new = FUNCTIONS[symbol][1](_taken(part, keys[-1:]), new)
    if keys[-1].tok:
        part.tok[keys[-1].key] = new
    else:
        part[keys[-1].key] = new


# --- which order the rules fix -------------------------------------------------------------------------------------


def touched(statement: Statement) -> tuple[set[Site], set[Site], set[str], str | None]:
    """Sites read, sites written, names used, name made."""
    reads: set[Site] = set()
    used: set[str] = set()

    def visit(expression: Expression) -> None:
        match expression:
            case At():
                reads.add(expression.site)
            case Var():
                used.add(expression.name)
            case Do():
                for arg in expression.args:
                    visit(arg)
            case Part():
                visit(expression.base)
            case _:
                pass

    match statement:
        case Let():
            visit(statement.value)
            return reads, set(), used, statement.name
        case Keep():
            visit(statement.value)
            return reads, set(), used, None
        case KeepLayers(layers=layers):
            return {Site(statement.site, layer) for layer in range(*layers)}, set(), used, None
        case Change():
            visit(statement.value)
            return reads, {statement.site}, used, None
        case ChangeLayers(layers=layers, value=given):
            if isinstance(given, str) and not given.startswith("rows"):
                reads |= {Site(given, layer) for layer in range(*layers)}
            return reads, {Site(statement.name, layer) for layer in range(*layers)}, used, None


def must_follow(program: Program) -> Iterator[tuple[int, int]]:
    """The pairs of statements whose order the rules fix: names made and used, and writes to one site."""
    facts = [touched(statement) for statement in program]
    for later, (reads, writes, used, made) in enumerate(facts):
        for earlier, (reads_0, writes_0, used_0, made_0) in enumerate(facts[:later]):
            names_meet = made_0 in used or (made is not None and (made in used_0 or made == made_0))
            if names_meet or writes_0 & (reads | writes) or reads_0 & writes:
                yield earlier, later
