"""Graphs as text and as files: what is cut off, altered, too new, forbidden or not trusted is refused and never run."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import tracelens as tl
from tests.errors import GPT2, IDS, LLAMA, D, refused
from tracelens.errors import (
    AbsentSiteError,
    ForbiddenFunctionError,
    GraphFileError,
    GraphSyntaxError,
    GraphVersionError,
    LayerRangeError,
    TracelensError,
    UntrustedApplyError,
    VerificationError,
)

model = LLAMA.model
V = torch.linspace(-1, 1, D)


def recorded() -> tl.Graph:
    with model.record() as r:
        model.layers[0].resid_post += V
        torch.relu(model.layers[1].resid_post).save("h")
        model.logits.save("logits")
    return r.graph


GRAPH = recorded()
TEXT = GRAPH.to_json()
TENSORS = GRAPH.constants_bytes()


def sealed(change: Any) -> str:
    """The file after ``change``, with the seal of whoever changed it: intact, as far as sums can tell."""
    document = json.loads(TEXT)
    change(document["body"])
    content = json.dumps(
        [document["format"], document["version"], document["body"]], sort_keys=True, separators=(",", ":")
    )
    document["sha256"] = hashlib.sha256(content.encode()).hexdigest()
    return json.dumps(document)


def in_graph(old: str, new: str) -> Any:
    def change(body: dict[str, Any]) -> None:
        assert any(old in line for line in body["graph"])
        body["graph"] = [line.replace(old, new) for line in body["graph"]]

    return change


def unlike(
    error: type[TracelensError], source: Any, *says: str, constants: bytes | None = TENSORS
) -> TracelensError:
    """Reading raises exactly ``error``; files have lines of their own, so there need not be one of the reader's."""
    before = LLAMA.forwards
    with pytest.raises(TracelensError) as caught:
        tl.Graph.from_json(source, constants=constants)
    assert type(caught.value) is error, caught.value
    for words in says:
        assert words in str(caught.value)
    assert LLAMA.forwards == before
    return caught.value


def test_an_intact_file_runs(tmp_path: Path) -> None:
    expected = model.compile(GRAPH)(IDS)
    for graph in (
        tl.Graph.from_json(TEXT, constants=TENSORS),
        tl.Graph.from_json(sealed(lambda body: None), constants=TENSORS),
    ):
        found = model.compile(graph)(IDS)
        assert all(torch.equal(found[name], expected[name]) for name in ("h", "logits"))
    GRAPH.to_json(tmp_path / "steer.json")
    found = model.compile(tl.Graph.from_json(tmp_path / "steer.json"))(IDS)
    assert torch.equal(found["logits"], expected["logits"])


# --- cut off and altered ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 50, len(TEXT) // 2, len(TEXT) - 1])
def test_a_file_that_is_cut_off(length: int, tmp_path: Path) -> None:
    unlike(GraphFileError, TEXT[:length] if length > 1 else "{", "cut off")
    (tmp_path / "steer.json").write_text(TEXT[:length])
    unlike(GraphFileError, tmp_path / "steer.json", constants=None)


@pytest.mark.parametrize("length", [0, 7, 8, 100, len(TENSORS) - 1])
def test_tensors_that_are_cut_off(length: int) -> None:
    unlike(GraphFileError, TEXT, "safetensors", constants=TENSORS[:length])


def test_tensors_that_are_missing() -> None:
    error = unlike(GraphFileError, TEXT, "missing", constants=None)
    assert ".safetensors" in error.instead


def test_tensors_that_were_altered() -> None:
    altered = TENSORS[:-1] + bytes([TENSORS[-1] ^ 1])
    unlike(GraphFileError, TEXT, "constant #0", constants=altered)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("torch.relu", "torch.tanh"),
        ("layers.0", "layers.2"),
        ('\\"h\\"', '\\"g\\"'),
        ("@1", "@0"),
        ("1.0", "1.1"),
    ],
)
def test_a_file_that_was_altered(old: str, new: str) -> None:
    assert old in TEXT
    error = unlike(GraphFileError, TEXT.replace(old, new, 1), "changed after it was written")
    assert "to_json" in error.instead


@pytest.mark.parametrize(
    "source", ["{}", "[]", '{"format": "something else"}', '{"format": "tracelens-graph"}']
)
def test_what_is_no_graph_file(source: str) -> None:
    unlike(GraphFileError, source)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "steer.json").write_bytes(b"\xff\xfe\x00\x01")
    unlike(GraphFileError, tmp_path / "steer.json", constants=None)


@pytest.mark.parametrize(
    "change",
    [
        in_graph("save", "sabe"),
        in_graph("@1", "@7"),
        in_graph("f32[B,P,48]", "f32[B,P,49]"),
        in_graph('"h"', '"logits"'),
        lambda body: body["graph"].pop(1),
        lambda body: body.pop("graph"),
        lambda body: body.update(graph="text"),
        lambda body: body.update(constants=[]),
        lambda body: body["lines"].pop(),
        lambda body: body.update(lines=[["file.py", "x"]] * len(body["lines"])),
    ],
)
def test_a_sealed_file_that_is_no_valid_graph(change: Any) -> None:
    unlike(GraphFileError, sealed(change))


# --- too new ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.0", "99.0", "2.17"])
def test_a_newer_major_version(version: str) -> None:
    error = unlike(
        GraphVersionError, json.dumps({**json.loads(TEXT), "version": version}), version, "reads up to 1.x"
    )
    assert error.instead == "a newer tracelens"


