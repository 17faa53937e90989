"""The user's door: prompts in every form, sites, parameters, records, programs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tracelens as tl
from tests.support.families import FAMILIES
from tests.support.tokenizers import byte_level_bpe
from tracelens.ir.sites import GLOBAL_KINDS, LAYER_KINDS

IDS = [3, 14, 15, 9, 2, 6]


@pytest.fixture(scope="module")
def model() -> tl.Model:
    tokenizer = byte_level_bpe()
    return tl.wrap(FAMILIES["llama"].build(vocab_size=len(tokenizer)), tokenizer)


def logits(model: tl.Model, prompt: object) -> torch.Tensor:
    with model.trace(prompt):
        saved = model.logits.save()
    return saved.value


@pytest.mark.parametrize(
    "prompt",
    [
        [IDS],
        torch.tensor(IDS),
        torch.tensor([IDS], dtype=torch.int32),
        np.array([IDS]),
        {"input_ids": [IDS]},
        {"input_ids": torch.tensor([[*IDS, 0, 0]]), "attention_mask": torch.tensor([[1] * 6 + [0, 0]])},
    ],
    ids=["nested", "1-D", "int32", "numpy", "dict", "right-padded dict"],
)
def test_every_form_of_a_prompt_is_the_same_prompt(model: tl.Model, prompt: object) -> None:
    with torch.no_grad():
        expected = model.hf(input_ids=torch.tensor([IDS])).logits
    assert torch.equal(logits(model, prompt), expected)
    assert torch.equal(logits(model, IDS), expected)


def test_text_is_tokenised_as_the_tokenizer_does(model: tl.Model) -> None:
    text = "the cat"
    assert model.tokenizer is not None
    with torch.no_grad():
        expected = model.hf(**model.tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits
    assert torch.equal(logits(model, text), expected)


def test_the_plan_stops_after_the_last_layer_that_is_needed(model: tl.Model) -> None:
    entered: list[int] = []
    handles = [
        layer.register_forward_hook(lambda *_, index=index: entered.append(index))
        for index, layer in enumerate(model.hf.model.layers)
    ]
    try:
        with model.trace(IDS):
            model.layers[1].mlp_out.save()
        # Layer 1 is left in its middle, so that only layer 0 ends.
        assert entered == [0]
        entered.clear()
        with model.trace(IDS):
            model.unembed[3].save()
        assert entered == []
        with model.trace(IDS):
            model.final_norm.save()
        assert entered == [0, 1, 2]
    finally:
        for handle in handles:
            handle.remove()


def test_a_write_behind_the_last_save_is_not_run(model: tl.Model) -> None:
    with model.trace(IDS) as t:
        model.layers[2].resid_post += 1.0
        model.layers[0].resid_post.save("h")
    assert "stops after layers.0.resid_post" in t.explain()
    assert "write layers.2" not in t.explain().split("program")[1]


def test_unembed_and_param_are_the_models_own_numbers(model: tl.Model) -> None:
    weight = model.hf.lm_head.weight.detach()
    with model.trace(IDS) as t:
        row = model.unembed[5].save()
        down = model.param("model.layers.1.mlp.down_proj.weight").save("down")
        by_module = model.hf.lm_head(model.final_norm).save("again")
        head = model.lm_head.save()
    assert torch.equal(row.value, weight[5])
    assert torch.equal(t["down"], model.hf.model.layers[1].mlp.down_proj.weight)
    torch.testing.assert_close(by_module.value, head.value)
    # The model's own weights are named in the graph, never captured; and what is saved of them is a copy.
    assert t.graph.constants == ()
    before = weight.clone()
    row.value.zero_()
    down.value.zero_()
    assert torch.equal(model.hf.lm_head.weight, before)


def test_sites_lists_what_there_is_and_why_the_rest_is_not() -> None:
    for name, family in FAMILIES.items():
        model = tl.wrap(family.build())
        table = model.sites()
        assert {row.name for row in table} == {"head_out"} | {
            kind.name for kind in (*LAYER_KINDS, *GLOBAL_KINDS)
        }
        for row in table:
            assert (row.absent is None) == (row.shape != ""), row
            assert row.absent is None or len(row.absent) > 20
        assert table["post_ln"].name == "mlp_norm"
        absent = {row.name for row in table if row.absent}
        normed = set() if name in ("qwen3", "qwen3_moe", "gemma3") else {"q_normed", "k_normed"}
        normed |= (
            set()
            if name == "qwen3_moe"
            else {"router_logits", "expert_index", "expert_weights", "expert_act", "expert_out"}
        )
        normed |= set() if name == "gemma3" else {"attn_post_norm", "mlp_post_norm"}
        assert absent == normed | ({"mlp_up", "q_rot", "k_rot"} if name == "gpt2" else {"pos_embed"})
        text, html = repr(table), table._repr_html_()
        for row in table:
            assert row.path in text
            assert row.path in html
        for row in table:
            if row.path.startswith("layers[i]"):
                layer = model.layers[row.layers[0] if row.layers else 0]
                assert (row.name in dir(layer)) == (row.absent is None)
            else:
                assert (row.name in dir(model)) == (row.absent is None)


def test_sites_are_known_before_weights_are_loaded(tmp_path) -> None:
    family = FAMILIES["qwen3"]
    family.build().save_pretrained(tmp_path)
    full = tl.load(tmp_path)
    empty = tl.load(tmp_path, weights=False)
    assert repr(empty.sites()) == repr(full.sites())
    assert empty.anatomy.device.type == "meta"
    with empty.record() as r:
        h = empty.layers[1].mlp_act
        assert str(h.shape) == "(B, P, 80)"
        h.save("h")
    assert full.compile(r.graph)(IDS)["h"].shape == (1, 6, 80)
    with pytest.raises(tl.errors.ModelClosedError), empty.trace(IDS):
        empty.logits.save()


def test_a_loaded_model_gives_transformers_logits(tmp_path) -> None:
    hf = FAMILIES["gpt2"].build()
    hf.save_pretrained(tmp_path)
    byte_level_bpe().save_pretrained(tmp_path)
    model = tl.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(logits(model, IDS), hf(torch.tensor([IDS])).logits)
    assert model.tokenizer is not None
    assert tl.load(tmp_path, dtype=torch.bfloat16).anatomy.dtype is torch.bfloat16


def test_mapped_layers_pair_up_stack_and_take_rows() -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    rows = torch.randn(2, 48)
    with model.trace(IDS):
        mapped = model.layers[0:2].resid_post
        assert mapped.shape == (1, 6, 48)
        last = mapped[:, -1].save("last")
        drift = (mapped - model.layers[0:2].resid_pre).norm(dim=-1).save()
        stacked = mapped.stack()
        assert stacked.shape == (2, 1, 6, 48)
        mean = stacked.mean(0).save()
        singles = [model.layers[i].resid_post.save() for i in (0, 1)]
        before = [model.layers[i].resid_pre.save() for i in (0, 1)]
    expected = torch.stack([single.value for single in singles])
    assert torch.equal(last.value, expected[:, :, -1])
    assert torch.equal(mean.value, expected.mean(0))
    torch.testing.assert_close(drift.value, (expected - torch.stack([b.value for b in before])).norm(dim=-1))
    with model.trace(IDS) as one:
        model.layers[[0, 1]].resid_post += tl.per_layer(2.0 * rows)
        model.logits.save("out")
    with model.trace(IDS) as two:
        for layer, row in enumerate(rows):
            model.layers[layer].resid_post += 2.0 * row
        model.logits.save("out")
    assert torch.equal(one["out"], two["out"])
    with model.trace(IDS) as plain:
        model.logits.save("out")
    assert (one["out"] - plain["out"]).abs().max() > 1e-3


def test_a_program_runs_on_many_prompts_and_owns_its_constants(model: tl.Model) -> None:
    v = torch.randn(48)
    with model.record() as r:
        model.layers[1].resid_post += v
        model.logits.save("out")
    program = model.compile(r)
    for prompt in ([IDS], [IDS[:3], IDS[2:5]], [IDS, IDS[:2]]):
        with model.trace(prompt) as t:
            model.layers[1].resid_post += v
            model.logits.save("out")
        torch.testing.assert_close(program(prompt)["out"], t["out"], rtol=0, atol=0)
    expected = program(IDS)["out"]
    v.zero_()
    assert torch.equal(program(IDS)["out"], expected)


def test_the_same_structure_is_compiled_once_and_names_its_own_lines(model: tl.Model) -> None:
    def failing(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    def run_first() -> None:
        with model.trace(IDS):
            tl.apply(failing, model.layers[0].resid_post).save()  # first

    def run_second() -> None:
        with model.trace(IDS):
            tl.apply(failing, model.layers[0].resid_post).save()  # second

    for attempt in range(2):
        with pytest.raises(tl.errors.OpFailedError) as caught:
            run_first() if attempt == 0 else run_second()
        assert caught.value.at is not None
        assert caught.value.at.text.endswith("# second" if attempt else "# first")
        assert isinstance(caught.value.__cause__, ValueError)


def test_taking_a_size_as_a_number_ties_the_graph_to_it(model: tl.Model) -> None:
    with model.record(IDS) as r:
        h = model.layers[0].resid_post
        rows, positions, width = h.shape
        assert (rows, positions, width) == (1, 6, 48)
        (h * positions).save("h")
    assert {pin.symbol for pin in r.graph.pins} == {"B", "P"}
    with pytest.raises(tl.errors.SpecialisedGraphError) as caught:
        model.compile(r)(IDS[:4])
    assert caught.value.at is not None
    with model.record(IDS) as r:
        h = model.layers[0].resid_post
        assert repr(h.shape) == "(1, 6, 48)"
        assert h.shape == (1, 6, 48)
        h.save("h")
    assert r.graph.pins == ()
    assert model.compile(r)(IDS[:4])["h"].shape == (1, 4, 48)


def test_a_constant_mask_selects_in_row_major_order(model: tl.Model) -> None:
    rows = [IDS, IDS[:4]]
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 1] = mask[1, 3] = mask[1, 5] = True
    with model.trace(rows):
        h = model.layers[1].resid_post
        chosen = h.tok[mask].save()
        whole = h.save()
        model.layers[1].resid_post.tok[mask] = 0.0
        after = model.layers[1].resid_post.save()
    first, second = whole.value
    assert torch.equal(chosen.value, torch.stack([first[0, 1], second[0, 1], second[0, 3]]))
    first[0, 1] = 0
    second[0, 1] = second[0, 3] = 0
    assert torch.equal(after.value[0], first)
    assert torch.equal(after.value[1], second)


def test_a_model_on_several_devices_is_refused_by_name() -> None:
    hf = FAMILIES["llama"].build()
    hf.model.layers[2].to("meta")
    with pytest.raises(tl.errors.SeveralDevicesError, match="cpu, meta"):
        tl.wrap(hf)


def test_a_prepared_prompt_is_used_as_it_is(model: tl.Model) -> None:
    prepared = model.prepare([IDS, IDS[:3]])
    with model.record() as r:
        model.layers[1].resid_post.tok[-1].save("h")
    program = model.compile(r)
    assert torch.equal(program(prepared)["h"], program([IDS, IDS[:3]])["h"])
    with model.trace(prepared):
        h = model.layers[1].resid_post.tok[-1].save()
    assert torch.equal(h.value, program(prepared)["h"])
    with pytest.raises(tl.errors.PromptError):
        tl.wrap(FAMILIES["gpt2"].build()).trace(prepared)
