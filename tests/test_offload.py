"""Models that accelerate offloads trace like any other, bit for bit, and are left as accelerate leaves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import tracelens as tl
from tests.support.families import EVERY, FAMILIES
from tests.support.offloading import WAYS, loaded
from tests.support.plain import untouched
from tracelens.backends import local
from tracelens.errors import (
    MetaTensorError,
    ModelMovedError,
    OpFailedError,
    OptionError,
    SeveralDevicesError,
    TracelensError,
)
from tracelens.ir.sites import KINDS, TEXT, Scope, Site

IDS = [[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]]
ROWS = [[5, 6, 7, 8, 9], [11, 12]]
Work = Callable[[tl.Model], dict[str, Any]]


def _every_site(model: tl.Model) -> dict[str, Any]:
    """What is at every site, in rows of different lengths."""
    with model.trace(ROWS) as t:
        for kind in KINDS:
            if kind.scope in TEXT or not model.anatomy.has(Site(kind.name)):
                continue
            holders: list[Any] = list(model.layers) if kind.scope is Scope.LAYER else [model]
            for number, holder in enumerate(holders):
                getattr(holder, kind.name).save(f"{kind.name} {number}")
    return dict(t.results)


def _edits(model: tl.Model) -> dict[str, Any]:
    with model.trace(IDS) as t:
        model.layers[0].resid_post[:, -1] += 2.0 * model.layers[0].resid_pre[:, 0]
        model.layers[1].mlp_act[..., ::2] = 0
        model.layers[1].head(1).z[:, -1] *= 3.0
        model.layers[2].pattern[:, 2] = 0.2
        model.layers[:].resid_mid.norm(dim=-1).save("norms")
        model.layers[1:].attn_out = model.layers[1:].attn_out * 1.5
        model.final_norm *= 0.5
        model.logits.save("logits")
    return dict(t.results)


def _parameters(model: tl.Model) -> dict[str, Any]:
    head = model.hf.lm_head
    norm = model.anatomy.module(model.anatomy.family.taps["final_norm"].module)
    with model.trace(IDS) as t:
        model.layers[1].resid_post[:, -1] += model.unembed[7]
        (model.layers[2].resid_post @ model.unembed.T).save("lens by hand")
        head(norm(model.layers[0].resid_post)).save("lens by modules")
        model.layers[1].head_out.save("heads")
        model.param(model.anatomy.output_projection(2)[0]).sum().save("sum")
    assert not t.graph.constants, "weights of the model are parameters, not constants"
    return dict(t.results)


def _modules(model: tl.Model) -> dict[str, Any]:
    mlp = model.anatomy.module_path(model.anatomy.family.taps["mlp_in"], 1)
    down = model.anatomy.module_path(model.anatomy.family.taps["mlp_act"], 2)
    with model.trace(IDS) as t:
        model.module(mlp).input[:, 0] = 0.5
        model.module(mlp).output.save("mlp")
        model.module(down).input *= 2
        model.module(down).output.save("down")
        model.module(model.anatomy.family.taps["lm_head"].module).output.save("head")
    return dict(t.results)


def _left_out(model: tl.Model) -> dict[str, Any]:
    with model.trace(IDS) as t:
        model.layers[1].skip()
        model.layers[2].replace(mlp_add=model.layers[0].mlp_add * 2)
        model.logits.save("logits")
    return dict(t.results)


def _gradients(model: tl.Model) -> dict[str, Any]:
    with model.trace(IDS) as t:
        h = model.layers[:].resid_post
        loss = model.logits[:, -1, 3].sum() - model.logits[:, -1, 5].sum()
        tl.grad(loss, h).save("gradients")
        model.layers[1].resid_post *= 1.5
    return dict(t.results)


def _generation(model: tl.Model) -> dict[str, Any]:
    with model.generate(ROWS, max_new_tokens=5, eos_token_id=[]) as t:
        model.layers[0].resid_post *= 1.5
        model.layers[1].mlp_act[..., :30] = 0
        model.layers[2].skip()
    return {"tokens": torch.tensor(t.tokens)}


def _steps(model: tl.Model) -> dict[str, Any]:
    """Values of one step in later ones, and what is saved over all of them."""
    with model.generate(ROWS, max_new_tokens=5, eos_token_id=[]) as t:
        t.decode.layers[0].resid_post[:, -1] += t.prefill.layers[2].resid_post.tok[-1]
        t.steps[2:4].layers[1].mlp_act[..., :30] = 0
        model.layers[1].resid_post.tok[model.positions >= 3] *= 0.5
        model.layers[:].mlp_act[:, -1].save("stack")
        t.decode.layers[2].resid_post.save("stream")
        (model.layers[1].resid_post[:, -1] @ model.param("lm_head.weight").T).save("lens")
        t.steps[:].logits[:, -1].argmax(-1).save("picks")
    return {**t.results, "tokens": torch.tensor(t.tokens)}


def _early(model: tl.Model) -> dict[str, Any]:
    with model.trace(IDS) as t:
        model.layers[1].mlp_act[..., 0] = 4.0
        model.layers[1].mlp_out.save("early")
    return dict(t.results)


WORK: dict[str, Work] = {
    work.__name__.strip("_"): work
    for work in (
        _every_site, _edits, _parameters, _modules, _left_out, _gradients, _generation, _steps, _early,
    )
}  # fmt: skip


def _plain(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama_tied", "qwen3", "gpt2"])
def test_an_offloaded_model_gives_the_numbers_of_the_model_in_memory(
    family: str, way: str, tmp_path: Path
) -> None:
    expected = tl.wrap(EVERY[family].build(attn="eager"))
    hf = WAYS[way](EVERY[family].build(attn="eager"), tmp_path)
    kept = loaded(hf)
    model = tl.wrap(hf)
    assert model.anatomy.device == torch.device("cpu")
    assert model.anatomy.dtype is torch.float32
    for name, work in WORK.items():
        with untouched(hf):
            found = work(model)
        wanted = work(expected)
        assert list(found) == list(wanted)
        for key, tensor in wanted.items():
            _equal(found[key], tensor, f"{name}: {key}")
        assert loaded(hf) == kept, name
    assert torch.equal(_plain(hf), _plain(expected.hf))


def _equal(found: Any, wanted: Any, what: str) -> None:
    if isinstance(wanted, list):
        assert len(found) == len(wanted), what
        for one, other in zip(found, wanted, strict=True):
            _equal(one, other, what)
        return
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(wanted)), what


def test_the_edits_that_are_compared_matter() -> None:
    model = tl.wrap(FAMILIES["llama"].build(attn="eager"))
    with model.trace(IDS):
        plain = model.logits.save()
        early = model.layers[1].mlp_out.save()
    assert not torch.allclose(_edits(model)["logits"], plain.value, atol=1e-2)
    assert not torch.allclose(_left_out(model)["logits"], plain.value, atol=1e-2)
    assert not torch.allclose(_early(model)["early"], early.value, atol=1e-2)


# --- what is left behind -------------------------------------------------------------------------------------------


def _offloaded(tmp_path: Path, way: str = "layers at once") -> PreTrainedModel:
    return WAYS[way](FAMILIES["llama"].build(), tmp_path)


def test_without_care_a_stop_leaves_nine_weights_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the tests below are about: accelerate unloads a layer where its forward ends, and here it never does."""

    class Careless:
        def __init__(self, keepers: object) -> None: ...

        def remove(self) -> None: ...

    hf = _offloaded(tmp_path)
    kept = loaded(hf)
    monkeypatch.setattr(local, "Loading", Careless)
    model = tl.wrap(hf)
    with model.trace(IDS):
        model.layers[1].mlp_act.save()
    assert len(loaded(hf) - kept) == 9


