"""Graphs as text and as files: nothing is lost, nothing is added, damage is refused: promise 1 of the design."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ir.forms import SYNTAX
from tests.strategies import graphs
from tracelens.errors import GraphFileError, GraphSyntaxError
from tracelens.ir import wire
from tracelens.ir.graph import Graph
from tracelens.ir.parse import parse
from tracelens.ir.text import text
from tracelens.ir.types import DType, TensorType
from tracelens.location import Location

VALID = graphs() | graphs(sizes={"B": 3, "P": 7}) | graphs(gradients=True) | graphs(lengths=(5, 3))


def payloads(graph: Graph) -> list[bytes]:
    return [constant.payload() for constant in graph.constants]


@given(SYNTAX)
def test_text_reads_back_as_the_same_graph(graph):
    written = text(graph)
    assert parse(written) == graph
    # Python takes 1, 1.0 and True for equal; their texts differ.
    assert text(parse(written)) == written


@given(VALID)
def test_text_of_valid_graphs_reads_back(graph):
    assert parse(text(graph)) == graph


@given(graph=SYNTAX, data=st.data())
def test_damaged_text_is_a_graph_or_is_refused_by_name(graph, data):
    """Never another exception, and never a graph that writes itself down as something else."""
    written = text(graph)
    place = data.draw(st.integers(0, len(written) - 1))
    other = data.draw(
        st.sampled_from(["", "x", " ", "0", '"', "(", "]", "%", "-", ".", "\n", "\\", "é", "²"])
    )
    damaged = written[:place] + other + written[place + 1 :]
    try:
        found = parse(damaged)
    except GraphSyntaxError:
        return
    assert parse(text(found)) == found


@given(graph=VALID)
def test_json_reads_back_with_its_constants_and_lines(graph):
    constants = graph.constants_bytes() if graph.constants else None
    found = Graph.from_json(graph.to_json(), constants=constants)
    assert found == graph
    assert text(found) == text(graph)
    assert payloads(found) == payloads(graph)
    assert [constant.type for constant in found.constants] == [constant.type for constant in graph.constants]
    assert [str(line) for line in found.locations] == [line.short for line in graph.locations]
    assert found.to_json() == graph.to_json()
    assert found.constants_bytes() == graph.constants_bytes()


def reread(document: str | bytes, constants: bytes | None, folder: Path) -> Graph:
    """Through files, as a user would: what is not text is refused as well."""
    path = folder / "graph.json"
    path.write_bytes(document.encode() if isinstance(document, str) else document)
    beside = path.with_suffix(".safetensors")
    beside.unlink(missing_ok=True)
    if constants is not None:
        beside.write_bytes(constants)
    return wire.read(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@pytest.mark.parametrize("damage", ["flip a bit", "replace a byte", "drop a byte", "add a byte", "cut off"])
@given(graph=VALID, data=st.data())
def test_damaged_json_is_refused_or_says_the_same(damage, graph, data, folder):
    document = graph.to_json().encode()
    constants = graph.constants_bytes() if graph.constants else None
    damaged = damaged_bytes(damage, document, data)
    try:
        found = reread(damaged, constants, folder)
    except GraphFileError:
        return
    # What was hit had no meaning: white space between the entries.
    assert json.loads(damaged) == json.loads(document)
    assert found == graph
    assert [str(line) for line in found.locations] == [line.short for line in graph.locations]
    assert payloads(found) == payloads(graph)


@pytest.mark.parametrize("damage", ["flip a bit", "replace a byte", "drop a byte", "add a byte", "cut off"])
@given(graph=VALID.filter(lambda graph: graph.constants), data=st.data())
def test_damaged_constants_are_refused_or_say_the_same(damage, graph, data, folder):
    damaged = damaged_bytes(damage, graph.constants_bytes(), data)
    try:
        found = reread(graph.to_json(), damaged, folder)
    except GraphFileError:
        return
    assert payloads(found) == payloads(graph)
    assert found == graph


def damaged_bytes(damage: str, whole: bytes, data: st.DataObject) -> bytes:
    # Most of a file is its long middle; its two ends are where the headers are.
    ends = st.integers(0, min(150, len(whole) - 1)) | st.integers(max(0, len(whole) - 20), len(whole) - 1)
    place = data.draw(ends | st.integers(0, len(whole) - 1), label="place")
    before, byte, after = whole[:place], whole[place], whole[place + 1 :]
    match damage:
        case "flip a bit":
            return before + bytes([byte ^ 1 << data.draw(st.integers(0, 7))]) + after
        case "replace a byte":
            return before + bytes([data.draw(st.integers(0, 255).filter(lambda new: new != byte))]) + after
        case "drop a byte":
            return before + after
        case "add a byte":
            return before + bytes([data.draw(st.integers(0, 255)), byte]) + after
        case _:
            return before


_PRINT_A_GRAPH = """
import torch, tracelens as tl
from tests.support.families import FAMILIES
model = tl.wrap(FAMILIES["llama"].build())
with model.record() as r:
    model.layers[0:3].resid_post += torch.ones(48)
    h = model.layers[1].mlp_act.softmax(dim=-1)
    torch.topk(h, k=3).values.save("top")
    model.layers[2].attn_out = tl.where(model.layers[2].attn_in > 0, 1.0, -0.0)
    model.logits.tok[[0, -1]].save("tokens")
