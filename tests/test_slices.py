"""``batch_size=``: a batch in slices of its rows gives what it gives at once, or says why it cannot."""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import tracelens as tl
from tests.errors import LLAMA, RAGGED, D, refused
from tests.strategies import graphs
from tests.support.families import FAMILIES
from tests.support.ranks import PoolOf
from tracelens import progress
from tracelens.errors import (
    ConstantChangedError,
    ExtraMemoryError,
    FailedRunError,
    GenerationStepError,
    OpFailedError,
    OptionError,
    RowsMeetError,
    SpecialisedGraphError,
)
from tracelens.ir.graph import Graph

model = LLAMA.model
PLAIN = tl.wrap(FAMILIES["llama"].build())  # of the sizes that graphs are drawn for
V = torch.randn(D, generator=torch.Generator().manual_seed(0))
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-5, "equal_nan": True}


def rows_of(lengths: list[int] | tuple[int, ...], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]


EVEN = rows_of([5] * 7)
UNEVEN = rows_of([3, 5, 2, 7, 7, 1, 4])
STRENGTHS = torch.linspace(-1, 1, 7)
BATCHES = {"even": EVEN, "ragged": UNEVEN}


def assert_same(found: Any, expected: Any) -> None:
    """The names, kinds, shapes, dtypes and numbers of two results."""
    assert list(found) == list(expected)
    for name in expected:
        one, other = found[name], expected[name]
        assert type(one) is type(other), name
        if isinstance(other, list):
            assert len(one) == len(other)
        ones, others = (one, other) if isinstance(other, list) else ([one], [other])
        for a, b in zip(ones, others, strict=True):
            assert a.shape == b.shape, name
            assert a.dtype == b.dtype, name
            assert a.is_contiguous(), name
            torch.testing.assert_close(a, b, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def write_and_save(strengths: torch.Tensor) -> None:
    """A steering of each row by its own strength, and saves of every kind."""
    model.layers[0].resid_post += strengths[:, None, None] * V
    h = model.layers[1].resid_post
    named = tl.constant(strengths, name="named") * 2
    h.save("streams")
    h[:, -1].save("last")
    model.layers[:].resid_post.save("all layers")
    model.layers[:].resid_post[:, -1].stack().save("stacked in the block")
    model.logits[:, -1].topk(3).indices.save("best")
    (h[:, -1] * named[:, None]).save("computed constants")
    (h[:, -1].transpose(0, 1) * strengths).save("rows as a second axis")
    h.tok[0].save("token")
    tl.where(strengths[:, None] > 0, h[:, -1], 0.0).save("chosen rows")
    model.layers[0].pattern.save("pattern")
    tl.masked_mean(h).save("mean")
    model.unembed[3].save("a parameter")
    h[:, -1].bfloat16().save("half")


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_a_trace_in_slices_is_a_trace(rows: list[list[int]], size: int) -> None:
    found = []
    for batch_size in (None, size):
        with model.trace(rows, batch_size=batch_size) as t:
            write_and_save(STRENGTHS)
            gradient = tl.grad(model.logits[:, -1, 5].sum(), wrt=model.layers[2].resid_post)
            gradient.save("gradient")
        found.append(t)
    whole, sliced = found
    assert_same(sliced.results, whole.results)
    assert sliced.results.entries["last"].axes == whole.results.entries["last"].axes
    for batch_size in (None, size):  # without the steering it is something else
        with model.trace(rows, batch_size=batch_size) as t:
            model.layers[1].resid_post[:, -1].save("last")
        assert not torch.allclose(t["last"], whole["last"], atol=1e-2)


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_a_program_in_slices_is_the_program(rows: list[list[int]]) -> None:
    with model.record(rows) as r:
        write_and_save(STRENGTHS)
    for program in (
        model.compile(r),
        model.compile(tl.Graph.from_json(r.graph.to_json(), constants=r.graph.constants_bytes())),
    ):
        other = STRENGTHS.flip(0) * 3
        for constants in ({}, {"named": other}):
            whole = program(rows, **constants)
            for size in (1, 3, 5):
                assert_same(program(rows, batch_size=size, **constants), whole)
    with model.record() as r:
        model.layers[1].resid_post += tl.constant(1.0, name="strength") * V
        model.logits[:, -1].save("logits")
    program = model.compile(r)
    assert_same(program(rows, batch_size=4, strength=2.0), program(rows, strength=2.0))


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(
    "options",
    [{}, {"include_last": True}, {"max_new_tokens": 0}, {"max_new_tokens": 0, "include_last": True}],
    ids=str,
)
def test_a_generation_in_slices_is_a_generation(rows: list[list[int]], options: dict[str, Any]) -> None:
    with model.generate(rows, max_new_tokens=6, eos_token_id=None) as t:
        model.layers[0].resid_post += STRENGTHS[:, None, None] * V
    given = {"max_new_tokens": 6, "eos_token_id": _ends(t.tokens), **options}
    found = []
    for batch_size in (None, 1, 2, 3, 7):
        with model.generate(rows, batch_size=batch_size, **given) as t:
            model.layers[0].resid_post += STRENGTHS[:, None, None] * V
            h = model.layers[1].resid_post
            h.save("streams")
            h[:, -1].save("newest")
            model.layers[:].resid_post[:, -1].save("newest of all layers")
            model.logits[:, -1].argmax(-1).save("picks")
            (h[:, -1] > 0).save("signs")
            t.decode.layers[1].resid_post.save("decode")
            t.prefill.layers[1].pattern.save("prompt")
            t.prefill.layers[1].resid_post.tok[-1].save("last of the prompt")
            t.steps[1:3].layers[1].resid_post[:, -1].save("window")
            t.steps[1].layers[1].resid_post.save("one step")
            t.steps[2].layers[:].resid_post[:, -1].save("one step of all layers")
            t.steps[3].layers[1].pattern.save("one pattern")
            t.steps[9].layers[1].resid_post.save("never")
            t.steps[8:].layers[1].resid_post.save("beyond")
            model.unembed[3].save("a parameter")
        found.append(t)
    whole = found[0]
    if not options:
        assert len({len(row) for row in whole.tokens}) > 2, "rows should end at different steps"
    reached = [name for name in whole.results if _is_there(whole, name)]
    assert "never" not in reached
    for t in found[1:]:
        assert t.tokens == whole.tokens
        assert torch.equal(t.valid, whole.valid)
        assert t.text == whole.text
        assert [name for name in t.results if _is_there(t, name)] == reached
        assert_same({name: t[name] for name in reached}, {name: whole[name] for name in reached})


def _ends(texts: list[list[int]]) -> list[int]:
    """Two tokens at which these texts end after as many different numbers of steps as can be."""

    def lengths(ends: tuple[int, ...]) -> int:
        return len({next((at for at, token in enumerate(text) if token in ends), 9) for text in texts})

    return list(
        max(itertools.combinations(sorted({token for text in texts for token in text}), 2), key=lengths)
    )


def _is_there(t: tl.Generation, name: str) -> bool:
    try:
        t[name]
    except GenerationStepError:
        return False
    return True


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=6),
    size=st.integers(1, 7),
    steps=st.integers(0, 5),
    seed=st.integers(0, 99),
    ends=st.integers(0, 60),
)
def test_any_batch_in_slices_of_any_size(
    lengths: list[int], size: int, steps: int, seed: int, ends: int
) -> None:
    rows, strengths = rows_of(lengths, seed), torch.linspace(-1, 1, len(lengths))
    traces, texts = [], []
    for batch_size in (None, size):
        with model.trace(rows, batch_size=batch_size) as t:
            write_and_save(strengths)
        traces.append(t)
        options: dict[str, Any] = {"max_new_tokens": steps, "eos_token_id": list(range(ends)) or None}
        with model.generate(rows, batch_size=batch_size, **options) as g:
            model.layers[0].resid_post += strengths[:, None, None] * V
            model.layers[:].resid_post.save("streams")
            g.steps[1:3].layers[1].resid_post[:, -1].save("window")
            best = model.logits[:, -1].topk(2).values.save("best")
        texts.append(g)
        # A choice between two tokens that are as good as each other is no question of the library.
        assume(not ((best[..., 0] - best[..., 1]) < 1e-3).any())
    assert_same(traces[1].results, traces[0].results)
    assert texts[1].tokens == texts[0].tokens
    assert_same(texts[1].results, texts[0].results)


