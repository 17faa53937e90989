"""The guilty line, wherever the code stands: functions, loops, lambdas, cells, exec, one-liners, threads."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import linecache
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tracelens as tl
from tests.errors import IDS, LLAMA, D, refused
from tracelens.errors import (
    CausalityError,
    FailedRunError,
    LostUpdateError,
    NestedTraceError,
    NothingSavedError,
    OpFailedError,
    ShapeError,
    TracelensError,
    UnknownSiteError,
)

model = LLAMA.model
BAD = torch.ones(7)


def steer(layer: int, v: torch.Tensor) -> None:
    model.layers[layer].resid_post += v  # in steer


def steer_more(layer: int, v: torch.Tensor) -> None:
    steer(layer, v)
    steer(layer + 1, v)


def test_in_a_function() -> None:
    """The innermost line that is the user's."""
    with refused(ShapeError, "f32[7]", instead="value.shape", text="# in steer"), model.trace(IDS):
        steer(0, BAD)
    with model.trace(IDS):
        steer(0, torch.ones(D))
        model.logits.save()


def test_in_a_function_of_a_function() -> None:
    with refused(ShapeError, "f32[7]", instead="value.shape", text="# in steer") as caught, model.trace(IDS):
        steer_more(0, BAD)
    assert caught.error.at.function == "steer"


def test_in_a_loop() -> None:
    for wrong in range(3):
        with refused(ShapeError, "f32[7]", instead="value.shape") as caught, model.trace(IDS):
            for layer in range(3):
                model.layers[layer].resid_post += (  # <-
                    BAD if layer == wrong else torch.ones(D)
                )
            model.logits.save()
        assert caught.error.at.line > 0


def test_in_a_comprehension() -> None:
    with refused(UnknownSiteError, "'resid_pots'", instead="resid_post"), model.trace(IDS):
        [
            model.layers[layer].resid_pots.save()  # <-
            for layer in range(3)
        ]


def test_in_a_lambda() -> None:
    scale = lambda h: h @ torch.ones(7, 7)  # noqa: E731  # <- the lambda's own line
    with refused(ShapeError, instead="value.shape", text="scale = lambda h:"), model.trace(IDS):
        scale(model.layers[0].resid_post).save()


def test_through_functions_of_the_standard_library() -> None:
    with refused(ShapeError, instead="value.shape"), model.trace(IDS):
        functools.reduce(torch.matmul, [model.layers[0].resid_post, BAD])  # <-
    with refused(ShapeError, instead="value.shape"), model.trace(IDS):
        list(map(functools.partial(torch.matmul, other=BAD), [model.layers[0].resid_post]))  # <-
    with refused(ShapeError, instead="value.shape", text="# in steer"), model.trace(IDS):
        functools.partial(steer, 0)(BAD)


class Steering:
    """A class of a user's."""

    def __init__(self, v: torch.Tensor) -> None:
        self.v = v

    @property
    def stream(self) -> Any:
        return model.layers[0].resid_post

    def __call__(self) -> None:
        self.stream[:, -1] = self.v  # in the method


def test_in_a_method() -> None:
    with refused(ShapeError, "f32[7]", instead="that shape", text="# in the method"), model.trace(IDS):
        Steering(BAD)()
    with model.trace(IDS):
        Steering(torch.ones(D))()
        model.logits.save()


# --- blocks of every shape -------------------------------------------------------------------------------------------


def test_a_block_in_one_line() -> None:
    for line, error in (
        ("with model.trace([1, 2]): model.layers[0].resid_post += torch.ones(7)", ShapeError),
        ("with model.trace([1, 2]): model.layers[0].resid_post += 1", NothingSavedError),
        ("with model.trace([1, 2]): h = model.layers[0].resid_post; h += 1; h.save()", LostUpdateError),
        ("with model.trace([1, 2]), model.trace([3]): pass", NestedTraceError),
    ):
        caught = guilty(f"x = 1\n{line}\n", "<one line>")
        assert type(caught) is error
        assert (caught.at.line, caught.at.text) == (2, line)
    names: dict[str, Any] = {"model": model}
    run_cell("with model.trace([5, 6, 7, 8]): h = model.logits.save()", names, "<one line>")
    assert torch.equal(names["h"].value, LLAMA.logits)


@contextlib.contextmanager
def steered(v: torch.Tensor) -> Iterator[tl.Trace]:
    with model.trace(IDS) as t:
        model.layers[0].resid_post += v  # in the manager
        yield t
        model.logits.save("logits")  # after the body


