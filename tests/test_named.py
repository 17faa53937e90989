"""Named constants: a program with other values for them equals recording with those values."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tracelens as tl
from tests.errors import IDS, LLAMA, D, refused
from tests.support.families import FAMILIES
from tracelens.errors import (
    DtypeError,
    DuplicateNameError,
    NestedTraceError,
    NoTraceError,
    OptionError,
    ShapeError,
    UnknownConstantError,
    VerificationError,
)
from tracelens.ir.verify import complaints

model = LLAMA.model
V = torch.randn(D, generator=torch.Generator().manual_seed(0))


def steering(m: tl.Model = model, layer: int = 1) -> tl.Program:
    with m.record() as r:
        strength = tl.constant(1.0, name="strength")
        m.layers[layer].resid_post += strength * tl.constant(V, name="v")
        m.logits.save("logits")
    return m.compile(r)


def recorded(strength: Any, v: torch.Tensor) -> torch.Tensor:
    with model.trace(IDS) as t:
        model.layers[1].resid_post += torch.tensor(float(strength)) * v
        model.logits.save("logits")
    return t["logits"]


@given(
    strength=st.floats(-8, 8, width=32),
    seed=st.integers(0, 2**31),
    give=st.sets(st.sampled_from(["strength", "v"])),
)
def test_a_program_with_other_values_equals_recording_with_them(
    strength: float, seed: int, give: set[str]
) -> None:
    v = torch.randn(D, generator=torch.Generator().manual_seed(seed))
    values: dict[str, Any] = {
        name: value for name, value in (("strength", strength), ("v", v)) if name in give
    }
    found = PROGRAM(IDS, **values)["logits"]
    wanted = recorded(values.get("strength", 1.0), values.get("v", V))
    assert torch.equal(found, wanted)
    # The call has left nothing behind.
    assert torch.equal(PROGRAM(IDS)["logits"], DEFAULT)


PROGRAM = steering()
DEFAULT = recorded(1.0, V)


def test_the_values_matter() -> None:
    assert not torch.allclose(PROGRAM(IDS, strength=3.0)["logits"], DEFAULT, atol=1e-2)
    assert not torch.allclose(PROGRAM(IDS, v=-V)["logits"], DEFAULT, atol=1e-2)


def test_nothing_is_recorded_or_compiled_for_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a call compiles")

    monkeypatch.setattr(model._compiler, "_compiled", never)
    monkeypatch.setattr("tracelens.tracing.Recorder", never)
    assert torch.equal(PROGRAM(IDS, strength=-2.0)["logits"], recorded_before)


recorded_before = recorded(-2.0, V)


def test_the_constants_show_themselves() -> None:
    constants = PROGRAM.constants
    assert list(constants) == ["strength", "v"]
    assert constants["v"].shape == (D,)
    assert constants["v"].dtype is torch.float32
    assert constants["strength"].default.item() == 1.0
    assert torch.equal(constants["v"].default, V)
    constants["v"].default.zero_()
    assert torch.equal(PROGRAM(IDS)["logits"], DEFAULT)
    text, html = repr(constants), constants._repr_html_()
    for word in ("strength", "(48,)", "float32"):
        assert word in text
        assert word in html


def test_names_are_in_the_text_and_in_the_file() -> None:
    graph = PROGRAM.graph
    assert '= const #1 "v" : f32[48]' in str(graph)
    assert tl.parse(str(graph)) == graph
    read = tl.Graph.from_json(graph.to_json(), constants=graph.constants_bytes())
    assert read == graph
    again = model.compile(read)
    assert list(again.constants) == ["strength", "v"]
    assert torch.equal(again(IDS, v=-V)["logits"], PROGRAM(IDS, v=-V)["logits"])


def test_plain_tensors_have_no_names_even_where_they_are_the_same() -> None:
    with model.record() as r:
        model.layers[0].resid_post += V
        model.layers[1].resid_post += tl.constant(V, name="v")
        model.logits.save("logits")
    program = model.compile(r)
    assert list(program.constants) == ["v"]
    with model.trace(IDS) as t:
        model.layers[0].resid_post += V
        model.layers[1].resid_post += 2 * V
        model.logits.save("logits")
    assert torch.equal(program(IDS, v=2 * V)["logits"], t["logits"])


def test_one_name_may_be_given_to_one_tensor_twice() -> None:
    with model.record() as r:
        for layer in (0, 1):
            model.layers[layer].resid_post += tl.constant(V, name="v") * tl.constant(2, name="twice")
        model.logits.save("logits")
    program = model.compile(r)
    assert list(program.constants) == ["v", "twice"]
    assert len(r.graph.constants) == 2
    with model.trace(IDS) as t:
        for layer in (0, 1):
            model.layers[layer].resid_post += -V * torch.tensor(2.0)
        model.logits.save("logits")
    assert torch.equal(program(IDS, v=-V)["logits"], t["logits"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_number_does_not_widen_the_floats_that_it_meets(dtype: torch.dtype) -> None:
    m = tl.wrap(FAMILIES["llama"].build(dtype=dtype))
    with m.record() as r:
        h = m.layers[0].resid_post * tl.constant(0.3, name="a")
        assert h.dtype is dtype
        wide = m.layers[0].resid_post * tl.constant(torch.ones(D), name="b")
        assert wide.dtype is torch.float32
        h.save("h")
    with m.trace(IDS) as t:
        (m.layers[0].resid_post * torch.tensor(0.7)).save("h")
    assert torch.equal(m.compile(r)(IDS, a=0.7)["h"], t["h"])


def test_other_floats_are_cast_to_the_dtype_of_the_constant() -> None:
    for v in (V.double() / 3, (V / 3).bfloat16(), (V / 3).numpy()):
        tensor = torch.as_tensor(v).float()
        assert torch.equal(PROGRAM(IDS, v=v)["logits"], recorded(1.0, tensor))
    for number in (2, np.float64(2.0), np.float32(2), torch.tensor(2.0), np.array(2.0)):
        assert torch.equal(PROGRAM(IDS, strength=number)["logits"], recorded(2.0, V))


def test_a_saved_value_is_a_value_for_a_constant() -> None:
    with model.trace(IDS):
        h = model.layers[0].resid_post[0, -1].save()
        other = tl.constant(V, name="v") * 1
        assert "value" in repr(other)
    assert torch.equal(PROGRAM(IDS, v=h)["logits"], recorded(1.0, h.value))


def test_constants_of_integers_and_truths_keep_their_dtype() -> None:
    with model.record() as r:
        index = tl.constant(torch.tensor([3, 5]), name="index")
        gate = tl.constant(torch.tensor(True), name="gate")
        h = model.layers[0].resid_post
        tl.where(gate, h, -h)[..., index].save("h")
    program = model.compile(r)
    with model.trace(IDS):
        h = model.layers[0].resid_post.save()
    assert torch.equal(program(IDS, index=torch.tensor([7, 1]), gate=False)["h"], -h.value[..., [7, 1]])
    with pytest.raises(DtypeError, match="bool"):
        program(IDS, gate=1)
    with pytest.raises(DtypeError, match=r"i64\[2\], and it was given int32"):
        program(IDS, index=torch.tensor([7, 1], dtype=torch.int32))


def test_calls_of_several_threads_do_not_see_each_others_values() -> None:
    strengths = [0.5 * n for n in range(6)]
    wanted = [recorded(strength, V) for strength in strengths]
    found: dict[int, list[bool]] = {}

    def work(number: int) -> None:
        found[number] = [
            torch.equal(PROGRAM(IDS, strength=strengths[number])["logits"], wanted[number]) for _ in range(5)
        ]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(strengths))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(all(equal) for equal in found.values())
    assert len(found) == len(strengths)


def test_a_value_of_a_call_is_not_kept() -> None:
    v = torch.randn(D)
    alive = weakref.ref(v)
    PROGRAM(IDS, v=v)
    del v
    gc.collect()
    assert alive() is None


def test_a_value_saved_as_it_was_given_is_a_copy() -> None:
    with model.record() as r:
        tl.constant(V, name="v").save("v")
    program = model.compile(r)
    mine = torch.ones(D)
    program(IDS, v=mine)["v"].zero_()
    assert torch.equal(mine, torch.ones(D))


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_name_that_there_is_not() -> None:
    says = ("no constant 'strenght'", "'strength', 'v'")
    with refused(UnknownConstantError, *says, instead="did you mean strength?"):
        PROGRAM(IDS, strenght=2.0)  # <-
    with refused(UnknownConstantError, "'w'", "'strength', 'v'", instead="program(prompt, strength=value)"):
        PROGRAM(IDS, w=V)  # <-
    with model.record() as r:
        model.logits.save()
    program = model.compile(r)
    assert repr(program.constants) == "no named constants"
    with refused(
        UnknownConstantError, "none of its constants has a name", instead='tl.constant(tensor, name="v")'
    ):
        program(IDS, v=V)  # <-


def test_a_value_of_another_shape() -> None:
    with refused(ShapeError, "'v' is f32[48]", "(47,)", instead="(48,)"):
        PROGRAM(IDS, v=torch.ones(D - 1))  # <-
    with refused(ShapeError, "'v' is f32[48]", "the number 2.0", instead="torch.full"):
        PROGRAM(IDS, v=2.0)  # <-
    with refused(ShapeError, "'strength' is f32[]", "(1,)", instead="()"):
        PROGRAM(IDS, strength=torch.ones(1))  # <-


def test_a_value_of_another_class_of_dtypes() -> None:
    with refused(DtypeError, "'v' is f32[48]", "int64", instead="tensor.to(torch.float32)"):
        PROGRAM(IDS, v=torch.ones(D, dtype=torch.int64))  # <-
    with refused(DtypeError, "'strength' is f32[]", "True", instead="a float32"):
        PROGRAM(IDS, strength=True)  # <-
    with refused(DtypeError, "float64 numpy array", instead="astype"):
        PROGRAM(IDS, v=np.ones(D))  # <-
    with refused(OptionError, "a list", instead="a tensor"):
        PROGRAM(IDS, v=[1.0] * D)  # <-
    with refused(DtypeError, "1e+300 is too large", instead="float64"):
        PROGRAM(IDS, strength=1e300)  # <-


@pytest.mark.parametrize("name", ["prompt", "batch_size", "product"])
def test_reserved_names(name: str) -> None:
    with refused(OptionError, repr(name), "argument of that name", instead=f"{name}_value"), model.trace(IDS):
        tl.constant(V, name=name)  # <-


@pytest.mark.parametrize("name", ["", "my vector", "3", "lambda", 3])
def test_what_is_no_name(name: Any) -> None:
    with refused(OptionError, repr(name), "could not be written", instead='name="v"'), model.trace(IDS):
        tl.constant(V, name=name)  # <-


def test_two_constants_of_one_name() -> None:
    says = ("the name 'v' is used by two constants", "first used at")
    with refused(DuplicateNameError, *says, instead='"v_2"'), model.trace(IDS):
        tl.constant(V, name="v")
        tl.constant(V.clone(), name="v")  # <-
    with refused(DuplicateNameError, "the name 'a'", instead='"a_2"'), model.trace(IDS):
        tl.constant(1.0, name="a")
        tl.constant(2.0, name="a")  # <-


def test_what_cannot_be_a_constant() -> None:
    with refused(OptionError, "computed in it", instead="save it"), model.trace(IDS):
        tl.constant(model.logits, name="v")  # <-
    with refused(OptionError, "a list", instead="a tensor"), model.trace(IDS):
        tl.constant([1.0], name="v")  # <-
    with refused(DtypeError, "True", instead="torch.tensor(True)"), model.trace(IDS):
        tl.constant(True, name="v")  # <-
    with refused(DtypeError, "1e+40", instead="float64"), model.trace(IDS):
        tl.constant(1e40, name="v")  # <-


def test_where_a_constant_belongs() -> None:
    with refused(NoTraceError, "outside a block", instead="model.record()"):
        tl.constant(V, name="v")  # <-
    other = tl.wrap(FAMILIES["gpt2"].build())
    with (
        refused(NestedTraceError, "several models", instead="model=model"),
        model.trace(IDS),
        other.trace(IDS),
    ):
        tl.constant(V, name="v")  # <-
    with model.trace(IDS), other.trace(IDS) as t:
        (other.layers[0].resid_post + tl.constant(V, name="v", model=other)).save("h")
        mine = tl.constant(V, name="v", model=model).save()
    assert torch.equal(mine.value, V)
    assert t["h"].shape == (1, len(IDS), D)


def test_the_verifier_wants_one_name_for_one_constant() -> None:
    text = str(PROGRAM.graph)
    for wrong, says in (
        (text.replace('const #1 "v"', 'const #1 "strength"'), "names constant #0 and constant #1"),
        (text.replace('const #1 "v" : f32[48]', 'const #0 "v" : f32[]'), "two names"),
    ):
        assert wrong != text
        with pytest.raises(VerificationError):
            tl.verify(tl.parse(wrong))
        found = [
            problem for rule, _, problem in complaints(tl.parse(wrong)) if rule == "constants_have_one_name"
        ]
        assert len(found) == 1
        assert says in found[0]
