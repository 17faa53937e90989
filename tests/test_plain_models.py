"""Models that are no language models: their modules by path, against plain torch."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import tracelens as tl
from tests.support.plain import untouched
from tracelens.errors import (
    CausalityError,
    GraphFileError,
    MetaForwardError,
    ModuleCallError,
    ModuleTensorError,
    NestedTraceError,
    NotALanguageModelError,
    NothingSavedError,
    NoTraceError,
    OptionError,
    ReplacementError,
    ShapeError,
    SkippedSiteError,
    SpecialisedGraphError,
    UnknownArchitectureError,
    UnknownModuleError,
    UnknownParameterError,
    UnknownSiteError,
    VerificationError,
)

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def perceptron() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))


class Named(nn.Module):
    """Takes several things, nested ones too, and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.second = nn.Linear(6, 4)
        self.join = nn.Bilinear(4, 4, 5)

    def forward(self, x: Tensor, rest: dict[str, Any], *, scale: float = 1.0) -> dict[str, Any]:
        one, two = self.first(x) * scale, self.second(rest["others"][0])
        return {"joined": self.join(one, two), "parts": (one, [two]), "count": 2}


class Shared(nn.Module):
    """One module in three places."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Linear(6, 6)
        self.places = nn.ModuleList([inner, inner, inner])
        self.norm = nn.LayerNorm(6)
        self.never = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for place in self.places:
            x = self.norm(place(x).relu())
        return x


def hooked(
    model: nn.Module, path: str, change: Callable[[Tensor], Tensor], *args: Any, calls: set[int] | None = None
) -> Any:
    """The model's own result with a plain hook on one module."""
    number = 0

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        nonlocal number
        number += 1
        return change(output) if calls is None or number - 1 in calls else None

    handle = model.get_submodule(path).register_forward_hook(hook)
    with torch.no_grad():
        result = model(*args)
    handle.remove()
    return result


def test_reads_and_writes_of_a_sequential() -> None:
    net = perceptron()
    model = tl.wrap(net)
    with torch.no_grad():
        expected = [net[0](X), net[1](net[0](X))]
    for number in range(5):
        with untouched(net), model.trace(X):
            hidden = model.module("0").output.save()
            active = model.module("1").output.save()
            model.module(str(number)).output *= 2.0
            result = model.module("").output.save()
        if number > 1:
            assert torch.equal(hidden.value, expected[0])
            assert torch.equal(active.value, expected[1])
        assert torch.equal(result.value, hooked(net, str(number), lambda tensor: tensor * 2.0, X))


def test_what_a_module_changes_in_place_is_seen_as_it_was() -> None:
    net = perceptron()
    model = tl.wrap(net)
    with model.trace(X):
        before = model.module("2").output
        after = model.module("3").output
        saved, positive, dropped = before.save(), after.save(), (after - before).save()
    assert (saved.value < 0).any()
    assert torch.equal(positive.value, saved.value.relu())
    assert torch.equal(dropped.value, saved.value.relu() - saved.value)


def test_what_lies_in_memory_of_others_is_copied() -> None:
    class Passing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 2))
            self.inner = nn.Identity()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(self.weight), x

    net, x = Passing(), torch.zeros(2)
    model = tl.wrap(net)
    with model.trace(x):
        weight, given = model.module("").output[0].save(), model.module("").input.save()
        inner = model.module("inner").output.save()
    x += 5.0
    with torch.no_grad():
        net.weight += 5.0
    assert (weight.value == 1).all()
    assert (inner.value == 1).all()
    assert (given.value == 0).all()


def test_nested_arguments_and_results() -> None:
    torch.manual_seed(0)
    net = Named()
    model = tl.wrap(net)
    rest = {"others": [X + 1.0], "flag": True}
    with torch.no_grad():
        plain = net(X, rest, scale=3.0)
    with untouched(net), model.trace(X, rest, scale=3.0) as t:
        whole = model.module("")
        given = whole.inputs["rest"]["others"][0].save()
        parts = whole.output["parts"][1][0].save()
        joined = whole.output["joined"].save()
        whole.output["parts"][0] += 1.0
        first = whole.output["parts"][0].save()
        second = model.module("join").inputs["input2"].save()
    assert torch.equal(given.value, X + 1.0)
    assert torch.equal(parts.value, plain["parts"][1][0])
    assert torch.equal(second.value, parts.value)
    assert torch.equal(joined.value, plain["joined"])
    assert torch.equal(first.value, plain["parts"][0] + 1.0)
    assert "inputs (float32[3, 6], {'others': [float32[3, 6]], 'flag': True}, scale=3.0)" in t.explain()
    with model.trace(X, rest, scale=3.0):
        model.module("").inputs["rest"]["others"][0] = 0.0
        joined = model.module("").output["joined"].save()
    assert torch.equal(joined.value, net(X, {"others": [X * 0.0]}, scale=3.0)["joined"])
    assert torch.equal(rest["others"][0], X + 1.0)


