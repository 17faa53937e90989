"""Any generation equals one by hand: no cache, each row alone, edits told where in its text each position stands."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.properties.generations import NAMES, Change, by_hand, cases, end_of, require_by_hand, subject
from tests.support import hand_generation as hand


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(cases(), st.booleans())
def test_generation_with_scoped_writes_equals_one_by_hand(case: Any, some: bool) -> None:
    case = (*case[:-1], end_of(case) if some else None)
    require_by_hand(subject(case[0])[1], case, by_hand(*case))


@pytest.mark.parametrize("family", NAMES)
def test_the_edits_that_are_drawn_matter(family: str) -> None:
    prompts = [[5, 6, 7, 8, 9], [10, 11]]
    hf, _ = subject(family)
    plain = [hand.forward(hf, family, prompt, len(prompt), [])[0][-1] for prompt in prompts]
    for where in ("all", "newest", "token", "last of the prompt", "from"):
        edit = Change(1, (0, None), where, 1, 0.5, 3).edit()
        for prompt, logits in zip(prompts, plain, strict=True):
            edited = hand.forward(hf, family, prompt, len(prompt), [edit])[0][-1]
            assert (edited - logits).abs().max() > 1e-2
