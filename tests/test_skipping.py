"""Layers and modules that a block does not run, against models from which they were taken out by hand."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

import tracelens as tl
from tests.support.batches import EVEN, RAGGED, batch, random_rows
from tests.support.families import FAMILIES
from tests.support.plain import plain_logits, untouched
from tracelens.errors import (
    CausalityError,
    DtypeError,
    LayerMappingError,
    OptionError,
    ReplacementError,
    ShapeError,
    SkippedSiteError,
    UnknownModuleError,
    UnknownSiteError,
    VerificationError,
)

EVEN_ROWS, RAGGED_ROWS = random_rows(EVEN), random_rows(RAGGED)
WEIGHT = torch.randn(48, 48, generator=torch.Generator().manual_seed(3)) * 0.2
main_family = pytest.mark.parametrize("family", FAMILIES)
both_batches = pytest.mark.parametrize("rows", [EVEN_ROWS, RAGGED_ROWS], ids=["even", "ragged"])

# Which module each site is the output of, and whether it returns a tuple.
MADE_BY = {
    "llama": {
        "attn_norm": "input_layernorm", "attn_out": "self_attn.o_proj", "attn_add": "self_attn", "mlp_norm":
        "post_attention_layernorm", "mlp_pre": "mlp.gate_proj", "mlp_up": "mlp.up_proj", "mlp_out": "mlp.down_proj",
        "mlp_add": "mlp", "resid_post": "",
    },
    "gpt2": {
        "attn_norm": "ln_1", "attn_out": "attn.c_proj", "attn_add": "attn", "mlp_norm": "ln_2", "mlp_pre": "mlp.c_fc",
        "mlp_out": "mlp.c_proj", "mlp_add": "mlp", "resid_post": "",
    },
}  # fmt: skip
MADE_BY["qwen3_moe"] = {
    **{site: path for site, path in MADE_BY["llama"].items() if site not in ("mlp_pre", "mlp_up")},
    "mlp_out": "mlp",
}
# Of what is added the last norm alone is left out: what it would have read has no other use.
MADE_BY["gemma3_text"] = {
    **MADE_BY["llama"], "attn_add": "post_attention_layernorm", "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm", "mlp_add": "post_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}  # fmt: skip


def made_by(model_type: str) -> dict[str, str]:
    return MADE_BY.get(model_type, MADE_BY["llama"])


def path_of(hf: Any, layer: int, name: str) -> str:
    gpt2 = hf.config.model_type == "gpt2"
    inner = made_by(hf.config.model_type)[name]
    outer = f"transformer.h.{layer}" if gpt2 else f"model.layers.{layer}"
    return f"{outer}.{inner}" if inner else outer


def without_layers(hf: Any, gone: set[int]) -> Any:
    """A copy of the model without some of its layers."""
    cut = copy.deepcopy(hf)
    holder, name = (cut.transformer, "h") if cut.config.model_type == "gpt2" else (cut.model, "layers")
    kept = [layer for number, layer in enumerate(getattr(holder, name)) if number not in gone]
    for number, layer in enumerate(kept):
        attention = layer.attn if cut.config.model_type == "gpt2" else layer.self_attn
        attention.layer_idx = number
    setattr(holder, name, nn.ModuleList(kept))
    if kinds := getattr(cut.config, "layer_types", None):
        cut.config.layer_types = [kind for number, kind in enumerate(kinds) if number not in gone]
    cut.config.num_hidden_layers = len(kept)
    return cut


def counting(hf: Any, prefix: str) -> list[str]:
    """The names of the modules under a path that compute something from now on."""
    called: list[str] = []

    def counted(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return forward(*args, **kwargs)

        return count

    for name, module in hf.named_modules():
        if name == prefix or name.startswith(prefix + "."):
            module.forward = counted(name, module.forward)
    return called


# --- skipping --------------------------------------------------------------------------------------------------------


@main_family
@both_batches
@pytest.mark.parametrize("gone", [{0}, {1}, {2}, {0, 1}, {0, 1, 2}], ids=str)
def test_a_skipped_layer_is_as_good_as_one_that_is_not_there(family, rows, gone) -> None:
    hf = FAMILIES[family].build()
    model = tl.wrap(hf)
    expected = plain_logits(without_layers(hf, gone), batch(rows))
    with untouched(hf), model.trace(rows):
        for layer in gone:
            model.layers[layer].skip()
        logits = model.logits[:, -1].save()
    assert torch.equal(logits.value, expected[:, -1])
    assert not torch.equal(expected, plain_logits(hf, batch(rows)))


@main_family
def test_several_layers_are_skipped_at_once_and_nothing_of_them_runs(family) -> None:
    hf = FAMILIES[family].build()
    expected = plain_logits(without_layers(hf, {1, 2}), batch(EVEN_ROWS))
    called = counting(hf, path_of(hf, 1, "resid_post")), counting(hf, path_of(hf, 2, "resid_post"))
    model = tl.wrap(hf)
    with untouched(hf), model.trace(EVEN_ROWS) as t:
        model.layers[1:3].skip()
        logits = model.logits.save()
        stream = model.layers[:].resid_post.save()
    assert torch.equal(logits.value, expected)
    assert called == ([], [])
    assert torch.equal(stream.value[0], stream.value[2])
    text = t.explain()
    assert "enters 3 of 3 layers but for 2 that are not run and stops after logits" in text
    assert (
        f'does not run module("{path_of(hf, 1, "resid_post")}"), in whose place layers.1.resid_post' in text
    )
    assert f'instead of module("{path_of(hf, 2, "resid_post")}"):' in text


@main_family
@pytest.mark.parametrize("gone", [{1}, {2}, {1, 2}], ids=str)
def test_skipping_holds_in_every_step_of_a_generation(family, gone) -> None:
    # One kind of attention, so that only layer 0 is asked for the length of the cache.
    alike = {"layer_types": ["sliding_attention"] * 3} if family == "gemma3" else {}
    hf = FAMILIES[family].build(**alike)
    model = tl.wrap(hf)
    ids = torch.tensor(EVEN_ROWS)
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    expected = without_layers(hf, gone).generate(ids, attention_mask=torch.ones_like(ids), **options)
    plain = hf.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert not torch.equal(expected, plain)
    with untouched(hf), model.generate(EVEN_ROWS, max_new_tokens=6, eos_token_id=None) as t:
        for layer in gone:
            model.layers[layer].skip()
    assert t.tokens == expected[:, ids.shape[1] :].tolist()


@main_family
def test_a_layer_that_is_asked_for_the_length_of_the_cache_cannot_be_skipped_in_generation(family) -> None:
    hf = FAMILIES[family].build()
    model = tl.wrap(hf)
    attention = path_of(hf, 0, "attn_add") if family != "gemma3" else "model.layers.0.self_attn"
    for leave_out in (
        lambda: model.layers[0].skip(),
        lambda: model.module(attention).replace(0.0),
        lambda: model.module(path_of(hf, 0, "resid_post")).replace(0.0),
    ):
        with pytest.raises(ReplacementError, match="layer 0 tells all others"):  # noqa: SIM117
            with model.generate(EVEN_ROWS, max_new_tokens=3):
                leave_out()
    with model.generate(EVEN_ROWS, max_new_tokens=3, eos_token_id=None) as t:
        model.layers[0].replace(mlp_add=0.0)  # its MLP has nothing to do with the cache
    assert len(t.tokens) == len(EVEN_ROWS)


def test_each_kind_of_attention_has_a_layer_that_is_asked() -> None:
    from tests.support.families import VARIANTS

    hf = VARIANTS["qwen2_sliding"].build()
    assert hf.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    model = tl.wrap(hf)
    with pytest.raises(ReplacementError, match="layer 1"), model.generate(EVEN_ROWS, max_new_tokens=2):
        model.layers[1].skip()
    expected = without_layers(hf, {2})
    ids = torch.tensor(EVEN_ROWS)
    wanted = expected.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    with model.generate(EVEN_ROWS, max_new_tokens=6, eos_token_id=None) as t:
        model.layers[2].skip()
    assert t.tokens == wanted[:, ids.shape[1] :].tolist()


# --- replacing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "name"),
    [(name, site) for name, family in FAMILIES.items() for site in made_by(family.config().model_type)],
)
@both_batches
def test_a_replaced_module_is_not_run_and_the_model_goes_on_with_the_value(family, rows, name) -> None:
    hf = FAMILIES[family].build()
    path, width = path_of(hf, 1, name), 80 if name in ("mlp_pre", "mlp_up") else 48
    weight = torch.randn(48, width, generator=torch.Generator().manual_seed(5)) * 0.3
    new = {}

    def received(_: nn.Module, args: Any, kwargs: Any) -> None:
        new["value"] = (args[0] if args else kwargs["hidden_states"]) @ weight

    def returned(_: nn.Module, args: Any, output: Any) -> Any:
        return (new["value"], *output[1:]) if isinstance(output, tuple) else new["value"]

    layer = hf.get_submodule(path_of(hf, 1, "resid_post"))
    hooks = [layer.register_forward_pre_hook(received, with_kwargs=True),
             hf.get_submodule(path).register_forward_hook(returned)]  # fmt: skip
    expected = plain_logits(hf, batch(rows))
    for hook in hooks:
        hook.remove()
    called = counting(hf, path)
    model = tl.wrap(hf)
    for spelling in ("site", "module"):
        with untouched(hf), model.trace(rows):
            value = model.layers[1].resid_pre @ weight
            if spelling == "site":
                model.layers[1].replace(**{name: value})
            else:
                model.module(path).replace(value)
            named = getattr(model.layers[1], name).save()
            raw = model.module(path).output
            raw = (raw if isinstance(raw, tl.Value) else raw[0]).save()
            logits = model.logits[:, -1].save()
        assert torch.equal(logits.value, expected[:, -1])
        assert called == []
        for one, two in zip(named.value, raw.value, strict=True):
            assert torch.equal(one, two)


def test_what_is_written_after_a_replacement_sees_it() -> None:
    hf = FAMILIES["llama"].build()
    model = tl.wrap(hf)
    with model.trace(EVEN_ROWS):
        layer = model.layers[1]
        layer.replace(mlp_add=layer.mlp_in @ WEIGHT)
        first = layer.mlp_add.save()
        layer.mlp_add += 1.0
        layer.resid_mid *= 2.0
        second = layer.mlp_add.save()
        mid = layer.resid_mid.save()
        given = layer.mlp_in.save()
        post = layer.resid_post.save()
    torch.testing.assert_close(first.value, given.value @ WEIGHT, atol=1e-6, rtol=1e-6)
    assert torch.equal(second.value, first.value + 1.0)
    assert torch.equal(post.value, mid.value + second.value)


def test_numbers_and_smaller_tensors_are_broadcast_and_cast_as_in_a_write() -> None:
    hf = FAMILIES["llama"].build(dtype=torch.bfloat16)
    model = tl.wrap(hf)
    for value in (0.5, torch.full((48,), 0.5), torch.full((1, 1, 48), 0.5, dtype=torch.float64)):
        with model.trace(EVEN_ROWS):
            model.layers[1].replace(attn_add=value)
            add = model.layers[1].attn_add.save()
        assert add.value.dtype is torch.bfloat16
        assert add.value.shape == (len(EVEN_ROWS), len(EVEN_ROWS[0]), 48)
        assert (add.value == 0.5).all()


def test_layers_are_replaced_together_or_each_by_its_own() -> None:
    hf = FAMILIES["llama"].build()
    model = tl.wrap(hf)
    rows = torch.stack([torch.full((48,), 0.1), torch.full((48,), 0.2)])
    with model.trace(EVEN_ROWS):
        model.layers[1:3].replace(mlp_add=tl.per_layer(rows), attn_add=model.layers[1:3].attn_in)
        mlp, attn, norm = (
            getattr(model.layers[1:3], name).save() for name in ("mlp_add", "attn_add", "attn_in")
        )
    for row, layer in enumerate(mlp.value):
        assert (layer == rows[row, 0]).all()
    assert torch.equal(attn.value, norm.value)


def test_an_activation_function_is_replaced_although_it_lies_between_sites_of_one_level() -> None:
    hf = FAMILIES["llama"].build()
    model = tl.wrap(hf)
    other = copy.deepcopy(hf)
    other.model.layers[1].mlp.act_fn = nn.ReLU()
    with model.trace(EVEN_ROWS):
        model.module("model.layers.1.mlp.act_fn").replace(model.layers[1].mlp_pre.relu())
        logits = model.logits.save()
    assert torch.equal(logits.value, plain_logits(other, batch(EVEN_ROWS)))


class Thrice(nn.Module):
    """Calls its one module three times."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(48, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(self.inner(x)))


