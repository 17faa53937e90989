"""Sites by module path against plain hooks of torch, for every module of every family."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tracelens as tl
from tests.support.batches import EVEN, RAGGED, batch, random_rows
from tests.support.families import EVERY, FAMILIES, MOST
from tests.support.plain import plain_logits, untouched
from tracelens.backends.survey import size_of
from tracelens.errors import (
    CausalityError,
    LostUpdateError,
    MetaForwardError,
    ModuleCallError,
    ModuleTensorError,
    OptionError,
    PositionAxisError,
    ShapeError,
    SiteMismatchError,
    StaleValueError,
    TracelensError,
    UnknownModuleError,
    UnknownSiteError,
    UnusedGradientError,
    VerificationError,
)
from tracelens.ir.module_sites import INPUT, ModuleSite
from tracelens.ir.sites import Site

EVEN_ROWS, RAGGED_ROWS = random_rows(EVEN), random_rows(RAGGED)
every_family = pytest.mark.parametrize("family", EVERY)
main_family = pytest.mark.parametrize("family", MOST)


def module_sites(model: tl.Model) -> list[ModuleSite]:
    """Every tensor at a side of every module that is called once, as the survey found them."""
    calls = [call for calls in model.anatomy.sides.survey().calls.values() for call in calls]
    leaves = [leaf for call in calls for leaf in (*call.inputs.values(), *call.outputs.values())]
    # Gemma rotates in two ways by one module, which plain hooks do not tell apart.
    return [
        leaf.site for leaf in leaves if "another order" not in (leaf.problem or "") and leaf.site.call is None
    ]


def handle(model: tl.Model, site: ModuleSite) -> tuple[Any, Any]:
    """Where a site is written, and the last key to it: ``(module.output, 0)``, ``(module, "input")``."""
    owner = model.module(site.path)
    if not site.key:
        return owner, None
    owner = owner.inputs if site.side == INPUT else owner.output
    for part in site.key[:-1]:
        owner = owner[part]
    return owner, site.key[-1]


def read(model: tl.Model, site: ModuleSite) -> Any:
    owner, key = handle(model, site)
    return owner.output if key is None else owner[key]


def write(model: tl.Model, site: ModuleSite, change: Callable[[Any], Any]) -> None:
    owner, key = handle(model, site)
    if key is None:
        owner.output = change(owner.output)
    else:
        owner[key] = change(owner[key])


def put(container: Any, key: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> Any:
    """By hand: the container with the tensor at ``key`` changed. The model makes each container anew for a call."""
    if not key:
        return change(container)
    part = put(container[key[0]], key[1:], change)
    if isinstance(container, tuple):
        return (*container[: key[0]], part, *container[key[0] + 1 :])
    container[key[0]] = part
    return container


def hooked(hf: nn.Module, site: ModuleSite, change: Callable[[Tensor], Tensor]) -> Any:
    """A plain hook of torch that changes the tensor at a site."""
    module = hf.get_submodule(site.path)
    if site.side == INPUT and isinstance(site.key[0], int):
        return module.register_forward_pre_hook(
            lambda _, args, kwargs: (put(args, site.key, change), kwargs), with_kwargs=True
        )
    if site.side == INPUT:
        return module.register_forward_pre_hook(
            lambda _, args, kwargs: (args, put(kwargs, site.key, change)), with_kwargs=True
        )
    return module.register_forward_hook(lambda _, args, output: put(output, site.key, change))


def tangled(model: tl.Model) -> set[tuple[str, str]]:
    """The sides of modules that lie amid named sites which the model reaches in another order than others."""
    calls = [call for calls in model.anatomy.sides.survey().calls.values() for call in calls]
    leaves = [leaf for call in calls for leaf in (*call.inputs.values(), *call.outputs.values())]
    return {(leaf.site.path, leaf.site.side) for leaf in leaves if "another order" in (leaf.problem or "")}


def present(hf: Any, sites: list[ModuleSite], rows: list[list[int]]) -> dict[ModuleSite, Tensor]:
    """What plain hooks see at the sites, those of the mask aside, which is no tensor where nothing is padded."""
    seen: dict[ModuleSite, Tensor] = {}
    taken = [site for site in sites if "attention_mask" not in site.name and site.key != (2,)]

    def looking(site: ModuleSite) -> Callable[[Tensor], Tensor]:
        def look(tensor: Tensor) -> Tensor:
            seen[site] = tensor.clone()
            return tensor

        return look

    handles = [hooked(hf, site, looking(site)) for site in taken]
    plain_logits(hf, batch(rows))
    for hook in handles:
        hook.remove()
    return seen


@every_family
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_every_tensor_of_every_module_is_the_one_that_a_plain_hook_sees(family, attn) -> None:
    hf = EVERY[family].build(attn=attn)
    model = tl.wrap(hf)
    expected = present(hf, module_sites(model), EVEN_ROWS)
    assert len(expected) > 90
    with untouched(hf), model.trace(EVEN_ROWS):
        saved = {site: read(model, site).save() for site in expected}
    for site, tensor in expected.items():
        assert torch.equal(saved[site].value, tensor), site


def test_sides_of_modules_amid_sites_of_another_order_are_refused_by_name() -> None:
    assert all(not tangled(tl.wrap(FAMILIES[name].build())) for name in ("llama", "qwen3", "gpt2"))
    model = tl.wrap(FAMILIES["gemma3"].build())
    attention = "model.layers.{}.self_attn.{}"
    assert tangled(model) == {
        (attention.format(layer, module), side)
        for layer in range(3)
        for module, side in (
            ("k_proj", "output"),
            ("v_proj", "input"),
            ("v_proj", "output"),
            ("q_norm", "input"),
            ("q_norm", "output"),
            ("k_norm", "input"),
        )
    }
    for spelling in ("read", "replace"):
        with pytest.raises(TracelensError, match="another order") as failure, model.trace(EVEN_ROWS):  # noqa: PT012  # its end may raise
            module = model.module("model.layers.1.self_attn.v_proj")
            module.output.save() if spelling == "read" else module.replace(0.0)
        assert failure.value.at is not None
        assert failure.value.at.filename == __file__


@main_family
def test_reads_of_a_ragged_batch_come_back_without_padding(family) -> None:
    hf = FAMILIES[family].build()
    model, prompt = tl.wrap(hf), batch(RAGGED_ROWS)
    expected = present(hf, module_sites(model), RAGGED_ROWS)
    with untouched(hf), model.trace(RAGGED_ROWS):
        saved = {site: read(model, site).save() for site in expected}
    for site, tensor in expected.items():
        for row, (part, mask) in enumerate(zip(saved[site].value, prompt.mask, strict=True)):
            torch.testing.assert_close(part[0], tensor[row][mask], rtol=0, atol=0)


@main_family
@pytest.mark.parametrize("rows", [EVEN_ROWS, RAGGED_ROWS], ids=["even", "ragged"])
def test_every_write_is_what_a_plain_hook_does(family, rows) -> None:
    hf = FAMILIES[family].build()
    model, prompt = tl.wrap(hf), batch(rows)
    before = plain_logits(hf, prompt)
    changed = 0
    for site, tensor in present(hf, module_sites(model), rows).items():
        if not tensor.dtype.is_floating_point or ("layers.2" in site.name or "h.2" in site.name):
            continue
        hook = hooked(hf, site, lambda tensor: tensor * 1.25 - 0.1)
        expected = plain_logits(hf, prompt)
        hook.remove()
        with untouched(hf), model.trace(rows):
            write(model, site, lambda value: value * 1.25 - 0.1)
            # The last of all sites: it sees the writes to the model's own output.
            logits = model.module("").output["logits"][:, -1].save()
        assert torch.equal(logits.value, expected[:, -1]), site
        changed += not torch.equal(expected, before)
    assert changed > 40


SPELLINGS: dict[str, Callable[[Any], None]] = {
    "in place": lambda m: setattr(m, "output", m.output.__iadd__(0.5)),
    "spelt out": lambda m: setattr(m, "output", m.output + 0.5),
    "whole index": lambda m: m.output.__setitem__(..., m.output + 0.5),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_spelling_does_not_matter(spelling) -> None:
    hf = FAMILIES["llama"].build()
    model = tl.wrap(hf)
    hook = hf.model.layers[1].mlp.register_forward_hook(lambda _, args, output: output + 0.5)
    expected = plain_logits(hf, batch(EVEN_ROWS))
    hook.remove()
    with model.trace(EVEN_ROWS):
        spelling(model.module("model.layers.1.mlp"))
        logits = model.logits.save()
    assert torch.equal(logits.value, expected)


def test_positions_and_tokens_of_a_module() -> None:
    hf = FAMILIES["gpt2"].build()
    model = tl.wrap(hf)
    path = "transformer.h.1.attn.c_attn"  # a Conv1D

    def zero_last(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, :-1], torch.zeros_like(output[:, -1:])], dim=1)

    hook = hf.get_submodule(path).register_forward_hook(zero_last)
    expected = plain_logits(hf, batch(RAGGED_ROWS))
    hook.remove()
    for key in ("tok", "index"):
        with model.trace(RAGGED_ROWS):
            if key == "tok":
                model.module(path).output.tok[-1] = 0
            else:
                model.module(path).output[:, -1] = 0
            logits = model.logits[:, -1].save()
        assert torch.equal(logits.value, expected[:, -1])


def test_the_names_and_the_numbers_of_an_argument_are_one_site() -> None:
    model = tl.wrap(FAMILIES["gpt2"].build())
    with model.record() as r:
        module = model.module("transformer.h.0.attn")
        one, two, three = module.input, module.inputs[0], module.inputs["hidden_states"]
        one.save()
    assert len(r.graph.reads) == 1
    assert {two._id, three._id} == {one._id}


def test_named_and_module_sites_at_one_hook_point_are_seen_in_order() -> None:
    hf = FAMILIES["llama"].build()
    model = tl.wrap(hf)
    with model.trace(EVEN_ROWS):
        model.layers[1].mlp_out += 1.0
        module = model.module("model.layers.1.mlp.down_proj")
        before = module.output.save()
        module.output *= 2.0
        add = model.layers[1].mlp_add.save()
        out = model.layers[1].mlp_out.save()
    assert torch.equal(before.value, out.value)
    assert torch.equal(add.value, out.value * 2.0)
    with pytest.raises(CausalityError), model.trace(EVEN_ROWS):
        model.layers[1].mlp_out = model.module("model.layers.1.mlp.down_proj").output


def test_the_pass_is_left_after_the_last_module() -> None:
    hf = FAMILIES["llama"].build()
    model = tl.wrap(hf)
    called: list[str] = []
    for name in ("model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj", "model.layers.2"):
        hf.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.append(name))
    with model.trace(EVEN_ROWS) as t:
        model.module("model.layers.1.mlp.gate_proj").output.save()
    assert called == []
    assert t.plan().plan.layers_run(3) == 2
    with model.trace(EVEN_ROWS):
        model.module("model.layers.1.mlp.act_fn").output.save()
        model.module("model.layers.1.mlp.up_proj").input.save()
    assert called == ["model.layers.1.mlp.up_proj"]


def test_a_module_amid_named_sites_of_one_level_has_its_true_place_among_them() -> None:
    hf = FAMILIES["llama"].build()
    model = tl.wrap(hf)
    with model.trace(EVEN_ROWS):
        model.module("model.layers.1.mlp.up_proj").input *= 0
        up = model.layers[1].mlp_up.save()
        pre = model.layers[1].mlp_pre.save()
    assert not up.value.any()
    assert pre.value.any()
    act = "model.module('model.layers.1.mlp.act_fn').output"
    for flow in (f"{act} = model.layers[1].mlp_up", f"model.layers[1].mlp_pre = {act}", "model.layers[1].mlp_up = "
                 "model.layers[1].mlp_pre"):  # fmt: skip
        with pytest.raises(CausalityError), model.trace(EVEN_ROWS):
            exec(flow)
    with model.trace(EVEN_ROWS):  # where a module's side comes among them, the model knows
        model.module("model.layers.1.mlp.act_fn").output = model.layers[1].mlp_pre * 2.0
        model.layers[1].mlp_up = model.module("model.layers.1.mlp.act_fn").output + 1.0
        pre, up = model.layers[1].mlp_pre.save(), model.layers[1].mlp_up.save()
        neurons = model.layers[1].mlp_act.save()
    assert torch.equal(up.value, pre.value * 2.0 + 1.0)
    assert torch.equal(neurons.value, pre.value * 2.0 * up.value)


# --- graphs as data ------------------------------------------------------------------------------------------------


def recorded(model: tl.Model) -> tl.Graph:
    with model.record() as r:
        model.module("model.layers.0.self_attn").output[0][:, -1] *= 2.0
        model.module("model.layers.1.mlp.act_fn").output += 1.0
        model.module("").output["logits"].save("logits")
        model.module("model.rotary_emb").output[1].save("sin")
    return r.graph


def test_graphs_with_modules_survive_text_and_files(tmp_path) -> None:
    hf = FAMILIES["llama"].build()
    model = tl.wrap(hf)
    graph = recorded(model)
    assert tl.parse(graph.text()) == graph
    graph.to_json(tmp_path / "g.json")
    loaded = tl.Graph.from_json(tmp_path / "g.json")
    assert loaded == graph
    one, two = model.compile(graph)(EVEN_ROWS), tl.wrap(hf).compile(loaded)(EVEN_ROWS)
    assert torch.equal(one["logits"], two["logits"])
    assert torch.equal(one["sin"], two["sin"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("amid layers.1.mlp_pre+4", "after layers.1.mlp_pre+4"),
        ("amid layers.1.mlp_pre+4", "amid layers.1.mlp_pre+5"),
        ("after layers.0.attn_add+1", "after layers.0.attn_in+1"),
        ('module("model.rotary_emb").output[1]', 'module("model.rotary_emb").output[0]'),
        ('module("model.rotary_emb").output[1]', 'module("model.rotary_emb").call(0).output[1]'),
        ('module("model.layers.1.mlp.act_fn")', 'module("model.layers.1.mlp.act")'),
        ("f32[B,P,12]", "f32[B,P,13]"),
    ],
)
def test_a_graph_whose_module_sites_are_not_those_of_the_model_is_refused(old, new) -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    text = recorded(model).text()
    assert old in text
    with pytest.raises((VerificationError, UnknownModuleError)):
        model.compile(tl.parse(text.replace(old, new)))


@pytest.mark.parametrize(
    "site",
    ["module(3).output after start+1", 'module("a").inputs after start+1', 'module("a").input[0] after start+1',
     'module("a").output after', 'module("a").output', 'module("a").middle after start+1',
     'module("a").output after layers.0.nothing+1', 'module("a").call(x).output after start+1'],
)  # fmt: skip
def test_what_is_no_module_site_is_refused_by_the_parser(site) -> None:
    with pytest.raises(tl.errors.GraphSyntaxError):
        tl.parse(f"graph {{\n  %0 = read {site}@0 : f32[B]\n}}")


@pytest.mark.parametrize(
    "site",
    ['module("a").output after start+0', 'module("a").input after start+1', 'module("a").output amid start+1',
     'module("a").call(-1).output after start+1'],
)  # fmt: skip
def test_what_cannot_be_a_module_site_of_any_model_breaks_a_rule(site) -> None:
    with pytest.raises(VerificationError, match="sites exist"):
        tl.verify(tl.parse(f"graph {{\n  %0 = read {site}@0 : f32[B]\n}}"))


# --- the survey ------------------------------------------------------------------------------------------------------


def test_learning_touches_nothing() -> None:
    hf = FAMILIES["llama"].build().train()
    hf.model.layers[0].remembered = torch.ones(3)
    called: list[int] = []
    hf.model.norm.register_forward_hook(lambda *_: called.append(1))
    state = torch.get_rng_state()
    with untouched(hf):
        assert "model.layers.2.mlp.down_proj" in tl.wrap(hf).modules()
    assert called == []
    assert torch.equal(torch.get_rng_state(), state)


def test_modules_are_known_before_weights_are_loaded(tmp_path) -> None:
    hf = FAMILIES["llama"].build()
    hf.save_pretrained(tmp_path)
    closed, open_ = tl.load(tmp_path, weights=False), tl.wrap(hf)
    assert closed.modules() == open_.modules()
    assert recorded(closed) == recorded(open_)


def test_another_dtype_is_learned_anew() -> None:
    hf: Any = FAMILIES["llama"].build()
    model = tl.wrap(hf)
    for dtype in (torch.float32, torch.bfloat16):
        hf.to(dtype)
        with model.trace(EVEN_ROWS):
            value = model.module("model.layers.1.mlp").output
            assert value.dtype is dtype
            value.save("x")


def test_another_vocabulary_is_learned_anew() -> None:
    hf: Any = FAMILIES["llama"].build()
    model = tl.wrap(hf)
    for size in (97, 120):
        hf.resize_token_embeddings(size)
        with model.trace(EVEN_ROWS):
            saved = model.module("lm_head").output[:, -1].save()
        assert saved.value.shape == (len(EVEN_ROWS), size)


def test_sizes_are_told_apart() -> None:
    pairs = {
        (3, 7): "B", (11, 17): "P", (33, 119): "B*P", (12, 18): "P+1", (66, 238): "2*B*P", (48, 48): "48",
        (5, 8): "None", (4, 8): "None",
    }  # fmt: skip
    assert {pair: str(size_of(pair)) for pair in pairs} == pairs


@main_family
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [EVEN_ROWS[:1], RAGGED_ROWS], ids=["one", "ragged"])
def test_the_mask_is_refused_by_name_wherever_it_passes_and_never_offered(family, attn, rows) -> None:
    hf = FAMILIES[family].build(attn=attn)
    model = tl.wrap(hf)
    layer = "transformer.h.1" if family == "gpt2" else "model.layers.1"
    for path in ("", layer.split(".")[0], layer, layer + (".attn" if family == "gpt2" else ".self_attn")):
        assert "mask" not in repr(model.module(path).inputs)
        with pytest.raises(ModuleTensorError, match="is the attention mask") as caught, model.trace(rows):
            model.module(path).inputs["attention_mask"].save()
        assert caught.value.at is not None
        assert caught.value.at.filename == __file__
        assert "model.token_mask" in str(caught.value.instead)
        with pytest.raises(ModuleTensorError) as missing, model.trace(rows):
            model.module(path).inputs["nothing"].save()
        assert "mask" not in str(missing.value)
        with pytest.raises(ModuleTensorError, match="is the attention mask"), model.trace(rows):
            model.module(path).inputs["attention_mask"] = 0


class Halved(nn.Module):
    """Takes every second position, whose number is no multiple of the prompt's sizes."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, ::2]


