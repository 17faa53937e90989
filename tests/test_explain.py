"""``explain()``: what it says, to the letter, of one small trace."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tracelens as tl
from tests.support.families import FAMILIES
from tracelens.explain import shortened
from tracelens.ir.text import op_text

EXPECTED = """\
LlamaForCausalLM (Llama, 3 layers, d_model 48) on cpu, float32, over 1 row x 4 positions

graph (as recorded)
  %0 = read layers.1.resid_mid@0 : f32[B,P,48]   # test_explain.py:{line}
  %1 = const #0 : f32[48]                        # test_explain.py:{line}
  %2 = call torch.add(%0, %1) : f32[B,P,48]      # test_explain.py:{line}
  write layers.1.resid_mid@1 <- %2               # test_explain.py:{line}
  %3 = read layers.2.resid_post@0 : f32[B,P,48]  # test_explain.py:{next}
  %4 = index %3[:, -1] : f32[B,48]               # test_explain.py:{next}
  save "h" <- %4                                 # test_explain.py:{next}

plan
  place 0 (cpu): layers 0 to 2
  the forward pass enters 3 of 3 layers and stops after layers.2.resid_post
  writes layers.1.resid_mid (the residual stream: every later layer sees it)
  layers.1.resid_post: the block's own sum is replaced by one with the value written in the block
  saves 'h': float32 [1, 48], 192 B
  bytes that leave the run: 192 B; between places: 0 B