def test_one_of_several_calls_is_replaced() -> None:
    hf = FAMILIES["llama"].build()
    thrice = Thrice()
    hf.model.norm = nn.Sequential(hf.model.norm, thrice)
    model = tl.wrap(hf)
    for replaced in ([1], [0, 2], [2, 0]):
        called = counting(hf, "model.norm.1.inner")
        with untouched(hf), model.trace(EVEN_ROWS):
            inner = model.module("model.norm.1.inner")
            for number in replaced:
                inner.call(number).replace(inner.call(number).input + number + 1.0)
            start, end = inner.call(0).input.save(), inner.call(2).output.save()
        assert len(called) == 3 - len(replaced)
        del thrice.inner.forward
        with torch.no_grad():
            x = start.value
            for number in range(3):
                x = x + number + 1.0 if number in replaced else thrice.inner(x)
        assert torch.equal(end.value, x)


def test_gradients_go_through_what_stands_in() -> None:
    hf = FAMILIES["llama"].build()
    model = tl.wrap(hf)
    with untouched(hf), model.trace(EVEN_ROWS):
        layer = model.layers[1]
        layer.replace(mlp_add=torch.tanh(layer.mlp_in @ WEIGHT))
        layer_in, add = layer.mlp_in, layer.mlp_add
        loss = model.logits[:, -1, 3].sum()
        found = [grad.save() for grad in tl.grad(loss, wrt=[layer_in, add])]
    seen: dict[str, Tensor] = {}

    def by_hand(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen["in"] = args[0].detach().requires_grad_()
        seen["add"] = torch.tanh(seen["in"] @ WEIGHT)
        seen["add"].retain_grad()
        return seen["add"]

    hook = hf.model.layers[1].mlp.register_forward_hook(by_hand)
    with torch.enable_grad():
        hf(torch.tensor(EVEN_ROWS)).logits[:, -1, 3].sum().backward()
    hook.remove()
    for grad, name in zip(found, ("in", "add"), strict=True):
        torch.testing.assert_close(grad.value, seen[name].grad, atol=1e-5, rtol=1e-4)


# --- the model as it was found ---------------------------------------------------------------------------------------


def test_a_forward_of_ones_own_comes_back() -> None:
    hf = FAMILIES["llama"].build()
    model = tl.wrap(hf)
    mlp: Any = hf.model.layers[1].mlp
    own = mlp.forward

    def mine(x: Tensor) -> Tensor:
        return own(x) * 2.0

    mlp.forward = mine
    before = plain_logits(hf, batch(EVEN_ROWS))
    with untouched(hf), model.trace(EVEN_ROWS):
        model.layers[1].replace(mlp_add=0.0)
        model.logits.save()
    assert vars(mlp)["forward"] is mine
    assert torch.equal(plain_logits(hf, batch(EVEN_ROWS)), before)
    del mlp.forward
    with model.trace(EVEN_ROWS):
        model.layers[1].replace(mlp_add=0.0)
        model.logits.save()
    assert "forward" not in vars(mlp)


def test_a_module_with_a_hook_of_accelerate_is_left_out_and_comes_back() -> None:
    hf = FAMILIES["llama"].build()
    expected = plain_logits(without_layers(hf, {1}), batch(EVEN_ROWS))
    add_hook_to_module(hf.model.layers[1], ModelHook())
    wrapped = vars(hf.model.layers[1])["forward"]
    model = tl.wrap(hf)
    with model.trace(EVEN_ROWS):
        model.layers[1].skip()
        logits = model.logits.save()
    assert torch.equal(logits.value, expected)
    assert vars(hf.model.layers[1])["forward"] is wrapped
    remove_hook_from_module(hf.model.layers[1])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_whatever_happens_the_forwards_come_back(error) -> None:
    hf = FAMILIES["llama"].build()
    model = tl.wrap(hf)

    def failing(*_: Any) -> None:
        raise error

    with model.record() as r:
        model.layers[0:2].skip()
        model.logits.save()
    program = model.compile(r)
    hook = hf.model.layers[2].register_forward_pre_hook(failing)
    with untouched(hf), pytest.raises(error):
        program(EVEN_ROWS)
    hook.remove()
    assert not any("forward" in vars(module) for module in hf.modules())
    program(EVEN_ROWS)


def test_other_threads_run_the_whole_model_meanwhile() -> None:
    hf = FAMILIES["llama"].build()
    model = tl.wrap(hf)
    expected = plain_logits(hf, batch(EVEN_ROWS))
    others: list[Tensor] = []

    def elsewhere(value: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: others.append(plain_logits(hf, batch(EVEN_ROWS))))
        thread.start()
        thread.join()
        return value + 0.0

    with model.trace(EVEN_ROWS):
        model.layers[1].skip()
        model.layers[0].resid_post = tl.apply(elsewhere, model.layers[0].resid_post)
        logits = model.logits.save()
    assert torch.equal(others[0], expected)
    assert not torch.equal(logits.value, expected)


# --- graphs as data ------------------------------------------------------------------------------------------------


def skipping(model: tl.Model) -> tl.Graph:
    with model.record() as r:
        model.layers[1].skip()
        model.layers[2].replace(mlp_add=model.layers[2].mlp_in * 0.5)
        model.logits.save("logits")
    return r.graph


def test_graphs_that_leave_modules_out_survive_text_and_files(tmp_path) -> None:
    hf = FAMILIES["llama"].build()
    model = tl.wrap(hf)
    graph = skipping(model)
    assert tl.parse(graph.text()) == graph
    graph.to_json(tmp_path / "g.json")
    loaded = tl.Graph.from_json(tmp_path / "g.json")
    assert loaded == graph
    one, two = model.compile(graph)(EVEN_ROWS), tl.wrap(hf).compile(loaded)(EVEN_ROWS)
    assert torch.equal(one["logits"], two["logits"])


SKIP = (
    'write layers.1.resid_post@1 <- %0 instead of module("model.layers.1").input after layers.1.resid_pre+6'
)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("after layers.1.resid_pre+6", "after layers.1.resid_post+6"),
        ('instead of module("model.layers.1").input', 'instead of module("model.layers.1").inputs[0]'),
        (SKIP, SKIP.replace("@1 <-", "@2 <-")),
        (SKIP, "%90 = read layers.1.mlp_out@0 : f32[B,P,48]\n  " + SKIP),
        (SKIP, "%90 = read layers.1.resid_post@0 : f32[B,P,48]\n  " + SKIP),
        (SKIP, SKIP + "\n  %90 = read layers.1.attn_out@0 : f32[B,P,48]"),
        (SKIP, "%90 = read layers.1.attn_in@0 : f32[B,P,48]\n  " + SKIP.replace("%0", "%90")),
        (SKIP, "write layers.1.resid_post@1 <- 0\n  " + SKIP.replace("@1 <-", "@2 <-")),
    ],
)
def test_altered_graphs_are_refused(old, new) -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    text = skipping(model).text()
    assert old in text
    model.compile(tl.parse(text))
    with pytest.raises(VerificationError):
        model.compile(tl.parse(text.replace(old, new)))