@pytest.mark.parametrize("way", WAYS)
def test_nothing_stays_loaded_after_a_stop(way: str, tmp_path: Path) -> None:
    hf = _offloaded(tmp_path, way)
    plain, kept = _plain(hf), loaded(hf)
    model = tl.wrap(hf)
    for site in ("resid_pre", "attn_norm", "z", "mlp_act", "resid_post"):
        with untouched(hf), model.trace(IDS):
            getattr(model.layers[1], site).save()
        assert loaded(hf) == kept, site
    assert torch.equal(_plain(hf), plain)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_stays_loaded_after_an_exception(
    way: str, error: type[BaseException], tmp_path: Path
) -> None:
    hf = _offloaded(tmp_path, way)
    plain, kept = _plain(hf), loaded(hf)
    model = tl.wrap(hf)

    def fails(tensor: Tensor) -> Tensor:
        # Inside a layer but between its modules: those that load their own weights have unloaded them again.
        assert (loaded(hf) != kept) == (way == "layers at once")
        raise error("in the middle of a layer")

    with untouched(hf):
        expected = OpFailedError if error is ValueError else error
        with pytest.raises(expected, match="middle"), model.trace(IDS):
            tl.apply(fails, model.layers[1].scores).sum().save()
    assert loaded(hf) == kept
    assert torch.equal(_plain(hf), plain)
    with pytest.raises(expected, match="middle"), model.generate(IDS, max_new_tokens=3):
        model.layers[1].scores = tl.apply(fails, model.layers[1].scores)
    assert loaded(hf) == kept


