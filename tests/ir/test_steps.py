"""Windows of generation steps, and the graphs that a generation is cut into, written out before and after."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ir.forms import WINDOWS
from tracelens.errors import VerificationError
from tracelens.ir.graph import Graph
from tracelens.ir.parse import parse
from tracelens.ir.passes.at_steps import in_steps
from tracelens.ir.passes.newest_logits import newest_logits
from tracelens.ir.text import op_text
from tracelens.ir.verify import verify, verify_steps
from tracelens.ir.windows import ApartError, StepWindow, parse_window, together

ALL = WINDOWS | st.just(StepWindow(0))
STEPS = range(40)


def graph(body: str) -> Graph:
    lines = [line.strip() for line in body.strip().splitlines()]
    lines = [line + " : f32[B,P,8]" if line[0] == "%" and " : " not in line else line for line in lines]
    return parse("\n".join(["graph {", *lines, "}"]))


def lines(found: Graph) -> list[str]:
    return [op_text(op) for op in found.ops]


@given(ALL, ALL)
def test_windows_are_sets_of_steps(one: StepWindow, other: StepWindow) -> None:
    first, second = ({step for step in STEPS if step in window} for window in (one, other))
    assert parse_window(str(one)) == one
    assert one.within(other) == (first <= second)
    assert one.overlaps(other) == bool(first & second)
    assert one.count(40) == len(first)
    assert one.single == (len(first) == 1)


@given(st.lists(ALL, max_size=4))
def test_what_is_made_together_is_there_in_all_its_steps(windows: list[StepWindow]) -> None:
    """In each step of the result every part is there: of that very step, or held from the one that had it."""
    try:
        found = together(windows)
    except ApartError:
        return
    if not windows:
        assert found is None
        return
    assert found in windows
    for window in windows:
        assert found.within(window) or (window.single and window.start <= found.start)


@pytest.mark.parametrize("text", ["", "3", "5:5", "7:3", "-1:2", "1:2:3", "a:"])
def test_what_is_no_window_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"window|no steps"):
        parse_window(text)


SCOPED = graph("""
%0 = read layers.0.resid_post@0 steps(0:1)
%1 = index %0[:, -1:] : f32[B,1,8]
%2 = read layers.1.resid_post@0 steps(1:)
%3 = call torch.add(%2, %1)
write layers.1.resid_post@1 steps(1:) <- %3
%4 = read layers.1.resid_post@1
write layers.1.resid_post@2 steps(2:4) <- 0.0
%5 = read layers.1.resid_post@2 steps(3:)
save "all" <- %4
save "late" <- %5
""")


def test_a_generation_is_cut_where_windows_end() -> None:
    verify(SCOPED)
    verify_steps(SCOPED)
    stepped = in_steps(SCOPED)
    assert [str(segment) for segment in stepped.segments] == ["0:1", "1:2", "2:3", "3:4", "4:"]
    assert stepped.held == {1: 0}
    assert lines(stepped.at(stepped.segments[0], {0: {0}})) == [
        "%0 = read layers.0.resid_post@0 : f32[B,P,8]",
        "%1 = index %0[:, -1:] : f32[B,1,8]",
        "hold #0 <- %1 at place 0 for later steps",
        "%4 = read layers.1.resid_post@0 : f32[B,P,8]",
        'save "all" <- %4',
    ]
    third = [
        "%1 = const #0 : f32[B,1,8]",
        "%2 = read layers.1.resid_post@0 : f32[B,P,8]",
        "%3 = call torch.add(%2, %1) : f32[B,P,8]",
        "write layers.1.resid_post@1 <- %3",
        "%4 = read layers.1.resid_post@1 : f32[B,P,8]",
        "write layers.1.resid_post@2 <- 0.0",
    ]
    assert lines(stepped.at(stepped.segments[2], {})) == [*third, 'save "all" <- %4']
    assert lines(stepped.at(stepped.segments[3], {})) == [
        *third,
        "%5 = read layers.1.resid_post@2 : f32[B,P,8]",
        'save "all" <- %4',
        'save "late" <- %5',
    ]
    # Without the write of the steps before, the read is of an earlier version.
    assert "%5 = read layers.1.resid_post@1 : f32[B,P,8]" in lines(stepped.at(stepped.segments[4], {}))
    for segment in stepped.segments:
        verify(stepped.at(segment, {}))


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (
            """%0 = read layers.0.resid_post@0 steps(3:4)
            %1 = index %0[:, -1:] : f32[B,1,8]
            %2 = read layers.1.resid_post@0
            %3 = call torch.add(%2, %1)
            save "x" <- %3""",
            "before it is there",
        ),
        (
            """%0 = read layers.0.resid_post@0 steps(0:4)
            %1 = read layers.0.resid_post@0 steps(2:6)
            %2 = call torch.add(%0, %1)
            save "x" <- %2""",
            "neither are all",
        ),
        (
            """%0 = read layers.0.resid_post@0 steps(1:)
            write layers.1.resid_post@1 <- %0""",
            "in steps 1: only",
        ),
        (
            """%0 = read layers.0.resid_post@0 steps(0:1)
            write layers.1.resid_post@1 steps(1:) <- %0""",
            "holds the positions of step 0",
        ),
        (
            """%0 = read layers.1.resid_post@0 steps(2:3)
            %1 = index %0[:, -1:] : f32[B,1,8]
            write layers.0.resid_post@1 steps(2:4) <- %1""",
            "not reached before it",
        ),
        (
            """%0 = read layers.0.resid_post@0 steps(1:)
            %1 = index %0[:, tok(2)] : f32[B,8]
            save "x" <- %1""",
            "tokens of the prompt",
        ),
        (
            """%0 = read layers.0.pattern@0 : f32[B,2,P,S]
            save "x" <- %0""",
            "axis of keys",
        ),
    ],
)
def test_values_of_steps_that_do_not_fit_are_no_graph(body: str, problem: str) -> None:
    found = graph(body)
    with pytest.raises(VerificationError, match=problem):
        _require_generation(found)


def _require_generation(found: Graph) -> None:
    verify(found)
    verify_steps(found)


def test_the_logits_of_the_newest_position_are_enough() -> None:
    found = graph("""
        %0 = read logits@0 : f32[B,P,9]
        %1 = call torch.mul(%0, 2.0) : f32[B,P,9]
        %2 = index %1[:, -1] : f32[B,9]
        %3 = put %0[:, :, 3] <- 1.0 : f32[B,P,9]
        write logits@1 <- %3
        save "x" <- %2
    """)
    assert lines(newest_logits(found)) == [
        "%0 = read logits@0 : f32[B,1,9]",
        "%1 = call torch.mul(%0, 2.0) : f32[B,1,9]",
        "%2 = index %1[:, -1] : f32[B,9]",
        "%3 = put %0[:, :, 3] <- 1.0 : f32[B,1,9]",
        "write logits@1 <- %3",
        'save "x" <- %2',
    ]
    verify(newest_logits(found))


@pytest.mark.parametrize(
    "use",
    [
        "%1 = index %0[:, 0] : f32[B,9]",
        "%1 = call torch.softmax(%0, -1) : f32[B,P,9]",
        "%1 = index %0[:, 1:] : f32[B,P-1,9]",
        'save "whole" <- %0',
    ],
)
def test_logits_of_which_more_is_used_stay_whole(use: str) -> None:
    found = graph(f'%0 = read logits@0 : f32[B,P,9]\n{use}\n%2 = index %0[:, -1] : f32[B,9]\nsave "x" <- %2')
    assert newest_logits(found) is found
