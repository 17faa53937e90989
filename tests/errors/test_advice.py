"""The advice of an error speaks of the line that the user wrote, and following it does what was meant."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch

import tracelens as tl
from tests.errors import GPT2, IDS, LLAMA, RAGGED, D, refused
from tests.support.families import FAMILIES
from tracelens.errors import (
    DtypeError,
    DuplicateNameError,
    DynamicShapeError,
    FailedRunError,
    MetaTensorError,
    NoTraceError,
    OptionError,
    PromptError,
    ShapeError,
    SymbolicSizeError,
    UnknownSiteError,
    UnsupportedFunctionError,
    ValueAttributeError,
    ValueBranchError,
)

model, gpt2 = LLAMA.model, GPT2.model


# --- masks ---------------------------------------------------------------------------------------------------------


def test_a_write_where_a_mask_holds() -> None:
    said = "model.layers[1].resid_post = tl.where(h > 0, 0, model.layers[1].resid_post)"
    with refused(DynamicShapeError, "mask", instead=said), model.trace(IDS):
        h = model.layers[1].resid_post
        model.layers[1].resid_post[h > 0] = 0  # <-
    with refused(DynamicShapeError, "mask", instead=said), model.trace(IDS):
        h = model.layers[1].resid_post
        h[h > 0] = 0  # <-
    with model.trace(IDS):
        before = model.layers[1].resid_post.save()
        h = model.layers[1].resid_post
        model.layers[1].resid_post = tl.where(h > 0, 0, model.layers[1].resid_post)
        after = model.layers[1].resid_post.save()
    assert (before.value > 0).any()
    assert torch.equal(after.value, before.value.clamp(max=0))


def test_a_mask_of_fewer_axes_and_an_update() -> None:
    said = "model.layers[1].resid_post = tl.where(m[..., None], 1, model.layers[1].resid_post)"
    with refused(DynamicShapeError, instead=said), model.trace(IDS):
        m = model.layers[1].resid_post.mean(-1) > 0
        model.layers[1].resid_post[m] = 1  # <-
    site = "model.layers[1].resid_post"
    with refused(DynamicShapeError, instead=f"{site} = tl.where(m, {site} * 2, {site})"), model.trace(IDS):
        m = model.layers[1].resid_post > 0
        model.layers[1].resid_post[m] *= 2  # <-
    with model.trace(IDS):
        before = model.layers[1].resid_post.save()
        m = model.layers[1].resid_post.mean(-1) > 0
        model.layers[1].resid_post = tl.where(m[..., None], 1, model.layers[1].resid_post)
        after = model.layers[1].resid_post.save()
    expected = before.value.clone()
    expected[before.value.mean(-1) > 0] = 1
    assert torch.equal(after.value, expected)


def test_a_mask_on_a_part_of_a_site() -> None:
    part = "model.layers[1].resid_post[:, -1]"
    with refused(DynamicShapeError, instead=f"{part} = tl.where(last > 0, 0, {part})"), model.trace(IDS):
        last = model.layers[1].resid_post[:, -1]
        last[last > 0] = 0  # <-
    with model.trace(IDS):
        before = model.layers[1].resid_post[:, -1].save()
        last = model.layers[1].resid_post[:, -1]
        model.layers[1].resid_post[:, -1] = tl.where(last > 0, 0, model.layers[1].resid_post[:, -1])
        after = model.layers[1].resid_post[:, -1].save()
    assert torch.equal(after.value, before.value.clamp(max=0))
    with refused(DynamicShapeError, instead="site.tok[...] = tl.where("), model.trace(IDS):
        first = model.layers[1].resid_post.tok[0]
        first[first > 0] = 0  # <-
    with refused(DynamicShapeError, instead="x = tl.where(x > 0, 0, x)"), model.trace(IDS):
        x = model.layers[1].resid_post * 2
        x[x > 0] = 0  # <-


def test_reading_where_a_mask_holds() -> None:
    with refused(DynamicShapeError, instead="site = tl.where(mask, new, site)"), model.trace(IDS):
        h = model.layers[1].resid_post
        h[h > 0].save()  # <-


# --- truth, lengths and lists --------------------------------------------------------------------------------------


def test_a_truth_that_does_not_exist() -> None:
    with refused(ValueBranchError, instead="(0 < h) & (h < 1)"), model.trace(IDS):
        h = model.layers[0].resid_post
        _ = 0 < h < 1  # <-
    with refused(ValueBranchError, instead="(h > 0) | (g > 0)"), model.trace(IDS):
        h, g = model.layers[0].resid_post, model.layers[1].resid_post
        if h > 0 or g > 0:  # <-
            pass
    with refused(ValueBranchError, instead="torch.maximum(h, g)"), model.trace(IDS):
        h, g = model.layers[0].resid_post, model.layers[1].resid_post
        _ = max(h, g)  # <-
    with refused(ValueBranchError, instead="tl.where(condition, a, b)"), model.trace(IDS):
        if model.layers[0].resid_post.mean() > 0:  # <-
            pass
    with model.trace(IDS):
        h, g = model.layers[0].resid_post, model.layers[1].resid_post
        inside, largest = ((h > 0) & (h < 1)).save(), torch.maximum(h, g).save()
        a, b = h.save(), g.save()
    assert torch.equal(inside.value, (a.value > 0) & (a.value < 1))
    assert torch.equal(largest.value, torch.maximum(a.value, b.value))


def test_a_length_and_a_list_of_values() -> None:
    with refused(ValueBranchError, instead="h.shape[0]") as caught, model.trace(IDS):
        h = model.layers[0].resid_post
        _ = len(h)  # <-
    assert "stack" not in caught.error.instead
    with refused(ValueBranchError, instead="torch.stack([a, b])") as caught, model.trace(IDS):
        a, b = model.layers[0].resid_post, model.layers[1].resid_post
        _ = torch.tensor([a, b])  # <-
    assert "shape" not in caught.error.instead
    with refused(ValueBranchError, instead="torch.stack([a, b])"), model.trace(IDS):
        a, b = model.layers[0].resid_post.mean(), model.layers[1].resid_post.mean()
        _ = torch.tensor([a, b])  # <-
    with model.trace(IDS):
        a, b = model.layers[0].resid_post, model.layers[1].resid_post
        both, a, b = torch.stack([a, b]).save(), a.save(), b.save()
    assert torch.equal(both.value, torch.stack([a.value, b.value]))


# --- names ---------------------------------------------------------------------------------------------------------


def test_one_name_in_every_round_of_a_loop() -> None:
    with refused(DuplicateNameError, "'h'", instead='f"h_{i}"') as caught, model.trace(IDS):
        for layer in model.layers:
            layer.resid_post.save("h")  # <-
    assert "h_2" not in caught.error.instead
    with model.trace(IDS) as t:
        for i, layer in enumerate(model.layers):
            layer.resid_post.save(f"h_{i}")
        model.layers[:].resid_post.save("h")
    assert torch.equal(t["h"], torch.stack([t["h_0"], t["h_1"], t["h_2"]]))


def test_an_empty_name() -> None:
    with refused(OptionError, "''", instead='value.save("name")'), model.trace(IDS):
        model.layers[0].resid_post.save("")  # <-


# --- generation ----------------------------------------------------------------------------------------------------


def test_a_constant_for_each_prompt_of_a_generation() -> None:
    generate = {"max_new_tokens": 2}
    says = "in model.generate a write must not depend on the number of rows"
    for shape, says_so in [((5, 1, D), "lengths 2 and 5"), ((3, D), "lengths P and 3")]:
        with (
            refused(ShapeError, says_so, instead="one model.generate per prompt") as caught,
            model.generate([IDS, IDS], **generate),
        ):
            model.layers[1].resid_post += torch.ones(shape)  # <-
        assert "no prompt" not in str(caught.error)
        assert "101" not in caught.error.problem
    with (
        refused(SymbolicSizeError, says, instead="one model.generate per prompt"),
        model.generate([IDS, IDS], **generate),
    ):
        model.layers[1].resid_post[torch.tensor([True, False])] = 0  # <-
    with refused(ShapeError, "no prompt", instead="record with a prompt"), model.record():
        model.layers[1].resid_post += torch.ones(2, 1, D)  # <-
    with model.generate([IDS, IDS], **generate) as t:
        model.layers[1].resid_post += torch.ones(D)
        model.layers[2].resid_post += torch.ones(2, 1, D)
    assert len(t.tokens) == 2


def test_a_mask_over_padded_prompts_in_a_generation() -> None:
    mask = torch.tensor([[False, True, False, False], [False, False, True, True]])
    for scope in ("all", "prefill"):
        with (
            refused(ShapeError, "lengths P and 4", instead="model.positions >= 5") as caught,
            model.generate(RAGGED, max_new_tokens=2) as t,
        ):
            (t.prefill if scope == "prefill" else model).token_mask & ~mask  # <-
        assert ".tok[mask]" in str(caught.error.instead)
        assert "[B, 1, D]" not in str(caught.error.instead)


def test_what_to_write_for_a_mask_in_a_generation() -> None:
    """Each of the ways that the error names, and all of them alike."""
    mask = torch.tensor([[False, True, False, False], [False, False, True, True]])
    found: list[list[torch.Tensor]] = []
    for way in ("nothing", "tok", "prompts", "run"):
        with model.generate(RAGGED, max_new_tokens=2) as t:
            if way == "tok":
                t.prefill.layers[1].resid_post.tok[mask] = 0.0
            elif way == "prompts":
                for p, own in zip(t.prompts, (mask[:1], mask[1:, -2:]), strict=True):
                    p.layers[1].resid_post = tl.where(own[..., None], 0.0, p.layers[1].resid_post)
            elif way == "run":
                site, ids = t.prefill.layers[1].resid_post, t.prefill.token_ids
                chosen = (ids == RAGGED[0][1]) | (ids == RAGGED[1][0]) | (ids == RAGGED[1][1])
                t.prefill.layers[1].resid_post = tl.where(chosen[..., None], 0.0, site)
            h = model.layers[2].resid_post.save()
        found.append(list(h.value))
    assert not any(torch.equal(*pair) for pair in zip(found[0], found[1], strict=True))
    for other in found[2:]:
        assert all(torch.equal(*pair) for pair in zip(found[1], other, strict=True))


def test_a_dict_from_generation() -> None:
    with refused(OptionError, "return_dict_in_generate", instead="t.tokens"):
        model.generate(IDS, max_new_tokens=2, return_dict_in_generate=True)  # <-


# --- saves ---------------------------------------------------------------------------------------------------------


def test_a_dtype_in_words() -> None:
    with refused(DtypeError, "'float16'", instead="dtype=torch.float16"), model.trace(IDS):
        model.layers[0].resid_post.save("x", dtype="float16")  # <-
    with refused(DtypeError, "'half a float'", instead="dtype=torch.float32"), model.trace(IDS):
        model.layers[0].resid_post.save("x", dtype="half a float")  # <-


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with refused(OptionError, "no folder", instead="os.makedirs("), model.trace(IDS):
        model.layers[0].resid_post.save(to=str(tmp_path / "nodir" / "x"))  # <-
    with refused(OptionError, "is a folder", instead="h.safetensors"), model.trace(IDS):
        model.layers[0].resid_post.save(to=str(tmp_path))  # <-
    with refused(OptionError, "no name of a file", instead='to="h.safetensors"'), model.trace(IDS):
        model.layers[0].resid_post.save(to=3)  # <-
    with model.trace(IDS):
        paths = [
            one.resid_post.save(to=tmp_path / name)
            for one, name in ((model.layers[0], "a"), (model.layers[:], "b"))
        ]
    assert torch.equal(paths[0].value, paths[1].value[0])
    assert (tmp_path / "a").is_file()
    assert (tmp_path / "b").is_file()
    os.makedirs(tmp_path / "nodir")
    with model.trace(IDS):
        h = model.layers[0].resid_post.save(to=str(tmp_path / "nodir" / "x"))
    assert h.value.shape == (1, 4, D)


def test_a_result_of_several_values_is_not_one() -> None:
    with refused(ValueAttributeError, "values and indices", instead=".values.save(...)"), model.trace(IDS):
        model.layers[0].resid_post.topk(2).save()  # <-
    with refused(ValueAttributeError, "topk", instead=".values.shape or"), model.trace(IDS):
        _ = model.layers[:].resid_post.topk(2).shape  # <-
    with model.trace(IDS):
        found = model.layers[0].resid_post.topk(2)
        largest, (_, where) = found.values.save(), found
        where.save()
    assert largest.value.shape == where.value.shape == (1, 4, 2)
    assert not hasattr(found, "_nothing")


# --- other places --------------------------------------------------------------------------------------------------


def test_a_block_of_another_model() -> None:
    with refused(NoTraceError, "another model", instead="its own") as caught, model.trace(IDS):  # open
        gpt2.layers[1].resid_post.save()  # <-
    assert "# open" in caught.error.also[0][1].text


def test_a_tensor_of_another_dtype_in_a_product() -> None:
    half = tl.wrap(FAMILIES["llama"].build().to(torch.bfloat16))
    for product in (lambda h, v: h @ v, lambda h, v: torch.einsum("bpd,d->bp", h, v)):
        with pytest.raises(DtypeError, match="bfloat16 and float32") as caught, half.trace(IDS):
            product(half.layers[0].resid_post, torch.ones(D)).save()
        assert caught.value.instead is not None
        assert "tensor.to(value.dtype)" in caught.value.instead
        with half.trace(IDS):
            h = half.layers[0].resid_post
            x = product(h, torch.ones(D).to(h.dtype)).save()
        assert x.value.dtype is torch.bfloat16


def test_all_layers_without_saying_so() -> None:
    said = "model.layers[:].resid_post"
    with refused(UnknownSiteError, "which layers", instead=said), model.trace(IDS):
        model.layers.resid_post.save()  # <-
    with refused(UnknownSiteError, "which layers", instead=said), model.trace(IDS):
        model.layers.resid_post = 0  # <-
    with refused(UnknownSiteError, "'resid_pst'", instead="resid_post"), model.trace(IDS):
        model.layers.resid_pst.save()  # <-
    assert not hasattr(model.layers, "_nothing")


def test_a_block_of_transformers_on_a_value() -> None:
    with refused(UnsupportedFunctionError, "LlamaDecoderLayer", instead="tl.apply("), model.trace(IDS):
        LLAMA.hf.model.layers[1](model.layers[0].resid_post)  # <-
    with refused(UnsupportedFunctionError, "LlamaDecoderLayer", instead="tl.apply("), model.trace(IDS):
        LLAMA.hf.model.layers[1](hidden_states=model.layers[0].resid_post)  # <-
    with pytest.raises(TypeError, match="mine"), model.trace(IDS):
        raise TypeError("mine")


def test_a_tensor_without_numbers() -> None:
    with refused(MetaTensorError, "meta", instead="torch.zeros"), model.trace(IDS):
        (model.layers[0].resid_post + torch.ones(D, device="meta")).save()  # <-


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    for name in ("./nothing", str(tmp_path / "nothing"), tmp_path / "nothing"):
        with refused(OptionError, "there is no folder", "nothing", instead="tl.load("):
            tl.load(name)  # <-


def test_a_copy_of_a_model_is_a_model_of_its_own() -> None:
    original = tl.wrap(FAMILIES["llama"].build())
    twin = copy.deepcopy(original)
    assert twin.hf is not original.hf
    twin.hf.lm_head.weight.data.zero_()
    with original.trace(IDS), twin.trace(IDS):
        mine, theirs = original.logits.save(), twin.logits.save()
    assert mine.value.abs().max() > 0
    assert theirs.value.abs().max() == 0


def test_a_copy_of_a_model_whose_hook_leads_back_to_it() -> None:
    # The subject of these tests holds its model, and the model of transformers holds a hook of the subject.
    twin = copy.deepcopy(model)
    with twin.trace(IDS):
        logits = twin.logits.save()
    assert twin.hf is not LLAMA.hf
    assert torch.equal(logits.value, LLAMA.logits)


def test_the_vocabulary_is_that_of_now() -> None:
    hf = FAMILIES["llama"].build()
    changed = tl.wrap(hf)
    for rows in (hf.config.vocab_size + 5, hf.config.vocab_size - 3):
        with changed.trace(IDS):
            changed.logits.save()
        hf.resize_token_embeddings(rows, mean_resizing=False)
        with changed.trace([rows - 1]):
            logits, head = changed.logits.save(), changed.lm_head.save()
        assert logits.value.shape == head.value.shape == (1, 1, rows)
        assert torch.equal(logits.value, hf(torch.tensor([[rows - 1]])).logits)
        with pytest.raises(PromptError, match=f"vocabulary of {rows}"):
            changed.trace([rows])


def test_a_block_that_failed_says_where() -> None:
    with pytest.raises(KeyboardInterrupt), model.trace(IDS) as t:  # noqa: PT012
        h = model.layers[0].resid_post.save()
        raise KeyboardInterrupt  # here
    for read in (lambda: h.value, lambda: t["x"]):
        with pytest.raises(FailedRunError, match="KeyboardInterrupt\n") as caught:
            read()
        assert "# here" in caught.value.also[0][1].text


def test_a_long_line_is_cut() -> None:
    # fmt: off
    with pytest.raises(DuplicateNameError) as caught, model.trace(IDS):  # noqa: PT012
        model.layers[0].resid_post.save("h"); model.layers[0].resid_post.save("h"); _ = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26]  # noqa: E501, E702
    # fmt: on
    assert "model.layers[0].resid_post.save" in str(caught.value)
    assert max(map(len, str(caught.value).splitlines())) < 175


def test_the_package_lists_its_public_names() -> None:
    assert dir(tl) == sorted(tl.__all__)


def test_the_length_of_a_slice_is_a_number_where_the_prompt_is_known() -> None:
    with refused(ShapeError, "f32[B,2,48]", instead="that shape") as caught, model.trace(IDS):
        model.layers[0].resid_post[:, :2] = torch.ones(7)  # <-
    assert "len(" not in str(caught.error)
    with refused(ShapeError, "len(P)[:2]", instead="record with a prompt"), model.record():
        model.layers[0].resid_post[:, :2] = torch.ones(3, D)  # <-
    with model.trace(IDS):
        h = model.layers[0].resid_post[:, 1:][:, :2]
        assert repr(h).endswith(": f32[B,2,48]>")
        assert "f32[B,2,48] in each" in repr(model.layers[:].resid_post[:, 1:][:, :2])
        h.save()