def test_the_moment_of_a_named_site_is_that_of_the_model_that_runs() -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    text = skipping(model).text()
    expected = model.compile(tl.parse(text))(EVEN_ROWS)["logits"]
    for old, new in (
        ("after layers.1.resid_pre+6", "after layers.1.resid_pre+5"),
        ('instead of module("model.layers.1").input', 'instead of module("transformer.h.1").input'),
    ):
        assert old in text
        assert torch.equal(model.compile(tl.parse(text.replace(old, new)))(EVEN_ROWS)["logits"], expected)


@pytest.mark.parametrize(("home", "other"), [("llama", "gpt2"), ("gpt2", "qwen3"), ("mistral", "gpt2")])
def test_graphs_that_leave_modules_out_by_site_run_on_another_family(home, other) -> None:
    graph = skipping(tl.wrap(FAMILIES[home].build()))
    hf = FAMILIES[other].build()
    model = tl.wrap(hf)
    with model.trace(EVEN_ROWS):
        model.layers[1].skip()
        model.layers[2].replace(mlp_add=model.layers[2].mlp_in * 0.5)
        saved = model.logits.save()
    logits = saved.value
    for moved in (graph, tl.parse(graph.text())):
        called = counting(hf, path_of(hf, 1, "resid_post"))
        assert torch.equal(tl.wrap(hf).compile(moved)(EVEN_ROWS)["logits"], logits)
        assert called == []


