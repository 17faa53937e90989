"""Ranks that fail, hang or die: it is told at once, and the next use works. Nothing is left of a pool when it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.ranks import fragile, runs
from tracelens.backends.ranks import process
from tracelens.backends.ranks.pool import Ranks, Request
from tracelens.backends.ranks.process import Launch, RankProcess
from tracelens.errors import (
    RankDiedError,
    RankFailedError,
    RanksClosedError,
    RankTimeoutError,
    ShapeError,
)

WHOLE = torch.tensor([3.0, 6.0])


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    """Two ranks; what a test does to them the next one has to get over."""
    with fragile(2) as ranks:
        yield ranks


def works(ranks: Ranks) -> bool:
    """Do the ranks do what is asked, together?"""
    replies = ranks.ask("collective", tensors={"value": WHOLE / 3})
    return ranks.alive and all(torch.equal(reply.tensors["total"], WHOLE) for reply in replies)


def misbehave(ranks: Ranks, how: str, **more: Any) -> Any:
    return ranks.ask("misbehave", {"rank": 1, "how": how, **more})


# --- a rank raises ---------------------------------------------------------------------------------------------------


def test_a_rank_that_raises_alone_is_told_with_its_traceback(two: Ranks) -> None:
    assert works(two)
    before = two.pids
    with pytest.raises(RankFailedError) as caught:
        misbehave(two, "raise")
    assert caught.value.rank == 1
    assert caught.value.kind == "ValueError"
    assert "rank 1 of 2 failed at 'misbehave': ValueError: a mistake, deep inside" in str(caught.value)
    assert "in _deeper" in str(caught.value)
    assert "in _deeper" in caught.value.remote_traceback
    assert works(two)
    assert two.pids == before, "nothing had been communicated, so all stand where they stood"


def test_one_of_our_own_errors_comes_with_its_parts(two: Ranks) -> None:
    with pytest.raises(RankFailedError) as caught:
        misbehave(two, "raise ours")
    original = caught.value.original
    assert type(original) is ShapeError
    assert original.problem == "no such shape"
    assert original.instead == "another"
    assert str(original.at) == "script.py:7"
    assert str(original) in str(caught.value)


def test_an_answer_that_cannot_be_sent_is_a_failure(two: Ranks) -> None:
    before = two.pids
    with pytest.raises(RankFailedError, match="not JSON"):
        misbehave(two, "unsendable")
    assert works(two)
    assert two.pids == before


def test_a_rank_that_took_part_in_all_says_so(two: Ranks) -> None:
    before = two.pids
    with pytest.raises(RankFailedError, match="rank 1 of 2 failed at 'misbehave': ValueError: a mistake"):
        misbehave(two, "raise in step", together=True)
    assert works(two)
    assert two.pids == before


def test_a_rank_that_raises_after_communicating_costs_a_start(two: Ranks) -> None:
    before = two.pids
    two.load("m", Request("keep", {"id": "m"}, {"weight": WHOLE}))
    with pytest.raises(RankFailedError, match="they no longer stood at the same step"):
        misbehave(two, "raise", together=True)
    assert not two.alive
    assert not any(runs(pid) for pid in before)
    # The model is loaded once more by the first request that needs it, and only by that.
    assert works(two)
    assert two.ask("ping")[0].header["models"] == []
    for _ in range(2):
        for reply in two.ask("kept", {"id": "m"}, model="m"):
            assert torch.equal(reply.tensors["weight"], WHOLE)
    assert two.ask("ping")[0].header["models"] == ["m"]
    two.forget("m")


@pytest.mark.timeout(100)
def test_the_others_do_not_wait_for_a_rank_that_raised(two: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracelens.backends.ranks.owner.GRACE", 0.5)
    with pytest.raises(RankFailedError, match="rank 0 did not come to an end without it") as caught:
        two.ask("misbehave", {"rank": 1, "how": "raise", "others": "sum"}, timeout=1000)
    assert caught.value.rank == 1
    assert "a mistake, deep inside" in str(caught.value)
    assert works(two)


# --- a rank dies -----------------------------------------------------------------------------------------------------


def test_a_rank_killed_while_idle_is_told(two: Ranks) -> None:
    assert works(two)
    os.kill(two.pids[1], signal.SIGKILL)
    with pytest.raises(RankDiedError, match="rank 1 of 2 was ended by SIGKILL") as caught:
        works(two)
    assert caught.value.rank == 1
    assert caught.value.exit_code == -signal.SIGKILL
    assert not two.alive
    assert "ended, the next use starts them" in repr(two)
    assert works(two)


def test_a_rank_killed_in_a_collective_is_told(two: Ranks) -> None:
    assert works(two)
    pid = two.pids[1]
    timer = threading.Timer(0.5, os.kill, [pid, signal.SIGKILL])
    timer.start()
    with pytest.raises(RankDiedError, match=r"rank 1 of 2 was ended by SIGKILL .* at 'misbehave'"):
        misbehave(two, "hang", others="sum")  # rank 0 waits for it
    timer.join()
    assert not two.alive


def test_a_rank_that_exits_is_told_with_its_last_words(two: Ranks) -> None:
    with pytest.raises(RankDiedError, match="rank 1 of 2 exited with code 7") as caught:
        misbehave(two, "exit")
    assert caught.value.exit_code == 7
    assert "the last words of this rank" in caught.value.log
    assert "the last words of this rank" in str(caught.value)


def test_a_pickle_from_a_rank_is_refused(two: Ranks) -> None:
    with pytest.raises(RankDiedError, match=r"what it sent could not be read .*was to begin here"):
        misbehave(two, "garbage")


def test_a_rank_refuses_a_pickle(two: Ranks) -> None:
    assert works(two)
    # Nothing but the owner can write to this socket; were it to write a pickle, nobody would read one.
    rank = two._owner.ranks[1]
    rank.channel.connection.sendall(b"\x80\x02cos\nsystem\nq\x00X\x04\x00\x00\x00true\x85R." * 9)
    rank.process.wait(20)
    with pytest.raises(RankDiedError, match="rank 1 of 2 exited with code 1") as caught:
        two.ask("ping")
    assert "RankMessageError: a message was to begin here" in caught.value.log


# --- waiting ---------------------------------------------------------------------------------------------------------


def test_a_time_limit_ends_the_ranks_and_shows_where_they_were(two: Ranks) -> None:
    assert works(two)
    before = two.pids
    with pytest.raises(RankTimeoutError, match="rank 0, 1 of 2 did not finish 'misbehave'") as caught:
        two.ask("misbehave", {"rank": 1, "how": "hang", "others": "sum"}, timeout=1)
    assert caught.value.waiting_for == (0, 1)
    assert "in _hang" in str(caught.value)
    assert "in all_reduce" in str(caught.value)
    assert isinstance(caught.value, TimeoutError)
    assert not any(runs(pid) for pid in before)


def test_what_was_interrupted_is_finished_before_the_next(two: Ranks) -> None:
    assert works(two)
    before = two.pids
    timer = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        misbehave(two, "sleep", together=True)
    timer.join()
    assert two._owner.doing == "'misbehave'"
    assert works(two)
    assert two.pids == before


@pytest.mark.parametrize("end", [Ranks.restart, Ranks.close])  # the last that has these two
def test_what_is_waited_for_can_be_ended(
    two: Ranks, end: Callable[[Ranks], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert works(two)
    current = Path.cwd()
    monkeypatch.chdir(tmp_path)
    caught: list[BaseException] = []

    def ask() -> None:
        try:
            misbehave(two, "hang", others="sum")
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while two._owner.doing is None:
        time.sleep(0.01)
    end(two)
    thread.join(20)
    assert [type(error) for error in caught] == [RanksClosedError]
    assert f"the ranks were {end.__name__.removesuffix('e')}ed at 'misbehave'" in str(caught[0])
    if end is Ranks.restart:
        assert works(two)
        # A relative path of a model is what it was when the ranks were first started.
        assert all(os.readlink(f"/proc/{pid}/cwd") == str(current) for pid in two.pids)
        return
    two.close()
    assert not two.alive
    assert repr(two) == "<Ranks: 2 on cpu, closed>"
    for use in (two.restart, lambda: two.ask("ping"), lambda: two.load("m", Request("keep"))):
        with pytest.raises(RanksClosedError, match="were closed"):
            use()


# --- starting and ending ---------------------------------------------------------------------------------------------


def test_a_rank_that_cannot_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACELENS_TEST_FAILING_RANK", "1")
    with pytest.raises(RankDiedError, match="rank 1 of 2 exited with code 1, at the start") as caught:
        fragile(2)
    assert "this rank does not even start" in caught.value.log


def test_a_start_that_is_interrupted_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def launched(launch: Launch, rank: int) -> RankProcess:
        started.append(process.launched(launch, rank))
        if rank == 1:
            signal.raise_signal(signal.SIGINT)
        return started[-1]

    monkeypatch.setattr("tracelens.backends.ranks.owner.launched", launched)
    with pytest.raises(KeyboardInterrupt):
        fragile(2)
    assert [rank.rank for rank in started] == [0, 1]
    assert not any(runs(rank.process.pid) for rank in started)
    assert not started[0].log.parent.exists()


def test_a_forgotten_pool_ends() -> None:
    ranks = fragile(1)
    pids, folder = ranks.pids, ranks._owner.folder
    assert all(runs(pid) for pid in pids)
    assert folder.exists()
    del ranks
    assert not any(runs(pid) for pid in pids)
    assert not folder.exists()


SCRIPT = """
import os, sys, time
from tracelens.backends.ranks.pool import Ranks
from tracelens.errors import RanksClosedError
ranks = Ranks(%(world)d, device="cpu", _worker="tests.support.rank_worker")
child = os.fork()
if not child:  # a copy of this process has the sockets too, and may live on
    try:
        ranks.ask("ping")
        code = 1
    except RanksClosedError as error:
        code = 0 if "forked" in str(error) else 2
    if %(lingers)d:
        devnull = os.open(os.devnull, os.O_RDWR)
        os.dup2(devnull, 1), os.dup2(devnull, 2)
        time.sleep(90)
        os._exit(code)
    sys.exit(code)  # with all that is done at exit
