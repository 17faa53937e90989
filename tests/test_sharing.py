"""A graph that was written on one model runs on others; where it does not fit, that is said before the model runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tracelens as tl
from tests.support.batches import random_rows
from tests.support.families import D_MODEL, FAMILIES, VOCABULARY, WITH_NEURONS
from tracelens.errors import AbsentSiteError, LayerRangeError, TracelensError, VerificationError

ROWS = random_rows((6, 6))
V = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))


def steer(m: tl.Model) -> None:
    """An intervention on sites that every family has, with a constant that has a name."""
    h = m.layers[1].resid_post
    m.layers[1].resid_post = h + tl.constant(2.0, name="strength") * V
    m.layers[0].mlp_act[..., :7] = 0.0
    m.layers[2].mlp_out.tok[-1] *= 0.5
    m.layers[:].resid_post[:, -1].norm(dim=-1).save("norms")
    m.logits[:, -1].save("logits")


def recorded(m: tl.Model) -> tl.Graph:
    with m.record() as r:
        steer(m)
    return r.graph


def traced(m: tl.Model) -> tl.Results:
    with m.trace(ROWS) as t:
        steer(m)
    return t.results


def through_a_file(graph: tl.Graph, folder: Path) -> tl.Graph:
    graph.to_json(folder / "steer.json")
    assert sorted(file.name for file in folder.iterdir()) == ["steer.json", "steer.safetensors"]
    return tl.Graph.from_json(folder / "steer.json")


@pytest.mark.parametrize("target", WITH_NEURONS)
@pytest.mark.parametrize("source", ["llama", "gpt2"])
def test_a_graph_of_one_model_means_the_same_on_another(source: str, target: str, tmp_path: Path) -> None:
    graph = through_a_file(recorded(tl.wrap(FAMILIES[source].build(seed=0))), tmp_path)
    other = tl.wrap(FAMILIES[target].build(seed=5))
    found, wanted = other.compile(graph)(ROWS), traced(other)
    assert list(found) == list(wanted)
    for name in wanted:
        assert torch.equal(found[name], wanted[name])
    plain = tl.wrap(FAMILIES[target].build(seed=5))
    with plain.trace(ROWS):
        logits = plain.logits[:, -1].save()
    assert not torch.allclose(found["logits"], logits.value, atol=1e-2)
    # The name went along.
    assert not torch.allclose(other.compile(graph)(ROWS, strength=-2.0)["logits"], found["logits"], atol=1e-2)


def test_a_graph_written_without_weights_runs_with_them(tmp_path: Path) -> None:
    hf = FAMILIES["llama"].build()
    hf.save_pretrained(tmp_path / "model")
    (tmp_path / "graph").mkdir()
    empty = tl.load(tmp_path / "model", weights=False)
    graph = through_a_file(recorded(empty), tmp_path / "graph")
    model = tl.wrap(hf)
    assert torch.equal(model.compile(graph)(ROWS)["logits"], traced(model)["logits"])


MISFITS: dict[str, tuple[dict[str, Any], type[TracelensError], str]] = {
    "too few layers": ({"num_hidden_layers": 2}, LayerRangeError, "layers.2"),
    "another width": (
        {"hidden_size": 96, "head_dim": 24},
        VerificationError,
        r"f32\[B,P,96\] in this model; the graph was recorded for f32\[B,P,48\]",
    ),
    "fewer neurons": (
        {"intermediate_size": 64},
        VerificationError,
        r"mlp_act is f32\[B,P,64\] in this model; the graph was recorded for f32\[B,P,80\]",
    ),
    "another vocabulary": ({"vocab_size": VOCABULARY + 1}, VerificationError, r"f32\[B,P,98\] in this model"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_are_refused_by_name_before_the_model_runs(name: str, tmp_path: Path) -> None:
    overrides, error, says = MISFITS[name]
    graph = through_a_file(recorded(tl.wrap(FAMILIES["llama"].build())), tmp_path)
    hf: Any = FAMILIES["llama"].build(**overrides)
    runs: list[object] = []
    hf.register_forward_pre_hook(lambda module, args: runs.append(module))
    with pytest.raises(error, match=says) as caught:
        tl.wrap(hf).compile(graph)
    assert not runs
    # The line is that of the recording, known by the name of its file.
    assert caught.value.at is not None
    assert caught.value.at.filename == "test_sharing.py"


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    graph = through_a_file(recorded(tl.wrap(FAMILIES["llama"].build())), tmp_path)
    other = tl.wrap(FAMILIES["llama"].build(dtype=torch.bfloat16))
    with pytest.raises(VerificationError, match=r"bf16\[B,P,48\] in this model"):
        other.compile(graph)


def test_a_site_that_the_family_lacks_is_refused(tmp_path: Path) -> None:
    llama, gpt2 = tl.wrap(FAMILIES["llama"].build()), tl.wrap(FAMILIES["gpt2"].build())
    with llama.record() as r:
        (llama.layers[1].mlp_up * V.norm()).save("up")
    with pytest.raises(AbsentSiteError, match="mlp_up"):
        gpt2.compile(through_a_file(r.graph, tmp_path))


def test_a_parameter_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    llama, gpt2 = tl.wrap(FAMILIES["llama"].build()), tl.wrap(FAMILIES["gpt2"].build())
    with llama.record() as r:
        (llama.layers[1].resid_post * llama.param("model.norm.weight") * V).save("h")
    graph = through_a_file(r.graph, tmp_path)
    again = tl.wrap(FAMILIES["llama"].build(seed=3))
    with again.trace(ROWS) as t:
        (again.layers[1].resid_post * again.param("model.norm.weight") * V).save("h")
    assert torch.equal(again.compile(graph)(ROWS)["h"], t["h"])
    with pytest.raises(TracelensError, match=r"model\.norm\.weight"):
        gpt2.compile(graph)


def test_a_prompt_without_the_words_that_the_graph_names_is_refused(tmp_path: Path) -> None:
    from tests.errors import LLAMA

    with LLAMA.model.record() as r:
        (LLAMA.model.layers[1].resid_post.tok["Paris", -1] + V).save("h")
    program = LLAMA.model.compile(through_a_file(r.graph, tmp_path))
    assert program("Paris is a city")["h"].shape == (1, D_MODEL)
    with pytest.raises(tl.errors.TokenMatchError, match="Paris"):
        program("Rome is a city")
