"""Sizes that are not numbers yet: ``B`` (batch), ``P`` (positions), ``S`` (attended keys), and arithmetic on them.

A :data:`Dim` is an ``int`` or a :class:`Sym`, a polynomial with integer coefficients over size symbols and slice
lengths. Two dims are the same size for every prompt exactly if they are equal as Python values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

BATCH, POSITION, KEY = "B", "P", "S"
SYMBOLS = (BATCH, POSITION, KEY)

Sizes = Mapping[str, int]


def bounds_text(start: object, stop: object, step: object) -> str:
    """The bounds of a slice as Python would write them.

    >>> bounds_text(None, -1, 2), bounds_text(3, None, None)
    (':-1:2', '3:')
    """
    parts = ["" if part is None else str(part) for part in (start, stop, step)]
    return ":".join(parts if step is not None else parts[:2])


@dataclass(frozen=True, slots=True)
class Sliced:
    """The length of ``x[start:stop:step]`` where ``len(x)`` is ``of``."""

    of: Sym
    start: int | None
    stop: int | None
    step: int | None

    def __str__(self) -> str:
        return f"len({self.of})[{bounds_text(self.start, self.stop, self.step)}]"


Atom = str | Sliced
Monomial = tuple[Atom, ...]


@dataclass(frozen=True, slots=True)
class Sym:
    """A size that depends on the prompt, in normal form: sorted (monomial, coefficient) pairs, none of them zero."""

    terms: tuple[tuple[Monomial, int], ...]

    def __str__(self) -> str:
        text = ""
        for monomial, factor in self.terms:
            sign = "-" if factor < 0 else "+" if text else ""
            parts = [str(atom) for atom in monomial]
            if abs(factor) != 1 or not parts:
                parts.insert(0, str(abs(factor)))
            text += sign + "*".join(parts)
        return text

    def __repr__(self) -> str:
        return str(self)


Dim = int | Sym


def symbol(name: str) -> Sym:
    """The dim that is just the symbol ``name``."""
    if name not in SYMBOLS:
        raise ValueError(f"unknown size symbol {name!r}")
    return Sym((((name,), 1),))


B, P, S = symbol(BATCH), symbol(POSITION), symbol(KEY)


def _terms(dim: Dim) -> dict[Monomial, int]:
    if isinstance(dim, int):
        return {(): dim} if dim else {}
    return dict(dim.terms)


def _normal(terms: Mapping[Monomial, int]) -> Dim:
    kept = {monomial: factor for monomial, factor in terms.items() if factor}
    if not kept:
        return 0
    if set(kept) == {()}:
        return kept[()]
    # Longest monomials first, the constant last: "B*P", "P-1".
    ordered = sorted(kept.items(), key=lambda item: (-len(item[0]), [str(atom) for atom in item[0]]))
    return Sym(tuple(ordered))


def add(left: Dim, right: Dim) -> Dim:
    terms = _terms(left)
    for monomial, factor in _terms(right).items():
        terms[monomial] = terms.get(monomial, 0) + factor
    return _normal(terms)


def multiply(left: Dim, right: Dim) -> Dim:
    terms: dict[Monomial, int] = {}
    for one, a in _terms(left).items():
        for two, b in _terms(right).items():
            key = tuple(sorted(one + two, key=str))
            terms[key] = terms.get(key, 0) + a * b
    return _normal(terms)


def product(dims: Iterable[Dim]) -> Dim:
    result: Dim = 1
    for dim in dims:
        result = multiply(result, dim)
    return result


def divide(left: Dim, right: Dim) -> Dim | None:
    """``left / right`` where that is exact for every prompt, else ``None``.  Only division by one monomial is tried."""
    if left == right:
        return 1
    divisor = _terms(right)
    if len(divisor) != 1:
        return None
    ((monomial, factor),) = divisor.items()
    result: dict[Monomial, int] = {}
    for own, coefficient in _terms(left).items():
        rest = list(own)
        for atom in monomial:
            if atom not in rest:
                return None
            rest.remove(atom)
        if coefficient % factor:
            return None
        result[tuple(rest)] = coefficient // factor
    return _normal(result)


def sliced(dim: Dim, start: int | None, stop: int | None, step: int | None) -> Dim:
    """The length of ``x[start:stop:step]`` where ``len(x) == dim``."""
    if isinstance(dim, int):
        return len(range(dim)[slice(start, stop, step)])
    whole = step in (None, 1) and start in (None, 0) and stop is None
    # Every size is at least one, so that the last element and "all but the first" have plain lengths.
    if whole:
        return dim
    if dim in (B, P, S) and step in (None, 1):
        if start == -1 and stop is None:
            return 1
        if (start in (None, 0) and stop == -1) or (start == 1 and stop is None):
            return add(dim, -1)
        if start in (None, 0) and stop == 1:
            return 1
    return Sym((((Sliced(dim, start, stop, step),), 1),))


def evaluate(dim: Dim, sizes: Sizes) -> int:
    """The number that ``dim`` is under ``sizes``; a ``KeyError`` names a symbol that has no size."""
    if isinstance(dim, int):
        return dim
    total = 0
    for monomial, factor in dim.terms:
        value = factor
        for atom in monomial:
            if isinstance(atom, str):
                value *= sizes[atom]
            else:
                length = evaluate(atom.of, sizes)
                value *= len(range(length)[slice(atom.start, atom.stop, atom.step)])
        total += value
    return total


def symbols(dim: Dim) -> frozenset[str]:
    """The size symbols that occur in ``dim``."""
    if isinstance(dim, int):
        return frozenset()
    found: set[str] = set()
    for monomial, _ in dim.terms:
        for atom in monomial:
            found |= {atom} if isinstance(atom, str) else symbols(atom.of)
    return frozenset(found)


_TERM = re.compile(r"([+-]?)([^+-]+)")
# The innermost slices: what is inside their parentheses has none of its own.
_SLICED = re.compile(r"len\((?P<of>[^()]*)\)\[(?P<start>-?\d*):(?P<stop>-?\d*)(?::(?P<step>-?\d*))?\]")


def with_lengths(text: str, sizes: Sizes | None) -> str:
    """The text with the lengths of slices as numbers, where the sizes are known.

    >>> with_lengths("f32[B,len(P)[:2],16]", {"B": 1, "P": 5})
    'f32[B,2,16]'
    """

    def number(match: re.Match[str]) -> str:
        start, stop, step = (int(part) if part else None for part in match.group("start", "stop", "step"))
        try:
            length = evaluate(parse(match["of"]), sizes or {})
        except (KeyError, ValueError):
            return match[0]
        return str(len(range(length)[slice(start, stop, step)]))

    shown = _SLICED.sub(number, text)
    return text if shown == text else with_lengths(shown, sizes)  # slices of slices, from the inside


def parse(text: str) -> Dim:
    """The inverse of ``str``: ``parse("B*P-1")``.  Raises ``ValueError`` on anything else."""
    source = text.replace(" ", "")
    atoms: list[Sliced] = []

    def remember(match: re.Match[str]) -> str:
        of = _sum(match["of"], atoms)
        if of is None or isinstance(of, int):
            raise ValueError(f"{text!r} is not a size")
        numbers = [int(part) if part else None for part in (match["start"], match["stop"], match["step"])]
        atoms.append(Sliced(of, *numbers))
        return f"@{len(atoms) - 1}"

    while "@" not in text and (replaced := _SLICED.sub(remember, source)) != source:
        source = replaced
    total = _sum(source, atoms)
    if total is None:
        raise ValueError(f"{text!r} is not a size")
    return total


def _sum(source: str, atoms: Sequence[Sliced]) -> Dim | None:
    """The sum of products in ``source``, where ``@3`` stands for an atom; ``None`` if it is no such thing."""
    total: Dim = 0
    position = 0
    for match in _TERM.finditer(source):
        if match.start() != position:
            return None
        position = match.end()
        term: Dim = -1 if match[1] == "-" else 1
        for factor in match[2].split("*"):
            if factor.isdecimal():
                value: Dim = int(factor)
            elif factor.startswith("@") and factor[1:].isdecimal() and int(factor[1:]) < len(atoms):
                value = Sym((((atoms[int(factor[1:])],), 1),))
            elif factor in SYMBOLS:
                value = symbol(factor)
            else:
                return None
            term = multiply(term, value)
        total = add(total, term)
    return total if source and position == len(source) else None
