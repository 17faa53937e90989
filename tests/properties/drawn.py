"""Random blocks that obey the rules, so that every refusal of one is a defect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from tests.properties.programs import (
    CONSTANTS,
    KEYS,
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
    Statement,
    Var,
    must_follow,
)  # fmt: skip
from tests.strategies import WIDTHS
from tests.support.families import HEADS, LAYERS
from tests.support.hand_forward import hand_sites
from tracelens.ir.sites import Effect, Order, Site

Shape = tuple[Any, ...]


@dataclass(frozen=True)
class Known:
    """An expression with its shape and the latest sites that it was made from."""

    expression: Expression
    shape: Shape
    order: Order | None
    sites: frozenset[Site]

    def may_reach(self, site: Site) -> bool:
        return self.order is None or self.order < site.order or self.sites == {site}


@dataclass
class _Writer:
    draw: Callable[[st.SearchStrategy], Any]
    sites: list[Site]
    aligned: bool
    variables: list[Known] = field(default_factory=list)
    statements: list[Statement] = field(default_factory=list)
    names: int = 0

    def one(self, choices: Any) -> Any:
        return self.draw(st.sampled_from(list(choices)))

    def fresh(self, letter: str) -> str:
        self.names += 1
        return f"{letter}{self.names}"

    def site(self, wanted: Callable[[Site], bool] = lambda _: True) -> Known:
        site = self.one(
            site
            for site in self.sites
            if site.kind.effect is not Effect.NONE and site.kind.dtype is None and wanted(site)
        )
        gpt2 = Site("pos_embed") in self.sites
        widths = {**WIDTHS, "K": HEADS} if gpt2 else WIDTHS
        shape = tuple(widths.get(str(dim), str(dim)) for dim in site.kind.shape)
        return Known(At(site), shape, site.order, frozenset((site,)))

    def number(self) -> Num:
        return Num(self.one([0.5, -1.25, 2, 0, 0.0, 1]))

    def keys(self, shape: Shape) -> tuple[tuple[Key, ...], Shape]:
        """Up to two keys, one after the other."""
        chosen: list[Key] = []
        for _ in range(self.one([0, 0, 1, 1, 1, 2])):
            fitting = [key for key in KEYS if key.fits(shape, aligned=self.aligned)]
            if not fitting:
                break
            key = self.one(fitting)
            chosen.append(key)
            shape = key.shape(shape)
        return tuple(chosen), shape

    def known(self) -> Known:
        """A site, a name, or a part of one of them."""
        base = self.one(self.variables) if self.variables and self.one([True, False]) else self.site(_is_tame)
        keys, shape = self.keys(base.shape)
        if not keys:
            return base
        return Known(Part(base.expression, keys), shape, base.order, base.sites)

    def operand(self, shape: Shape) -> Expression:
        """A number or a tensor of the user's that fits next to a value of this shape."""
        fitting = [Const(f"c{shape[-1]}")] if f"c{shape[-1]}" in CONSTANTS else []
        return self.one([self.number(), *fitting])

    def computed(self) -> Known:
        base = self.known()
        for _ in range(self.one([1, 1, 2])):
            base = self.applied(base)
        return base

    def applied(self, base: Known) -> Known:
        width = base.shape[-1]
        pointwise = ["add", "sub", "mul", "reverse", "tanh", "method", "leaky", "cast", "pair"]
        last = ["softmax", "mean", "top"] if isinstance(width, int) and width >= 3 else []
        product = ["matmul"] if f"m{width}" in CONSTANTS else []
        name = self.one(pointwise + last + product)
        shape, order, sites = base.shape, base.order, base.sites
        if name in ("add", "sub", "mul"):
            args = (base.expression, self.operand(shape))
        elif name == "reverse":
            name, args = "sub", (self.operand(shape), base.expression)
        elif name == "pair":
            other = next((v for v in reversed(self.variables) if v.shape == shape), None) or base
            name, args = "add", (base.expression, other.expression)
            if order is None or (other.order is not None and other.order >= order):
                sites = other.sites | (sites if other.order == order else frozenset())
                order = other.order
        elif name == "matmul":
            args, shape = (base.expression, Const(f"m{width}")), (*shape[:-1], 5)
        else:
            args = (base.expression,)
            shape = {"mean": (*shape[:-1], 1), "top": (*shape[:-1], 3)}.get(name, shape)
        return Known(Do(name, args), shape, order, sites)

    # --- statements ----------------------------------------------------------------------------------------------

    def let(self) -> None:
        found = self.one([self.known, self.computed])()
        name = self.fresh("x")
        self.statements.append(Let(name, found.expression))
        self.variables.append(Known(Var(name), found.shape, found.order, found.sites))

    def change(self) -> None:
        target = self.site()
        site = target.expression.site
        keys, shape = self.keys(target.shape)
        fitting = [v.expression for v in self.variables if v.shape == shape and v.may_reach(site)]
        own = Part(target.expression, keys) if keys else target.expression
        choices = [self.operand(shape), Do("tanh", (own,)), *fitting * 3]
        symbol = self.one(["add", "add", "sub", "mul", None, None])
        if not _is_tame(site):
            choices, symbol = [self.number()], self.one(["add", "sub", None])
        spelling = self.one(["augmented", "spelled out", "handle"])
        self.statements.append(Change(site, keys, symbol, self.one(choices), spelling))

    def change_layers(self) -> None:
        target = self.site(lambda site: site.layer is not None)
        site = target.expression.site
        layers = self.one([(0, LAYERS), (0, 2), (1, 3)])
        keys, shape = self.keys(target.shape)
        values: list[Any] = [self.operand(shape)]
        values += [
            name for name in ("resid_pre", "attn_out", "mlp_act")
            if Site(name, 0).order < Site(site.name, 0).order and Site(name, 0).kind.shape == site.kind.shape
        ]  # fmt: skip
        values += [f"rows{shape[-1]}"] if f"rows{shape[-1]}" in CONSTANTS else []
        symbol = self.one(["add", "mul", None] if _is_tame(site) else ["add", None])
        self.statements.append(ChangeLayers(layers, site.name, keys, symbol, self.one(values)))

    def keep(self) -> None:
        self.statements.append(Keep(self.one([self.known, self.computed])().expression, self.fresh("s")))

    def keep_layers(self) -> None:
        site = self.site(lambda site: site.layer is not None).expression.site
        self.statements.append(KeepLayers(self.one([(0, LAYERS), (1, 3)]), site.name, self.fresh("s")))