def test_a_size_that_is_no_multiple_is_refused_at_use_and_nowhere_else() -> None:
    hf = FAMILIES["llama"].build()
    hf.model.layers[0].halved = Halved()
    forward = hf.model.layers[0].forward

    class Layer(type(hf.model.layers[0])):
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
            self.halved(hidden_states)
            return super().forward(hidden_states, **kwargs)

    assert forward
    hf.model.layers[0].__class__ = Layer
    model = tl.wrap(hf)
    with model.trace(EVEN_ROWS):
        model.module("model.layers.0.halved").input.save()
    with pytest.raises(ModuleTensorError, match=r"6 for .*'P': 11") as caught, model.trace(EVEN_ROWS):
        model.module("model.layers.0.halved").output.save()
    assert caught.value.at is not None


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def flattening(hf: Any) -> Any:
    """A model with a module that runs on [B*P, D], as the experts of a mixture do."""

    class Layer(type(hf.model.layers[0])):
        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
            flat = self.flat(hidden_states.reshape(-1, hidden_states.shape[-1]))
            return super().forward(flat.reshape(hidden_states.shape), **kwargs)

    hf.model.layers[1].flat = Flat()
    hf.model.layers[1].__class__ = Layer
    return hf


def test_rows_and_positions_in_one_axis() -> None:
    hf = flattening(FAMILIES["llama"].build())
    model = tl.wrap(hf)
    with model.trace(EVEN_ROWS):
        flat = model.module("model.layers.1.flat").output
        assert str(flat._type) == "f32[B*P,48]"
        saved = flat.save()
        stream = model.layers[1].resid_pre.save()
    assert torch.equal(saved.value, stream.value.reshape(-1, 48))
    with pytest.raises(PositionAxisError, match="padding included") as caught, model.trace(RAGGED_ROWS):
        model.module("model.layers.1.flat").output.save()
    assert caught.value.at is not None
    assert "flat" in caught.value.at.text
    with model.trace(RAGGED_ROWS):  # positions that are not looked at do no harm
        model.module("model.layers.1.flat").output *= 2.0
        model.logits.save()


