"""Writing to sites: shapes, dtypes, stale values, targets that are none, values from the future."""

from __future__ import annotations

from typing import Any

import einops
import numpy as np
import pytest
import torch

import tracelens as tl
from tests.errors import GPT2, IDS, LLAMA, D, refused
from tracelens.errors import (
    CausalityError,
    DtypeError,
    OpFailedError,
    ShapeError,
    StaleValueError,
    UnsupportedFunctionError,
    WriteTargetError,
)

model, gpt2 = LLAMA.model, GPT2.model
V = torch.ones(D)


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_a_tensor_of_another_width() -> None:
    with refused(ShapeError, "f32[7]", "48", "P = 4", instead="value.shape"), model.trace(IDS):
        model.layers[0].resid_post += torch.ones(7)  # <-
        model.logits.save()
    with refused(ShapeError, "f32[7]", "48", instead="that shape"), model.trace(IDS):
        model.layers[0].resid_post = torch.ones(7)  # <-
        model.logits.save()
    with refused(ShapeError, "f32[7]", "[:, -1]", "48", instead="that shape"), model.trace(IDS):
        model.layers[0].resid_post[:, -1] = torch.ones(7)  # <-
        model.logits.save()
    with model.trace(IDS):
        h = model.layers[0].resid_post
        assert h.shape == (1, 4, D)
        model.layers[0].resid_post += torch.ones(h.shape[-1])
        model.layers[0].resid_post[:, -1] = torch.ones(1, D)
        model.logits.save()


def test_a_site_is_not_stretched() -> None:
    with refused(ShapeError, "f32[2,4,48]", instead="that shape"), model.trace(IDS):
        model.layers[0].resid_post = torch.ones(2, 4, D)  # <-
        model.logits.save()
    with refused(ShapeError, "48", instead="that shape"), model.trace(IDS):
        model.layers[0].resid_post += torch.ones(2, 1, 1)  # <-
        model.logits.save()


@pytest.mark.parametrize(
    "compute",
    [
        lambda h: h @ torch.ones(47, 3),
        lambda h: h.mean(5),
        lambda h: h.reshape(3, 7),
        lambda h: h.transpose(0, 5),
        lambda h: torch.cat([h, model.logits], dim=1),
        lambda h: torch.stack([h, h[:, -1]]),
        lambda h: torch.einsum("bpd,de->bpe", h, torch.ones(47, 3)),
        lambda h: torch.where(h > 0, torch.ones(7), h),
        lambda h: torch.nn.Linear(47, 3)(h),
        lambda h: torch.nn.LayerNorm(47)(h),
        lambda h: h.split([40, 9], dim=-1),
        lambda h: h.topk(99),
    ],
)
def test_functions_of_shapes_that_do_not_fit(compute) -> None:
    with refused(ShapeError, r"4[89]|\d", instead="value.shape", text="lambda h:"), model.trace(IDS):
        compute(model.layers[0].resid_post).save()


@pytest.mark.parametrize(
    ("index", "says"),
    [
        (lambda h: h[:, 9], "9 is outside an axis of size 4"),
        (lambda h: h[:, -5], "-5 is outside an axis of size 4"),
        (lambda h: h[1], "1 is outside an axis of size 1"),
        (lambda h: h[0, 0, 0, 0], "4 indices for a tensor of 3 axes"),
        (lambda h: h[:, torch.tensor([0, 1]), torch.tensor([0, 1, 2])], "do not broadcast"),
    ],
)
def test_indices_that_do_not_fit(index, says: str) -> None:
    instead = "a number from -" if "outside" in says else None
    with refused(ShapeError, says, instead=instead, text="lambda h:"), model.trace(IDS):
        index(model.layers[0].resid_post).save()


def test_a_step_backwards() -> None:
    with refused(ShapeError, "[::-1]", "step", instead="value.flip(axis)"), model.trace(IDS):
        model.layers[0].resid_post[::-1].save()  # <-
    with model.trace(IDS):
        model.layers[0].resid_post.flip(0).save()


@pytest.mark.parametrize(
    "pattern",
    ["b p (h d) -> b p h d", "b p h d -> b p h d", "b p -> p b"],
)
def test_patterns_that_do_not_fit(pattern: str) -> None:
    sizes = {"h": 7} if "(h d)" in pattern else {}
    with refused(ShapeError, "einops", "48", instead="a pattern"), model.trace(IDS):
        einops.rearrange(model.layers[0].resid_post, pattern, **sizes).save()  # <-
    with model.trace(IDS):
        einops.rearrange(model.layers[0].resid_post, "b p (h d) -> b p h d", h=6).save()


