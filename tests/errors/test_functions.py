"""Functions that a graph cannot hold: in place, random, unknown, whole modules; and tl.apply, which holds anything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import tracelens as tl
from tests.errors import IDS, LLAMA, D, refused
from tests.support.families import FAMILIES
from tracelens.errors import (
    ApplyResultError,
    InPlaceError,
    MutatedActivationError,
    NoTraceError,
    OpFailedError,
    RandomFunctionError,
    SiteMismatchError,
    UnsupportedFunctionError,
)

model = LLAMA.model


# --- in place --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "says", "instead"),
    [
        (lambda h: h.add_(1), "Tensor.add_", "value.add(...)"),
        (lambda h: h.relu_(), "Tensor.relu_", "value.relu(...)"),
        (lambda h: h.clamp_(0), "Tensor.clamp_", "value.clamp(...)"),
        (lambda h: h.zero_(), "Tensor.zero_", "model.layers[i].resid_post = new"),
        (lambda h: h.copy_(torch.zeros(D)), "Tensor.copy_", "model.layers[i].resid_post = new"),
        (lambda h: h.normal_(), "Tensor.normal_", "model.layers[i].resid_post = new"),
        (lambda h: torch.relu_(h), "relu_", "value.relu(...)"),
        (lambda h: nn.init.zeros_(h), "zero_", "model.layers[i].resid_post = new"),
        (lambda h: torch.add(h, 1, out=torch.zeros(1)), "out=", "a value of its own"),
        (lambda h: functional.relu(h, inplace=True), "inplace=True", "inplace=False"),
        (lambda h: nn.ReLU(inplace=True)(h), "inplace=True", "inplace=False"),
    ],
)
def test_changing_a_value_in_place(use, says: str, instead: str) -> None:
    for value in (lambda: model.layers[0].resid_post, lambda: model.layers[0:2].resid_post):
        with refused(InPlaceError, says, instead=instead, text="lambda h:"), model.trace(IDS):
            use(value())


def test_what_to_write_instead_of_changing_a_value() -> None:
    with model.trace(IDS):
        h = model.layers[0].resid_post
        new = h.add(1).relu().clamp(0)
        model.layers[0].resid_post = new
        functional.relu(h, inplace=False).save()
        model.logits.save()


def test_adding_a_value_to_a_tensor() -> None:
    total = torch.zeros(D)
    with (
        refused(InPlaceError, "Tensor.add_", "a tensor of yours", instead="tensor = tensor + value"),
        model.trace(IDS),
    ):
        total += model.layers[0].resid_post[0, -1]  # <-
    assert total.abs().max() == 0
    with model.trace(IDS):
        for layer in range(3):
            total = total + model.layers[layer].resid_post[0, -1]
        summed = total.save()
    assert summed.value.shape == (D,)


@pytest.mark.parametrize(
    ("use", "instead"),
    [
        (lambda tensor, h: tensor.sub_(h), "tensor = tensor - value"),
        (lambda tensor, h: tensor.mul_(h), "tensor = tensor * value"),
        (lambda tensor, h: tensor.div_(h), "tensor = tensor / value"),
        (lambda tensor, h: tensor.__imul__(h), "tensor = tensor * value"),
        (lambda tensor, h: tensor.lerp_(h, 0.5), "tensor = tensor.lerp(...)"),
        (lambda tensor, h: tensor.copy_(h), "the value itself"),
    ],
)
def test_changing_a_tensor_by_a_value(use, instead: str) -> None:
    tensor = torch.zeros(D)
    with (
        refused(InPlaceError, "a tensor of yours", instead=instead, text="lambda tensor, h:"),
        model.trace(IDS),
    ):
        use(tensor, model.layers[0].resid_post[0, -1])
    assert tensor.abs().max() == 0


def test_putting_a_value_into_a_tensor() -> None:
    table = torch.zeros(3, D)
    with (
        refused(InPlaceError, "Tensor.__setitem__", "a tensor of yours", instead="torch.stack"),
        model.trace(IDS),
    ):
        table[1] = model.layers[1].resid_post[0, -1]  # <-
    assert table.abs().max() == 0
    with model.trace(IDS):
        rows = torch.stack([model.layers[layer].resid_post[0, -1] for layer in range(3)]).save()
        mixed = tl.where(torch.arange(3)[:, None] == 1, model.layers[1].resid_post[0, -1], table).save()
    assert rows.value.shape == (3, D)
    assert torch.equal(mixed.value[1], rows.value[1])
    assert mixed.value[0].abs().max() == 0


def test_adding_a_value_to_an_array() -> None:
    array = np.zeros(D, dtype=np.float32)
    with (
        refused(InPlaceError, "numpy.add", "an array of yours", instead="array = array + value"),
        model.trace(IDS),
    ):
        array += model.layers[0].resid_post[0, -1]  # <-
    with model.trace(IDS):
        array = array + model.layers[0].resid_post[0, -1]
        summed = array.save()
    assert summed.value.shape == (D,)


def test_functions_of_numpy() -> None:
    with refused(UnsupportedFunctionError, "numpy.exp", instead="torch.exp"), model.trace(IDS):
        np.exp(model.layers[0].resid_post)  # <-
    with refused(UnsupportedFunctionError, "numpy.cbrt", instead="a function of torch"), model.trace(IDS):
        np.cbrt(model.layers[0].resid_post)  # <-
    with model.trace(IDS):
        h = torch.exp(model.layers[0].resid_post).save()
    assert h.value.min() > 0


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda a, h: a + h, lambda a, t: torch.from_numpy(a) + t),
        (lambda a, h: a - h, lambda a, t: torch.from_numpy(a) - t),
        (lambda a, h: a / h, lambda a, t: torch.from_numpy(a) / t),
        (lambda a, h: a < h, lambda a, t: torch.from_numpy(a) < t),
        (lambda a, h: a >= h, lambda a, t: torch.from_numpy(a) >= t),
        (lambda a, h: a == h, lambda a, t: torch.from_numpy(a) == t),
        (lambda a, h: h - a, lambda a, t: t - torch.from_numpy(a)),
        (lambda a, h: np.float32(2) * h, lambda a, t: 2 * t),
        (lambda a, h: np.subtract(a, h), lambda a, t: torch.from_numpy(a) - t),
    ],
)
def test_operators_with_arrays_are_recorded(ours, theirs) -> None:
    array = np.linspace(-1, 1, D, dtype=np.float32)
    with model.trace(IDS):
        h = model.layers[0].resid_post
        result = ours(array, h).save()
        plain = h.save()
    assert torch.equal(result.value, theirs(array, plain.value))


# --- random ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "instead"),
    [
        (lambda h: torch.rand_like(h), "before the trace"),
        (lambda h: torch.randn_like(h), "before the trace"),
        (lambda h: torch.bernoulli(h), "before the trace"),
        (lambda h: h.bernoulli(), "before the trace"),
        (lambda h: torch.normal(h, 1.0), "before the trace"),
        (lambda h: torch.multinomial(h[0].softmax(-1), 1), "before the trace"),
        (lambda h: functional.gumbel_softmax(h), "before the trace"),
        (lambda h: functional.dropout(h, 0.5), "module.eval()"),
        (lambda h: nn.Dropout()(h), "module.eval()"),
        (lambda h: nn.Sequential(nn.Linear(D, D), nn.Dropout(0.1))(h), "module.eval()"),
        (lambda h: functional.scaled_dot_product_attention(h, h, h, dropout_p=0.1), "dropout_p=0.0"),
    ],
)
def test_random_functions(use, instead: str) -> None:
    with refused(RandomFunctionError, "random", instead=instead, text="lambda h:"), model.trace(IDS):
        use(model.layers[0].resid_post)


def test_what_to_write_instead_of_random_functions() -> None:
    noise = torch.randn(D)
    with model.trace(IDS):
        h = model.layers[0].resid_post
        dropped = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.1)).eval()(h).save()
        same = nn.Dropout().eval()(h).save()
        functional.dropout(h, 0.5, training=False).save()
        functional.scaled_dot_product_attention(h, h, h, dropout_p=0.0).save()
        noisy = (h + noise).save()
        plain = h.save()
    assert dropped.value.shape == (1, 4, D)
    assert torch.equal(same.value, plain.value)
    assert torch.equal(noisy.value, plain.value + noise)


# --- unknown ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "says", "instead"),
    [
        (lambda h: torch.hash_tensor(h), "hash_tensor", "tl.apply"),
        (lambda h: torch.lu(h), "lu", "tl.apply"),
        (lambda h: torch.fake_quantize_per_tensor_affine(h, 1.0, 0, 0, 255), "fake_quantize", "tl.apply"),
        (lambda h: h.as_strided((2, 2), (1, 1)), "as_strided", "reshape, view or expand"),
        (lambda h: h.to_sparse(), "to_sparse", "tl.apply"),
        (lambda h: torch.ones(3, D)[h[0, 0].argmax()], "__getitem__", "torch.nn.functional.embedding"),
        (lambda h: torch.stack(h), "stack", None),
        (lambda h: h.softmax(), "softmax", None),
        (lambda h: h + "abc", "add", None),
        (lambda h: tl.where(h > 0, "abc", h), "where", None),
    ],
)
def test_functions_that_a_graph_cannot_hold(use, says: str, instead: str | None) -> None:
    with refused(UnsupportedFunctionError, says, instead=instead, text="lambda h:"), model.trace(IDS):
        use(model.layers[0].resid_post)


def sofmax(x):
    """A function of a library that lets others take part, with a name that torch does not have."""
    return torch.overrides.handle_torch_function(sofmax, (x,), x)  # in the library


def test_the_nearest_supported_function_is_named() -> None:
    block = model.trace(IDS)
    with refused(UnsupportedFunctionError, "sofmax", instead="torch.softmax", text="# in the library"), block:
        sofmax(model.layers[0].resid_post)
    with refused(UnsupportedFunctionError, "lu", instead="torch.linalg.lu; or tl.apply"), model.trace(IDS):
        torch.lu(model.layers[0].resid_post)  # <-
    with model.trace(IDS):
        torch.linalg.lu(model.layers[0].resid_post).L.save()
        torch.softmax(model.layers[0].resid_post, -1).save()


def test_rows_of_a_table_by_a_value() -> None:
    table = torch.randn(D, 5)
    with model.trace(IDS):
        index = model.layers[0].resid_post.argmax(-1)
        rows = functional.embedding(index, table).save()
        picked = torch.index_select(table, 0, index[0]).save()
        kept = index.save()
    assert torch.equal(rows.value, table[kept.value])
    assert torch.equal(picked.value, table[kept.value[0]])


# --- whole modules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name", "result"),
    [
        (
            nn.MultiheadAttention(D, 4, batch_first=True).eval(),
            "MultiheadAttention",
            lambda m: lambda x: m(x, x, x)[0],
        ),
        (nn.LSTM(D, D, batch_first=True), "LSTM", lambda m: lambda x: m(x)[0]),
        (nn.TransformerEncoderLayer(D, 4, batch_first=True).eval(), "TransformerEncoderLayer", lambda m: m),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_modules_that_look_at_their_input(module: nn.Module, name: str, result) -> None:
    arguments = 3 if name == "MultiheadAttention" else 1
    with (
        refused(UnsupportedFunctionError, f"the module {name}", instead="tl.apply(module, value"),
        model.trace(IDS),
    ):
        module(*[model.layers[0].resid_post] * arguments)  # <-
    with torch.no_grad(), model.trace(IDS):
        h = model.layers[0].resid_post.save()
        applied = tl.apply(result(module), h).save()
    with torch.no_grad():
        torch.testing.assert_close(applied.value, result(module)(h.value), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_module() -> None:
    scripted = torch.jit.script(nn.Linear(D, D))
    with (
        refused(UnsupportedFunctionError, "scripted module Linear", instead="tl.apply(module, value"),
        model.trace(IDS),
    ):
        scripted(model.layers[0].resid_post)  # <-
    with model.trace(IDS):
        h = tl.apply(scripted, model.layers[0].resid_post).save()
    assert h.value.shape == (1, 4, D)


class Centred(nn.Module):
    """A module of a user's own: its lines are the user's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - torch.rand_like(x)  # in the module