# --- what keeps rows apart, and what does not ------------------------------------------------------------------------

APART: dict[str, Callable[[Any], Any]] = {
    "sum over features": lambda h: h.sum(-1),
    "position mean": lambda h: h.mean(1),
    "flattened": lambda h: h.flatten(1),
    "turned": lambda h: h.transpose(0, 1),
    "stack": lambda h: torch.stack([h, h * 2]),
    "table": lambda h: model.unembed[model.logits.argmax(-1)],
    "number of rows as a number": lambda h: h / h.shape[0],
    "a row number for each row": lambda h: h + torch.arange(7)[:, None, None],
    "einsum with a matrix a row": lambda h: torch.einsum("bpd,bdk->bpk", h, MATRICES),
    "matmul with a matrix a row": lambda h: h @ MATRICES,
    "written rows": lambda h: _put(h),
    "constants with as many features as rows": lambda h: h[..., :7] * torch.arange(7),
    "both": lambda h: h[..., :7] * torch.arange(49).reshape(7, 1, 7),
    "gathered": lambda h: h.gather(-1, torch.arange(7)[:, None, None].expand(7, 5, 1)),
    "heads": lambda h: model.layers[1].head(1).z.norm(dim=-1),
    "nothing of a site": lambda h: tl.constant(V, name="v").norm() * STRENGTHS,
    "logits of each row's token": lambda h: model.logits[:, -1].gather(-1, torch.arange(7)[:, None]),
    "more of them": lambda h: model.logits[:, -1].gather(-1, torch.arange(7)[:, None]).squeeze(1) * 2,
}
MATRICES = torch.randn(7, D, 3, generator=torch.Generator().manual_seed(2))
MEET: dict[str, Callable[[Any], Any]] = {
    "row mean": lambda h: h.mean(0),
    "all mean": lambda h: h.mean(),
    "sorted": lambda h: h.sort(0).values,
    "soft-max": lambda h: h.softmax(0),
    "summed so far": lambda h: h.cumsum(0),
    "centred": lambda h: h - h.mean(0),
    "first": lambda h: h[0],
    "last": lambda h: h[-1:],
    "picked": lambda h: h[torch.arange(7), torch.arange(7) % 5],
    "all against all": lambda h: h[:, -1] @ h[:, -1].T,
    "flipped": lambda h: h.flip(0),
    "rolled": lambda h: h.roll(1, 0),
    "joined": lambda h: torch.cat([h, h], 0),
    "merged": lambda h: h.flatten(0, 1),
    "a shape with the number of rows": lambda h: h.reshape(h.shape[0], -1),
    "python": lambda h: tl.apply(torch.relu, h),
    "gradient of a mean": lambda h: tl.grad(model.logits[:, -1, 3].mean(), wrt=h),
    "gradient of a sum of squares of sums": lambda h: tl.grad(model.logits[:, -1, 3].sum() ** 2, wrt=h),
    "loss": lambda h: model.logits[:, -1, 3].sum(),
}