def test_index_tensors_are_looked_at_when_the_model_runs() -> None:
    with (
        refused(OpFailedError, "IndexError", "index 9", "size 4", instead=None, forwards=1),
        model.trace(IDS),
    ):
        model.layers[0].resid_post[:, torch.tensor([9])].save()  # <-
    with model.trace(IDS):
        model.layers[0].resid_post[:, torch.tensor([3])].save()


# --- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "word"),
    [(torch.long, "integer"), (torch.int32, "integer"), (torch.bool, "bool"), (torch.complex64, "complex")],
)
def test_tensors_that_are_no_floats_into_a_float_site(dtype: torch.dtype, word: str) -> None:
    bad = torch.ones(D, dtype=dtype)
    with refused(DtypeError, f"{word} values", "f32", instead="value.to(torch.float32)"), model.trace(IDS):
        model.layers[0].resid_post = bad  # <-
        model.logits.save()
    with refused(DtypeError, f"{word} values", instead="value.to(torch.float32)"), model.trace(IDS):
        model.layers[0].resid_post[:, -1] = bad  # <-
        model.logits.save()
    with refused(DtypeError, f"{word} values", instead="value.to(torch.float32)"), model.trace(IDS):
        model.layers[0].resid_post.tok[-1] = bad  # <-
        model.logits.save()
    if dtype is not torch.complex64:
        with model.trace(IDS):
            model.layers[0].resid_post = bad.to(torch.float32)
            model.logits.save()


def test_integers_and_booleans_in_arithmetic_are_promoted() -> None:
    with model.trace(IDS):
        model.layers[0].resid_post += torch.ones(D, dtype=torch.long)
        model.layers[0].resid_post *= torch.ones(D, dtype=torch.bool)
        model.layers[0].resid_post[:, -1] = 0
        model.layers[0].resid_post[:, 0] = True
        model.logits.save()


def test_complex_numbers() -> None:
    with refused(DtypeError, "complex", instead="value.to(torch.float32)"), model.trace(IDS):
        model.layers[0].resid_post += torch.ones(D, dtype=torch.complex64)  # <-
        model.logits.save()
    with refused(DtypeError, "1j", instead=None), model.trace(IDS):
        model.layers[0].resid_post = 1j  # <-
        model.logits.save()


def test_a_computed_value_of_integers() -> None:
    with refused(DtypeError, "integer", instead="value.to(torch.float32)"), model.trace(IDS):
        model.layers[0].resid_post[:, -1] = model.layers[0].resid_post.argmax(-1)[:, -1:]  # <-
        model.logits.save()


def test_numpy_in_double_precision() -> None:
    direction = np.ones(D)
    for use in (
        lambda: model.layers[0].resid_post + direction,
        lambda: direction + model.layers[0].resid_post,
        lambda: direction * model.layers[0].resid_post,
        lambda: setattr(model.layers[0], "resid_post", direction),
        lambda: model.layers[0].resid_post.__setitem__(slice(None), direction),
    ):
        with (
            refused(DtypeError, "float64", "(48,)", instead=".astype(np.float32)", text="lambda:"),
            model.trace(IDS),
        ):
            use()
            model.logits.save()
    single = direction.astype(np.float32)
    with model.trace(IDS):
        model.layers[0].resid_post += single
        model.layers[0].resid_post = single + model.layers[0].resid_post
        model.layers[0].resid_post[:] = torch.from_numpy(direction)
        model.logits.save()


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([object()]), np.zeros(D, dtype="datetime64[s]")])
def test_arrays_that_hold_no_numbers(array: Any) -> None:
    with refused(DtypeError, str(array.dtype), instead=None), model.trace(IDS):
        model.layers[0].resid_post[:] = array  # <-
        model.logits.save()


def test_sparse_tensors() -> None:
    with refused(DtypeError, "sparse", instead="x.to_dense()"), model.trace(IDS):
        model.layers[0].resid_post += V.to_sparse()  # <-
        model.logits.save()
    with model.trace(IDS):
        model.layers[0].resid_post += V.to_sparse().to_dense()
        model.logits.save()


@pytest.mark.parametrize(
    "compute",
    [
        lambda h: h & 3,
        lambda h: ~h,
        lambda h: torch.nn.Embedding(D, 3)(h),
        lambda h: tl.where(h, 1.0, 0.0),
        lambda h: h.imag,
    ],
)
def test_functions_of_dtypes_that_do_not_fit(compute) -> None:
    with refused(DtypeError, instead=None, text="lambda h:"), model.trace(IDS):
        compute(model.layers[0].resid_post).save()