def test_a_module_in_several_places_is_called_several_times() -> None:
    torch.manual_seed(0)
    net = Shared()
    model = tl.wrap(net)
    assert model.modules() == ("", "places", "places.0", "places.1", "places.2", "norm", "never")
    with model.trace(X):
        inner = model.module("places.2")
        outputs = [inner.call(number).output.save() for number in range(3)]
        inner.call(1).output = inner.call(0).output * 0.5
        result = model.module("").output.save()
        norms = [model.module("norm").call(number).input.save() for number in range(3)]
    expected = hooked(net, "places.0", lambda _: outputs[0].value * 0.5, X, calls={1})
    assert torch.equal(result.value, expected)
    for norm, output in zip(norms, (outputs[0].value, outputs[0].value * 0.5, outputs[2].value), strict=True):
        if norm is not norms[1]:
            assert torch.equal(norm.value, output.relu())
    with pytest.raises(CausalityError), model.trace(X):
        model.module("norm").call(0).output = model.module("places.0").call(1).output
    with pytest.raises(ModuleCallError, match="called 3 times"), model.trace(X):
        _ = model.module("norm").output
    with pytest.raises(ModuleCallError, match="is not called"), model.trace(X):
        _ = model.module("never").output
    with pytest.raises(ModuleCallError, match="has no call 3"), model.trace(X):
        model.module("norm").call(3)


def test_the_pass_is_left_after_the_last_module_and_replaced_ones_are_not_run() -> None:
    net = perceptron()
    model = tl.wrap(net)
    called: list[str] = []
    for name, module in net.named_children():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    with model.trace(X) as t:
        model.module("1").output.save()
    assert called == ["0", "1"]
    assert "stops after module" in t.explain()
    own = net[2].forward
    ran: list[int] = []
    net[2].forward = lambda x: ran.append(1) or own(x)
    with model.trace(X):
        model.module("2").replace(model.module("1").output @ torch.eye(8) + 1.0)
        result = model.module("").output.save()
    assert not ran
    del net[2].forward
    assert torch.equal(result.value, hooked(net, "2", lambda _: net[1](net[0](X)) + 1.0, X))


def test_parameters_functions_and_gradients() -> None:
    net = perceptron()
    model = tl.wrap(net)
    with untouched(net), model.trace(X):
        weight = model.param("0.weight").save()
        hidden = model.module("0").output
        mean = tl.where(hidden > 0, hidden, 0.0).mean().save()
        (gradient,) = tl.grad(model.module("4").output.sum(), wrt=[hidden])
        grad = gradient.save()
    assert torch.equal(weight.value, net[0].weight)
    assert torch.equal(mean.value, net[1](net[0](X)).mean())
    x = net[0](X).detach().requires_grad_()
    torch.nn.Sequential(*list(net)[1:])(x).sum().backward()
    torch.testing.assert_close(grad.value, x.grad)


# --- graphs and programs ---------------------------------------------------------------------------------------------


def test_a_program_takes_other_values_for_its_named_constants() -> None:
    model = tl.wrap(net := perceptron())
    with model.record(X) as r:
        model.module("0").output *= tl.constant(torch.tensor(2.0), name="strength")
        model.module("").output.save("y")
    program = model.compile(r)
    for strength in (2.0, 0.0, -1.5):
        found = program(X) if strength == 2.0 else program(X, strength=strength)
        assert torch.equal(found["y"], net[1:](net[0](X) * strength))
    with pytest.raises(ShapeError, match="strength"):
        program(X, strength=torch.ones(3))
    with model.record(X) as r:
        model.module("0").output *= tl.constant(torch.tensor(2.0), name="input")
        model.module("").output.save("y")
    with pytest.raises(OptionError, match="could mean either"):
        model.compile(r)