def test_a_module_by_path_is_of_one_family_and_says_so() -> None:
    llama = tl.wrap(FAMILIES["llama"].build())
    with llama.record() as r:
        llama.module("model.layers.1.mlp.act_fn").replace(0.0)
        llama.logits.save("logits")
    with pytest.raises(UnknownModuleError):
        tl.wrap(FAMILIES["gpt2"].build()).compile(r)
    text = r.graph.text()
    act = 'module("model.layers.1.mlp.act_fn").input amid layers.1.mlp_pre+'
    number = int(text.split(act)[1].split()[0])
    with pytest.raises(VerificationError, match="where the graph has") as caught:
        llama.compile(tl.parse(text.replace(f"{act}{number}", f"{act}{number - 1}")))
    assert "replace(mlp_add=...)" in str(caught.value.instead)


def test_a_plain_write_that_follows_does_not_bring_the_module_back() -> None:
    hf = FAMILIES["llama"].build()
    called = counting(hf, "model.layers.1.mlp")
    model = tl.wrap(hf)
    with model.trace(EVEN_ROWS):
        model.layers[1].replace(mlp_add=3.0)
        model.layers[1].mlp_add = 0.0
        add = model.layers[1].mlp_add.save()
        model.logits.save()
    assert called == []
    assert not add.value.any()