def test_a_mistake_in_a_module_of_ones_own() -> None:
    with (
        refused(RandomFunctionError, "rand_like", instead="before the trace", text="# in the module"),
        model.trace(IDS),
    ):
        Centred()(model.layers[0].resid_post)


# --- tl.apply --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "says", "instead"),
    [
        (lambda x: x[:, :2], "(1, 2, 48)", "of the shape and dtype"),
        (lambda x: x.double(), "torch.float64", "of the shape and dtype"),
        (lambda x: 3.0, "3.0", "returns tensors"),
        (lambda x: None, "None", "returns tensors"),
        (lambda x: (x, x), "2 results", "like=(a, b)"),
        (lambda x: [], "0 results", "like=(a, b)"),
    ],
)
def test_a_function_that_returns_something_else(function, says: str, instead: str) -> None:
    with refused(ApplyResultError, says, "like=", instead=instead, forwards=1), model.trace(IDS):
        tl.apply(function, model.layers[0].resid_post).save()  # <-


def test_what_like_declares() -> None:
    with (
        refused(ApplyResultError, "1 result,", "declares 2", instead="like=(a, b)", forwards=1),
        model.trace(IDS),
    ):
        h = model.layers[0].resid_post
        tl.apply(lambda x: x, h, like=(h, h))[0].save()  # <-
    with model.trace(IDS):
        h = model.layers[0].resid_post
        first = tl.apply(lambda x: x[:, :2], h, like=h[:, :2]).save()
        double = tl.apply(lambda x: x.double(), h, like=h.double()).save()
        pair = tl.apply(lambda x: (x, x.sum()), h, like=(h, torch.tensor(0.0)))
        total = pair[1].save()
    assert first.value.shape == (1, 2, D)
    assert double.value.dtype is torch.float64
    assert total.value.shape == ()