def test_programs_and_files_are_for_inputs_of_the_shapes_that_they_were_recorded_on(tmp_path) -> None:
    net = perceptron()
    model = tl.wrap(net)
    with model.record(X) as r:
        model.module("1").output[:, 0] = 7.0
        model.module("").output.save("y")
    program = model.compile(r)
    other = X + 1.0
    assert torch.equal(
        program(other)["y"], hooked(net, "1", lambda t: torch.cat([t[:, :1] * 0 + 7, t[:, 1:]], 1), other)
    )
    for wrong in (torch.ones(4, 6), X.double(), torch.ones(3, 6, dtype=torch.bfloat16)):
        with pytest.raises(SpecialisedGraphError, match="other shapes"):
            program(wrong)
    with pytest.raises(SpecialisedGraphError):
        program(X, scale=2)
    assert tl.parse(r.graph.text()) == r.graph
    r.graph.to_json(tmp_path / "g.json")
    loaded = tl.Graph.from_json(tmp_path / "g.json")
    assert loaded == r.graph
    fresh = tl.wrap(copy.deepcopy(net)).compile(loaded)  # which has not seen any inputs yet
    assert "module(" in fresh.explain()
    assert torch.equal(fresh(other)["y"], program(other)["y"])
    assert "stops after" in fresh.explain()
    text = (tmp_path / "g.json").read_text().replace("output after", "output  after")
    with pytest.raises(GraphFileError):
        tl.Graph.from_json(text)
    altered = tl.parse(r.graph.text().replace("f32[3,8]", "f32[3,7]"))
    with pytest.raises(VerificationError):
        model.compile(altered)
    with pytest.raises(OptionError):
        model.compile("graph")
    with model.record(X) as r:
        model.module("1").output.save("h")
    assert torch.equal(model.compile(r)(X)["h"], net[1](net[0](X)))


def test_blocks_on_inputs_of_other_shapes_are_learned_anew() -> None:
    net = perceptron()
    model = tl.wrap(net)
    for rows in (1, 4, 1):
        x = torch.ones(rows, 6)
        with model.trace(x):
            assert tuple(model.module("1").output.shape) == (rows, 8)
            saved = model.module("").output.save()
        assert torch.equal(saved.value, net(x))
    for number in range(40):  # more shapes than are kept
        with model.trace(torch.ones(number + 1, 6)):
            model.module("1").output.save()
    assert len(model._fitted) <= 16


