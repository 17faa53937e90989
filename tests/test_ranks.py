"""Ranks that do what they are asked to."""

from __future__ import annotations

import os
import signal
import socket
import stat
import threading
import time
from pathlib import Path

import pytest
import torch

import tracelens as tl
from tests.support.ranks import PoolOf, runs
from tracelens.backends.ranks import requests
from tracelens.backends.ranks.pool import Ranks, Request
from tracelens.backends.ranks.ready import Ready
from tracelens.errors import OptionError, RankFailedError, RankMessageError, RankTimeoutError


def test_each_rank_answers_for_itself(ranks_of: PoolOf) -> None:
    ranks = ranks_of(2)
    sent = {"v": torch.randn(2, 3), "n": torch.tensor(3)}
    replies = ranks.ask("ping", {"a": [1, None]}, sent)
    assert [reply.rank for reply in replies] == [0, 1]
    assert [reply.header["rank"] for reply in replies] == [0, 1]
    assert tuple(reply.header["pid"] for reply in replies) == ranks.pids
    assert os.getpid() not in ranks.pids
    for reply in replies:
        assert reply.header["world"] == 2
        assert reply.header["threads"] == int(os.environ.get("OMP_NUM_THREADS", 1))
        assert reply.header["sent"] == {"a": [1, None]}
        assert all(torch.equal(reply.tensors[name], tensor) for name, tensor in sent.items())
    assert ranks.alive
    assert repr(ranks) == "<Ranks: 2 on cpu, alive>"


def test_the_ranks_reach_each_other(ranks_of: PoolOf) -> None:
    value = torch.randn(5)
    for reply in ranks_of(2).ask("collective", tensors={"value": value}):
        torch.testing.assert_close(reply.tensors["total"], 3 * value, rtol=0, atol=1e-6)


def test_a_mistake_of_all_ranks_is_told_once_and_costs_nothing(ranks_of: PoolOf) -> None:
    ranks = ranks_of(2)
    before = ranks.pids
    with pytest.raises(RankFailedError) as caught:
        ranks.ask("collective")
    assert caught.value.rank == 0
    assert caught.value.kind == "ValueError"
    assert "rank 0 of 2 failed at 'collective': ValueError: a collective is asked for" in str(caught.value)
    assert "the same at rank 1" in str(caught.value)
    assert "checks.py" in caught.value.remote_traceback
    assert caught.value.original is None
    ranks.ask("ping")
    assert ranks.pids == before


@pytest.mark.parametrize("name", ["os:system", "tracelens.backends.ranks.checks:ping", "__import__", ""])
def test_a_request_cannot_name_code(ranks_of: PoolOf, name: str) -> None:
    with pytest.raises(RankFailedError, match="a rank cannot be asked for"):
        ranks_of(2).ask(name, {"args": ["true"]})


def test_the_table_names_functions_of_tracelens_that_are_there() -> None:
    for name in requests.HANDLERS:
        assert callable(requests.handler(name))
    with pytest.raises(LookupError, match="no function of tracelens"):
        requests.handler("call", {"call": "os:system"})


def test_what_cannot_be_sent_never_leaves(ranks_of: PoolOf) -> None:
    with pytest.raises(RankMessageError, match="not JSON"):
        ranks_of(2).ask("ping", {"value": object()})
    assert ranks_of(2).ask("ping", {"value": 1})[0].header["sent"] == {"value": 1}


def test_several_threads_may_ask(ranks_of: PoolOf) -> None:
    ranks = ranks_of(2)
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        found[number] = [
            int(ranks.ask("collective", tensors={"value": torch.tensor(number)})[1].tensors["total"])
            for _ in range(5)
        ]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [3 * number] * 5 for number in range(4)}


def test_two_pools_at_once_with_many_open_files(ranks_of: PoolOf) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    # More than select() has room for, and the new sockets come after them.
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1200)]
    try:
        with Ranks(1, device="cpu", env={"TRACELENS_TEST_NOTE": "here"}) as other:
            assert max(rank.channel.connection.fileno() for rank in other._owner.ranks) > 1024
            assert ranks_of(2).ask("ping")[1].header["world"] == 2
            (reply,) = other.ask("collective", tensors={"value": torch.ones(2)})
            assert torch.equal(reply.tensors["total"], torch.ones(2))
            # Neither these files nor the other pool's sockets go to the ranks.
            (pid,) = other.pids
            assert len(os.listdir(f"/proc/{pid}/fd")) < 100
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            assert b"TRACELENS_TEST_NOTE=here" in environment
            folder = other._owner.folder
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not runs(pid)
    assert not folder.exists()
    assert ranks_of(2).alive