@pytest.mark.parametrize("like", [[1, 2], "x", 3.0])
def test_a_like_that_says_nothing(like: object) -> None:
    with refused(UnsupportedFunctionError, "like=", instead="like=value"), model.trace(IDS):
        tl.apply(lambda x: x, model.layers[0].resid_post, like=like)  # <-


def test_what_cannot_be_applied() -> None:
    with refused(UnsupportedFunctionError, "3 cannot be called", instead=None), model.trace(IDS):
        tl.apply(3, model.layers[0].resid_post)  # <-
    with refused(NoTraceError, "needs a value", instead="call the function"), model.trace(IDS):
        tl.apply(torch.relu, torch.ones(3))  # <-


def test_an_applied_function_that_fails() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        return x.means(-1)

    with (
        refused(OpFailedError, "AttributeError", "means", "-->", instead=None, forwards=1) as caught,
        model.trace(IDS),
    ):
        tl.apply(broken, model.layers[0].resid_post).save()  # <-
    assert isinstance(caught.error.__cause__, AttributeError)


def test_an_applied_function_that_changes_its_argument() -> None:
    with (
        refused(MutatedActivationError, "in place", instead="returns new tensors", forwards=1),
        model.trace(IDS),
    ):
        tl.apply(lambda x: x.add_(1), model.layers[0].resid_post).save()  # <-
    with model.trace(IDS):
        tl.apply(lambda x: x.add(1), model.layers[0].resid_post).save()


# --- what the model itself does --------------------------------------------------------------------------------------


def test_a_site_of_another_dtype_than_its_table_says() -> None:
    mixed, block = torch.autocast("cpu", dtype=torch.bfloat16), model.trace(IDS)
    says = ("bfloat16", "float32")
    with refused(SiteMismatchError, *says, instead="torch.autocast", text="# read", forwards=1), mixed, block:
        model.layers[2].mlp_out.save()  # read
    with model.trace(IDS):
        model.layers[2].mlp_out.save()


def test_a_hook_of_ones_own_that_changes_a_tensor_in_place() -> None:
    hf = FAMILIES["llama"].build()
    mutated = tl.wrap(hf)

    def steer(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        args[0].add_(1)

    handle = hf.model.layers[2].register_forward_pre_hook(steer)
    with refused(MutatedActivationError, "in place", instead=None, text="# saved"), mutated.trace(IDS):
        mutated.layers[1].resid_post.save()  # saved
        mutated.logits.save()
    handle.remove()
    with mutated.trace(IDS):
        mutated.layers[2].resid_pre += 1
        mutated.logits.save()