class DependsOnData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_model_that_looks_at_its_data_is_refused_by_name() -> None:
    hf = FAMILIES["llama"].build()
    hf.model.norm = nn.Sequential(hf.model.norm, DependsOnData())
    model = tl.wrap(hf)
    with pytest.raises(MetaForwardError, match="fails with") as caught, model.trace(EVEN_ROWS):
        model.module("model.layers.1.mlp").output.save()
    assert caught.value.at is not None
    with model.trace(EVEN_ROWS):  # named sites need no such pass
        model.layers[1].mlp_add.save()


class Sometimes(nn.Module):
    """Calls its module as often as it is told to, whatever was learned."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.times = 1

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.inner(x)
        return x


def looking(model: tl.Model, path: str) -> tl.Program:
    """A program that saves what a module returns, and the logits."""
    with model.record() as r:
        model.module(path).output.save()
        model.logits.save()
    return model.compile(r)


@pytest.mark.parametrize("times", [0, 2])
def test_a_module_that_is_called_more_or_less_often_than_learned_fails_the_run(times) -> None:
    hf = FAMILIES["llama"].build()
    hf.model.norm = nn.Sequential(hf.model.norm, Sometimes())
    model = tl.wrap(hf)
    program = looking(model, "model.norm.1.inner")
    program(EVEN_ROWS)
    hf.model.norm[1].times = times
    with untouched(hf), pytest.raises(SiteMismatchError, match=r"model\.norm\.1\.inner"):
        program(EVEN_ROWS)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x * 1.0))


def test_a_tensor_that_the_model_changes_in_place_later_is_what_it_was_when_it_was_read() -> None:
    hf = FAMILIES["llama"].build()
    hf.model.norm = nn.Sequential(hf.model.norm, InPlace())
    model = tl.wrap(hf)
    with model.trace(EVEN_ROWS):
        before = model.module("model.norm.1.first").output
        saved = before.save()
        after = model.module("model.norm.1.second").output.save()
        difference = (after - before).save()
    assert (saved.value < 0).any()
    assert torch.equal(after.value, saved.value.relu())
    assert torch.equal(difference.value, after.value - saved.value)


# --- errors ----------------------------------------------------------------------------------------------------------


def refused(error: type[tl.TracelensError], model: tl.Model, code: str) -> tl.TracelensError:
    with pytest.raises(error) as caught, model.trace(EVEN_ROWS):
        exec(compile(code, "<cell 1>", "exec"), {"model": model, "torch": torch})
    assert caught.value.at is not None
    assert caught.value.at.filename == "<cell 1>"
    return caught.value


def test_mistakes_have_names_and_lines() -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    down, attn = "model.module('model.layers.1.mlp.down_proj')", "model.module('model.layers.1.self_attn')"
    error = refused(UnknownModuleError, model, "model.module('model.layers.1.mlp.down_prj').output")
    assert "'model.layers.1.mlp.down_proj'" in (error.instead or "")
    error = refused(ModuleTensorError, model, f"{attn}.output.save()")
    assert error.instead == ".output[0] f32[B,P,48]"
    for code in (
        f"{attn}.output + 1",
        f"torch.add({attn}.output, 1)",
        f"{attn}.output = 1",
        f"{attn}.output += 1",
    ):
        refused(ModuleTensorError, model, code)
    for code in (f"{attn}.input", f"{attn}.inputs['nothing']", f"{attn}.output[1]", f"{attn}.output[-1]",
                 f"{attn}.output[True]", f"{attn}.output[1] = 0"):  # fmt: skip
        refused(ModuleTensorError, model, code)
    refused(ModuleCallError, model, "model.module('model.layers').output")
    refused(ModuleCallError, model, f"{down}.call(1)")
    refused(ModuleCallError, model, f"{down}.call(-1)")
    refused(OptionError, model, "model.module(3)")
    refused(OptionError, model, f"{down}.weight = 0")
    error = refused(UnknownSiteError, model, f"{down}.weight")
    assert "model.param('model.layers.1.mlp.down_proj.weight')" in (error.instead or "")
    refused(ShapeError, model, f"{down}.output = torch.zeros(3)")
    refused(StaleValueError, model, f"h = {down}.output\n{down}.output = 0\nh[:, -1] = 1")
    with pytest.raises(tl.errors.NoTraceError):
        _ = model.module("model.layers.1.mlp").output


def test_lost_updates_are_found_at_modules_too() -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    code = "h = model.module('model.layers.1.mlp').output\nh += 1.0\nmodel.logits.save()"
    error = refused(LostUpdateError, model, code)
    assert error.at is not None
    assert error.at.line == 2
    assert 'model.module("model.layers.1.mlp").output += v' in (error.instead or "")


# --- generation and threads ------------------------------------------------------------------------------------------


def generated(hf: Any) -> Tensor:
    ids = torch.tensor(EVEN_ROWS)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, **options)


@main_family
def test_writes_hold_in_every_step_of_a_generation(family) -> None:
    hf = FAMILIES[family].build()
    model = tl.wrap(hf)
    path = "transformer.h.1.mlp.c_proj" if family == "gpt2" else "model.layers.1.mlp.down_proj"
    hook = hf.get_submodule(path).register_forward_hook(lambda _, args, output: output * 0.25 + 0.5)
    with torch.no_grad():
        expected = generated(hf)
    hook.remove()
    plain = generated(hf)
    assert not torch.equal(plain, expected)
    with untouched(hf), model.generate(EVEN_ROWS, max_new_tokens=5, eos_token_id=None) as t:
        module = model.module(path)
        module.output = module.output * 0.25 + 0.5
    assert t.tokens == expected[:, len(EVEN_ROWS[0]) :].tolist()
    with model.generate(EVEN_ROWS, max_new_tokens=3, eos_token_id=None) as t:
        model.module("lm_head").output[..., 7] = 1e4
    assert t.tokens == [[7, 7, 7]] * len(EVEN_ROWS)


def test_threads_learn_once_and_read_alike() -> None:
    hf = FAMILIES["llama"].build()
    model = tl.wrap(hf)
    expected = present(hf, module_sites(tl.wrap(hf)), EVEN_ROWS)
    found: list[Tensor] = []
    surveys: list[object] = []

    def work() -> None:
        for _ in range(5):
            with model.trace(EVEN_ROWS):
                saved = model.module("model.layers.1.self_attn.k_proj").output.save()
            found.append(saved.value)
            surveys.append(model.anatomy.sides.survey())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    site = next(site for site in expected if site.name == 'module("model.layers.1.self_attn.k_proj").output')
    assert len(found) == 20
    assert all(torch.equal(tensor, expected[site]) for tensor in found)
    assert len(set(map(id, surveys))) == 1
    assert Site("k_proj") != site


# --- gradients -------------------------------------------------------------------------------------------------------


@main_family
def test_the_gradient_at_every_module_is_that_of_autograd(family) -> None:
    """With respect to what a write would replace: of a module's input, what the module makes of it."""
    hf = FAMILIES[family].build(attn="eager")
    model, weights = tl.wrap(hf), torch.linspace(-1, 1, 97)
    checked = 0
    for site, seen in present(hf, module_sites(model), EVEN_ROWS).items():
        if not seen.dtype.is_floating_point or "layers.2" in site.name or "h.2" in site.name:
            continue
        if not site.path and site.side != INPUT:
            continue  # what the model returns comes after the loss
        leaves: list[Tensor] = []

        def leaf(tensor: Tensor, leaves: list[Tensor] = leaves) -> Tensor:
            leaves.append(tensor.detach().requires_grad_())
            return leaves[0]

        hook = hooked(hf, site, leaf)
        loss = (plain_logits(hf, batch(EVEN_ROWS)) * weights).sum()
        hook.remove()
        (wanted,) = torch.autograd.grad(loss, leaves, allow_unused=True)
        program = gradient_program(model, site, weights)
        if wanted is None:
            with pytest.raises(UnusedGradientError), untouched(hf):
                program()
            continue
        with untouched(hf):
            found = program()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        checked += 1
    assert checked > 40


def gradient_program(model: tl.Model, site: ModuleSite, weights: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with model.trace(EVEN_ROWS) as t:
            tl.grad((model.logits * weights).sum(), read(model, site)).save("g")
        return t["g"]

    return run