def _put(h: Any) -> Any:
    model.layers[2].resid_post[:, -1] = STRENGTHS[:, None] * V
    model.layers[2].mlp_out = STRENGTHS[:, None, None].expand(7, 5, D)
    return model.logits[:, -1]


@pytest.mark.parametrize("function", APART.values(), ids=APART)
def test_what_keeps_rows_apart(function: Callable[[Any], Any]) -> None:
    found = []
    for size in (None, 3):
        with model.trace(EVEN, batch_size=size) as t:
            function(model.layers[1].resid_post).save("f")
        found.append(t.results)
    assert_same(found[1], found[0])


@pytest.mark.parametrize("function", MEET.values(), ids=MEET)
def test_what_lets_rows_meet_is_refused_before_anything_runs(function: Callable[[Any], Any]) -> None:
    with model.trace(EVEN):
        saved = function(model.layers[1].resid_post).save()
    assert saved.value is not None
    before = LLAMA.forwards
    with pytest.raises(RowsMeetError) as caught, model.trace(EVEN, batch_size=3):
        function(model.layers[1].resid_post).save()
    assert caught.value.at is not None
    assert caught.value.at.filename == __file__
    assert LLAMA.forwards == before


def test_prompts_that_are_named_are_rows_of_the_whole() -> None:
    with model.trace(UNEVEN) as t:
        t.prompts[1].layers[1].resid_post.save("h")
    assert t["h"].shape == (1, 5, D)
    with (
        refused(RowsMeetError, "t.prompts", instead="no batch_size="),
        model.trace(UNEVEN, batch_size=2) as t,
    ):
        t.prompts[1].layers[1].resid_post.save("h")  # <-