def test_nothing_stays_loaded_after_an_interrupt_while_weights_are_loaded(tmp_path: Path) -> None:
    hf = _offloaded(tmp_path)
    plain, kept = _plain(hf), loaded(hf)
    hook = hf.model.layers[1]._hf_hook
    own = hook.weights_map

    class Interrupted(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            if name == "mlp.up_proj.weight":
                assert loaded(hf) != kept
                raise KeyboardInterrupt
            return own[name]

    hook.weights_map = Interrupted()
    model = tl.wrap(hf)
    with pytest.raises(KeyboardInterrupt), model.trace(IDS):
        model.logits.save()
    assert loaded(hf) == kept
    hook.weights_map = own
    assert torch.equal(_plain(hf), plain)


def test_nothing_stays_loaded_after_an_error_in_a_block(tmp_path: Path) -> None:
    """A module that is called on a value has its weights loaded by accelerate, while the block is recorded."""
    hf = _offloaded(tmp_path, "memory")
    model = tl.wrap(hf)
    with pytest.raises(TracelensError), model.trace(IDS):
        hf.lm_head(model.layers[1].mlp_act)  # of the wrong width
    assert not loaded(hf)


def test_weights_that_the_user_has_loaded_stay(tmp_path: Path) -> None:
    hf = _offloaded(tmp_path, "memory")
    model = tl.wrap(hf)
    with accelerate.utils.align_module_device(hf.model.layers[2].mlp.up_proj):
        with model.trace(IDS):
            model.layers[1].mlp_act.save()
        assert loaded(hf) == {"model.layers.2.mlp.up_proj.weight"}
    assert not loaded(hf)


def test_a_module_that_is_not_run_does_not_load_its_weights(tmp_path: Path) -> None:
    hf = _offloaded(tmp_path, "memory")
    model = tl.wrap(hf)
    seen: list[str] = []
    for name, module in hf.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if hook is not None and hasattr(hook, "weights_map") and hook.offload:
            hook.weights_map = _Counted(hook.weights_map, name, seen)
    with model.trace(IDS):
        model.layers[1].skip()
        model.layers[2].replace(mlp_add=0.5)
        model.logits.save()
    touched = {path for path in seen if path.startswith("model.layers")}
    assert {path for path in touched if path.startswith("model.layers.0")}
    assert not {path for path in touched if path.startswith(("model.layers.1", "model.layers.2.mlp"))}


class _Counted(dict[str, Tensor]):
    def __init__(self, weights: Any, module: str, seen: list[str]) -> None:
        super().__init__()
        self.weights, self.module, self.seen = weights, module, seen

    def __getitem__(self, name: str) -> Tensor:
        self.seen.append(f"{self.module}.{name}")
        return self.weights[name]


def test_learning_about_modules_copies_no_weights(tmp_path: Path) -> None:
    hf = _offloaded(tmp_path, "memory")
    seen: list[str] = []
    for name, module in hf.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if hook is not None and getattr(hook, "offload", False):
            hook.weights_map = _Counted(hook.weights_map, name, seen)
    model = tl.wrap(hf)
    with untouched(hf):
        assert "model.layers.1.mlp.up_proj" in model.modules()
    assert seen == []


# --- tensors without data ------------------------------------------------------------------------------------------


def test_torch_computes_with_tensors_that_have_no_data() -> None:
    """Why all of these are refused: no error, and whatever is in memory for a result."""
    result = torch.nn.functional.linear(torch.ones(3, 4), torch.ones(2, 4, device="meta"))
    assert result.device.type == "cpu"
    assert result.shape == (3, 2)


def test_operands_without_data_are_refused(tmp_path: Path) -> None:
    hf = _offloaded(tmp_path, "memory")
    model = tl.wrap(hf)
    with pytest.raises(MetaTensorError, match="no numbers"), model.trace(IDS):
        (model.layers[1].resid_post @ hf.lm_head.weight.T).save()
    with pytest.raises(MetaTensorError, match="without data") as caught, model.trace(IDS):
        tl.apply(lambda h: h.to("meta"), model.layers[1].resid_post).save()
    assert caught.value.at is not None
    assert caught.value.at.text.startswith("tl.apply")
    # The parameter itself is recognised, and loaded for the run.
    with model.trace(IDS):
        right = (model.layers[1].resid_post @ model.unembed.T).save()
        also = torch.nn.functional.linear(model.layers[1].resid_post, hf.lm_head.weight).save()
    torch.testing.assert_close(also.value, right.value)


def test_weights_that_nobody_loads_are_refused(tmp_path: Path) -> None:
    hf = FAMILIES["llama"].build()
    hf.lm_head.to("meta")
    with pytest.raises(SeveralDevicesError, match="cpu, meta"):
        tl.wrap(hf)
    hf = _offloaded(tmp_path, "memory")
    accelerate.hooks.remove_hook_from_module(hf.lm_head)
    hf.lm_head.to("meta")
    with pytest.raises(MetaTensorError, match=r"lm_head\.weight"):
        tl.wrap(hf)


def test_a_weight_that_lost_its_hook_is_refused_when_it_is_needed(tmp_path: Path) -> None:
    hf = _offloaded(tmp_path, "memory")
    model = tl.wrap(hf)
    with model.record(IDS) as r:
        (model.layers[0].resid_post @ model.unembed.T).save("lens")
    program = model.compile(r)
    assert program(IDS)["lens"].isfinite().all()
    accelerate.hooks.remove_hook_from_submodules(hf)  # all weights come back
    with pytest.raises(ModelMovedError, match="was moved") as caught:
        program(IDS)
    assert "model.compile" in str(caught.value)
    assert torch.equal(model.compile(program.graph)(IDS)["lens"], model.compile(r)(IDS)["lens"])


# --- moving models ---------------------------------------------------------------------------------------------------


def test_spreading_a_model_anew_makes_programs_stale_and_leaves_blocks_right(tmp_path: Path) -> None:
    hf = FAMILIES["llama"].build()
    model = tl.wrap(hf)

    def traced() -> Tensor:
        with model.trace(IDS):
            model.layers[1].resid_post += 1.0
            h = model.layers[2].mlp_act.save()
        return h.value

    with model.record() as r:
        model.layers[1].resid_post += 1.0
        model.layers[2].mlp_act.save("h")
    program, wanted = model.compile(r), traced()
    assert torch.equal(program(IDS)["h"], wanted)
    WAYS["memory"](hf, tmp_path)
    with pytest.raises(ModelMovedError):
        program(IDS)
    assert torch.equal(traced(), wanted)
    assert not loaded(hf)
    program = model.compile(r)
    assert torch.equal(program(IDS)["h"], wanted)
    assert not loaded(hf)
    accelerate.hooks.remove_hook_from_submodules(hf)
    WAYS["layers at once"](hf, tmp_path)
    with pytest.raises(ModelMovedError):
        program(IDS)
    kept = loaded(hf)
    assert torch.equal(traced(), wanted)
    assert loaded(hf) == kept


def test_a_model_that_nobody_moved_is_not_looked_through_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    with model.record() as r:
        model.layers[1].resid_post.save("h")
    program = model.compile(r)
    program(IDS)

    def walked(self: torch.nn.Module, *args: object, **kwargs: object) -> object:
        raise AssertionError("a run walks over the model's modules")

    monkeypatch.setattr(torch.nn.Module, "named_modules", walked)
    monkeypatch.setattr(torch.nn.Module, "modules", walked)
    monkeypatch.setattr(torch.nn.Module, "named_parameters", walked)
    program(IDS)
    with model.trace(IDS):
        model.layers[1].resid_post.save()


# --- what is said ----------------------------------------------------------------------------------------------------


def test_a_model_says_where_it_is(tmp_path: Path) -> None:
    model = tl.wrap(_offloaded(tmp_path, "memory"))
    assert "on cpu, 30 weights offloaded" in model.describe()
    assert model.describe() in repr(model)
    assert "weights offloaded" not in tl.wrap(FAMILIES["llama"].build()).describe()
    spread = model.anatomy.spread
    assert spread.offloaded("model.layers.1.mlp")
    assert spread.offloaded("lm_head.weight")
    assert spread.offloaded("")
    assert not spread.offloaded("model.rotary_emb")
    assert spread.device_of("model.layers.1.mlp.down_proj.weight") == torch.device("cpu")


def test_a_plain_module_that_is_offloaded() -> None:
    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

    def run(model: tl.PlainModel) -> Tensor:
        with model.trace(torch.ones(3, 4)):
            model.module("1").output[:, 0] = 2.0
            out = (model.module("2").output + model.param("2.bias")).save()
        return out.value

    hf = accelerate.cpu_offload(build(), execution_device="cpu")
    model = tl.wrap(hf)
    with untouched(hf):
        found = run(model)
    assert torch.equal(found, run(tl.wrap(build())))
    with model.trace(torch.ones(3, 4)):
        model.module("0").output.save()
    assert not loaded(hf)


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    FAMILIES["llama"].build().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, "balanced"])
def test_one_device_is_one_device(saved: Path, device_map: Any) -> None:
    plain, model = tl.load(saved), tl.load(saved, device_map=device_map)
    assert not model.anatomy.spread.hooked
    assert model.describe() == plain.describe()
    with plain.trace(IDS), model.trace(IDS):
        wanted, found = plain.logits.save(), model.logits.save()
    assert torch.equal(found.value, wanted.value)


def test_parts_are_kept_on_disk_as_the_map_says(saved: Path, tmp_path: Path) -> None:
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    layers = {f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(3)}
    model = tl.load(saved, device_map={**parts, **layers}, offload_folder=tmp_path / "weights")
    assert model.anatomy.spread.offloaded("lm_head.weight")
    assert model.anatomy.spread.offloaded("model.layers.1.mlp")
    assert not model.anatomy.spread.offloaded("model.layers.0")
    assert f"{2 * 9 + 1} weights offloaded" in model.describe()
    plain = tl.load(saved)
    for name, work in WORK.items():
        wanted = work(plain)
        for key, tensor in work(model).items():
            _equal(tensor, wanted[key], f"{name}: {key}")


def test_options_without_a_map_have_no_effect_and_are_refused(saved: Path) -> None:
    for options in ({"max_memory": {"cpu": "1GiB"}}, {"offload_folder": "weights"}):
        with pytest.raises(OptionError, match=next(iter(options))) as caught:
            tl.load(saved, **options)
        assert caught.value.at is not None
        assert caught.value.at.text == "tl.load(saved, **options)"
    # Sites are there without weights, wherever these would be.
    assert tl.load(saved, weights=False, device_map="auto").n_layers == 3
