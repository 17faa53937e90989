"""What results, graphs and generations look like when they are printed, and what loading prints."""

from __future__ import annotations

import sys

import pytest
import torch

import tracelens as tl
from tests.errors import IDS, LLAMA, RAGGED, D
from tracelens.ir import dims
from tracelens.loading import without_bars

model = LLAMA.model


def test_results_of_prompts_of_different_lengths_begin_with_their_shapes() -> None:
    with model.trace(RAGGED):
        h = model.layers[0].resid_post.save()
        stacked = model.layers[:].resid_post.save()
    first, second = repr(h).split("\n", 1)
    assert first == f"2 prompts: (1, 4, {D}), (1, 2, {D})"
    assert second == f"[0]: {h.value[0]!r}"
    assert repr(stacked).startswith(f"2 prompts: (3, 1, 4, {D}), (3, 1, 2, {D})\n")
    with model.trace([[5, 6]] + [[7]] * 9):
        many = model.layers[0].resid_post.save()
    assert repr(many).splitlines()[0].endswith(f"(1, 1, {D}), ...")
    with model.trace(IDS):
        one = model.layers[0].resid_post.save()
    assert repr(one) == repr(one.value)


def test_a_graph_is_one_line_in_a_list_and_all_lines_in_print() -> None:
    with model.record() as r:
        model.layers[0].resid_post += 1
        model.logits.save("x")
    assert repr(r.graph) == f"<graph: {len(r.graph.ops)} operations, saves 'x'>"
    assert str(r.graph).startswith("graph {\n")
    assert len(str(r.graph).splitlines()) > 4


def test_a_generation_shows_its_text() -> None:
    with model.generate("The capital", max_new_tokens=3) as t:
        assert repr(t) == "<generation>"
    assert repr(t) == repr(t.text)
    object.__setattr__(t, "_new", [LLAMA.tokenizer("<b>&")["input_ids"]])
    assert "&lt;b&gt;&amp;" in t._repr_html_()
    with model.generate(["The capital", "of"], max_new_tokens=3) as both:
        pass
    assert both._repr_html_().count("<pre") == 2
    bare = tl.wrap(LLAMA.hf)
    with bare.generate([IDS, IDS], max_new_tokens=3, eos_token_id=None) as ids:
        pass
    assert repr(ids) == "<generation: 3, 3 new tokens, by row>"
    assert "<" in ids._repr_html_()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("f32[B,len(P)[:2],16]", "f32[B,2,16]"),
        ("f32[B,len(len(P)[1:])[::2],16]", "f32[B,2,16]"),
        ("f32[len(S)[:2]]", "f32[len(S)[:2]]"),
        ("len(it)[0] and len(x)[1:]", "len(it)[0] and len(x)[1:]"),
    ],
)
def test_lengths_of_slices_as_numbers(text: str, shown: str) -> None:
    assert dims.with_lengths(text, {"B": 1, "P": 5}) == shown
    assert dims.with_lengths(text, None) == text


def test_bars_are_off_only_within(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import logging

    monkeypatch.setattr(logging, "_tqdm_active", True)
    with without_bars():
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    with without_bars():
        pass
    assert not logging.is_progress_bar_enabled()


def test_the_embedded_model_is_loaded_without_bars_where_nobody_looks(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    import transformers
    from transformers.utils import logging

    seen: list[bool] = []

    def found(*_: object, **__: object) -> torch.nn.Module:
        seen.append(logging.is_progress_bar_enabled())
        return LLAMA.hf

    LLAMA.hf.config.save_pretrained(tmp_path)
    monkeypatch.setattr("tracelens.loading.embedded_model", lambda _: tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", found)
    monkeypatch.setattr(LLAMA.hf.config, "name_or_path", LLAMA.hf.config.name_or_path)
    monkeypatch.setattr(logging, "_tqdm_active", True)
    for watched in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda watched=watched: watched, raising=False)
        tl.load("smollm2-135m")
    assert seen == [False, True]