def test_threads() -> None:
    net = perceptron()
    model = tl.wrap(net)
    found: dict[int, Tensor] = {}

    def work(rows: int) -> None:
        for _ in range(10):
            with model.trace(torch.ones(rows, 6)):
                model.module("1").output *= float(rows)
                saved = model.module("").output.save()
            found[rows] = saved.value

    threads = [threading.Thread(target=work, args=(rows,)) for rows in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rows in (1, 2, 3):
        expected = hooked(net, "1", lambda tensor, rows=rows: tensor * float(rows), torch.ones(rows, 6))
        assert torch.equal(found[rows], expected)


# --- other architectures of transformers -----------------------------------------------------------------------------


def test_a_model_of_a_family_without_a_table() -> None:
    torch.manual_seed(0)
    bert: Any = BertModel(
        BertConfig(
            hidden_size=24, num_attention_heads=2, num_hidden_layers=2, intermediate_size=48, vocab_size=50
        )
    ).eval()
    model: Any = tl.wrap(bert)
    ids = torch.tensor([[4, 5, 6, 7]])
    with untouched(bert), model.trace(input_ids=ids):
        dense = model.module("encoder.layer.1.intermediate.dense").output.save()
        model.module("encoder.layer.0.output.dense").output *= 0.0
        last = model.module("").output["last_hidden_state"].save()
    with torch.no_grad():
        handle = bert.encoder.layer[0].output.dense.register_forward_hook(lambda _, __, output: output * 0.0)
        seen: list[Tensor] = []
        other = bert.encoder.layer[1].intermediate.dense.register_forward_hook(
            lambda _, __, out: seen.append(out)
        )
        expected = bert(input_ids=ids).last_hidden_state
        handle.remove()
        other.remove()
    assert torch.equal(last.value, expected)
    assert torch.equal(dense.value, seen[0])
    with pytest.raises(NotALanguageModelError, match="no site table for models of type 'bert'"):
        _ = model.layers


# --- errors ----------------------------------------------------------------------------------------------------------


class LooksAtNumbers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def refused(error: type[tl.TracelensError], code: str, net: nn.Module | None = None) -> tl.TracelensError:
    model = tl.wrap(net or perceptron())
    with pytest.raises(error) as caught, model.trace(X):
        exec(compile(code, "<cell 1>", "exec"), {"model": model, "torch": torch, "tl": tl, "X": X})
    assert caught.value.at is not None
    assert caught.value.at.filename == "<cell 1>"
    return caught.value


def test_what_only_language_models_have_is_refused_by_name() -> None:
    for name in ("layers", "generate", "tokenizer", "sites", "unembed", "logits", "resid_post", "prepare"):
        error = refused(NotALanguageModelError, f"model.{name}")
        assert "it is no language model of transformers" in error.problem
    assert not hasattr(tl.wrap(perceptron()), "layers")
    refused(tl.errors.PositionAxisError, "model.module('0').output.tok[0]")
    refused(tl.errors.PositionAxisError, "tl.masked_mean(model.module('0').output)")
    with pytest.raises(NotALanguageModelError, match="no prompts"):
        tl.wrap(perceptron()).trace("The capital of France is")


class Pair(NamedTuple):
    u: Tensor
    rest: dict[str, Tensor]


class Pairs(nn.Module):
    """Takes and returns named tuples, one inside of another container."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Swapped()

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner([Pair(x, {"w": 2 * x})], scale=3.0)
        return found.u + found.rest["w"]


class Swapped(nn.Module):
    def forward(self, pairs: list[Pair], scale: float, unused: Tensor | None = None) -> Pair:
        return Pair(pairs[0].rest["w"] * scale, {"w": pairs[0].u})


def test_fields_of_named_tuples_are_named_as_in_the_model() -> None:
    model: Any = tl.wrap(Pairs())
    with model.trace(X):
        inner = model.module("inner")
        assert inner.output["u"] is not None
        by_name, by_number = inner.output["u"].save(), inner.output[0].save()
        w = inner.output["rest"]["w"].save()
        given = inner.inputs["pairs"][0]["rest"]["w"].save()
    assert torch.equal(by_name.value, 6 * X)
    assert torch.equal(by_number.value, 6 * X)
    assert torch.equal(w.value, X)
    assert torch.equal(given.value, 2 * X)
    with model.trace(X):
        model.module("inner").output["u"] = 0.0
        model.module("inner").inputs[0][0]["u"] += 1.0
        result = model.module("").output.save()
    assert torch.equal(result.value, X + 1.0)
    refused(ModuleTensorError, "model.module('inner').output['v']", Pairs())


def test_an_argument_that_is_no_tensor_is_called_as_the_user_called_it() -> None:
    for name in ("'scale'", "'unused'", "2"):
        error = refused(ModuleTensorError, f"model.module('inner').inputs[{name}]", Pairs())
        assert f".inputs[{name}]: that argument is no tensor here" in error.problem
        assert ".inputs[0][0][0]" in str(error.instead)
    error = refused(ModuleTensorError, "model.module('inner').inputs['nothing']", Pairs())
    assert error.problem.endswith(".inputs['nothing']")


class Within(nn.Module):
    """Calls itself."""

    def forward(self, x: Tensor, deep: bool = True) -> Tensor:
        return self(x, deep=False) if deep else x


def test_a_plain_model_is_not_sent_to_what_it_does_not_have() -> None:
    def nothing_it_lacks(error: tl.TracelensError) -> None:
        assert error.instead is not None
        assert "sites" not in error.instead
        assert "modules() lists those" not in error.instead

    for net in (LooksAtNumbers(), nn.Linear(5, 5), Within()):
        error = refused(MetaForwardError, "model.module('').output", net)
        nothing_it_lacks(error)
        assert "arguments that the module's forward takes" in str(error.instead)
    model: Any = tl.wrap(Named())
    with pytest.raises(MetaForwardError, match="missing 1 required") as caught, model.trace(X):
        model.module("first").output.save()
    nothing_it_lacks(caught.value)
    error = refused(ModuleCallError, "model.module('never').output", Shared())
    nothing_it_lacks(error)
    assert error.instead == "the module around it, ''"
    error = refused(ModuleCallError, "model.module('places').output", Shared())
    nothing_it_lacks(error)
    assert "those inside that are called, such as 'places.0'" in str(error.instead)
    error = refused(UnknownSiteError, "model.module('places').skip()", Shared())
    assert ".replace(value)" in str(error.instead)


def test_mistakes_have_names_and_lines() -> None:
    error = refused(UnknownModuleError, "model.module('5')")
    assert error.problem == "the model has no module '5'"
    refused(UnknownParameterError, "model.param('0.weigth')")
    refused(OptionError, "model.module(3)")
    refused(ShapeError, "model.module('0').output = torch.ones(5)")
    refused(NestedTraceError, "with model.trace(torch.ones(9, 6)): pass")
    refused(SkippedSiteError, "h = model.module('1').output\nmodel.module('1').replace(0.0)")
    refused(ModuleTensorError, "model.module('').inputs['y']")
    refused(MetaForwardError, "model.module('').output", LooksAtNumbers())
    refused(MetaForwardError, "model.module('').output", nn.Linear(5, 5))  # which these inputs do not fit
    refused(ReplacementError, "model.module('').replace(0.0)", nn.LSTM(6, 6))
    with pytest.raises(NoTraceError):
        tl.wrap(perceptron()).module("0")
    with pytest.raises(NothingSavedError), (model := tl.wrap(perceptron())).trace(X):
        model.module("0").output = 0.0
    with pytest.raises(UnknownArchitectureError):
        tl.wrap("a name")
