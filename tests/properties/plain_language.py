"""What a block means, in plain Python: every site has a list of versions, and nothing else is remembered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.properties.programs import (
    CONSTANTS,
    FUNCTIONS,
    At,
    Change,
    ChangeLayers,
    Const,
    Do,
    Expression,
    Keep,
    KeepLayers,
    Key,
    Let,
    Num,
    Part,
    Program,
    Var,
)  # fmt: skip
from tests.support.batches import Batch
from tests.support.hand_forward import Intercept
from tracelens.ir.sites import Site

Node = Callable[["Plain"], Any]


@dataclass
class Plain:
    """A block over a forward pass by hand: lists of versions, and functions to be called when their sites are there."""

    mask: Tensor
    writes: dict[Site, list[Node]] = field(default_factory=dict)
    saves: dict[str, Node] = field(default_factory=dict)
    versions: dict[tuple[Site, int], Tensor] = field(default_factory=dict)

    def read(self, site: Site) -> Node:
        version = len(self.writes.get(site, ()))
        return lambda run: run.versions[site, version]

    def change(self, site: Site, keys: Sequence[Key], symbol: str | None, new: Node) -> None:
        old = self.read(site)

        def written(run: Plain) -> Tensor:
            site_now = old(run)
            value = new(run)
            if symbol is not None:
                value = FUNCTIONS[symbol][1](self._taken(site_now, keys), value)
            return self._put(site_now, keys, torch.as_tensor(value))

        self.writes.setdefault(site, []).append(written)

    def _taken(self, tensor: Tensor, keys: Sequence[Key]) -> Tensor:
        for key in keys:
            tensor = key.take(tensor, self.mask)
        return tensor

    def _put(self, tensor: Tensor, keys: Sequence[Key], new: Tensor) -> Tensor:
        if not keys:
            return new.to(tensor.dtype).expand_as(tensor).clone()
        inner = self._put(keys[0].take(tensor, self.mask), keys[1:], new)
        return keys[0].put(tensor, inner, self.mask)

    def do(self, program: Program) -> None:
        found: dict[str, Node] = {}

        def node(expression: Expression) -> Node:
            match expression:
                case At():
                    return self.read(expression.site)
                case Var():
                    return found[expression.name]
                case Num():
                    return lambda run: expression.number
                case Const():
                    return lambda run: CONSTANTS[expression.name]
                case Do():
                    args, function = list(map(node, expression.args)), FUNCTIONS[expression.function][1]
                    return lambda run: function(*(arg(run) for arg in args))
                case Part():
                    base = node(expression.base)
                    return lambda run: self._taken(base(run), expression.keys)

        for statement in program:
            match statement:
                case Let():
                    found[statement.name] = node(statement.value)
                case Keep():
                    self.saves[statement.name] = node(statement.value)
                case Change():
                    new = node(statement.value)
                    self.change(statement.site, statement.keys, statement.operator, new)
                case KeepLayers(layers=layers):
                    members = [self.read(Site(statement.site, layer)) for layer in range(*layers)]
                    self.saves[statement.name] = lambda run, m=members: torch.stack([one(run) for one in m])
                case ChangeLayers(layers=layers, value=given):
                    for place, layer in enumerate(range(*layers)):
                        if isinstance(given, str) and given.startswith("rows"):
                            row = CONSTANTS[given][layers[0] + place]
                            new = lambda run, row=row: row  # noqa: E731
                        elif isinstance(given, str):
                            new = node(Part(At(Site(given, layer)), statement.keys))
                        else:
                            new = node(given)
                        self.change(Site(statement.name, layer), statement.keys, statement.operator, new)

    def intercept(self, site: Site, tensor: Tensor) -> Tensor:
        self.versions[site, 0] = tensor
        for version, write in enumerate(self.writes.get(site, ()), 1):
            tensor = self.versions[site, version] = write(self)
        return tensor

    def results(self, forward: Callable[[Intercept], object]) -> dict[str, Tensor]:
        with torch.no_grad():
            forward(self.intercept)
            return {name: node(self) for name, node in self.saves.items()}


def expected(
    program: Program, batch: Batch, forward: Callable[[Intercept], object]
) -> dict[str, Tensor | list[Tensor]]:
    """What a block saves; where rows differ in length, a value with positions is one tensor per prompt."""
    block = Plain(batch.mask)
    block.do(program)
    found = block.results(forward)
    if bool(batch.mask.all()):
        return dict(found)
    return {name: unpadded(tensor, batch) for name, tensor in found.items()}


def unpadded(tensor: Tensor, batch: Batch) -> Tensor | list[Tensor]:
    """One tensor per prompt, if the tensor has the padded positions on an axis after the rows (stacked or not)."""
    rows, width = batch.mask.shape
    for axis in (0, 1):
        if tensor.shape[axis : axis + 1] != (rows,):
            continue
        # [B, P, ...], or scores and pattern: [B, H, P, S].
        if tensor.shape[axis + 1 : axis + 2] == (width,):
            padded = (axis + 1,)
        elif tensor.shape[axis + 2 : axis + 4] == (width, width):
            padded = (axis + 2, axis + 3)
        else:
            continue
        parts = []
        for row, length in enumerate(batch.lengths):
            part = tensor.narrow(axis, row, 1)
            for place in padded:
                part = part.narrow(place, width - length, length)
            parts.append(part)
        return parts
    return tensor
