"""``explain()``: what it says, to the letter, of one small trace."""

from __future__ import annotations

import torch

import tracelens as tl
from tests.support.families import FAMILIES

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