def test_a_block_in_a_context_manager() -> None:
    with refused(ShapeError, "f32[7]", instead="value.shape", text="# in the manager"), steered(BAD):
        model.layers[1].resid_post.save()
    with refused(ShapeError, "f32[7]", instead="value.shape"), steered(torch.ones(D)):
        model.layers[1].resid_post += BAD  # <-
    with refused(LostUpdateError, instead="h = h + v"), steered(torch.ones(D)):
        h = model.layers[1].resid_post
        h += 1  # <-
    with steered(torch.ones(D)) as t:
        h = model.layers[1].resid_post.save()
    assert not torch.equal(t["logits"], LLAMA.logits)
    assert h.value.shape == (1, 4, D)


def test_a_block_on_an_exit_stack() -> None:
    with refused(ShapeError, "f32[7]", instead="value.shape"), contextlib.ExitStack() as stack:
        stack.enter_context(model.trace(IDS))
        model.layers[0].resid_post += BAD  # <-
    with contextlib.ExitStack() as stack:
        t = stack.enter_context(model.trace(IDS))
        model.logits.save("logits")
    assert torch.equal(t["logits"], LLAMA.logits)


def blocks() -> Iterator[tl.Trace]:
    with model.trace(IDS) as t:
        yield t
        model.layers[0].resid_post += BAD  # in the generator


def test_a_block_in_a_generator() -> None:
    with refused(ShapeError, "f32[7]", instead="value.shape", text="# in the generator"):
        list(blocks())


def test_entering_by_hand() -> None:
    with refused(NothingSavedError, instead="model.logits.save()"):
        t = model.trace(IDS)
        t.__enter__()
        model.layers[0].resid_post += 1  # <-
        t.__exit__(None, None, None)


# --- source that is in no file ---------------------------------------------------------------------------------------


def run_cell(source: str, names: dict[str, Any], filename: str) -> None:
    """What a notebook does: compiles a cell under a name of its own, and tells linecache the source."""
    source = textwrap.dedent(source)
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), names)


def guilty(source: str, filename: str, **names: Any) -> TracelensError:
    before = LLAMA.forwards
    with pytest.raises(TracelensError) as caught:
        run_cell(source, {"model": model, "tl": tl, "torch": torch, **names}, filename)
    assert LLAMA.forwards == before
    LLAMA.check()
    return caught.value


CELL = """
    v = torch.ones(7)

    with model.trace([5, 6, 7, 8]) as t:
        h = model.layers[0].resid_post
        model.layers[1].resid_post += v
        model.logits.save()
"""


@pytest.mark.parametrize(
    "filename", ["/tmp/ipykernel_1/3029.py", "<ipython-input-7-abc>", "<python-input-3>", "<stdin>"]
)
def test_in_a_cell(filename: str) -> None:
    error = guilty(CELL, filename)
    assert type(error) is ShapeError
    assert (error.at.filename, error.at.line) == (filename, 6)
    assert f"at {filename}:6\n      model.layers[1].resid_post += v" in str(error)


def test_in_a_cell_that_uses_functions_of_an_earlier_one() -> None:
    names: dict[str, Any] = {"model": model, "torch": torch}
    run_cell("def bump(v):\n    model.layers[0].resid_post += v\n", names, "<cell 1>")
    error = guilty("with model.trace([1, 2]):\n    bump(torch.ones(7))\n", "<cell 2>", **names)
    assert (error.at.filename, error.at.line, error.at.text) == (
        "<cell 1>",
        2,
        "model.layers[0].resid_post += v",
    )


def test_in_a_cell_that_was_run_again() -> None:
    """The same cell, edited: the message shows what stands there now."""
    first = guilty("with model.trace([1]):\n    model.logit.save()\n", "<cell 3>")
    assert first.at.text == "model.logit.save()"
    second = guilty("x = 1\nwith model.trace([1]):\n    model.lugits.save()\n", "<cell 3>")
    assert (second.at.line, second.at.text) == (3, "model.lugits.save()")


def test_in_exec_without_source() -> None:
    with pytest.raises(UnknownSiteError) as caught:
        exec("x = 1\nwith model.trace([1]):\n    model.logit.save()\n", {"model": model})
    assert (caught.value.at.filename, caught.value.at.line) == ("<string>", 3)
    assert caught.value.at.text == ""
    assert "at <string>:3\n  instead: did you mean logits" in str(caught.value)
    names: dict[str, Any] = {"model": model}
    exec("with model.trace([5, 6, 7, 8]):\n    logits = model.logits.save()\n", names)
    assert torch.equal(names["logits"].value, LLAMA.logits)


