"""What a run leaves behind: tensors with names and places, tables, files."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tracelens as tl
from tests.support.families import FAMILIES
from tracelens.errors import MutatedActivationError, SiteMismatchError

IDS = [3, 14, 15, 9, 2, 6]


@pytest.fixture(scope="module")
def model() -> tl.Model:
    return tl.wrap(FAMILIES["llama"].build())


def test_saves_come_back_in_order_by_name_and_by_handle(model: tl.Model) -> None:
    with model.trace(IDS) as t:
        late = model.logits.save("late")
        early = model.layers[0].resid_post.save("early")
        model.layers[1].resid_post.save()
    assert list(t.results) == ["late", "early", "#2"]
    assert torch.equal(t["late"], late.value)
    assert torch.equal(t.results["early"], early.value)
    with pytest.raises(KeyError, match="late"):
        t["latte"]


def test_a_handle_behaves_as_its_tensor(model: tl.Model) -> None:
    with model.trace(IDS):
        h = model.layers[1].resid_post.save()
    tensor = h.value
    assert type(tensor) is torch.Tensor
    assert not tensor.requires_grad
    assert np.asarray(h).shape == (1, 6, 48)
    assert torch.equal(h[:, -1], tensor[:, -1])
    assert torch.equal(h + 1, tensor + 1)
    assert torch.equal(2 * h, 2 * tensor)
    assert torch.equal(torch.softmax(h, -1), tensor.softmax(-1))
    assert torch.equal(torch.stack([h, h]), torch.stack([tensor, tensor]))
    assert h.shape == tensor.shape
    assert h.mean().item() == tensor.mean().item()
    assert len(h) == 1
    assert float(h[0, 0, 0]) == tensor[0, 0, 0].item()
    assert [row.shape for row in h] == [torch.Size([6, 48])]
    assert repr(h) == repr(tensor)
    # It is fit for training on, and for use in the next trace.
    probe = torch.nn.Linear(48, 1)
    probe(h.value).sum().backward()
    with model.trace(IDS):
        difference = (model.layers[1].resid_post - h).save()
    assert difference.value.abs().max() == 0


def test_dtype_and_a_file_as_a_destination(model: tl.Model, tmp_path) -> None:
    path = str(tmp_path / "acts.safetensors")
    with model.trace(IDS):
        h = model.layers[1].resid_post.save("h", dtype=torch.bfloat16)
        stored = model.layers[:].resid_post.save("all", to=path)
        kept = model.layers[0].resid_pre.save(device="keep")
    assert h.value.dtype is torch.bfloat16
    assert torch.equal(load_file(path)["all"], stored.value)
    assert stored.value.shape == (3, 1, 6, 48)
    torch.testing.assert_close(h.value.float(), stored.value[1], rtol=1e-2, atol=1e-2)
    assert kept.value.device == model.anatomy.device


def test_ragged_results_come_per_prompt(model: tl.Model, tmp_path) -> None:
    rows = [IDS, IDS[:2], IDS[1:5]]
    with model.trace(rows) as t:
        h = model.layers[1].resid_post.save("h")
        stacked = model.layers[:].mlp_act.save("stacked")
        last = model.layers[1].resid_post[:, -1].save("last")
    assert [part.shape for part in h.value] == [(1, 6, 48), (1, 2, 48), (1, 4, 48)]
    assert [part.shape for part in stacked.value] == [(3, 1, 6, 80), (3, 1, 2, 80), (3, 1, 4, 80)]
    assert last.value.shape == (3, 48)
    for row, part, end in zip(rows, h.value, last.value, strict=True):
        with model.trace(row):
            alone = model.layers[1].resid_post.save()
        torch.testing.assert_close(part, alone.value, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(end, alone.value[0, -1], rtol=1e-5, atol=1e-5)
    stored = load_file(t.results.to_safetensors(tmp_path / "r.safetensors"))
    assert torch.equal(stored["h.1"], h.value[1])
    frame = t.results.to_pandas("h")
    assert frame.groupby("row")["position"].max().tolist() == [5, 1, 3]


def test_tables_and_files(model: tl.Model, tmp_path) -> None:
    with model.trace(IDS) as t:
        model.layers[0:2].resid_post.norm(dim=-1).save("norms")
        model.layers[1].resid_post[:, -1].save("h")
        model.layers[[2, 0]].mlp_out.save("pair")
    results = t.results
    assert torch.equal(load_file(results.to_safetensors(tmp_path / "r.safetensors"))["h"], t["h"])
    arrays = results.numpy()
    assert arrays["norms"].shape == (2, 1, 6)
    frame = results.to_pandas("norms")
    assert list(frame.columns) == ["layer", "row", "position", "value"]
    assert frame.query("layer == 1 and position == 3")["value"].item() == t["norms"][1, 0, 3].item()
    assert set(results.to_pandas("pair")["layer"]) == {0, 2}
    first = results.to_pandas("pair").iloc[0]
    assert first["layer"] == 2
    assert first["value"] == t["pair"][0, 0, 0, 0].item()
    summary = results.to_pandas()
    assert list(summary.index) == ["norms", "h", "pair"]
    for view in (repr(results), results._repr_html_()):
        assert "layers[1].resid_post[:, -1]" in view
        assert "layers[[2, 0]].mlp_out" in view


def test_saves_are_compact_and_apart(model: tl.Model) -> None:
    with model.trace(IDS):
        h = model.layers[1].resid_post
        one, two = h.save(), h.save()
        small = h[:, -1, :2].save()
        entering = model.layers[2].resid_pre.save()
    for handle in (one, two, small, entering):
        tensor = handle.value
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    one.value.zero_()
    assert two.value.abs().max() > 0
    assert torch.equal(entering.value, two.value)


def test_bfloat16_reaches_numpy_as_float32() -> None:
    model = tl.wrap(FAMILIES["gpt2"].build(dtype=torch.bfloat16))
    with model.trace(IDS) as t:
        model.layers[1].resid_post.save("h")
    assert t["h"].dtype is torch.bfloat16
    assert t.results.numpy()["h"].dtype == np.float32


def test_a_mapped_handle_is_one_value_per_layer_in_the_block_and_the_stack_after_it(model: tl.Model) -> None:
    with model.trace(IDS):
        saved = model.layers[:].resid_post.save()
        doubled = (2 * saved[:, -1]).save()
    assert saved.value.shape == (3, 1, 6, 48)
    assert torch.equal(doubled.value, 2 * saved.value[:, :, -1])
    assert saved.shape == (3, 1, 6, 48)
    assert saved.ndim == 4
    assert torch.equal(saved[2], saved.value[2])
    assert torch.equal(saved.mean(0), saved.value.mean(0))


def test_a_dropped_handle_frees_its_memory(model: tl.Model) -> None:
    with model.trace(IDS) as t:
        kept = model.layers[0].resid_post.save()
        dropped = model.layers[1].resid_post.save()
    watch = weakref.ref(dropped.value)
    del dropped, t
    gc.collect()
    assert watch() is None
    assert kept.value.shape == (1, 6, 48)


MEMBERS: dict[str, tuple[bool, Callable[[Any], Any]]] = {
    "a part": (True, lambda h: h[:, -1].save()),
    "in another dtype": (True, lambda h: h.save(dtype=torch.float64)),
    "a part in another dtype": (True, lambda h: h[:, :2].save(dtype=torch.bfloat16)),
    "computed": (True, lambda h: (h * 2).save()),
    "a part by a function": (True, lambda h: tl.apply(lambda x: x[:, -1], h, like=h[:, -1]).save()),
    "the whole": (False, lambda h: h.save()),
    "the whole, which stays on its device": (False, lambda h: h.save(device="keep")),
    "the whole in another shape": (False, lambda h: h.reshape(-1, 48).save()),
    "the whole in its own dtype": (False, lambda h: h.save(dtype=torch.float32)),
}


@pytest.mark.parametrize("layers", ["stacked", "alone"])
@pytest.mark.parametrize("what", MEMBERS)
def test_what_was_copied_when_it_was_read_may_be_changed_in_place(what: str, layers: str) -> None:
    """A member of a stack is saved at its own layer: copied there, it is what was read; else the change is found."""
    copied, save = MEMBERS[what]
    copied = copied or (layers == "stacked" and "stays" in what)
    hf = FAMILIES["llama"].build()
    model = tl.wrap(hf)

    def saved() -> torch.Tensor:
        with model.trace(IDS):
            h = model.layers[:].resid_post if layers == "stacked" else model.layers[1].resid_post
            found = save(h)
            model.logits[:, -1].save()
        return found.value[:2] if layers == "stacked" else found.value

    def steer(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        args[0].add_(1)

    right = saved()
    handle = hf.model.layers[2].register_forward_pre_hook(steer)
    if copied:
        assert torch.equal(saved(), right)
    else:
        with pytest.raises(MutatedActivationError, match="in place") as caught:
            saved()
        assert caught.value.at is not None
        assert ".save(" in caught.value.at.text
    handle.remove()


def test_a_stack_that_stays_on_its_device_is_the_stack_that_leaves(model: tl.Model) -> None:
    for rows in ([IDS], [IDS, IDS[:2]]):
        with model.trace(rows) as t:
            h = model.layers[[2, 0]].resid_post
            loss = model.logits[:, -1].sum()
            for name, value in {
                "h": h,
                "part": h[:, -1],
                "norm": h.norm(dim=-1),
                "grad": tl.grad(loss, h),
            }.items():
                for dtype in (None, torch.bfloat16):
                    value.save(f"{name} {dtype}", dtype=dtype)
                    value.save(f"{name} {dtype} kept", dtype=dtype, device="keep")
        assert len(t.results) == 16
        for name in t.results:
            if name.endswith("kept"):
                found, wanted = t[name], t[name.removesuffix(" kept")]
                pairs = zip(found, wanted, strict=True) if isinstance(wanted, list) else [(found, wanted)]
                for one, other in pairs:
                    assert one.dtype is other.dtype
                    assert not one.requires_grad
                    assert torch.equal(one, other)


@pytest.mark.parametrize("layers", [1, slice(None), slice(1, 2)])
@pytest.mark.parametrize("device", ["cpu", "keep"])
def test_a_pass_that_does_not_come_to_what_is_saved_is_an_error(layers: int | slice, device: str) -> None:
    hf = FAMILIES["llama"].build()
    skipping = tl.wrap(hf)
    hf.model.layers[1].forward = lambda hidden_states, *_, **__: hidden_states

    def run() -> None:
        with skipping.trace(IDS):
            skipping.layers[layers].mlp_out.save("late", device=device)  # said here
            skipping.logits[:, -1].save()

    with pytest.raises(SiteMismatchError, match="had not come to all that is saved as 'late'") as caught:
        run()
    assert caught.value.at is not None
    assert "said here" in caught.value.at.text