def _is_tame(site: Site) -> bool:
    """Can any arithmetic be done with it?  Scores hold the lowest number there is, and soon infinities."""
    return site.name != "scores"


@st.composite
def programs(
    draw: Callable[[st.SearchStrategy], Any], sites: list[Site], *, aligned: bool, most: int = 10
) -> Program:
    """Blocks over these sites that save at least the logits; ``aligned``: all rows have one length."""
    writer = _Writer(draw, sites, aligned)
    kinds = (
        [writer.let] * 3 + [writer.change] * 4 + [writer.keep] + [writer.change_layers, writer.keep_layers]
    )
    for kind in draw(st.lists(st.sampled_from(kinds), min_size=2, max_size=most)):
        kind()
    writer.statements.append(Keep(At(Site("logits")), "logits"))
    return tuple(writer.statements)


@st.composite
def permutations(draw: Callable[[st.SearchStrategy], Any], program: Program) -> Program:
    """The same statements in another order that the rules take for the same."""
    before: dict[int, set[int]] = {number: set() for number in range(len(program))}
    for earlier, later in must_follow(program):
        before[later].add(earlier)
    order: list[int] = []
    while len(order) < len(program):
        ready = [n for n in before if n not in order and before[n] <= set(order)]
        order.append(draw(st.sampled_from(ready)))
    return tuple(program[number] for number in order)


def traceable_sites(hf: Any) -> list[Site]:
    """The sites of a model that a block can read and write."""
    return [
        site for site in hand_sites(hf) if site.kind.effect is not Effect.NONE and site.kind.dtype is None
    ]