print(r.graph.text())
print(r.graph.to_json())
print(r.explain())
"""


def test_text_and_plan_do_not_depend_on_the_hash_seed():
    written: list[str] = []
    for seed in ("0", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        run = subprocess.run(
            [sys.executable, "-c", "import tests.conftest\n" + _PRINT_A_GRAPH],
            env=environment, capture_output=True, text=True, timeout=240, check=True,
        )  # fmt: skip
        written.append(run.stdout)
    assert written[0].startswith("graph {")
    assert written[0] == written[1]


def test_saved_files_are_the_same_bytes_each_time(tmp_path):
    graph = parse('graph {\n  %0 = read logits@0 : f32[B,P,97]\n  save "l" <- %0\n}')
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    graph.to_json(one)
    Graph.from_json(one).to_json(two)
    assert one.read_bytes() == two.read_bytes()
    assert not one.with_suffix(".safetensors").exists()


_SMALL = """graph {
  %0 = read layers.1.mlp_out@0 : f32[B,P,8]
  %1 = const #0 : f32[3]
  %2 = index %0[:, :, :3] : f32[B,P,3]
  %3 = call torch.add(%2, %1) : f32[B,P,3]
  save "h" <- %3
}"""


def small_graph() -> Graph:
    constant = wire.StoredConstant(TensorType(DType.FLOAT32, (3,)), "v", bytes(range(12)))
    return replace(parse(_SMALL), constants=(constant,), locations=(Location("a.py", 1),) * 5)


def test_every_single_bit_of_a_file_counts():
    graph = small_graph()
    document, constants = graph.to_json().encode(), graph.constants_bytes()
    assert Graph.from_json(document.decode(), constants=constants) == graph
    for place in range(len(document)):
        for bit in range(8):
            damaged = document[:place] + bytes([document[place] ^ 1 << bit]) + document[place + 1 :]
            try:
                source = damaged.decode()
                found = wire.from_json(source, constants)
            except (UnicodeDecodeError, GraphFileError):
                continue
            assert json.loads(damaged) == json.loads(document), (place, bit, damaged[place - 9 : place + 9])
            assert (found, found.locations) == (graph, graph.locations)


def test_every_single_bit_of_the_constants_counts():
    graph = small_graph()
    document, constants = graph.to_json(), graph.constants_bytes()
    for place in range(len(constants)):
        for bit in range(8):
            damaged = constants[:place] + bytes([constants[place] ^ 1 << bit]) + constants[place + 1 :]
            try:
                found = wire.from_json(document, damaged)
            except GraphFileError:
                continue
            assert payloads(found) == payloads(graph), (place, bit)


def test_a_file_that_is_cut_off_anywhere_is_refused():
    graph = small_graph()
    document, constants = graph.to_json(), graph.constants_bytes()
    for length in range(len(document)):
        with pytest.raises(GraphFileError):
            wire.from_json(document[:length], constants)
    for length in range(len(constants)):
        with pytest.raises(GraphFileError):
            wire.from_json(document, constants[:length])
