"""What a run has cost is what the pretend devices have seen."""

from __future__ import annotations

import accelerate
import torch

import tracelens as tl
from tests.support.families import FAMILIES
from tests.support.pretend import Pretend, device_map, pretend

__all__ = ["pretend"]

P = [f"pretend:{index}" for index in range(3)]
ROWS = [[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]]
OWN = ("backends/execute.py", "backends/departing.py", "compiling.py")


def test_what_travelled_is_reported_by_pair_and_kind(pretend: Pretend) -> None:
    hf = FAMILIES["llama"].build()
    model = tl.wrap(accelerate.dispatch_model(hf, device_map(hf, P), main_device=torch.device(P[0])))
    v = torch.randn(48)
    reports = []
    for _ in range(2):
        with pretend.watched() as seen, model.trace(ROWS, measure=True) as t:
            model.layers[1].resid_post += v
            model.layers[2].resid_post[:, -1:] += model.layers[0].resid_post[:, -1:]
            model.layers[:].resid_post.norm(dim=-1).save("norms")
            model.layers[2].mlp_act.save("neurons", dtype=torch.bfloat16)
            model.logits.save("kept", device="keep")
        reports.append(t.report)
        # The inputs are the model's business, and are not reported.
        ours = [copy for copy in seen.copies if any(own in line for line in copy.lines for own in OWN)]
        ours = [copy for copy in ours if copy.dtype.is_floating_point and "cpu" in (copy.source, copy.target)]
        found = {(one.source, one.target, one.what): (one.copies, one.bytes) for one in t.report.moved}
        for source, target in {(copy.source, copy.target) for copy in ours}:
            expected = [copy.bytes for copy in ours if (copy.source, copy.target) == (source, target)]
            assert t.report.bytes_between(source, target) == sum(expected)
        assert found[P[0], P[2], "transfers"] == (1, 2 * 48 * 4)
        assert found[P[0], "cpu", "results"] == found[P[1], "cpu", "results"] == (1, 2 * 5 * 4)
        assert found[P[2], "cpu", "results"] == (2, 2 * 5 * 4 + 2 * 5 * 80 * 2)
    first, second = reports
    for report in (first, second):
        assert ("cpu", P[1], "constants", 1, 48 * 4) in [
            (one.source, one.target, one.what, one.copies, one.bytes) for one in report.moved
        ]
    assert all(first.peaks[device] > extra.bytes for device, extra in zip(P, first.held, strict=True))
    assert 0 < first.seconds < 60
    assert "pretend:0" in repr(first)
    assert "<table" in first._repr_html_()


def test_on_one_device_nothing_travels() -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    with model.trace(ROWS) as t:
        model.layers[1].resid_post.save()
    assert t.report.moved == ()
    assert "nothing travelled between devices" in repr(t.report)