program for place 0 (cpu) {{
  before the pass:
    %1 = const #0 : f32[48]
  at layers.1.resid_mid:
    %0 = read layers.1.resid_mid@0 : f32[B,P,48]
    %2 = call torch.add(%0, %1) : f32[B,P,48]   free %0, %1
    write layers.1.resid_mid@1 <- %2   free %2
    %5 = read layers.1.resid_mid@1 : f32[B,P,48]
  at layers.1.mlp_add:
    %6 = read layers.1.mlp_add@0 : f32[B,P,48]
    %7 = call torch.add(%5, %6) : f32[B,P,48]   free %5, %6
  at layers.1.resid_post:
    write layers.1.resid_post@1 <- %7   free %7
  at layers.2.resid_post:
    %3 = read layers.2.resid_post@0 : f32[B,P,48]
    %4 = index %3[:, -1] : f32[B,48]   free %3
    save "h" <- %4   free %4
  stop after layers.2.resid_post
}}"""


def test_explain_to_the_letter() -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    v = torch.ones(48)
    with model.trace([1, 2, 3, 4]) as t:
        model.layers[1].resid_mid += v
        model.layers[2].resid_post[:, -1].save("h")
    line = t.graph.locations[0].line
    assert t.explain() == EXPECTED.format(line=line, next=line + 1)
    assert repr(t.plan()) == t.explain()
    html = t._repr_html_()
    for part in ("layers.1.resid_mid", "stop after", "<details>", "192 B"):
        assert part in html


def test_a_recording_explains_itself_without_sizes() -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    with model.record() as r:
        model.layers[0].resid_post.save("h")
    assert "for prompts of any size" in r.explain()
    assert "saves 'h': f32[B,P,48]" in r.explain()
    program = model.compile(r)
    assert "for prompts of any size" in program.explain()
    assert r.graph.text() in r.graph._repr_html_().replace("&quot;", '"').replace("&lt;", "<").replace(
        "&gt;", ">"
    )


def test_a_block_that_saves_nothing_says_that_nothing_runs() -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    with model.trace([1, 2, 3]) as t:
        pass
    head = "LlamaForCausalLM (Llama, 3 layers, d_model 48) on cpu, float32"
    rest = (
        "\n\ngraph (as recorded): empty\n\n"
        "plan\n  place 0 (cpu): layers 0 to 2\n  nothing runs: the block saves nothing"
    )
    assert t.explain() == head + ", over 1 row x 3 positions" + rest
    with model.record() as r:
        pass
    assert r.explain() == head + ", for prompts of any size" + rest
    with model.trace([1, 2, 3]) as t:
        model.layers[1].resid_post  # read, and not saved
    assert "graph (as recorded)\n  %0 = read layers.1.resid_post@0" in t.explain()
    assert t.explain().endswith("nothing runs: the block saves nothing")


def test_a_block_that_saves_what_no_layer_computes() -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    with model.trace([1, 2, 3]) as t:
        (model.unembed[5] + torch.ones(48)).save("u")
    assert torch.equal(t["u"], model.hf.lm_head.weight[5].detach() + 1)
    plan, program = t.explain().split("\n\n")[2:]
    assert plan == (
        "plan\n"
        "  place 0 (cpu): layers 0 to 2\n"
        "  no layer runs: what is saved needs no site of the model\n"
        "  saves 'u': float32 [48], 192 B\n"
        "  bytes that leave the run: 192 B; between places: 0 B"
    )
    assert program.splitlines()[1] == "  before the pass:"


def test_a_generation_without_writes() -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    with model.generate([1, 2, 3], max_new_tokens=1) as t:
        pass
    assert t.explain().endswith(
        "\n\nsteps 0:\nplan\n  place 0 (cpu): layers 0 to 2\n  every forward pass runs whole: 3 layers and the head\n"
        "  can be captured in a CUDA graph: yes"
    )


def test_a_plan_is_a_text_of_its_own() -> None:
    model = tl.wrap(FAMILIES["llama"].build())
    with model.trace([[1, 2, 3], [4, 5, 6]]) as t:
        model.layers[0].mlp_out *= 2
        model.logits[:, -1].save("next")
    plan = t.plan().plan
    sizes = {"B": 2, "P": 3}
    assert t.explain().split("\n\n")[2] == plan.text(sizes)
    assert "  saves 'next': float32 [2, 97], 776 B\n" in plan.text(sizes)
    assert str(plan) == plan.text()
    assert str(plan) == (
        "plan\n"
        "  place 0 (cpu): layers 0 to 2\n"
        "  the forward pass enters 3 of 3 layers and stops after logits\n"
        "  writes layers.0.mlp_out (one branch only: the stream changes through that sublayer)\n"
        "  saves 'next': f32[B,97]"
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("stack(%1, %2, %3, %4)", "stack(%1, %2, %3, %4)"),
        ("stack(%1, %2, %3, %4, %5)", "stack(%1, %2, ..., %5)"),
        ("free %9, %11, %13, %15, %17, %20", "free %9, %11, ..., %17, %20"),
        ("free %3, %9, %11, %13, %15, %17", "free %3, %9, %11, ..., %17"),
        ("call torch.stack((%5, %4, %3, %2, %1,), 0)", "call torch.stack((%5, %4, ..., %1,), 0)"),
        ("stack(%1, %1, %1, %1, %1)", "stack(%1, %1, ..., %1)"),
        ("%1, %2, %3 = x : f32[B,P], f32[B,P], f32[B,P]", "%1, %2, %3 = x : 3 x f32[B,P]"),
        ("%1, %2 = x : f32[B,P], f32[B,P]", "%1, %2 = x : f32[B,P], f32[B,P]"),
        ("x : f32[B], f32[B], f32[B], f32[B,P]", "x : 3 x f32[B], f32[B,P]"),
        ("x : i64[B], f32[B], f32[B], f32[B]   free %1", "x : i64[B], 3 x f32[B]   free %1"),
        ("x : f32[len(P)[1:]], f32[len(P)[1:]], f32[len(P)[1:]]", None),
        ('save "%1, %2, %3, %4, %5" <- %1', None),
        ('save "a \\" %1, %2, %3, %4, %5" <- %1', None),
    ],
)
def test_lists_are_shortened_where_nothing_is_lost(text: str, wanted: str | None) -> None:
    assert shortened(text) == (text if wanted is None else wanted)


def test_what_is_shortened_can_be_filled_in_again() -> None:
    """Every operation of a block over many layers, and its programs."""
    hf = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=12,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=20,
        )
    )
    model = tl.wrap(hf)
    with model.trace([5, 6, 7]) as t:
        model.layers[:].resid_post.norm(dim=-1).save("norms")
        model.layers[:].mlp_out.stack().mean(0).save("mean")
        tl.grad(model.logits[:, -1].sum(), model.layers[:].resid_post).save("gradients")
    text = t.explain()
    assert max(map(len, text.splitlines())) < 200
    assert max(map(len, t.graph.text().splitlines())) > 250, "the graph's own text is whole"

    def filled(text: str) -> str:
        def listed(found: re.Match[str]) -> str:
            first, second, last = map(int, found.groups())
            return ", ".join(f"%{number}" for number in range(first, last + 1, second - first))

        text = re.sub(r"%(\d+), %(\d+), \.\.\., %(\d+)", listed, text)
        return re.sub(r"(\d+) x (\w+\[[^\]]*\])", lambda found: ", ".join([found[2]] * int(found[1])), text)

    compiled = t._compiled()
    for whole in [*map(op_text, t.graph.ops), *(program.text() for program in compiled.programs)]:
        assert shortened(whole) in text
        assert filled(shortened(whole)) == whole