@pytest.mark.parametrize(
    "compute",
    [
        lambda h: h @ torch.ones(D, 3, dtype=torch.float64),
        lambda h: torch.nn.Linear(D, 3).half()(h),
    ],
)
def test_products_of_several_dtypes(compute) -> None:
    says, instead = "tensors of one dtype", "tensor.to(value.dtype)"
    with refused(DtypeError, says, instead=instead, text="lambda h:"), model.trace(IDS):
        compute(model.layers[0].resid_post).save()


@pytest.mark.parametrize("dtype", [torch.quint8, float])
def test_a_dtype_that_is_none(dtype: Any) -> None:
    with refused(DtypeError, str(dtype), instead="dtype=torch.float32"), model.trace(IDS):
        model.layers[0].resid_post.save(dtype=dtype)  # <-
    with refused(DtypeError, str(dtype), instead="dtype=torch.float32"), model.trace(IDS):
        model.layers[0:2].resid_post.save(dtype=dtype)  # <-
    with model.trace(IDS):
        h = model.layers[0].resid_post.save(dtype=torch.float16)
    assert h.value.dtype is torch.float16


# --- stale values ----------------------------------------------------------------------------------------------------

USES = [
    lambda h: h + 1,
    lambda h: 1 - h,
    lambda h: torch.relu(h),
    lambda h: torch.cat([h, h]),
    lambda h: h.mean(),
    lambda h: h[0],
    lambda h: h.__setitem__(0, 1),
    lambda h: h.tok[0],
    lambda h: h.save(),
    lambda h: setattr(model.layers[0], "resid_post", h),
    lambda h: setattr(model.layers[1], "resid_post", h),
]


@pytest.mark.parametrize("use", USES)
def test_using_a_value_after_writing_through_it(use) -> None:
    for assign in (
        lambda h: h.__setitem__((slice(None), -1), 0),
        lambda h: h.tok.__setitem__(-1, 0),
        lambda h: h[:, -1].__setitem__((slice(None), slice(3)), 0),
    ):
        block = model.trace(IDS)
        says = "again: model.layers[0].resid_post"
        with refused(StaleValueError, "written through", instead=says, text="lambda h:") as caught, block:
            h = model.layers[0].resid_post
            assign(h)
            use(h)
        assert "lambda h: h" in caught.error.also[0][1].text


@pytest.mark.parametrize("use", [*USES[:4], USES[5], USES[8]])
def test_using_a_mapped_value_after_writing_through_it(use) -> None:
    block = model.trace(IDS)
    with refused(StaleValueError, "written through", instead="read the site again", text="lambda h:"), block:
        h = model.layers[0:2].resid_post
        h[:, -1] = 0
        use(h)


@pytest.mark.parametrize("use", [*USES[:6], *USES[7:10]])
def test_reading_the_site_again(use) -> None:
    with model.trace(IDS):
        h = model.layers[0].resid_post
        h[:, -1] = 0
        use(model.layers[0].resid_post)
        model.logits.save()


def test_writing_through_a_value_that_is_too_old() -> None:
    block = model.trace(IDS)
    with (
        refused(StaleValueError, "would undo that", instead="layers[0].resid_post[...] = new") as caught,
        block,
    ):
        h = model.layers[0].resid_post
        model.layers[0].resid_post = 0  # the write
        h[:, -1] = 1  # <-
    assert "# the write" in caught.error.also[0][1].text
    with refused(StaleValueError, "would undo", instead="read the site again"), model.trace(IDS):
        h = model.layers[0].resid_post
        last = h[:, -1]
        h[:, 0] = 0
        last[:, 3] = 0  # <-
    with (
        refused(StaleValueError, "would undo that", instead="layers[0].resid_post.tok[mask] = new") as caught,
        model.trace(IDS),
    ):
        h = model.layers[0].resid_post
        model.layers[0].resid_post = 0  # the write
        h.tok[model.positions >= 2] = 1  # <-
    assert "# the write" in caught.error.also[0][1].text
    with model.trace(IDS):
        model.layers[0].resid_post = 0
        model.layers[0].resid_post[:, -1] = 1
        after = model.layers[0].resid_post.save()
    assert after.value[0, :, 0].tolist() == [0, 0, 0, 1]


def test_an_old_value_may_still_be_read() -> None:
    with model.trace(IDS):
        before = model.layers[0].resid_post
        model.layers[0].resid_post = 0
        kept = (before * 1).save()
        after = model.layers[0].resid_post.save()
    assert kept.value.abs().min() > 0
    assert after.value.abs().max() == 0


