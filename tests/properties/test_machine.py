"""Random sessions, step by step: what is allowed does what it means, what is forbidden is refused and changes nothing.

The machine drives the language on a tiny model, and beside it a model of the language in plain Python: lists of
versions, and a few facts about each value in hand (what it was read from, whether it was written through).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

import tracelens as tl
from tests.properties.drawn import traceable_sites
from tests.properties.plain_language import Node, Plain
from tests.properties.programs import KEYS
from tests.strategies import WIDTHS
from tests.support.batches import EVEN, batch, random_rows
from tests.support.families import FAMILIES, LAYERS
from tests.support.hand_forward import hand_forward
from tests.support.plain import Fingerprint, assert_untouched, model_fingerprint
from tracelens import errors
from tracelens.ir.sites import Effect, Order, Site

HF = FAMILIES["llama"].build()
MODEL = tl.wrap(HF)
ROWS = random_rows(EVEN)
PROMPT = batch(ROWS)
# Few sites, so that steps meet at the same ones.
SITES = [
    site for site in traceable_sites(HF)
    if site.name in ("resid_pre", "resid_mid", "mlp_act", "mlp_out", "logits") and site.layer in (None, 0, 1)
    and site.kind.effect is not Effect.NONE and site.kind.dtype is None
]  # fmt: skip
PART = [key for key in KEYS if key.text in ("[..., :7]", "[:, -1]", ".tok[-2:]")]


@dataclass
class Held:
    """A value in hand."""

    value: Any
    node: Node
    order: Order
    sites: frozenset[Site]
    # For a site's own value: which, at which version; and whether it was written through.
    site: Site | None = None
    version: int = 0
    stale: bool = False

    def may_reach(self, site: Site) -> bool:
        return self.order < site.order or self.sites == {site}


class Sessions(RuleBasedStateMachine):
    """``trace`` is the open block, if there is one."""

    trace: tl.Trace | None = None

    @initialize()
    def begin(self) -> None:
        self.before: Fingerprint = model_fingerprint(HF)
        self.kept: list[tuple[Any, Tensor]] = []  # results of earlier blocks, with what they ought to be
        self.foreign: list[Any] = []  # unsaved values of earlier blocks
        self.held: list[Held] = []

    # --- opening and closing ----------------------------------------------------------------------------------

    @precondition(lambda self: self.trace is None)
    @rule(steps=st.integers(2, 14), careless=st.sampled_from([False, False, True]))
    def open(self, steps: int, careless: bool) -> None:
        """``steps``: how many there are at least before it closes; ``careless``: updates may get lost in it."""
        self.left, self.careless = steps, careless
        self.trace = MODEL.trace(ROWS)
        self.trace.__enter__()
        self.plain = Plain(PROMPT.mask)
        self.held, self.saved, self.lost = [], [], False

    @precondition(lambda self: self.trace is not None and self.left <= 0)
    @rule(looks=st.sampled_from([True, True, True, False]))
    def close(self, looks: bool = True) -> None:
        """``looks``: the logits and one more site are saved at the very end."""
        for site in (SITES[-1], SITES[2]) if looks else ():
            held, name = self.hold(site), f"s{len(self.saved)}"
            self.saved.append((held.value.save(name), name))
            self.plain.saves[name] = held.node
        trace, self.trace = self.trace, None
        if self.lost:
            with pytest.raises(errors.LostUpdateError):
                trace.__exit__(None, None, None)
            self.assert_failed(trace)
        elif self.plain.writes and not self.saved:
            with pytest.raises(errors.NothingSavedError):
                trace.__exit__(None, None, None)
        else:
            trace.__exit__(None, None, None)
            self.check(trace)
        # Only parts are saved, so these are not.
        self.foreign += [held.value for held in self.held[:2]]

    @precondition(lambda self: self.trace is not None and self.left <= 0 and self.careless)
    @rule()
    def raise_in_the_body(self) -> None:
        trace, self.trace = self.trace, None
        error = ValueError("mine")
        assert not trace.__exit__(ValueError, error, None)
        self.assert_failed(trace)

    def assert_failed(self, trace: tl.Trace) -> None:
        for handle, _ in self.saved:
            with pytest.raises(errors.FailedRunError):
                handle.value
        with pytest.raises(errors.FailedRunError):
            trace.results

    def check(self, trace: tl.Trace) -> None:
        wanted = self.plain.results(lambda intercept: hand_forward(HF, *PROMPT, intercept))
        assert list(trace.results) == list(wanted)
        for handle, name in self.saved:
            torch.testing.assert_close(handle.value, wanted[name], rtol=1e-4, atol=1e-5)
            assert trace[name] is handle.value
            self.kept.append((handle, handle.value.clone()))

    # --- reading and computing --------------------------------------------------------------------------------

    def hold(self, site: Site) -> Held:
        owner = MODEL if site.layer is None else MODEL.layers[site.layer]
        version = len(self.plain.writes.get(site, ()))
        value = getattr(owner, site.name)
        return Held(value, self.plain.read(site), site.order, frozenset((site,)), site, version)

    @precondition(lambda self: self.trace is not None)
    @rule(site=st.sampled_from(SITES))
    def read(self, site: Site) -> None:
        self.held.append(self.hold(site))

    def fresh(self, data: st.DataObject, wanted: Callable[[Held], bool] = lambda held: True) -> Held | None:
        if not self.held:
            self.read(data.draw(st.sampled_from(SITES)))
        fitting = [held for held in self.held if not held.stale and wanted(held)]
        return data.draw(st.sampled_from(fitting)) if fitting else None

    @precondition(lambda self: self.trace is not None)
    @rule(data=st.data(), number=st.sampled_from([0.5, -1.5, 2.0]))
    def compute(self, data: st.DataObject, number: float) -> None:
        held = self.fresh(data)
        if held is not None:
            node = held.node
            self.held.append(
                Held(
                    torch.tanh(held.value * number),
                    lambda run: torch.tanh(node(run) * number),
                    held.order,
                    held.sites,
                )
            )

    @precondition(lambda self: self.trace is not None)
    @rule(data=st.data(), key=st.sampled_from(PART))
    def save(self, data: st.DataObject, key: Any) -> None:
        held = self.fresh(data)
        if held is None:
            return
        name, node = f"s{len(self.saved)}", held.node
        part = held.value.tok[key.key] if key.tok else held.value[key.key]
        self.saved.append((part.save(name), name))
        self.plain.saves[name] = lambda run: key.take(node(run), PROMPT.mask)

    # --- writing ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.trace is not None)
    @rule(
        site=st.sampled_from(SITES),
        spelling=st.sampled_from(
            ["SITE += x", "SITE = SITE + x", "h = SITE; h += x; SITE = h", "SITE.tok[:] += x"]
        ),
        data=st.data(),
    )
    def add(self, site: Site, spelling: str, data: st.DataObject) -> None:
        width = WIDTHS[site.kind.shape[-1]]
        kept = [handle for handle, wanted in self.kept if tuple(wanted.shape) == (*PROMPT.mask.shape, width)]
        x = data.draw(st.sampled_from([0.25, torch.linspace(-1, 1, width), *kept[-2:]]))
        self.run(spelling, site, x)
        plain = x if isinstance(x, float | Tensor) else x.value
        self.plain.change(site, (), "add", lambda run: plain)

    @precondition(lambda self: self.trace is not None)
    @rule(site=st.sampled_from(SITES), key=st.sampled_from(PART))
    def change_a_part(self, site: Site, key: Any) -> None:
        self.run(f"SITE{key.text} *= x", site, 0.5)
        self.plain.change(site, (key,), "mul", lambda run: 0.5)

    @precondition(lambda self: self.trace is not None)
    @rule(site=st.sampled_from(SITES), data=st.data())
    def assign_a_value(self, site: Site, data: st.DataObject) -> None:
        width = WIDTHS[site.kind.shape[-1]]
        held = self.fresh(data, lambda held: held.may_reach(site) and held.value.shape[-1] == width)
        if held is not None:
            self.run("SITE = x", site, held.value)
            self.plain.change(site, (), None, held.node)

    @precondition(lambda self: self.trace is not None)
    @rule(name=st.sampled_from(["resid_mid", "mlp_out"]), first=st.integers(0, LAYERS - 2))
    def change_layers(self, name: str, first: int) -> None:
        value = torch.linspace(-1, 1, 48)
        exec(
            f"model.layers[{first}:{first + 2}].{name} += value",
            {"model": MODEL, "value": value},
        )
        for layer in (first, first + 1):
            self.plain.change(Site(name, layer), (), "add", lambda run: value)

    @precondition(lambda self: self.trace is not None)
    @rule(data=st.data(), key=st.sampled_from(PART))
    def write_through_a_value(self, data: st.DataObject, key: Any) -> None:
        """Allowed for the site's present version; afterwards the value is not used again."""
        held = self.fresh(data, lambda held: held.site is not None)
        if held is None:
            return
        assert held.site is not None
        target = held.value.tok if key.tok else held.value
        if held.version == len(self.plain.writes.get(held.site, ())):
            target[key.key] = 0.125
            held.stale = True
            self.plain.change(held.site, (key,), None, lambda run: torch.tensor(0.125))
        else:
            with pytest.raises(errors.StaleValueError):
                target[key.key] = 0.125

    def run(self, spelling: str, site: Site, x: Any) -> None:
        where = f"model.{site.name}" if site.layer is None else f"model.layers[{site.layer}].{site.name}"
        exec(spelling.replace("SITE", where), {"model": MODEL, "x": x})

    # --- what is forbidden: refused by name, and nothing has happened -----------------------------------------

    @precondition(lambda self: self.trace is not None)
    @rule(data=st.data())
    def use_what_was_written_through(self, data: st.DataObject) -> None:
        stale = [held for held in self.held if held.stale]
        if stale:
            value = data.draw(st.sampled_from(stale)).value
            use = data.draw(
                st.sampled_from([lambda v: v + 1, lambda v: v[0], lambda v: v.save(), torch.tanh])
            )
            with pytest.raises(errors.StaleValueError):
                use(value)

    @precondition(lambda self: self.trace is not None)
    @rule(site=st.sampled_from(SITES), data=st.data())
    def write_backwards(self, site: Site, data: st.DataObject) -> None:
        held = self.fresh(data, lambda held: not held.may_reach(site))
        if held is not None:
            with pytest.raises((errors.CausalityError, errors.ShapeError)) as refused:
                self.run("SITE = x", site, held.value)
            if held.value.shape[-1] == WIDTHS[site.kind.shape[-1]]:
                assert refused.type is errors.CausalityError

    @precondition(lambda self: self.trace is not None and self.careless)
    @rule(site=st.sampled_from(SITES))
    def lose_an_update(self, site: Site) -> None:
        h = self.hold(site).value
        h += 1.0
        self.lost = True

    @precondition(lambda self: self.trace is not None)
    @rule(data=st.data())
    def change_a_computed_value(self, data: st.DataObject) -> None:
        held = self.fresh(data)
        if held is not None:
            with pytest.raises(errors.WriteTargetError):
                (held.value * 2)[0] = 0

    @precondition(lambda self: self.trace is not None)
    @rule(data=st.data())
    def ask_for_numbers(self, data: st.DataObject) -> None:
        held = self.fresh(data)
        if held is not None:
            ask = data.draw(st.sampled_from([bool, float, len, iter, lambda v: v.sum().item()]))
            with pytest.raises(errors.ValueBranchError):
                ask(held.value)
            with pytest.raises(errors.NotRunYetError):
                held.value.value

    @precondition(lambda self: self.trace is not None)
    @rule(site=st.sampled_from(SITES))
    def write_what_does_not_fit(self, site: Site) -> None:
        with pytest.raises(errors.ShapeError):
            self.run("SITE = x", site, torch.ones(49))
        with pytest.raises(errors.DtypeError):
            self.run("SITE = x", site, torch.tensor(3))

    @precondition(lambda self: self.trace is not None)
    @rule(record=st.booleans())
    def nest(self, record: bool) -> None:
        block = MODEL.record() if record else MODEL.trace(ROWS)
        with pytest.raises(errors.NestedTraceError):
            block.__enter__()

    @precondition(lambda self: self.trace is not None and self.saved)
    @rule()
    def use_a_name_twice(self) -> None:
        with pytest.raises(errors.DuplicateNameError):
            MODEL.layers[0].resid_post.save("s0")

    @precondition(lambda self: self.trace is not None and self.foreign)
    @rule(data=st.data(), site=st.sampled_from(SITES))
    def use_a_foreign_value(self, data: st.DataObject, site: Site) -> None:
        value = data.draw(st.sampled_from(self.foreign))
        with pytest.raises(errors.ForeignValueError):
            self.run("SITE = SITE + x", site, value)

    @precondition(lambda self: self.trace is None)
    @rule(site=st.sampled_from(SITES), data=st.data())
    def use_a_site_outside(self, site: Site, data: st.DataObject) -> None:
        with pytest.raises(errors.NoTraceError):
            self.run(
                data.draw(st.sampled_from(["SITE", "SITE = 0", "SITE += 1", "SITE[:, -1] = 0"])), site, 0
            )
        for value in self.foreign[-1:]:
            with pytest.raises(errors.TracelensError):
                value.value
            with pytest.raises(errors.TracelensError):
                value + 1

    # --- always ------------------------------------------------------------------------------------------------

    @invariant()
    def time_passes(self) -> None:
        self.left = getattr(self, "left", 0) - 1

    @invariant()
    def results_stay(self) -> None:
        for handle, wanted in self.kept[-5:]:
            assert torch.equal(handle.value, wanted)

    def teardown(self) -> None:
        if self.trace is not None:
            self.close()
        assert_untouched(self.before, model_fingerprint(HF))


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=settings().max_examples, stateful_step_count=35)
