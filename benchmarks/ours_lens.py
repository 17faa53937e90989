"""tracelens' own logit lens of a generation, as users write it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tracelens as tl
from benchmarks.peers.laps import Tick
from benchmarks.peers.lens_text import TOP, answer
from benchmarks.peers.subject import Results
from benchmarks.peers.text import WRITTEN, Text, processors


def ours(text: Text, metrics: Sequence[str] = (), **more: Any) -> WRITTEN:
    """``model.logit_lens(prompt, generate=T, top_k=5)``; ``metrics``: what is computed beside the likeliest tokens."""
    text = text.separate()
    model = tl.wrap(text.model)

    def write(new: int, tick: Tick) -> Results:
        options = {name: value for name, value in text.options(new).items() if name != "max_new_tokens"}
        lens = model.logit_lens(
            text.ids[0].tolist(),
            generate=new,
            top_k=TOP,
            metrics=metrics,
            logits_processor=processors(tick),
            **options,
            **more,
        )
        assert isinstance(lens, tl.LensResult)
        tokens = lens.next_ids[None, -new:]
        return answer(tokens, lens.top_log_probs[0], lens.top_ids[0])

    return write