# --- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        lambda: model.layers[0].resid_post * 2,
        lambda: (model.layers[0].resid_post * 2)[:, -1],
        lambda: model.layers[0].resid_post.relu(),
        lambda: model.layers[0].resid_post[torch.tensor([0])],
        lambda: model.layers[0:2].resid_post.stack(),
        lambda: model.layers[0:2].resid_post * 2,
        lambda: model.unembed[:3],
    ],
)
def test_assigning_into_what_is_no_site(target) -> None:
    block = model.trace(IDS)
    with refused(WriteTargetError, "changes a site", instead="model.layers[i].resid_post[...] = new"), block:
        value = target()
        value[0] = 0  # <-
    with model.trace(IDS):
        h = model.layers[0].resid_post * 2
        zeroed = torch.where(torch.arange(4)[:, None] == 0, 0.0, h).save()
    assert zeroed.value[:, 0].abs().max() == 0
    assert zeroed.value[:, 1:].abs().min() > 0


@pytest.mark.parametrize("thing", ["abc", None, [1.0] * D, (1, 2)], ids=lambda thing: type(thing).__name__)
def test_writing_what_is_no_tensor(thing: Any) -> None:
    block = model.trace(IDS)
    with refused(WriteTargetError, type(thing).__name__, instead="a value, a tensor or a number"), block:
        model.layers[0].resid_post = thing  # <-


@pytest.mark.parametrize("thing", [{}, torch.nn.Linear(2, 2), object], ids=["dict", "Linear", "type"])
def test_writing_what_a_graph_cannot_hold(thing: Any) -> None:
    block = model.trace(IDS)
    instead = "Linear(model.layers[i].mlp_in)" if isinstance(thing, torch.nn.Module) else None
    with refused(UnsupportedFunctionError, "graph cannot hold", type(thing).__name__, instead=instead), block:
        model.layers[0].resid_post[:] = thing  # <-


# --- causality -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("early", "late"),
    [
        ((0, "resid_post"), (1, "resid_post")),
        ((0, "resid_post"), (None, "logits")),
        ((0, "mlp_out"), (0, "resid_post")),
        ((1, "resid_pre"), (1, "resid_mid")),
        ((1, "mlp_act"), (1, "mlp_out")),
        # Names for one tensor, or nearly: a write at the earlier is seen at the later, never the reverse.
        ((1, "attn_out"), (1, "attn_add")),
        ((1, "mlp_norm"), (1, "mlp_in")),
        ((0, "resid_post"), (1, "resid_pre")),
        ((None, "lm_head"), (None, "logits")),
    ],
)
def test_a_value_from_the_future(early, late) -> None:
    def site(place: tuple[int | None, str]) -> tuple[Any, str]:
        layer, name = place
        return (model if layer is None else model.layers[layer]), name

    block = model.trace(IDS)
    with (
        refused(CausalityError, early[1], late[1], "later", instead="save the value in one trace") as caught,
        block,
    ):
        value = getattr(*site(late))  # read
        derived = value.mean()
        setattr(*site(early), derived)  # <-
        model.logits.save()
    assert "# read" in caught.error.also[0][1].text
    # Two traces, as it says.
    with model.trace(IDS):
        saved = getattr(*site(late)).mean().save()
    with model.trace(IDS):
        setattr(*site(early), saved)
        model.logits.save()


def test_a_value_from_the_future_however_it_is_written() -> None:
    for write in (
        lambda late: setattr(model.layers[0], "resid_post", late),
        lambda late: model.layers[0].resid_post.__setitem__(slice(None), late),
        lambda late: model.layers[0].resid_post.tok.__setitem__(0, late[:, 0]),
        lambda late: setattr(model.layers[0:2], "resid_post", late),
        lambda late: setattr(model.layers[0], "resid_post", model.layers[0].resid_post + late),
    ):
        block = model.trace(IDS)
        with (
            refused(CausalityError, "resid_post", instead="a later site", text="lambda late:") as caught,
            block,
        ):
            write(model.layers[2].resid_post)
            model.logits.save()
        assert "write(model.layers[2].resid_post)" in caught.error.also[0][1].text


def test_forwards_is_fine() -> None:
    with model.trace(IDS):
        model.layers[2].resid_post = model.layers[0].resid_post
        model.layers[1].resid_post = model.layers[1].resid_pre + model.layers[0].mlp_out
        model.logits.save()
