"""Lenses of several steps of a generation go through the unembedding together, and say what each would in its step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import accelerate
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import tracelens as tl
from tests.support.families import FAMILIES
from tests.support.pretend import Pretend, device_map, pretend, watched
from tracelens import compiling, generation_plan
from tracelens.errors import OpFailedError, TracelensError
from tracelens.generation_plan import CompiledGeneration
from tracelens.ir.ops import Call, Read
from tracelens.ir.passes.defer_lenses import defer_lenses
from tracelens.ir.passes.join_members import join_members
from tracelens.ir.passes.share_values import share_values
from tracelens.ir.text import op_text
from tracelens.ir.types import bytes_text
from tracelens.ir.verify import complaints
from tracelens.readout_part import Head

__all__ = ["pretend"]

ONE = [[1, 2, 3, 4]]
ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 4]]
NEW = 7
TRANSLATOR = torch.randn(48, 48, generator=torch.Generator().manual_seed(1)) / 7


def fresh(family: str = "llama") -> tl.Model:
    return tl.wrap(FAMILIES[family].build(initializer_range=0.4))


MODEL, PLAIN = fresh(), fresh()
Block = Callable[[tl.Model, Any], None]


@contextmanager
def at_once(steps: int, *, positions: int = 1000) -> Iterator[None]:
    """So many steps wait for each other, and so many positions of a prompt are done at once."""

    with patch.object(generation_plan, "at_once", lambda rows, kept: (steps, positions)):
        yield


def generated(model: tl.Model, block: Block, rows: Any = ROWS, **options: Any) -> tl.Generation:
    with model.generate(rows, **{"max_new_tokens": NEW, "eos_token_id": None, **options}) as t:
        block(model, t)
    return t


def in_its_step(block: Block, rows: Any = ROWS, **options: Any) -> tl.Generation:
    """The same with everything done in its own step."""
    with patch.object(compiling, "defer_lenses", lambda *_, **__: None):
        t = generated(PLAIN, block, rows, **options)
    assert tails(t) == 0
    return t


def compiled(t: tl.Generation) -> CompiledGeneration:
    found = t._compiled()
    assert isinstance(found, CompiledGeneration)
    return found


def tails(t: tl.Generation) -> int:
    return sum(tail is not None for tail in compiled(t).tails)


def require_same(t: tl.Generation, plain: tl.Generation) -> None:
    assert t.tokens == plain.tokens
    assert list(t.results) == list(plain.results)
    for name in plain.results:
        found, wanted = t[name], plain[name]
        assert isinstance(found, list) == isinstance(wanted, list)
        for one, other in zip(parts(found), parts(wanted), strict=True):
            assert one.shape == other.shape
            assert one.dtype == other.dtype
            if one.is_floating_point():
                assert_close(one, other, atol=1e-5, rtol=1e-5, equal_nan=True, msg=name)
            else:
                assert torch.equal(one, other), name


def parts(value: Any) -> list[Tensor]:
    return value if isinstance(value, list) else [value]


def looked_at(model: Any, t: Any) -> None:
    model.next_tokens.save("next")
    lens = model.lens(model.layers[:].resid_post)
    lens.topk(3).save("top")
    lens.rank(model.next_tokens).save("rank")
    lens.log_prob(model.next_tokens).save("log_prob")
    lens.kl().save("kl")
    lens.js().save("js")


@contextmanager
def products() -> Iterator[list[int]]:
    """How many states go through the head each time that it is read."""
    found: list[int] = []
    logits = Head.logits

    def counted(self: Head, rows: Tensor, *bounds: int) -> Tensor:
        found.append(len(rows))
        return logits(self, rows, *bounds)

    with patch.object(Head, "logits", counted):
        yield found


# --- it is the same, and done less often -----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5, 100])
@pytest.mark.parametrize("rows", [ONE, ROWS], ids=["one", "of different lengths"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"include_last": True},
        {"max_new_tokens": 0},
        {"max_new_tokens": 1},
        {"cache_implementation": "static"},
        {"do_sample": True, "seed": 3, "temperature": 3.0},
    ],
    ids=["cached", "without a cache", "over the last token", "none", "one", "static cache", "drawn"],
)
def test_numbers_do_not_depend_on_how_many_wait(steps: int, rows: Any, options: dict[str, Any]) -> None:
    plain = in_its_step(looked_at, rows, **options)
    with at_once(steps, positions=steps + 1):
        t = generated(MODEL, looked_at, rows, **options)
    assert tails(t) == 1
    require_same(t, plain)


@pytest.mark.parametrize("steps", [1, 2, 5, 100])
@pytest.mark.parametrize("options", [{}, {"use_cache": False}], ids=["cached", "without a cache"])
def test_rows_that_end_at_different_steps(steps: int, options: dict[str, Any]) -> None:
    tokens: Any = in_its_step(looked_at).tokens
    end = next(token for token in tokens[0][1:-1] if token not in tokens[1])
    options = {"eos_token_id": end, "pad_token_id": 0, **options}
    plain = in_its_step(looked_at, **options)
    assert len({len(row) for row in plain.tokens if isinstance(row, list)}) == 2
    with at_once(steps):
        require_same(generated(MODEL, looked_at, **options), plain)
        # All end long before the steps that were allowed.
        alone = {**options, "max_new_tokens": 50}
        require_same(
            generated(MODEL, looked_at, ROWS[:1], **alone), in_its_step(looked_at, ROWS[:1], **alone)
        )


def top(model: Any, t: Any) -> None:
    model.lens(model.layers[:].resid_post).topk(3).save("top")


def test_the_head_is_read_once_for_several_steps() -> None:
    with products() as each, at_once(1):
        generated(MODEL, top, ONE)
    with products() as together, at_once(3):
        generated(MODEL, top, ONE)
    # The vocabulary fits one chunk. Three layers; the prompt, and of the six steps after it three at once.
    assert each == [3 * 4, *[3] * 6]
    assert together == [3 * 4, 9, 9]
    with products() as uncached, at_once(4):
        generated(MODEL, top, ONE, use_cache=False)
    assert uncached == [3 * 4, 12, 6], "of a pass over all of the text the newest position alone"
    with products() as cut, at_once(100, positions=3):
        generated(MODEL, top, ONE)
    assert cut == [9, 3, 18]


def test_what_waits_is_bounded() -> None:
    (tail,) = compiled(generated(MODEL, top, ONE)).tails
    assert tail is not None
    assert tail.together({"B": 1, "P": 9, "S": 9})[0] == generation_plan.MOST_STEPS
    steps, positions = tail.together({"B": 50, "P": 9, "S": 9})
    assert steps == 4 == -(-generation_plan.ROWS // 150)
    assert positions == generation_plan.WAITING // (150 * 48 * 4)
    with patch.object(generation_plan, "WAITING", 150 * 48 * 4 * 2 + 1):
        assert tail.together({"B": 50, "P": 9, "S": 9}) == (2, 2)
    with patch.object(generation_plan, "WAITING", 1):
        assert tail.together({"B": 50, "P": 9, "S": 9}) == (1, 1)


# --- any block -------------------------------------------------------------------------------------------------------

STATES: dict[str, Callable[[Any, Any], Any]] = {
    "all layers": lambda model, where: where.layers[:].resid_post,
    "some layers": lambda model, where: where.layers[1:].resid_mid,
    "one": lambda model, where: where.layers[1].attn_out,
    "computed": lambda model, where: where.layers[2].resid_post - 2 * where.layers[0].resid_post,
    "of heads": lambda model, where: where.layers[1].z.flatten(-2) * 1.5,
    "translated": lambda model, where: where.layers[0].resid_post @ TRANSLATOR,
    "the newest": lambda model, where: where.layers[:].resid_post[:, -1],
    "beside the newest": lambda model, where: where.layers[1].resid_post - where.layers[1].resid_post[:, -1:],
    "the output": lambda model, where: where.final_norm,
}
ASKS: dict[str, Callable[[Any, Any], Any]] = {
    "top": lambda lens, following: lens.topk(2).values,
    "tokens": lambda lens, following: lens.topk(2).indices,
    "entropy": lambda lens, following: lens.entropy(),
    "max_prob": lambda lens, following: lens.max_prob(),
    "logit": lambda lens, following: lens.logit(5),
    "surprise": lambda lens, following: lens.entropy() * 2 - lens.log_prob(7).exp(),
    "log_prob": lambda lens, following: lens.log_prob(following),
    "rank": lambda lens, following: lens.rank(following),
}
BY_TOKEN = ("log_prob", "rank")
WINDOWS: dict[str, Callable[[Any, Any], Any]] = {
    "every": lambda model, t: model,
    "prompt": lambda model, t: t.prefill,
    "later": lambda model, t: t.decode,
    "some": lambda model, t: t.steps[1:4],
    "one": lambda model, t: t.steps[2:3],
    "last": lambda model, t: t.steps[4:],
}


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    wanted = draw(
        st.lists(
            st.tuples(*map(st.sampled_from, (tuple(STATES), tuple(ASKS), tuple(WINDOWS)))),
            min_size=1,
            max_size=4,
            unique=True,
        )
    )
    written = draw(st.sampled_from([None, None, "before", "from a lens", "held"]))

    def block(model: Any, t: Any) -> None:
        if written == "before":
            model.layers[0].resid_post *= 1.25
        if written == "from a lens":
            sure = model.lens(model.layers[0].resid_post).max_prob()
            model.layers[1].resid_post *= 1 + sure[..., None]
        held = None
        if written == "held":
            held = model.lens(t.prefill.layers[0].resid_post).entropy()[:, -1:]
        for number, (state, ask, window) in enumerate(wanted):
            where = WINDOWS[window](model, t)
            value = STATES[state](model, where)
            if ask in BY_TOKEN and state == "the newest":
                ask = "entropy"
            found = ASKS[ask](model.lens(value), where.next_tokens)
            if held is not None and window in ("later", "some") and state == "one" and ask == "entropy":
                found = found + held
            found.save(f"{number} {state} {ask} {window}")
        model.layers[0].resid_post.norm(dim=-1).save("beside them")

    return block


def refused(run: Callable[..., tl.Generation], *given: Any, **options: Any) -> tl.Generation | str:
    """What a block gives, or what is wrong with it."""
    try:
        return run(*given, **options)
    except TracelensError as error:
        return str(error).split("\n")[0]


@settings(max_examples=25)
@given(
    block=blocks(),
    rows=st.sampled_from([ONE, ROWS]),
    steps=st.sampled_from([1, 2, 3, 100]),
    options=st.sampled_from([{}, {}, {"include_last": True}, {"batch_size": 1}, {"use_cache": False}]),
)
def test_any_block_says_the_same(block: Block, rows: Any, steps: int, options: dict[str, Any]) -> None:
    plain = refused(in_its_step, block, rows, **options)
    with at_once(steps, positions=2):
        t = refused(partial(generated, MODEL), block, rows, **options)
    if isinstance(plain, str) or isinstance(t, str):
        assert t == plain
    else:
        require_same(t, plain)


# --- what waits, and what does not -----------------------------------------------------------------------------------


def test_a_lens_that_a_write_waits_for_is_done_in_its_step() -> None:
    def block(model: Any, t: Any) -> None:
        lens = model.lens(model.layers[0].resid_post)
        lens.entropy().save("entropy")
        sure = lens.max_prob()
        sure.save("sure")
        model.layers[1].resid_post *= 1 + sure[..., None]
        model.lens(model.layers[2].resid_post).entropy().save("after")

    t = generated(MODEL, block)
    require_same(t, in_its_step(block))
    (part,), (tail,) = compiled(t).parts, compiled(t).tails
    assert tail is not None
    assert [save.name for save in part.plan.graph.saves] == ["sure"]
    assert [save.name for save in tail.compiled.plan.graph.saves] == ["entropy", "after"]


def test_what_python_of_the_users_is_given_is_there_in_its_step() -> None:
    seen: list[int] = []

    def look(entropy: Tensor) -> Tensor:
        seen.append(entropy.shape[1])
        return entropy * 2

    def block(model: Any, t: Any) -> None:
        entropy = model.lens(model.layers[1].resid_post).entropy()
        tl.apply(look, entropy, like=entropy).save("twice")

    t = generated(MODEL, block, ONE)
    assert tails(t) == 0
    assert seen == [4, *[1] * (NEW - 1)]


@pytest.mark.parametrize("of", ["newest", "prompt", "one step"])
def test_what_has_no_positions_of_several_steps_does_not_wait(of: str) -> None:
    def block(model: Any, t: Any) -> None:
        where = {"newest": model, "prompt": t.prefill, "one step": t.steps[2:3]}[of]
        state = where.layers[:].resid_post
        model.lens(state[:, -1] if of == "newest" else state).entropy().save("entropy")

    t = generated(MODEL, block)
    assert tails(t) == 0
    require_same(t, in_its_step(block))


def test_a_window_of_steps_waits_for_nobody_behind_it() -> None:
    def block(model: Any, t: Any) -> None:
        for number, window in enumerate((t.steps[1:4], t.steps[4:])):
            lens = model.lens(window.layers[number].resid_post)
            lens.rank(window.next_tokens).save(f"rank {number}")
            lens.entropy().save(f"entropy {number}")

    plain = in_its_step(block)
    for steps in (1, 2, 100):
        with at_once(steps):
            t = generated(MODEL, block)
        assert tails(t) == 2
        require_same(t, plain)


def kept(model: tl.Model, block: Block, *, spread: bool) -> list[str]:
    """What a step keeps for its lenses."""
    with model.record(generation=True) as r:
        block(model, r)
    deferred = defer_lenses(r.graph, 0, spread=spread)
    assert deferred is not None
    graph = deferred.rest
    made = [graph.ops[graph.producer[value]] for one in deferred.kept for value in one.values]
    return [str(op.site) if isinstance(op, Read) else op_text(op).split("(")[0].split()[-1] for op in made]


def test_what_is_computed_with_matrices_stays_on_its_device() -> None:
    def block(model: Any, t: Any) -> None:
        model.lens(model.layers[0].resid_post @ TRANSLATOR).entropy().save("translated")

    # Norms have vectors, and come along.
    assert kept(MODEL, block, spread=False) == ["layers.0.resid_post"]
    assert kept(MODEL, block, spread=True) == ["torch.matmul"]


def test_the_smaller_is_kept() -> None:
    def block(model: Any, t: Any) -> None:
        summed = model.layers[0].resid_post + model.layers[1].resid_post + model.layers[2].resid_post
        model.lens(summed).entropy().save("of a sum")

    (made,) = kept(MODEL, block, spread=False)
    assert made.startswith("torch.")


def test_a_stream_has_all_of_a_step_in_it() -> None:
    with MODEL.record(generation=True) as r:
        top(MODEL, None)
    stream = MODEL._compiler.compile_stream(r.graph)
    assert stream.tails == (None,) * len(stream.parts)
    assert MODEL._compiler.compile_generation(r.graph).tails != stream.tails
    events = list(MODEL.stream(ONE, r, max_new_tokens=NEW, eos_token_id=None))
    whole = generated(MODEL, top, ONE)
    assert torch.equal(torch.cat([event["top.indices"] for event in events], 2), whole["top.indices"])


def test_nothing_waits_without_lenses() -> None:
    def block(model: Any, t: Any) -> None:
        model.layers[:].resid_post.norm(dim=-1).save("norms")

    assert tails(generated(MODEL, block)) == 0


# --- files, failures, and what is said -------------------------------------------------------------------------------


def test_files_hold_the_same(tmp_path: Path) -> None:
    def to(folder: Path) -> Block:
        folder.mkdir()

        def block(model: Any, t: Any) -> None:
            found = model.lens(model.layers[:].resid_post).topk(3)
            found.values.save("values", to=str(folder / "values.safetensors"))
            found.indices.save("indices", to=str(folder / "indices.safetensors"))

        return block

    plain = in_its_step(to(tmp_path / "plain"))
    with at_once(3):
        require_same(generated(MODEL, to(tmp_path / "together")), plain)
    for name in ("values", "indices"):
        files = [sorted(folder.glob(f"{name}*")) for folder in (tmp_path / "plain", tmp_path / "together")]
        assert [file.name for file in files[0]] == [file.name for file in files[1]]


def test_an_error_names_the_line_and_the_next_generation_is_well() -> None:
    def block(model: Any, t: Any) -> None:
        lens = model.lens(model.layers[1].resid_post)
        lens.entropy().save("entropy")

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no room for the logits")

    with at_once(3):
        model = fresh()
        with patch.object(Head, "logits", broken), pytest.raises(OpFailedError) as failed:
            generated(model, block)
        assert "no room for the logits" in str(failed.value)
        assert "lens.entropy().save" in str(failed.value)
        require_same(generated(model, block), in_its_step(block))


def test_explain_says_how_many_wait_and_how_many_bytes() -> None:
    text = generated(MODEL, looked_at, ONE).explain()
    said = re.search(r"steps 0:, at once for up to (\d+) steps, whose operands wait \(([^)]+)\)", text)
    assert said is not None
    steps = int(said[1])
    # Three states and the output, and one token.
    assert said[2] == bytes_text(steps * (4 * 48 * 4 + 8))
    assert "behind earlier positions" in text


def test_one_norm_and_one_copy_for_all_layers() -> None:
    (tail,) = compiled(generated(MODEL, looked_at, ONE)).tails
    assert tail is not None
    functions = [op.function for op in tail.compiled.plan.graph.ops if isinstance(op, Call)]
    assert functions.count("torch.rsqrt") == 1
    assert "torch.stack" not in functions


def test_what_is_predicted_is_held(pretend: Pretend) -> None:
    device = "pretend:0"
    hf = FAMILIES["llama"].build(attn="eager")
    hf = accelerate.dispatch_model(hf, device_map(hf, [device] * 3), main_device=torch.device(device))
    model: Any = tl.wrap(hf)
    rows = [[7, *range(1, 20)]] * 2

    def most(block: Block | None) -> tuple[int, tl.Generation]:
        with watched() as seen:
            with model.generate(rows, max_new_tokens=9, eos_token_id=None) as t:
                model.layers[0].resid_post[:, -1, :1].save("some")
                if block is not None:
                    block(model, t)
            return seen.peak(device), t

    bare, _ = most(None)
    with_lenses, t = most(looked_at)
    held = compiled(t).held(t.graph, {"B": 2, "P": 20, "S": 20}, 9, include_last=False)
    assert held[device] / 3 < with_lenses - bare <= held[device] * 1.05 + 512
    sizes = {"B": 2, "P": 1, "S": 1}
    with at_once(2):
        fewer = compiled(t).held(t.graph, sizes, 50, include_last=False)
    with at_once(9):
        more = compiled(t).held(t.graph, sizes, 50, include_last=False)
        few_steps = compiled(t).held(t.graph, sizes, 2, include_last=False)
        # What waits, and beside it what is in hand while it is done.
        (tail,) = compiled(t).tails
        assert tail is not None
        waits = tail.bytes_kept({**sizes, "P": 9})[device]
        beside = tail.held(t.graph, {**sizes, "P": 9})[device]
        saved = sum(course.nbytes(sizes, 50) for course in compiled(t).courses)
    assert waits == 9 * 2 * (4 * 48 * 4 + 8)
    assert more[device] == waits + beside + saved
    assert fewer[device] < more[device]
    assert few_steps[device] < fewer[device]


# --- more devices ----------------------------------------------------------------------------------------------------

D = [f"pretend:{index}" for index in range(3)]


@pytest.mark.parametrize(
    "where",
    [
        {"layers": [D[0], D[1], D[1]]},
        {"layers": D},
        {"layers": [D[0], D[1], D[1]], "norm": D[1], "head": D[2]},
        {"layers": [D[0], D[1], D[1]], "norm": D[1], "head": "cpu"},
    ],
    ids=["two", "three", "the head elsewhere", "the head in memory"],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_devices_say_what_one_says(pretend: Pretend, family: str, where: dict[str, Any]) -> None:
    def block(model: Any, t: Any) -> None:
        looked_at(model, t)
        model.lens(model.layers[0].resid_post @ TRANSLATOR).entropy().save("translated")

    with patch.object(compiling, "defer_lenses", lambda *_, **__: None):
        plain = generated(tl.wrap(FAMILIES[family].build()), block)
    hf = FAMILIES[family].build()
    places: Any = device_map(hf, **where)
    model: Any = tl.wrap(accelerate.dispatch_model(hf, places, main_device=torch.device(D[0])))
    with at_once(3, positions=2):
        t = generated(model, block)
    assert tails(t) == 1
    require_same(t, plain)
    moved = {(one.source, one.target) for one in t.report.moved if one.what == "transfers"}
    assert moved, "states travel to where the head is"


# --- the pass --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "joins"),
    [
        (lambda z: [z[h] * 2 + 1 for h in range(4)], True),
        (lambda z: [z[h].square().mean(-1, keepdim=True) for h in range(4)], True),
        (lambda z: [z[h].square() for h in range(1, 3)], True),
        (lambda z: [torch.nn.functional.layer_norm(z[h], (12,)) for h in range(4)], True),
        (lambda z: [z[h] - z[h].mean(dim=-1, keepdim=True) for h in range(4)], True),
        (lambda z: [z[h].square() for h in (2, 1)], False),
        (lambda z: [z[h].square() for h in (0, 2)], False),
        (lambda z: [z[h] * (h + 1) for h in range(4)], False),
        (lambda z: [z[h] * z[0] for h in range(4)], True),
        (lambda z: [z[h] * z[h] if h else z[h] + z[h] for h in range(4)], False),
        (lambda z: [z[h].softmax(2) for h in range(4)], False),
        (lambda z: [z[h].mean(2) for h in range(4)], False),
        (lambda z: [z[h] * z[h, ..., 0, :1].mean(-1) for h in range(4)], False),
        # With one more axis in front another one of three would be the third.
        (lambda z: [z[..., :9].unflatten(-1, (3, 3))[h].mean(3) for h in range(4)], False),
    ],
)
def test_members_are_joined_where_that_is_the_same(body: Callable[[Any], Any], joins: bool) -> None:
    def found_in(z: Any) -> Any:
        return torch.stack(body(z.permute(2, 0, 1, 3)))

    with MODEL.record(ONE) as r:
        found_in(MODEL.layers[0].z).save("found")
    graph = join_members(share_values(r.graph))
    stacks = [op for op in graph.ops if isinstance(op, Call) and op.function == "torch.stack"]
    assert (not stacks) == joins
    assert len(graph.ops) <= len(r.graph.ops)
    assert complaints(graph) == []
    assert join_members(graph) == graph
    with MODEL.trace(ONE):
        z = MODEL.layers[0].z.save()
        found = found_in(MODEL.layers[0].z).save()
    assert_close(found.value, found_in(z.value), atol=1e-6, rtol=1e-6)