def listening(pid: int) -> list[str]:
    """The addresses that a process listens at, TCP and UDP, as the kernel has them."""
    inodes = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = []
    for protocol, family in (
        ("tcp", socket.AF_INET),
        ("tcp6", socket.AF_INET6),
        ("udp", socket.AF_INET),
        ("udp6", socket.AF_INET6),
    ):
        table = Path(f"/proc/{pid}/net/{protocol}")
        for line in table.read_text().splitlines()[1:] if table.exists() else []:
            fields = line.split()
            if fields[9] in inodes and (fields[3] == "0A" or protocol.startswith("udp")):
                packed = bytes.fromhex(fields[1].partition(":")[0])
                words = [packed[i : i + 4][::-1] for i in range(0, len(packed), 4)]
                found.append(socket.inet_ntop(family, b"".join(words)))
    return found


def test_nothing_listens_but_on_loopback(ranks_of: PoolOf) -> None:
    with socket.create_server(("0.0.0.0", 0)):
        assert "0.0.0.0" in listening(os.getpid()), "this test sees what listens"
    ranks = ranks_of(2)
    ranks.ask("collective", tensors={"value": torch.ones(1)})
    for pid in ranks.pids:
        # Which address a machine's own name leads to is different everywhere.
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            assert f"{name}={os.environ.get(name, 'lo')}".encode() in environment
        addresses = listening(pid)
        assert addresses, "gloo's own"
        assert set(addresses) <= {"127.0.0.1", "::1"}


def test_a_late_request_is_not_begun(ranks_of: PoolOf) -> None:
    ranks = ranks_of(2)
    before = ranks.pids
    big = {"value": torch.ones(60_000_000)}
    thread = threading.Thread(target=lambda: ranks.ask("ping", tensors=big))
    thread.start()
    try:
        while ranks._owner.doing is None:
            time.sleep(0.001)
        with pytest.raises(RankTimeoutError, match="still at 'ping', and this request was not begun"):
            ranks.ask("ping", timeout=0.01)
    finally:
        thread.join()
    ranks.ask("ping")
    assert ranks.pids == before


def test_control_c_stops_the_waiting_and_not_the_ranks(ranks_of: PoolOf) -> None:
    ranks = ranks_of(2)
    before = ranks.pids
    big = {"value": torch.ones(60_000_000)}

    def ask_for_ever() -> None:
        while True:
            ranks.ask("ping", tensors=big)

    timer = threading.Timer(0.1, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        ask_for_ever()
    timer.join()
    assert ranks.ask("ping", {"again": 1})[1].header["sent"] == {"again": 1}
    assert ranks.pids == before


@pytest.mark.parametrize("world", [0, -1, 1.0, True, "2"])
def test_a_number_of_ranks_is_a_number(world: int) -> None:
    with pytest.raises(OptionError, match="there are 1, 2, "):
        Ranks(world)


def test_options_that_cannot_be(ranks_of: PoolOf, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="not on 'tpu'"):
        Ranks(2, device="tpu")
    with pytest.raises(OptionError, match="a number of seconds"):
        Ranks(2, device="cpu", timeout=-1)
    with pytest.raises(OptionError, match="a number of seconds"):
        ranks_of(2).ask("ping", timeout=float("nan"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(OptionError, match="2 ranks take 2 GPUs, and this process sees 1"):
        Ranks(2)


def test_a_model_is_loaded_when_it_is_needed(ranks_of: PoolOf) -> None:
    # Any request will do as the one that loads: what counts is when it is sent.
    ranks = ranks_of(2)
    ranks.remember("m", Request("no such loading"))
    assert ranks.ask("ping")[0].rank == 0
    for _ in range(2):  # it failed, so it is tried again
        with pytest.raises(RankFailedError, match="at 'no such loading', once more"):
            ranks.ask("ping", model="m")
    ranks.forget("m")
    assert ranks.ask("ping", model="m")[0].rank == 0


def test_the_line_while_starting_is_for_those_who_look(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Ready(2, "starting ranks") as line:
        line.ready()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("tracelens.backends.ranks.ready.in_notebook", lambda: True)
    with Ready(2, "starting ranks") as line:
        line.ready()
        line.ready()
    out, err = capsys.readouterr()
    assert out == ""
    assert "tracelens: starting ranks" in err
    assert "2/2" in err


def test_a_line_says_that_weights_are_loaded(
    tiny_folder: Path,
    ranks_of: PoolOf,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tracelens.backends.ranks.ready.in_notebook", lambda: True)
    with tl.load(tiny_folder, tp=2, ranks=ranks_of(2)) as model:
        err = capsys.readouterr().err
        assert "tracelens: loading weights" in err
        assert "2/2" in err
        with model.trace([[5, 6]]):
            model.logits.save()
    assert capsys.readouterr().err == ""
