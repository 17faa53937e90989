"""Graphs as files: what is in them, and what is refused. Never pickle, never code."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file

import tracelens as tl
from tests.support.batches import random_rows
from tests.support.families import FAMILIES
from tracelens.errors import (
    ForbiddenFunctionError,
    GraphFileError,
    GraphVersionError,
    UntrustedApplyError,
    VerificationError,
)  # fmt: skip
from tracelens.ir import wire
from tracelens.ir.graph import Graph
from tracelens.ir.parse import parse
from tracelens.location import Location

MODEL = tl.wrap(FAMILIES["llama"].build())
ROWS = random_rows((6,))


def doubled(x: torch.Tensor) -> torch.Tensor:
    """A function with an importable name."""
    return x * 2


def recorded() -> tuple[Graph, torch.Tensor]:
    v = torch.randn(48, generator=torch.Generator().manual_seed(1))
    with MODEL.record() as r:
        MODEL.layers[1].resid_post += v
        MODEL.logits.save("logits")
    return r.graph, v


def sealed(document: dict, **header: object) -> str:
    """A document with a header that fits it, as somebody who knows the format could make."""
    version = str(header.get("version", document["version"]))
    body = json.dumps(
        ["tracelens-graph", version, document["body"]],
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=True,
    )
    return json.dumps({**document, **header, "sha256": hashlib.sha256(body.encode()).hexdigest()})


def with_body(recorded: Graph, *, trusted: bool = False, **changes: object) -> str:
    document = json.loads(recorded.to_json(trusted=trusted))
    document["body"].update(changes)
    return sealed(document)


def test_a_document_holds_the_text_the_lines_and_digests():
    graph, v = recorded()
    document = json.loads(graph.to_json())
    assert list(document) == ["format", "version", "sha256", "body"]
    assert (document["format"], document["version"]) == ("tracelens-graph", "1.0")
    body = document["body"]
    assert body["graph"] == graph.text().splitlines()
    assert body["lines"] == [[Path(__file__).name, location.line] for location in graph.locations]
    assert str(Path(__file__).parent) not in graph.to_json()
    assert body["functions"] == []
    digest = hashlib.sha256(v.numpy().tobytes()).hexdigest()
    assert body["constants"] == [{"type": "f32[48]", "name": None, "sha256": digest}]
    assert sealed(document) == json.dumps(document)


def test_constants_are_a_safetensors_file():
    graph, v = recorded()
    assert torch.equal(load(graph.constants_bytes())["0"], v)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool,
     torch.complex64],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4)])
def test_constants_of_every_dtype_and_shape_come_back(dtype, shape):
    c = (
        torch.arange(1 + max(0, int(torch.tensor(shape).prod()) if shape else 1))[1:]
        .reshape(shape or ())
        .to(dtype)
    )
    with MODEL.record() as r:
        torch.stack([MODEL.layers[0].mlp_out.sum().to(torch.complex64), MODEL.logits.sum()]).save("x")
        torch.broadcast_tensors(MODEL.layers[0].mlp_out.sum(), c)[1].save("c")
    found = Graph.from_json(r.graph.to_json(), constants=r.graph.constants_bytes())
    assert found == r.graph
    result = MODEL.compile(found)(ROWS)["c"]
    assert result.dtype is dtype
    assert torch.equal(result, c)


def test_files_lie_beside_each_other_and_run_elsewhere(tmp_path):
    graph, v = recorded()
    path = tmp_path / "graph.json"
    document = graph.to_json(path)
    assert path.read_text() == document
    assert torch.equal(load_file(path.with_suffix(".safetensors"))["0"], v)
    found = Graph.from_json(path)
    assert found == graph
    assert found == Graph.from_json(str(path))
    with MODEL.trace(ROWS):
        MODEL.layers[1].resid_post += v
        wanted = MODEL.logits.save()
    assert torch.equal(MODEL.compile(found)(ROWS)["logits"], wanted.value)


def test_the_library_imports_no_pickle_to_read_a_file(tmp_path):
    source = Path(wire.__file__).read_text()
    assert "pickle" not in source.replace("Never pickle", "")
    assert "torch" not in source.replace("torch's", "")


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    ["", "{", "[]", "3", "null", '"graph"', '{"format": "other"}', '{"format": "tracelens-graph"}', "{} {}"],
)
def test_what_is_no_graph_file_is_refused(source):
    with pytest.raises(GraphFileError):
        wire.from_json(source)


def test_a_changed_body_is_refused():
    graph, _ = recorded()
    changed = graph.to_json().replace("layers.1.resid_post@1", "layers.2.resid_post@1")
    with pytest.raises(GraphFileError, match="sha256"):
        wire.from_json(changed, graph.constants_bytes())


@pytest.mark.parametrize("version", ["2.0", "10.3"])
def test_a_newer_major_version_is_refused_as_such(version):
    document = json.loads(recorded()[0].to_json())
    with pytest.raises(GraphVersionError, match=version):
        wire.from_json(sealed(document, version=version))


def test_a_newer_minor_version_is_read():
    graph, _ = recorded()
    document = sealed(json.loads(graph.to_json()), version="1.7")
    assert wire.from_json(document, graph.constants_bytes()) == graph


@pytest.mark.parametrize("version", ["", "1", "one", "1.x", "1.0.0", "²", "-1.0", None, 1.5])
def test_what_is_no_version_is_refused(version):
    document = json.loads(recorded()[0].to_json())
    with pytest.raises(GraphFileError):
        wire.from_json(json.dumps({**document, "version": version}))


def test_unknown_entries_of_the_header_are_refused():
    document = json.loads(recorded()[0].to_json())
    with pytest.raises(GraphFileError, match="run"):
        wire.from_json(json.dumps({**document, "run": "os.system"}), recorded()[0].constants_bytes())


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "torch.load", "torch.manual_seed", "torch.nope"]
)
def test_a_function_outside_the_list_is_refused_and_not_looked_up(name):
    graph, _ = recorded()
    lines = [line.replace("torch.add", name) for line in graph.text().splitlines()]
    with pytest.raises(ForbiddenFunctionError, match=name.replace(".", r"\.")):
        wire.from_json(with_body(graph, graph=lines), graph.constants_bytes())


def test_a_graph_that_breaks_the_law_is_refused():
    graph, _ = recorded()
    lines = [line.replace("resid_post@1", "resid_post@5") for line in graph.text().splitlines()]
    with pytest.raises(GraphFileError, match="not valid"):
        wire.from_json(with_body(graph, graph=lines), graph.constants_bytes())


@pytest.mark.parametrize(
    "changes",
    [
        {"graph": "graph {"},
        {"graph": ["graph {"]},
        {"graph": [3]},
        {"graph": None},
        {"lines": [["a.py"]]},
        {"lines": [["a.py", "x"]]},
        {"lines": 3},
        {"constants": []},
        {"constants": [3]},
        {"constants": [{}]},
        {"constants": [{"type": "f32[48]"}]},
        {"constants": [{"type": "f31[48]", "name": None, "sha256": ""}]},
        {"constants": [{"type": "f32[48]", "name": None, "sha256": ""}]},
        {"functions": [3]},
        {"functions": None},
    ],
)
def test_a_body_with_a_proper_seal_and_nonsense_in_it_is_refused(changes):
    graph, _ = recorded()
    with pytest.raises(GraphFileError):
        wire.from_json(with_body(graph, **changes), graph.constants_bytes())


def test_constants_that_are_missing_or_others_are_refused(tmp_path):
    graph, _ = recorded()
    document = graph.to_json(tmp_path / "g.json")
    with pytest.raises(GraphFileError, match="missing"):
        wire.from_json(document)
    (tmp_path / "g.safetensors").unlink()
    with pytest.raises(GraphFileError, match="missing"):
        Graph.from_json(tmp_path / "g.json")
    other, _ = recorded()
    other = replace(other, constants=(wire.StoredConstant(other.constants[0].type, None, b"\1" * 192),))
    with pytest.raises(GraphFileError, match="constant #0"):
        wire.from_json(document, other.constants_bytes())


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 7, struct.pack("<Q", 2**60), struct.pack("<Q", 2) + b"{}", b"\x80\x04."]
)
def test_what_is_no_safetensors_file_is_refused(data):
    graph, _ = recorded()
    with pytest.raises(GraphFileError):
        wire.from_json(graph.to_json(), data)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "g.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(GraphFileError, match="not text"):
        Graph.from_json(tmp_path / "g.json")


# --- Python functions, and files -------------------------------------------------------------------------------------


def applying(function: object) -> Graph:
    with MODEL.record() as r:
        tl.apply(function, MODEL.layers[0].mlp_out).save("d")
    return r.graph


def test_applied_functions_are_written_and_read_only_if_trusted():
    graph = applying(doubled)
    with pytest.raises(UntrustedApplyError):
        graph.to_json()
    document = graph.to_json(trusted=True)
    assert json.loads(document)["body"]["functions"] == [f"{__name__}:doubled"]
    with pytest.raises(UntrustedApplyError):
        Graph.from_json(document)
    found = Graph.from_json(document, trusted=True)
    assert found.functions == (doubled,)
    assert torch.equal(MODEL.compile(found)(ROWS)["d"], MODEL.compile(graph)(ROWS)["d"])


@pytest.mark.parametrize("function", [lambda x: x, torch.nn.Identity()], ids=["lambda", "module"])
def test_functions_without_an_importable_name_are_not_written(function):
    with pytest.raises(UntrustedApplyError, match="importable"):
        applying(function).to_json(trusted=True)


@pytest.mark.parametrize(
    "name", ["no_such_module:f", f"{__name__}:no_such_function", "", "os", ":", "os:no.such.path"]
)
def test_functions_that_cannot_be_found_are_refused_by_name(name):
    with pytest.raises(GraphFileError):
        wire.from_json(with_body(applying(doubled), trusted=True, functions=[name]), trusted=True)


def test_a_graph_that_applies_more_than_the_file_names_is_refused():
    document = with_body(applying(doubled), trusted=True, functions=[])
    with pytest.raises(GraphFileError, match="does not list"):
        wire.from_json(document, trusted=True)
    with pytest.raises(UntrustedApplyError):
        wire.from_json(document)


@pytest.mark.parametrize("graph", [recorded()[0], applying(doubled)], ids=["constants", "functions"])
def test_a_graph_that_went_through_its_text_alone_cannot_be_compiled(graph):
    with pytest.raises(VerificationError, match="has lost its"):
        MODEL.compile(parse(graph.text()))


def test_a_graph_that_writes_files_is_read_only_if_trusted(tmp_path):
    graph = parse(
        'graph {\n  %0 = read logits@0 : f32[B,P,97]\n  save "l" <- %0 to="somewhere.safetensors"\n}'
    )
    with pytest.raises(UntrustedApplyError):
        Graph.from_json(graph.to_json())
    assert Graph.from_json(graph.to_json(), trusted=True) == graph


def test_lines_come_back_even_from_files_that_are_gone():
    graph = parse('graph {\n  %0 = read logits@0 : f32[B,P,97]\n  save "l" <- %0\n}')
    graph = replace(graph, locations=(Location("/home/me/ä\udc80.py", 3), Location("<cell 4>", 1)))
    found = Graph.from_json(graph.to_json())
    assert [str(location) for location in found.locations] == ["ä\udc80.py:3", "<cell 4>:1"]


@pytest.mark.parametrize(
    ("filename", "own"),
    [
        ("/somewhere/of/ann/steer.py", "steer.py"),
        ("C:\\Users\\ann\\steer.py", "steer.py"),
        ("steer.py", "steer.py"),
        ("/tmp/ipykernel_71/3029.py", "3029.py"),
        ("<ipython-input-7-abc>", "<ipython-input-7-abc>"),
        ("<doctest /somewhere/of/ann/page.md[3]>", "<page.md[3]>"),
        ("<unknown>", "<unknown>"),
    ],
)
def test_a_file_does_not_say_in_which_folder_its_author_works(filename, own):
    graph = parse('graph {\n  %0 = read logits@0 : f32[B,P,97]\n  save "l" <- %0\n}')
    document = replace(graph, locations=(Location(filename, 3), Location(filename, 4))).to_json()
    assert json.loads(document)["body"]["lines"] == [[own, 3], [own, 4]]
    assert Graph.from_json(document).to_json() == document


def test_a_line_out_of_a_file_does_not_quote_a_file_of_the_same_name_here(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "steer.py").write_text("quite another file\n")
    graph = parse('graph {\n  %0 = read logits@0 : f32[B,P,97]\n  save "l" <- %0\n}')
    written = replace(graph, locations=(Location("steer.py", 1), Location("steer.py", 1)))
    found = Graph.from_json(written.to_json())
    assert written.locations[0].text == "quite another file"  # what a line of this process quotes
    assert (str(found.locations[0]), found.locations[0].text) == ("steer.py:1", "")