@pytest.mark.parametrize("version", ["", "one", "1", None, "1.x", "-1.0"])
def test_a_version_that_is_none(version: Any) -> None:
    unlike(GraphFileError, json.dumps({**json.loads(TEXT), "version": version}), "is not a version")


# --- forbidden functions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "os.remove",
        "os.system",
        "builtins.eval",
        "builtins.exec",
        "torch.load",
        "torch.save",
        "torch.hub.load",
        "torch.Tensor.add_",
        "torch.rand_like",
        "torch.nn.Module.__init__",
        "subprocess.run",
        "torch.os.remove",
        "tracelens.pretrained.embedded_model",
    ],
)
def test_a_function_outside_the_allow_list(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(os, "remove", lambda *args: ran.append("remove"))
    monkeypatch.setattr(os, "system", lambda *args: ran.append("system"))
    monkeypatch.setattr(torch, "load", lambda *args: ran.append("load"))
    monkeypatch.setattr(torch, "save", lambda *args: ran.append("save"))
    error = unlike(
        ForbiddenFunctionError, sealed(in_graph("torch.relu", name)), repr(name), "allow-list", "was not run"
    )
    # It names the line of the recording, and the place in the graph.
    assert error.at is not None
    assert Path(error.at.filename).name == Path(__file__).name
    assert "--> " in str(error)
    assert ran == []


def test_a_forbidden_function_does_not_run_without_a_file_either(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(os, "system", lambda *args: ran.append("system"))
    text = """graph {
      %0 = read layers.1.resid_post@0 : f32[B,P,48]
      %1 = call torch.relu(%0) : f32[B,P,48]
      save "h" <- %1
    }"""
    assert model.compile(tl.parse(text))(IDS)["h"].min() == 0
    with refused(VerificationError, "os.system", "-->", instead=None):
        model.compile(tl.parse(text.replace("torch.relu", "os.system")))  # <-
    assert ran == []


def test_a_text_that_has_lost_its_constants() -> None:
    with refused(VerificationError, "lost its constants", instead="graph.to_json(path)"):
        model.compile(tl.parse(GRAPH.text()))  # <-


# --- trust -----------------------------------------------------------------------------------------------------------


def test_functions_of_ones_own_in_a_file() -> None:
    with model.record() as r:
        tl.apply(torch.nn.functional.relu, model.layers[0].resid_post).save("h")
    with pytest.raises(UntrustedApplyError, match=r"tl\.apply") as caught:
        r.graph.to_json()
    assert "trusted=True" in caught.value.instead
    text = r.graph.to_json(trusted=True)
    with pytest.raises(UntrustedApplyError, match="run Python functions") as caught:
        tl.Graph.from_json(text)
    assert "trusted=True" in caught.value.instead
    graph = tl.Graph.from_json(text, trusted=True)
    assert model.compile(graph)(IDS)["h"].min() >= 0


def test_functions_without_a_name() -> None:
    with model.record() as r:
        tl.apply(lambda x: x, model.layers[0].resid_post).save("h")
    with pytest.raises(UntrustedApplyError, match="no importable name") as caught:
        r.graph.to_json(trusted=True)
    assert "top of a module" in caught.value.instead


def test_files_that_write_files(tmp_path: Path) -> None:
    with model.record() as r:
        model.layers[0].resid_post.save("h", to=str(tmp_path / "h.safetensors"))
    text = r.graph.to_json()
    with pytest.raises(UntrustedApplyError, match="write files"):
        tl.Graph.from_json(text)
    assert not (tmp_path / "h.safetensors").exists()
    graph = tl.Graph.from_json(text, trusted=True)
    assert model.compile(graph)(IDS)["h"].shape == (1, 4, D)
    assert (tmp_path / "h.safetensors").exists()


# --- text, and graphs for other models -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "h = model.layers[2].resid_post",
        GRAPH.text()[:60],
        GRAPH.text().replace("read", "raed", 1),
    ],
)
def test_text_that_is_no_graph(text: str) -> None:
    with pytest.raises(GraphSyntaxError, match="graph"):
        tl.parse(text)


def test_a_graph_that_breaks_a_rule() -> None:
    broken = tl.parse(GRAPH.text().replace("resid_post@1", "resid_post@3"))
    with pytest.raises(VerificationError, match="graph is not valid") as caught:
        tl.verify(broken)
    assert "--> " in str(caught.value)
    tl.verify(tl.parse(GRAPH.text()))


def test_a_graph_for_a_larger_model() -> None:
    deeper = tl.parse('graph {\n  %0 = read layers.7.resid_post@0 : f32[B,P,48]\n  save "h" <- %0\n}')
    with refused(LayerRangeError, "layers.7.resid_post", "3 layers", "-->", instead=None):
        model.compile(deeper)  # <-
    wider = tl.parse('graph {\n  %0 = read layers.1.resid_post@0 : f32[B,P,64]\n  save "h" <- %0\n}')
    with refused(VerificationError, "f32[B,P,48]", "f32[B,P,64]", "-->", instead=None):
        model.compile(wider)  # <-


def test_a_graph_for_another_family() -> None:
    with model.record() as r:
        model.layers[0].mlp_up.save("h")  # in the recording
    with refused(
        AbsentSiteError, "GPT-2", "mlp_up", instead="model.sites()", text="# in the recording", on=GPT2
    ):
        GPT2.model.compile(r)