@pytest.mark.parametrize(
    "function", [lambda h: h / h.shape[0], lambda h: h + h.shape[0], lambda h: h.roll(h.shape[0], -1)]
)
def test_a_symbol_for_the_number_of_rows_is_not_that_of_a_slice(function: Callable[[Any], Any]) -> None:
    with model.record() as r:
        function(model.layers[1].resid_post).save("f")
    program = model.compile(r)
    assert program(EVEN)["f"].shape == (7, 5, D)
    with pytest.raises(RowsMeetError, match="size of the whole batch"):
        program(EVEN, batch_size=2)


def test_a_number_of_positions_is_that_of_the_whole() -> None:
    with model.record(EVEN) as r:
        h = model.layers[1].resid_post
        (h[:, -1] / h.shape[1]).save("f")
        (h[:, -1] * torch.arange(7)[:, None]).save("g")
    program = model.compile(r)
    assert_same(program(EVEN, batch_size=3), program(EVEN))
    before = LLAMA.forwards
    rows = rows_of([3, 5, 2, 4, 1, 1, 1])
    with pytest.raises(SpecialisedGraphError, match="recorded for 5 positions") as caught:
        program(rows, batch_size=3)
    assert caught.value.__notes__ == ["It went wrong in rows 3 to 5 of 7."]
    assert LLAMA.forwards == before