# --- errors ----------------------------------------------------------------------------------------------------------


def refused(error: type[tl.TracelensError], code: str, family: str = "llama") -> tl.TracelensError:
    model = tl.wrap(FAMILIES[family].build())
    with pytest.raises(error) as caught, model.trace(EVEN_ROWS):
        exec(compile(code, "<cell 1>", "exec"), {"model": model, "torch": torch, "tl": tl, "W": WEIGHT})
    assert caught.value.at is not None
    assert (caught.value.at.filename, caught.value.at.line) == ("<cell 1>", len(code.splitlines()))
    return caught.value


LATE = {
    "read the output before": "h = model.layers[1].mlp_add\nmodel.layers[1].replace(mlp_add=0)",
    "wrote the output before": "model.layers[1].mlp_add = 1\nmodel.layers[1].replace(mlp_add=0)",
    "replaced it twice": "model.layers[1].skip()\nmodel.layers[1].skip()",
    "read inside before": "h = model.layers[1].mlp_out\nmodel.layers[1].skip()",
    "read inside after": "model.layers[1].skip()\nh = model.layers[1].mlp_out",
    "wrote inside after": "model.layers[1].skip()\nmodel.layers[1].attn_add = 0",
    "read a module inside after": "model.layers[1].skip()\nmodel.module('model.layers.1.mlp.act_fn').output",
    "replaced inside after": "model.layers[1].skip()\nmodel.layers[1].replace(mlp_add=0)",
    "replaced around after": "model.layers[1].replace(mlp_add=0)\nmodel.layers[1].skip()",
    "read the stream inside": "model.layers[1].skip()\nmodel.layers[1].resid_mid",
}


