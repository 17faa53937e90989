"""What a run has cost is what the pretend devices have seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import accelerate
import pytest
import torch

import tracelens as tl
from tests.support.families import FAMILIES
from tests.support.pretend import Copy, Pretend, device_map, pretend
from tracelens.report import Moved

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


@pytest.mark.parametrize("losses", [1, 2])
def test_gradients_that_come_back_are_those_of_a_loss_by_hand(pretend: Pretend, losses: int) -> None:
    """Hooks and autograd alone move as much in the backward pass; without the block's transfer, that much less."""
    hf = FAMILIES["llama"].build().requires_grad_(False)
    accelerate.dispatch_model(hf, device_map(hf, P), main_device=torch.device(P[0]))
    found: dict[str, torch.Tensor] = {}

    def leaf(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        found["early"] = output.detach().requires_grad_()
        return found["early"]

    def late(_: Any, __: Any, output: torch.Tensor) -> None:
        found["late"] = output

    def by_hand(*, across: bool) -> Counter[tuple[str, str, int]]:
        handles = [
            hf.model.layers[0].register_forward_hook(leaf),
            hf.model.layers[2].register_forward_hook(late),
        ]
        logits = hf(torch.tensor(ROWS, device=P[2]), use_cache=False).logits
        for handle in handles:
            handle.remove()
        last = found["early"][:, -1].to(P[2]) if across else 1.0
        loss = (found["late"][:, -1] * last).sum() + logits.sum()
        with pretend.watched() as seen:
            for number in range(losses):
                (found["gradient"],) = torch.autograd.grad(
                    loss, found["early"], retain_graph=number + 1 < losses
                )
        return counted(seen.copies)

    def counted(copies: Sequence[Copy]) -> Counter[tuple[str, str, int]]:
        return Counter((copy.source, copy.target, copy.bytes) for copy in copies)

    own, both = by_hand(across=False), by_hand(across=True)
    model = tl.wrap(hf)
    with pretend.watched() as seen, model.trace(ROWS) as t:
        h = model.layers[0].resid_post
        loss = (model.layers[2].resid_post[:, -1] * h[:, -1]).sum() + model.logits.sum()
        for number in range(losses):
            tl.grad(loss * (number + 1), h).save(f"g{number}")
    backward = [copy for copy in seen.copies if any("differentiate.py" in line for line in copy.lines)]
    assert counted(backward) == both
    (back,) = [one for one in t.report.moved if one.what == "gradients"]
    assert back == Moved(P[2], P[0], "gradients", losses, losses * 2 * 48 * 4)
    assert both - own == Counter({(P[2], P[0], 2 * 48 * 4): losses})
    assert both.total() - own.total() == losses > 0
    often = "" if losses == 1 else ", in each of 2 backward passes"
    assert (
        f"from place 0 to place 2 after layers.0.resid_post, 384 B; its gradient comes back, 384 B{often}\n"
        in (t.explain())
    )
    assert f"of gradients, back: {384 * losses} B" in t.explain()
    torch.testing.assert_close(t["g0"], found["gradient"].cpu(), rtol=1e-4, atol=1e-5)


def test_a_gradient_that_is_cut_off_does_not_come_back(pretend: Pretend) -> None:
    hf = FAMILIES["llama"].build()
    model = tl.wrap(accelerate.dispatch_model(hf, device_map(hf, P), main_device=torch.device(P[0])))
    with model.trace(ROWS) as t:
        h, late = model.layers[0].resid_post, model.layers[2].resid_post
        tl.grad((late * h[:, -1:].detach()).sum(), h).save("g")
    assert {one.what for one in t.report.moved} == {"transfers", "results"}
    assert "comes back" not in t.explain()
    with model.trace(ROWS) as t:
        h, late = model.layers[0].resid_post, model.layers[2].resid_post
        tl.grad((late + torch.ones_like(h * 2.0).to(torch.float32) * late).sum(), h).save("g")
    assert "comes back" not in t.explain()
    with model.trace(ROWS) as t:
        h, late = model.layers[0].resid_post, model.layers[2].resid_post
        (late * h).save("product")
        tl.grad(late.sum(), h).save("g")
    assert {one.what for one in t.report.moved} == {"transfers", "results"}, "it is no part of the loss"
    assert "comes back" not in t.explain()


@pytest.mark.parametrize(
    ("early", "cut"), [("resid_pre", "resid_post"), ("attn_out", "attn_add"), ("mlp_act", "mlp_out")]
)
@pytest.mark.parametrize("whole", [True, False])
def test_nothing_comes_back_through_a_site_that_was_replaced(
    pretend: Pretend, early: str, cut: str, whole: bool
) -> None:
    """What the tensor itself adds to the loss has a gradient; what follows from the replaced site has none."""
    hf = FAMILIES["llama"].build()
    model = tl.wrap(accelerate.dispatch_model(hf, device_map(hf, P), main_device=torch.device(P[0])))
    with model.trace(ROWS) as t:
        h = getattr(model.layers[0], early)
        if whole:
            setattr(model.layers[0], cut, torch.linspace(0, 1, 48))
        late = model.layers[2].resid_post * model.layers[1].resid_post
        tl.grad(h.pow(2).sum() + late.sum(), h).save("g")
    back = {(one.source, one.target, one.bytes) for one in t.report.moved if one.what == "gradients"}
    number, stream = (P[2], P[0], 4), (P[2], P[1], 2 * 5 * 48 * 4)
    assert back == ({number} if whole else {number, stream})
    assert t.explain().count("its gradient comes back") == len(back)


def test_on_one_device_nothing_travels() -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    with model.trace(ROWS) as t:
        model.layers[1].resid_post.save()
    assert t.report.moved == ()
    assert "nothing travelled between devices" in repr(t.report)
