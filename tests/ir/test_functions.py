"""The catalogue against torch: everything public is either supported or refused with a reason."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.overrides import get_overridable_functions, resolve_name

from tracelens.errors import (
    DynamicShapeError,
    ForbiddenFunctionError,
    InPlaceError,
    RandomFunctionError,
    UnsupportedFunctionError,
    ValueBranchError,
)
from tracelens.ir.calls import DROPOUTS, refused, supported_spelling
from tracelens.ir.functions import FUNCTIONS, NOT_IN_EVERY_TORCH, SYNONYMS, Function, Kind, nearest
from tracelens.ir.infer import name_of, refusal_of, resolve
from tracelens.ir.refused import REFUSED, Reason, refusal


def overridable() -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups = get_overridable_functions()
        names = {resolve_name(function) for functions in groups.values() for function in functions}
    return sorted(name.replace("torch.functional.", "torch.") for name in names if name)


OVERRIDABLE = overridable()


def test_torch_has_a_thousand_functions_to_decide_about() -> None:
    assert len(OVERRIDABLE) > 1000


def test_every_function_is_supported_or_refused_with_a_reason() -> None:
    undecided = [name for name in OVERRIDABLE if supported_spelling(name) is None and refusal(name) is None]
    assert undecided == []


def test_no_function_is_both_supported_and_listed_as_refused() -> None:
    assert [name for name in REFUSED if supported_spelling(name) is not None and name not in DROPOUTS] == []
    assert FUNCTIONS.keys() & SYNONYMS.keys() == set()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_entry_resolves_to_a_callable(name: str) -> None:
    try:
        function = resolve(name)
    except ForbiddenFunctionError:
        assert name in NOT_IN_EVERY_TORCH
        return
    assert callable(function)


def test_every_synonym_stands_for_an_entry() -> None:
    assert set(SYNONYMS.values()) <= FUNCTIONS.keys()


def test_names_that_are_given_to_torch_functions_come_back() -> None:
    for name in FUNCTIONS:
        if name.startswith("einops.") or name in NOT_IN_EVERY_TORCH:
            continue
        # One function may be found under two names, as torch.conv1d and F.conv1d are; both are in the catalogue.
        found = name_of(resolve(name))
        assert found is not None
        assert resolve(found) is resolve(name)


def test_nothing_in_place_is_supported() -> None:
    bad = [name for name in FUNCTIONS if name.endswith("_") or name.startswith("torch.Tensor.__i")]
    assert bad == []
    in_place = [name for name in OVERRIDABLE if name.endswith("_") and not name.endswith("__")]
    assert len(in_place) > 150
    assert all(supported_spelling(name) is None for name in in_place)


@pytest.mark.parametrize(
    ("name", "reason", "error"),
    [
        ("torch.Tensor.add_", Reason.IN_PLACE, InPlaceError),
        ("torch.Tensor.__iadd__", Reason.IN_PLACE, InPlaceError),
        ("torch.Tensor.__setitem__", Reason.IN_PLACE, InPlaceError),
        ("torch.Tensor.fill_", Reason.IN_PLACE, InPlaceError),
        ("torch.nn.functional.dropout", Reason.RANDOM, RandomFunctionError),
        ("torch.rrelu", Reason.RANDOM, RandomFunctionError),
        ("torch.bernoulli", Reason.RANDOM, RandomFunctionError),
        ("torch.multinomial", Reason.RANDOM, RandomFunctionError),
        ("torch.nonzero", Reason.DYNAMIC_SHAPE, DynamicShapeError),
        ("torch.Tensor.masked_select", Reason.DYNAMIC_SHAPE, DynamicShapeError),
        ("torch.unique", Reason.DYNAMIC_SHAPE, DynamicShapeError),
        ("torch.Tensor.cuda", Reason.DEVICE, UnsupportedFunctionError),
        ("torch.Tensor.device.__get__", Reason.DEVICE, UnsupportedFunctionError),
        ("torch.Tensor.tolist", Reason.HOST_READ, ValueBranchError),
        ("torch.Tensor.item", Reason.HOST_READ, ValueBranchError),
        ("torch.Tensor.__bool__", Reason.HOST_READ, ValueBranchError),
        ("torch.allclose", Reason.HOST_READ, ValueBranchError),
        ("torch.Tensor.backward", Reason.AUTOGRAD, UnsupportedFunctionError),
        ("torch.Tensor.requires_grad_", Reason.AUTOGRAD, UnsupportedFunctionError),
        ("torch.Tensor.is_sparse.__get__", Reason.QUESTION, UnsupportedFunctionError),
        ("torch.nn.functional.multi_head_attention_forward", Reason.MODULE, UnsupportedFunctionError),
        ("torch.quantize_per_tensor", Reason.LOW_LEVEL, UnsupportedFunctionError),
        ("torch.Tensor.__getitem__", Reason.INDEXING, UnsupportedFunctionError),
    ],
)
def test_reasons(name: str, reason: Reason, error: type[Exception]) -> None:
    found = refusal(name)
    assert found is not None
    assert found[0] is reason
    assert type(refused(name)) is error


def test_reasons_are_found_for_the_functions_themselves() -> None:
    for function, reason in [
        (torch.Tensor.add_, Reason.IN_PLACE),
        (torch.rand, Reason.RANDOM),
        (torch.randn_like, Reason.RANDOM),
        (torch.nonzero, Reason.DYNAMIC_SHAPE),
        (torch.Tensor.tolist, Reason.HOST_READ),
        (torch.nn.functional.multi_head_attention_forward, Reason.MODULE),
    ]:
        assert name_of(function) is None
        found = refusal_of(function)
        assert found is not None
        assert found[0] is reason
        assert found[1] == reason.value
    assert refusal_of(len) is None
    assert refusal_of([]) is None


def test_nearest() -> None:
    assert nearest("torch.sofmax") == ("torch.softmax", *nearest("torch.sofmax")[1:])
    assert "torch.nn.functional.layer_norm" in nearest("torch.nn.functional.layernorm")
    assert nearest("torch.qqqqqq") == ()


def test_a_name_outside_the_catalogue_is_not_executed() -> None:
    for name in ("os.system", "torch.load", "torch.hub.load", "torch.Tensor.add_", "torch.sofmax", "torch"):
        with pytest.raises(ForbiddenFunctionError):
            resolve(name)


def test_entries_are_plain_data() -> None:
    assert FUNCTIONS["torch.topk"] == Function("torch.topk", Kind.AXIS, ("values", "indices"))
    assert FUNCTIONS["torch.add"] == Function("torch.add", Kind.POINTWISE)