@pytest.mark.parametrize("code", LATE.values(), ids=LATE)
def test_what_is_not_run_cannot_be_looked_at(code) -> None:
    error = refused(SkippedSiteError, code)
    assert error.also
    assert error.also[0][1].line == 1
    # The same block twice: the second walks along the steps of the first.
    refused(SkippedSiteError, code)


# What goes to the module that is not run and nowhere else, and what replaces the module without seeing it.
OVERLOOKED = {
    "the stream": ("model.layers[1].skip()", "model.layers[1].resid_pre += 1.0"),
    "a part of the stream": ("model.layers[1].skip()", "model.layers[1].resid_pre[:, -1] = 0.0"),
    "the layer's input": ("model.layers[1].skip()", "model.module('model.layers.1').input += 1.0"),
    "another input": (
        "model.layers[1].skip()",
        "model.module('model.layers.1').inputs['position_embeddings'][0] = 0.0",
    ),
    "what the MLP receives": ("model.layers[1].replace(mlp_add=0.0)", "model.layers[1].mlp_in = 9.0"),
    "the norm before it": ("model.layers[1].replace(mlp_add=0.0)", "model.layers[1].mlp_norm = 9.0"),
    "the norm by path": (
        "model.layers[1].replace(mlp_add=0.0)",
        "model.module('model.layers.1.post_attention_layernorm').output *= 2.0",
    ),
    "what the norm receives": (
        "model.layers[1].replace(mlp_add=0.0)",
        "model.module('model.layers.1.post_attention_layernorm').input *= 2.0",
    ),
    "neurons": ("model.layers[1].replace(mlp_out=0.0)", "model.layers[1].mlp_act[..., 3] = 9.0"),
    "the pattern": ("model.layers[1].replace(attn_out=0.0)", "model.layers[1].pattern = 0.0"),
    "what attention receives": (
        "model.layers[1].replace(attn_add=model.layers[1].resid_pre)",
        "model.layers[1].attn_in += 1.0",
    ),
    "a module's own input": (
        "model.module('model.layers.1.mlp.act_fn').replace(0.0)",
        "model.module('model.layers.1.mlp.act_fn').input += 1.0",
    ),
    "the whole layer's stream": (
        "model.layers[1].replace(resid_post=0.0)",
        "model.layers[1].resid_pre += 1.0",
    ),
    "what the head reads": ("model.module('lm_head').replace(0.0)", "model.final_norm = 1.0"),
}


