"""A model on ranks in a script under torchrun, on one machine and on two, and in a notebook."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import tracelens as tl
from tests.parallel.compared import TOLERANCE
from tests.support.spread_models import relative_error, stored

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("torchrun_script.py")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def launched(groups: Sequence[Sequence[str]], *arguments: object) -> None:
    """Runs the script in groups of ranks, each of which has a launcher of its own."""
    launchers = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *group, str(SCRIPT), *map(str, arguments)],
            env={**os.environ, **ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for group in groups
    ]
    try:
        for launcher in launchers:
            said, _ = launcher.communicate(timeout=240)
            assert launcher.returncode == 0, said[-4000:]
    finally:
        for launcher in launchers:
            launcher.kill()
            launcher.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def check(tmp_path: Path, hf: Any) -> list[dict[str, Any]]:
    """Rank 0 has what one process has; the others say where it is, and all refuse to do different things."""
    one = tl.wrap(hf)
    with one.trace([[5, 6, 7, 8], [9, 10, 11, 12]]):
        one.layers[1].mlp_act[..., :70] = 0
        one.layers[2].head(3).z = 0
        one.layers[2].resid_post += one.layers[0].resid_post
        act = one.module("model.layers.2.mlp.act_fn").output.save()
        expected = {"q": one.layers[1].q.save(), "act": act, "logits": one.logits.save()}
    found = torch.load(tmp_path / "results.pt", weights_only=True)
    for name, handle in expected.items():
        assert relative_error(found[name], handle.value) <= TOLERANCE
    seen = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["rank"] for rank in seen] == [0, 1]
    assert seen[0]["value"] == seen[0]["by name"] == {"error": ""}
    assert seen[0]["again"] is True
    for way in ("value", "by name"):
        assert seen[1][way]["error"] == "ElsewhereError"
        assert "is on rank 0" in seen[1][way]["problem"]
        assert seen[1][way]["file"] == str(SCRIPT)
    for rank in seen:
        for what, words in {"prompts": "prompt", "blocks": "plan", "tensors": "captured tensors"}.items():
            assert rank[what]["error"] == "PlansDifferError"
            assert words in rank[what]["problem"]
            assert rank[what]["file"] == str(SCRIPT)
        assert rank["stream"]["error"] == "OptionError"
        assert "under torchrun every rank runs the loop itself" in rank["stream"]["problem"]
    whole = sum(parameter.nbytes for parameter in hf.parameters())
    assert all(0.3 * whole < rank["bytes"] < 0.7 * whole for rank in seen)
    return seen


def test_a_script_under_torchrun(tmp_path: Path) -> None:
    hf = stored("llama", tmp_path / "model")
    launched([["--standalone", "--nproc-per-node=2"]], tmp_path / "model", tmp_path, "--tp", 2)
    seen = check(tmp_path, hf)
    check_text(seen, hf)
    check_steps(seen, hf, tmp_path)


def check_steps(seen: list[dict[str, Any]], hf: Any, tmp_path: Path) -> None:
    """What is saved over the steps is on the first rank; all have the text."""
    one = tl.wrap(hf)
    with one.generate([[5, 6, 7], [9, 10]], max_new_tokens=4, do_sample=False, eos_token_id=None) as steps:
        steps.decode.layers[0].resid_post[:, -1] += steps.prefill.layers[2].resid_post.tok[-1]
        one.layers[:].mlp_act[:, -1].save("stack")
        one.layers[1].z.save("z")
    assert [rank["new"] for rank in seen] == [steps.tokens] * 2
    assert [rank["a step"]["error"] for rank in seen] == ["", "ElsewhereError"]
    found = torch.load(tmp_path / "steps.pt", weights_only=True)
    assert relative_error(found["stack"], steps["stack"]) <= TOLERANCE
    for own, other in zip(found["z"], steps["z"], strict=True):
        assert relative_error(own, other) <= TOLERANCE


def check_text(seen: list[dict[str, Any]], hf: Any) -> None:
    """Ranks that draw other tokens would each write a text of its own."""
    for rank in seen:
        assert rank["options"]["error"] == rank["draws"]["error"] == "PlansDifferError"
        assert "options" in rank["options"]["problem"]
        assert "random numbers" in rank["draws"]["problem"]
        assert rank["greedy"] == rank["sampled"] == {"error": ""}
    assert seen[0]["tokens"] == seen[1]["tokens"]
    one = tl.wrap(hf)
    with one.generate([[5, 6, 7]], max_new_tokens=3, do_sample=False) as greedy:
        one.layers[1].z[:, :, 2] = 0
    torch.manual_seed(1)
    with one.generate([[5, 6, 7]], max_new_tokens=3, do_sample=True) as sampled:
        one.layers[1].z[:, :, 2] = 0
    assert seen[0]["tokens"][-2:] == [greedy.tokens, sampled.tokens]


@pytest.mark.parametrize("way", ["load", "wrapped"])
def test_text_through_the_stages_of_a_script(way: str, tmp_path: Path) -> None:
    """A function of the script is called on the ranks of one stage alone: what it draws, and what it is given."""
    hf = stored("llama", tmp_path / "model")
    arguments = (tmp_path / "model", tmp_path, "--pp", 2, "--way", way)
    launched([["--standalone", "--nproc-per-node=2"]], *arguments)
    seen = check(tmp_path, hf)
    check_text(seen, hf)
    assert len(seen[0]["tokens"]) == 3
    steps: list[list[int]] = []
    one = tl.wrap(hf)
    with one.generate([[5, 6, 7]], max_new_tokens=4, do_sample=False, eos_token_id=None) as t:
        pass
    for length in range(3, 7):
        with one.trace([[5, 6, 7, *t.tokens[0]][:length]]):
            scores = one.layers[2].resid_post[:, -1] @ one.param("model.embed_tokens.weight").T
            best = scores.argmax(-1).save()
        steps.append(best.value.tolist())
    assert [rank["steps"] for rank in seen] == [steps, []]


@pytest.mark.parametrize("way", ["wrapped", "wrapped plan", "function"])
def test_a_script_that_spreads_the_model_itself(way: str, tmp_path: Path) -> None:
    """By transformers, or by a plan of its own; the ranks are looked at when the model is wrapped."""
    hf = stored("llama", tmp_path / "model")
    arguments = (tmp_path / "model", tmp_path, "--tp", 2, "--way", way)
    launched([["--standalone", "--nproc-per-node=2"]], *arguments)
    check(tmp_path, hf)


def test_two_groups_of_ranks_as_on_two_machines(tmp_path: Path) -> None:
    hf = stored("qwen3", tmp_path / "model")
    port = free_port()
    groups = [
        [
            "--nnodes=2",
            f"--node-rank={node}",
            "--nproc-per-node=1",
            "--master-addr=127.0.0.1",
            f"--master-port={port}",
        ]
        for node in (0, 1)
    ]
    launched(groups, tmp_path / "model", tmp_path, "--pp", 2)
    check(tmp_path, hf)


CELLS = (
    """