print("CHILD", child if %(lingers)d else os.waitpid(child, 0)[1])
assert ranks._owner.folder.exists()
print("FOLDER", ranks._owner.folder)
print("PIDS", *(reply.header["pid"] for reply in ranks.ask("ping")), flush=True)
"""


def facts(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in text.splitlines()}


def ended(pids: list[int], folder: Path) -> bool:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if not any(runs(pid) for pid in pids) and not folder.exists():
            return True
        time.sleep(0.05)
    return False


def from_file(code: str, tmp_path: Path) -> dict[str, Any]:
    script = tmp_path / "script.py"
    script.write_text(code)
    return {"args": [sys.executable, str(script)]}


def from_stdin(code: str, tmp_path: Path) -> dict[str, Any]:
    return {"args": [sys.executable, "-"], "input": code + "\nraise SystemExit(3)\n"}


@pytest.mark.parametrize(("how", "code"), [(from_file, 0), (from_stdin, 3)], ids=["file", "stdin"])
def test_a_script_without_a_guard_has_ranks_and_leaves_none(
    how: Callable[[str, Path], dict[str, Any]], code: int, tmp_path: Path
) -> None:
    text = SCRIPT % {"world": 1, "lingers": 0}
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    done = subprocess.run(
        **how(text, tmp_path),
        text=True,
        capture_output=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == code, done.stderr
    found = facts(done.stdout)
    assert found["CHILD"] == ["0"]
    assert len(found["PIDS"]) == 1
    assert ended([int(pid) for pid in found["PIDS"]], Path(found["FOLDER"][0]))
    assert "tracelens: starting" not in done.stderr, "nobody looks"


def test_ranks_end_with_an_owner_that_is_killed() -> None:
    text = SCRIPT % {"world": 2, "lingers": 1}
    text += 'ranks.ask("misbehave", {"rank": 1, "how": "hang", "others": "sum"})'
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    owner = subprocess.Popen(
        [sys.executable, "-c", text],
        text=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        assert owner.stdout is not None
        found = facts("".join(owner.stdout.readline() for _ in range(3)))
        pids, folder = [int(pid) for pid in found["PIDS"]], Path(found["FOLDER"][0])
        child = int(found["CHILD"][0])
        time.sleep(0.5)  # for the ranks to be in their collective
        assert all(runs(pid) for pid in [*pids, child])
    finally:
        owner.kill()
        owner.communicate()
    try:
        assert ended(pids, folder)
        assert runs(child), "the copy of the owner was there until the end"
    finally:
        for pid in (child, *pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