@pytest.mark.parametrize(("replacing", "writing"), OVERLOOKED.values(), ids=OVERLOOKED)
def test_a_write_that_only_a_module_not_run_would_see_is_refused_in_any_order(replacing, writing) -> None:
    for _ in range(2):  # the second along known steps
        late = refused(SkippedSiteError, f"{replacing}\n{writing}")
        assert "nothing would see" in late.problem
        assert late.also[0][1].line == 1
    if "skip()" in replacing and "position" not in writing:
        return  # a skipped layer returns what was written before
    early = refused(SkippedSiteError, f"{writing}\n{replacing}")
    assert "nothing sees it" in early.problem
    assert early.also[0][1].line == 1


@main_family
@both_batches
def test_a_skipped_layer_returns_what_it_received_after_the_writes_before(family, rows) -> None:
    hf = FAMILIES[family].build()
    model = tl.wrap(hf)
    path = path_of(hf, 1, "resid_post")
    found: list[Tensor] = []
    v = torch.linspace(-1, 1, 48)
    for write in ("site", "module", "both", "none"):
        with model.trace(rows):
            if write in ("module", "both"):
                model.module(path).input *= 2.0
            if write in ("site", "both"):
                model.layers[1].resid_pre += v
            model.layers[1].skip()
            post = model.layers[1].resid_post[:, -1].save()
        found.append(post.value)
    site, module, both, none = found
    assert torch.equal(site, none + v)
    assert torch.equal(module, none * 2.0)
    assert torch.equal(both, (none + v) * 2.0)
    # Writes further up are seen whatever the order.
    with model.trace(rows):
        model.layers[1].skip()
        model.layers[0].resid_post += v
        post = model.layers[1].resid_post[:, -1].save()
    assert torch.equal(post.value, none + v)


def test_what_stands_in_place_of_a_module_may_be_made_of_what_was_written() -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    found: list[Tensor] = []
    for write in ("", "mlp_in", "mlp_norm"):
        with model.trace(EVEN_ROWS):
            layer = model.layers[1]
            if write:
                setattr(layer, write, getattr(layer, write) * 2.0)
            layer.replace(mlp_add=layer.mlp_in @ WEIGHT)
            add = layer.mlp_add.save()
        found.append(add.value)
    torch.testing.assert_close(found[1], found[0] * 2.0, atol=1e-6, rtol=1e-6)
    assert torch.equal(found[2], found[1])
    # What was read before the write does not see it.
    refused(
        SkippedSiteError,
        "h = model.layers[1].mlp_in\nmodel.layers[1].mlp_in += 1\nmodel.layers[1].replace(mlp_add=h)",
    )


def test_a_graph_from_elsewhere_with_a_write_that_nothing_sees_is_refused() -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    text = skipping(model).text()
    for after in (True, False):
        new = "write layers.1.resid_pre@1 <- 0"
        altered = text.replace(SKIP, f"{SKIP}\n  {new}" if after else f"{new}\n  {SKIP}")
        with pytest.raises(VerificationError, match="nothing would see" if after else "nothing sees it"):
            model.compile(tl.parse(altered))