import torch
import tracelens as tl

model = tl.load(FOLDER, tp=2)
print(model.ranks)
""",
    """
with model.trace([[5, 6, 7, 8]]) as t:
    model.layers[1].mlp_act[..., :70] = 0
    logits = model.logits.save()
torch.save(logits.value, OUT)
t
""",
    """
try:
    with model.trace([[5, 6, 7, 8]]):
        model.layers[1].mlp_act += torch.zeros(79)
except tl.errors.TracelensError as error:
    print(type(error).__name__, error.at)
""",
    """
model.close()
print(model.ranks)
""",
)


# The kernel of a notebook talks over sockets of its own; what its libraries warn of is not ours.
@pytest.mark.filterwarnings("ignore")
def test_a_notebook_has_ranks_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell has no file, and nothing guards it against being run once more by the ranks."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    hf = stored("llama", tmp_path / "model")
    names = f"FOLDER, OUT = {str(tmp_path / 'model')!r}, {str(tmp_path / 'logits.pt')!r}"
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source.strip()) for source in (names, *CELLS)]
    )
    NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    said = [
        "".join(output.get("text", "") for output in cell.outputs if output.get("name") == "stdout")
        for cell in notebook.cells[1:]
    ]
    assert said[0].startswith("<Ranks: 2 on cpu, alive>")
    assert "ShapeError" in said[2]
    assert "closed" in said[3]
    one = tl.wrap(hf)
    with one.trace([[5, 6, 7, 8]]):
        one.layers[1].mlp_act[..., :70] = 0
        expected = one.logits.save()
    assert relative_error(torch.load(tmp_path / "logits.pt", weights_only=True), expected.value) <= TOLERANCE


ENDING = """
import atexit, sys, threading
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from tracelens.backends.mesh import Mesh

done, dropped = threading.Event(), threading.Event()

def collective():
    done.wait()
    dropped.set()

threading.Thread(target=collective, daemon=True).start()
atexit.register(lambda: print("dropped in time:", dropped.is_set()))
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
for _ in range(3):
    Mesh(init_device_mesh("cpu", (1,)))
atexit.register(done.set)
sys.setswitchinterval(1000)
"""


def test_a_script_ends_after_the_threads_of_its_collectives() -> None:
    """A thread that wants the interpreter only when the script is at its end, as one of gloo's does, is let in.

    Gloo's own aborts the process otherwise, though seldom; this one says whether it was in time. The interval keeps
    the interpreter from being let go for any other reason.
    """
    command = [sys.executable, "-c", ENDING]
    environment = {**os.environ, **ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert ended.stdout == "dropped in time: True\n"