@pytest.mark.parametrize("kind", ["any", "aligned", "pinned", "gradients"])
@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), size=st.integers(1, 3), ragged=st.booleans())
def test_random_graphs_in_slices_are_the_same_or_refused(
    kind: str, data: st.DataObject, size: int, ragged: bool
) -> None:
    rows = rows_of([4, 2, 3, 4] if ragged else [4, 4, 4, 4])
    sizes = {"B": 4, "P": 4, "S": 4}
    strategy = {
        "any": graphs(),
        "aligned": graphs(aligned=False),
        "pinned": graphs(sizes=sizes, pinned=True),
        "gradients": graphs(gradients=True),
    }[kind]
    graph: Graph = data.draw(strategy)
    program = PLAIN.compile(graph)
    try:
        whole = program(rows)
    except tl.TracelensError:  # positions that are mixed, where rows differ in length
        assume(False)
        raise
    try:
        found = program(rows, batch_size=size)
    except (RowsMeetError, SpecialisedGraphError):
        return
    assert list(found) == list(whole)
    for name in whole:
        ones, others = (value if isinstance(value, list) else [value] for value in (whole[name], found[name]))
        for one, other in zip(ones, others, strict=True):
            assert one.shape == other.shape
            assert one.dtype == other.dtype
            if one.is_floating_point():
                # Some graphs cast to halves in their middle, where a last bit of float32 can move a rounding.
                finite = one.isfinite() & other.isfinite()
                scale = max(one[finite].double().abs().max().item() if finite.any() else 0.0, 1e-3)
                assert ((one.double() - other.double()).abs() <= 2e-2 * scale)[finite].all(), name


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_slice_that_fails_names_its_rows_and_delivers_nothing(tmp_path: Path) -> None:
    calls = 0

    def fail(module: object, args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of memory")

    path = tmp_path / "h.safetensors"
    handle = LLAMA.hf.model.layers[1].register_forward_pre_hook(fail)
    state = LLAMA._state()
    try:
        with pytest.raises(RuntimeError, match="out of memory") as caught, model.trace(EVEN, batch_size=2):
            h = model.layers[1].resid_post.save(to=str(path))
        assert caught.value.__notes__ == ["It went wrong in rows 4 to 5 of 7."]
        with pytest.raises(FailedRunError):
            _ = h.value
        assert LLAMA._state() == state
        calls = -4
        with (
            pytest.raises(RuntimeError) as caught,
            model.generate(EVEN, max_new_tokens=2, batch_size=2, eos_token_id=None),
        ):
            h = model.layers[1].resid_post.save()
        assert caught.value.__notes__ == ["It went wrong in row 6 of 7."]
    finally:
        handle.remove()
    assert not list(tmp_path.iterdir())
    LLAMA.check()


def test_an_operation_that_fails_in_a_slice_tells_its_line() -> None:
    index = torch.zeros(7, 5, 1, dtype=torch.long)
    index[5, 0] = 99
    with refused(OpFailedError, "index 99|out of", instead=None, forwards=2), model.trace(EVEN, batch_size=3):
        model.layers[1].resid_post.gather(-1, index).save()  # <-


def test_batch_sizes_that_are_none() -> None:
    for wrong in (0, -1, 2.0, True, "8"):
        with refused(
            OptionError, "positive whole number of rows", instead="batch_size=8", text="batch_size=wrong"
        ):
            model.trace(EVEN, batch_size=wrong)
        with refused(OptionError, "positive whole", instead="batch_size=8", text="batch_size=wrong"):
            model.generate(EVEN, max_new_tokens=1, batch_size=wrong)
    with model.record() as r:
        model.logits[:, -1].save("p")
    program = model.compile(r)
    with refused(OptionError, "positive whole", instead="batch_size=8", text="batch_size=0"):
        program(EVEN, batch_size=0)


def test_options_that_are_about_all_rows_are_refused() -> None:
    with (
        pytest.raises(OptionError, match="prefix_allowed_tokens_fn"),
        model.generate(
            EVEN, max_new_tokens=1, batch_size=2, prefix_allowed_tokens_fn=lambda row, text: [1, 2]
        ),
    ):
        model.logits[:, -1].save()


def test_a_constant_that_was_changed_is_refused_before_the_first_slice() -> None:
    strengths = STRENGTHS.clone()
    before = LLAMA.forwards
    with pytest.raises(ConstantChangedError), model.trace(EVEN, batch_size=2):  # noqa: PT012  # the block is what raises
        (model.layers[1].resid_post * strengths[:, None, None]).save()
        (model.layers[1].resid_post[:, -1] * strengths[:, None]).save()
        strengths.zero_()
    assert LLAMA.forwards == before


def test_extra_memory_is_that_of_a_slice() -> None:
    size = 7 * 5 * D * 4
    with pytest.raises(ExtraMemoryError), model.trace(EVEN, max_extra_memory=size // 2):
        model.layers[1].resid_post.save()
    with model.trace(EVEN, max_extra_memory=size // 2, batch_size=2):
        h = model.layers[1].resid_post.save()
    assert h.shape == (7, 5, D)
    with pytest.raises(ExtraMemoryError), model.trace(EVEN, max_extra_memory=size // 2, batch_size=6):
        model.layers[1].resid_post.save()
    with model.generate(EVEN, max_new_tokens=3, max_extra_memory=size, batch_size=2):
        h = model.layers[1].resid_post[:, -1].save()
    with (
        pytest.raises(ExtraMemoryError),
        model.generate(EVEN, max_new_tokens=3, max_extra_memory=200, batch_size=2),
    ):
        model.layers[1].resid_post.save()


# --- what is around it -----------------------------------------------------------------------------------------------


def test_a_batch_of_no_more_rows_is_one_slice() -> None:
    before = LLAMA.forwards
    with model.trace(EVEN, batch_size=7) as t:
        model.layers[1].resid_post.mean(0).save("over all rows")
    assert LLAMA.forwards == before + 1
    assert t["over all rows"].shape == (5, D)
    with model.trace(EVEN, batch_size=3) as t:
        model.logits[:, -1].save()
    assert LLAMA.forwards == before + 4


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES)
def test_files_have_the_keys_that_they_have_without_slices(rows: list[list[int]], tmp_path: Path) -> None:
    keys: list[dict[str, torch.Tensor]] = []
    for size in (None, 3):
        path = str(tmp_path / "h.safetensors")
        with model.trace(rows, batch_size=size):
            h = model.layers[1].resid_post.save("h", to=path)
            p = model.logits[:, -1].save("p", to=path)
            q = model.logits[:, -1].save("q")
        assert torch.equal(p.value, q.value)
        assert len(h.value) == 7
        with safe_open(path, framework="pt") as file:
            keys.append({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118  # not a dict
        path = str(tmp_path / "g.safetensors")
        with model.generate(rows, max_new_tokens=3, batch_size=size, eos_token_id=None):
            model.layers[1].resid_post.save("h", to=path)
            model.layers[1].resid_post[:, -1].save("p", to=path)
        with safe_open(path, framework="pt") as file:
            keys.append({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118  # not a dict
    assert sorted(one.name for one in tmp_path.iterdir()) == ["g.safetensors", "h.safetensors"]
    assert_same(dict(sorted(keys[2].items())), dict(sorted(keys[0].items())))
    assert_same(dict(sorted(keys[3].items())), dict(sorted(keys[1].items())))


def test_what_stays_on_its_device_stays_there() -> None:
    for size in (None, 2):
        with model.trace(UNEVEN, batch_size=size) as t:
            model.layers[1].resid_post.save("h", device="keep")
            model.logits[:, -1].save("p", device="keep")
        assert len(t["h"]) == 7
        assert t["p"].device.type == "cpu"


def test_a_report_adds_up() -> None:
    with model.trace(EVEN, batch_size=2) as t:
        model.layers[1].resid_post.save()
    with model.trace(EVEN[:2]) as one:
        model.layers[1].resid_post.save()
    assert t.report.seconds > 0
    assert [extra.bytes for extra in t.report.held] == [extra.bytes for extra in one.report.held]
    assert "ms" in repr(t.report)


def test_tokens_are_drawn_slice_by_slice_with_seeds_of_their_own() -> None:
    texts = []
    same = [EVEN[0]] * 6
    for seed in (5, 5, 6):
        with model.generate(same, max_new_tokens=8, do_sample=True, seed=seed, batch_size=2) as t:
            pass
        texts.append(t.tokens)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][:2] != texts[0][2:4] != texts[0][4:]
    with model.generate(
        EVEN[:2], max_new_tokens=4, do_sample=True, seed=5, num_return_sequences=3, batch_size=2
    ) as t:
        h = model.layers[1].resid_post[:, -1].save()
    assert len(t.tokens) == 6
    assert h.shape[1] == 6


def test_texts_that_come_to_one_length_from_prompts_of_several_are_a_list() -> None:
    rows = rows_of([4, 3], seed=1)
    with model.generate(rows, max_new_tokens=4, eos_token_id=None) as t:
        pass
    ends = [t.tokens[0][1], t.tokens[1][2]]
    found = []
    for size in (None, 1):
        with model.generate(rows, max_new_tokens=4, eos_token_id=ends, batch_size=size) as t:
            model.layers[1].resid_post.save("streams")
        found.append(t)
    assert [len(text) for text in found[0].tokens] == [2, 3]
    assert [tuple(part.shape) for part in found[0]["streams"]] == [(1, 5, D)] * 2
    assert_same(found[1].results, found[0].results)


def test_a_stream_is_of_all_rows() -> None:
    with refused(OptionError, "one step of all rows", instead="model.generate", text="batch_size=2"):
        model.stream(EVEN, max_new_tokens=2, batch_size=2)


def test_what_the_last_pass_adds_to_a_text_of_one_token() -> None:
    """The pass over the last token has a position, also where the text ended with its first token."""
    with model.generate(EVEN[:2], max_new_tokens=1, include_last=True) as t:
        streams = model.layers[1].resid_post.save()
        decode = t.decode.layers[1].resid_post.save()
    assert streams.shape == (2, 6, D)
    assert torch.equal(decode.value, streams.value[:, 5:])


def test_the_bar_is_there_where_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, seen in ((io.StringIO(), False), (Terminal(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        with model.trace(EVEN, batch_size=2):
            model.logits[:, -1].save()
        assert bool(stream.getvalue()) is seen
        assert ("7/7" in stream.getvalue() or "/7" in stream.getvalue()) is seen
    monkeypatch.setattr(sys, "stderr", silent := Terminal())
    with model.trace(EVEN, batch_size=7):
        model.logits[:, -1].save()
    assert not silent.getvalue()
    assert list(progress.watched([1, 2], [1, 1], "row", progress=False)) == [1, 2]
    assert not silent.getvalue()


def test_ranks_run_slices_too(tiny_folder: Path, ranks_of: PoolOf) -> None:
    one = tl.load(tiny_folder)
    with tl.load(tiny_folder, tp=2, ranks=ranks_of(2)) as shared:
        width = one.config.hidden_size
        found = []
        for m, size in ((one, None), (shared, None), (shared, 3)):
            v = torch.linspace(-1, 1, width)
            with m.trace(UNEVEN, batch_size=size) as t:
                m.layers[0].resid_post += STRENGTHS[:, None, None] * v
                named = tl.constant(STRENGTHS, name="s") * 2
                m.layers[1].resid_post.save("h")
                (m.layers[1].mlp_act[:, -1] * named[:, None]).save("neurons")
                m.logits[:, -1].save("p")
            with m.generate(UNEVEN, max_new_tokens=4, batch_size=size, eos_token_id=None) as g:
                m.layers[0].resid_post += STRENGTHS[:, None, None] * v
                m.layers[1].resid_post.save("h")
                m.layers[1].resid_post[:, -1].save("newest")
            found.append((t.results, g.results, g.tokens))
        for trace, texts, tokens in found[1:]:
            assert tokens == found[0][2]
            assert_same(trace, found[0][0])
            assert_same(texts, found[0][1])


def test_rows_of_a_batch_are_padded_to_their_own_longest() -> None:
    batch = model.prepare(UNEVEN).batch
    part = batch.rows(0, 3)
    assert part.sizes == {"B": 3, "P": 5}
    assert part.pads == (2, 0, 3)
    assert [part.tokens(row) for row in range(3)] == UNEVEN[:3]
    alone = model.prepare(UNEVEN[:3]).batch
    for name in ("mask", "position_ids"):
        assert torch.equal(getattr(part, name), getattr(alone, name))
    assert RAGGED
    texts = model.prepare(["Paris is", "The capital", "Hello"])
    assert texts.rows(1, 3).batch.texts == ("The capital", "Hello")