def test_explain_claims_no_effect_beyond_a_layer_that_shuts_the_stream_out() -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    for code, reach in (
        ("skip()", "the residual stream: every later layer sees it"),
        ("replace(resid_post=layer.resid_pre * 2)", "the residual stream: every later layer sees it"),
        (
            "replace(resid_post=0.0)",
            "the residual stream up to layer 1, in whose place stands what does not see",
        ),
    ):
        with model.trace(EVEN_ROWS) as t:
            model.layers[0].resid_post += 1.0
            exec(f"model.layers[1].{code}", {"model": model, "layer": model.layers[1]})
            logits = model.logits.save()
        with model.trace(EVEN_ROWS):
            exec(f"model.layers[1].{code}", {"model": model, "layer": model.layers[1]})
            without = model.logits.save()
        assert f"writes layers.0.resid_post ({reach}" in t.explain()
        assert torch.equal(logits.value, without.value) == ("does not see" in reach)


def test_hints_name_what_can_be_written() -> None:
    for twice in ("model.layers[1].skip()", "model.layers[1].replace(mlp_add=0)"):
        error = refused(SkippedSiteError, f"{twice}\n{twice}")
        assert "is replaced twice in this block" in error.problem
        assert "replace the module first" not in str(error.instead)
    error = refused(SkippedSiteError, LATE["replaced around after"])
    assert "replace the module first" not in str(error.instead)
    error = refused(UnknownSiteError, "model.module('model.layers.2').skip()")
    assert error.instead == "model.layers[2].skip()"
    error = refused(UnknownSiteError, "model.module('model.layers.2.mlp').skip()")
    assert ".replace(value)" in str(error.instead)
    for code in ("model.layers[2].replace()", "model.layers[1:3].replace()"):
        error = refused(OptionError, code)
        assert ".replace(mlp_add=value)" in str(error.instead)
        assert ".skip()" in str(error.instead)


def test_hooks_of_ones_own_on_a_module_that_is_not_run_fire_and_those_inside_do_not() -> None:
    hf = FAMILIES["llama"].build()
    model, seen = tl.wrap(hf), []
    hooks = [
        module.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
        for module in (hf.model.layers[1], hf.model.layers[1].mlp)
    ]
    with model.trace(EVEN_ROWS):
        model.layers[1].skip()
        model.logits.save()
    assert seen == ["LlamaDecoderLayer"]
    for hook in hooks:
        hook.remove()


def test_a_value_has_to_be_there_before_the_module_runs() -> None:
    for late in (
        "model.layers[1].resid_post",
        "model.layers[2].mlp_norm",
        "model.module('model.norm').output",
    ):
        error = refused(CausalityError, f"model.layers[1].replace(mlp_add={late})")
        assert "which is not there yet" in error.problem
        assert error.also
    refused(CausalityError, "model.layers[1].replace(attn_add=model.layers[1].resid_mid)")
    refused(
        CausalityError,
        "model.layers[1].replace(mlp_add=tl.grad(model.logits.sum(), model.layers[0].resid_post))",
    )
    refused(CausalityError, "model.module('model.layers.1.mlp.act_fn').replace(model.layers[1].mlp_up)")


def test_mistakes_have_names_and_lines() -> None:
    refused(ShapeError, "model.layers[1].replace(mlp_add=torch.zeros(3))")
    refused(DtypeError, "model.layers[1].replace(mlp_add=torch.zeros(48, dtype=torch.int64))")
    refused(UnknownSiteError, "model.layers[1].replace(mlp=0)")
    refused(LayerMappingError, "model.layers[1].replace(mlp_add=model.layers[0:2].attn_add)")
    for name in ("resid_pre", "attn_in", "resid_mid", "mlp_act"):
        error = refused(ReplacementError, f"model.layers[1].replace({name}=0)")
        assert "is not the whole output of a module" in error.problem
    error = refused(ReplacementError, "model.module('model').replace(0)")
    assert "it returns a BaseModelOutputWithPast" in error.problem
    error = refused(ReplacementError, "model.module('model.rotary_emb').replace(0)")
    assert "2 tensors" in error.problem
    refused(UnknownSiteError, "model.layers[1].skipp()")
    with pytest.raises(tl.errors.NoTraceError):
        tl.wrap(FAMILIES["llama"].build()).layers[1].skip()
