"""Sizes with symbols: equal exactly if they are equal for every prompt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ir.forms import symbolic
from tracelens.ir import dims
from tracelens.ir.dims import B, P, S

SIZES = st.fixed_dictionaries({"B": st.integers(1, 9), "P": st.integers(1, 40), "S": st.integers(1, 40)})
BOUNDS = st.none() | st.integers(-5, 8)


@given(symbolic(), symbolic(), SIZES)
def test_arithmetic_is_that_of_the_numbers(left, right, sizes):
    one, other = dims.evaluate(left, sizes), dims.evaluate(right, sizes)
    assert dims.evaluate(dims.add(left, right), sizes) == one + other
    assert dims.evaluate(dims.multiply(left, right), sizes) == one * other
    assert dims.evaluate(dims.product([left, right, 2]), sizes) == 2 * one * other


@given(symbolic(), symbolic(), symbolic())
def test_one_size_has_one_form(a, b, c):
    assert dims.add(a, b) == dims.add(b, a)
    assert dims.multiply(a, b) == dims.multiply(b, a)
    assert dims.add(dims.add(a, b), c) == dims.add(a, dims.add(b, c))
    assert dims.multiply(a, dims.add(b, c)) == dims.add(dims.multiply(a, b), dims.multiply(a, c))
    assert dims.add(a, dims.multiply(-1, a)) == 0
    assert hash(dims.add(a, b)) == hash(dims.add(b, a))


@given(symbolic(), BOUNDS, BOUNDS, st.none() | st.integers(1, 3), SIZES)
def test_a_slice_has_the_length_that_python_gives_it(dim, start, stop, step, sizes):
    length = dims.sliced(dim, start, stop, step)
    assert dims.evaluate(length, sizes) == len(range(dims.evaluate(dim, sizes))[slice(start, stop, step)])


@given(symbolic(), symbolic(), SIZES)
def test_a_quotient_is_exact_or_there_is_none(left, right, sizes):
    product = dims.multiply(left, right)
    for dividend, divisor in ((product, right), (left, right)):
        if divisor != 0 and (quotient := dims.divide(dividend, divisor)) is not None:
            assert dims.multiply(quotient, divisor) == dividend


@given(symbolic())
def test_a_size_reads_back(dim):
    assert dims.parse(str(dim)) == dim
    assert dims.parse(f" {dim} ") == dim


@given(symbolic(), SIZES)
def test_the_symbols_of_a_size_are_those_it_depends_on(dim, sizes):
    names = dims.symbols(dim)
    dims.evaluate(dim, {name: size for name, size in sizes.items() if name in names})
    if names:
        with pytest.raises(KeyError):
            dims.evaluate(dim, {})
    else:
        assert isinstance(dim, int)


@pytest.mark.parametrize(
    ("dim", "shown"),
    [
        (dims.multiply(B, P), "B*P"),
        (dims.add(dims.multiply(2, dims.multiply(P, B)), dims.add(P, -1)), "2*B*P+P-1"),
        (dims.sliced(P, 1, None, None), "P-1"),
        (dims.sliced(P, None, -1, None), "P-1"),
        (dims.sliced(P, -1, None, None), "1"),
        (dims.sliced(P, None, 1, None), "1"),
        (dims.sliced(P, 2, None, None), "len(P)[2:]"),
        (dims.sliced(P, None, None, 3), "len(P)[::3]"),
        (dims.sliced(dims.sliced(S, 2, -2, None), None, 4, None), "len(len(S)[2:-2])[:4]"),
        (dims.multiply(P, P), "P*P"),
        (dims.add(P, dims.multiply(-1, P)), "0"),
    ],
)
def test_how_sizes_are_written(dim, shown):
    assert str(dim) == shown


@pytest.mark.parametrize(
    "other", ["", "Q", "B+", "+", "B**P", "2B", "B-", "len(P)", "len(3)[1:]", "@0", "len(P)[1:"]
)
def test_what_is_no_size_is_refused(other):
    with pytest.raises(ValueError, match="not a size"):
        dims.parse(other)


def test_there_are_three_symbols():
    assert [str(dims.symbol(name)) for name in dims.SYMBOLS] == ["B", "P", "S"]
    with pytest.raises(ValueError, match="unknown size symbol"):
        dims.symbol("Q")
    assert dims.divide(dims.multiply(B, 6), 4) is None
    assert dims.divide(P, B) is None
    assert dims.divide(dims.add(P, 1), dims.add(P, 1)) == 1