def test_in_eval() -> None:
    with pytest.raises(UnknownSiteError) as caught, model.trace(IDS):
        eval("model.logit", {"model": model})
    assert (caught.value.at.filename, caught.value.at.line) == ("<string>", 1)


def test_in_a_file_that_was_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "steering_of_mine.py").write_text(
        "def bump(model, v):\n\n    model.layers[0].resid_post += v\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import steering_of_mine

    with pytest.raises(ShapeError) as caught, model.trace(IDS):
        steering_of_mine.bump(model, BAD)
    assert caught.value.at.filename == str(tmp_path / "steering_of_mine.py")
    assert caught.value.at.line == 3
    assert caught.value.at.text == "model.layers[0].resid_post += v"


SCRIPT = """
import torch
import tracelens as tl
from tests.support.families import FAMILIES

model = tl.wrap(FAMILIES["llama"].build())
with model.trace([1, 2, 3]) as t:
    h = model.layers[0].resid_post
    h += 1
    model.logits.save()
"""


@pytest.mark.parametrize("how", ["file", "stdin", "-c"])
def test_in_a_script(how: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = {"file": [str(script)], "stdin": ["-"], "-c": ["-c", SCRIPT]}[how]
    done = subprocess.run(
        [sys.executable, *command],
        input=SCRIPT if how == "stdin" else None,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1", "PATH": ""},
        check=False,
    )
    assert done.returncode == 1
    where = {"file": f"{script}:9\n      h += 1", "stdin": "<stdin>:9", "-c": "<string>:9"}[how]
    assert "tracelens.errors.LostUpdateError: the result of an in-place operator" in done.stderr
    assert f"\n  at {where}\n" in done.stderr
    assert "  instead: to change the model:   model.layers[0].resid_post += v" in done.stderr


# --- late errors, and threads ----------------------------------------------------------------------------------------


def test_errors_of_the_run_name_the_line_of_the_recording() -> None:
    """The graph is compiled once for both blocks: each has its own line."""

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("broken")

    for _ in range(2):
        with refused(OpFailedError, "broken", instead=None, forwards=1), model.trace(IDS):
            tl.apply(broken, model.layers[0].resid_post).save()  # <-
    with refused(OpFailedError, "broken", instead=None, forwards=1), model.trace(IDS):
        tl.apply(broken, model.layers[0].resid_post).save()  # <- another line, the same graph


def test_errors_with_two_lines_show_both() -> None:
    with refused(CausalityError, instead="a later site") as caught, model.trace(IDS):
        late = model.layers[2].resid_post  # read
        model.layers[0].resid_post = late  # <-
    message = str(caught.error)
    assert "late = model.layers[2].resid_post  # read" in message
    assert "model.layers[0].resid_post = late  # <-" in message


def test_the_words_come_in_order() -> None:
    with refused(OpFailedError, instead=None, forwards=1) as caught, model.trace(IDS):
        tl.apply(lambda x: 1 / 0, model.layers[0].resid_post).save()  # <-
    first, at, source, graph = str(caught.error).splitlines()[:4]
    assert first == caught.error.problem
    assert at == f"  at {caught.error.at}"
    assert source.strip().startswith("tl.apply")
    assert graph == "  graph:"
    assert sum(line.lstrip().startswith("--> ") for line in str(caught.error).splitlines()) == 1


def test_in_a_thread() -> None:
    caught: list[TracelensError] = []

    def work() -> None:
        try:
            with model.trace(IDS):
                model.layers[0].resid_post += BAD  # in the thread
        except ShapeError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    with model.trace(IDS):
        # A block of this thread is open, and is no business of the other's.
        thread.start()
        thread.join()
        logits = model.logits.save()
    assert torch.equal(logits.value, LLAMA.logits)
    assert "# in the thread" in caught[0].at.text
    LLAMA.check()


def test_in_a_task() -> None:
    async def nested() -> None:
        with model.trace(IDS):
            await asyncio.sleep(0)
            with model.trace(IDS):  # <-
                pass

    with refused(
        NestedTraceError, "already open", instead="end the first block", text="with model.trace(IDS):  # <-"
    ):
        asyncio.run(nested())


def test_a_failed_block_leaves_nothing_open() -> None:
    for _ in range(3):
        with pytest.raises(ShapeError), model.trace(IDS) as t:
            model.layers[0].resid_post += BAD
        with pytest.raises(FailedRunError):
            t.results
        with pytest.raises(ZeroDivisionError), model.trace(IDS):
            1 / 0
        LLAMA.check()
