"""One rank as its owner sees it: a process, a socket, and a file with what it prints."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tracelens.backends.ranks.channel import Channel

# Not ``python -m``: the rank is to import the tracelens, and the models' code, that its owner would. Not
# ``multiprocessing``: that imports the user's script once more, which a script without a guard does not survive.
_START = """\
import json, sys
about = json.loads(sys.argv[1])
sys.path[:] = about["path"]
sys.argv = ["tracelens-rank", f"{about['rank']}/{about['world']}"]
from importlib import import_module
import_module(about["worker"]).main(about)
"""
_LINES = 30
"""Of a rank's output, in an error."""
_MOST = 16_000
"""Bytes of it that are looked at."""


@dataclass(frozen=True)
class Launch:
    """What all ranks of one start have in common.

    ``folder``: of all starts, removed by the ranks if the owner dies. ``home``: of this one.
    ``current``: where relative paths begin. ``worker``: the module.
    """

    world: int
    device: str
    folder: Path
    home: Path
    current: Path
    worker: str
    environment: Mapping[str, str]


@dataclass(frozen=True)
class RankProcess:
    """A started rank."""

    rank: int
    process: subprocess.Popen[bytes]
    channel: Channel
    log: Path

    @property
    def runs(self) -> bool:
        """Is the process still there?"""
        return self.process.poll() is None

    def kill(self) -> None:
        """Ends the process and those that it started, at once."""
        # Its group is its own. Once it has been waited for, the number may be somebody else's.
        if self.runs:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def gone(self) -> None:
        """Waits for the end of a killed process, and lets go of the socket."""
        with contextlib.suppress(
            subprocess.TimeoutExpired
        ):  # a driver may keep it a while: nothing to be done
            self.process.wait(10)
        self.channel.close()

    def end(self) -> str:
        """How it ended, in words; waits a moment for the exit code, which comes after the end of the connection."""
        try:
            code = self.process.wait(2)
        except subprocess.TimeoutExpired:
            return "closed its connection but did not exit"
        if code >= 0:
            return f"exited with code {code}"
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = "a signal"
        hint = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        return f"was ended by {name} (signal {-code}{hint})"

    def tail(self) -> str:
        """The last lines of what it printed."""
        try:
            with self.log.open("rb") as stream:
                stream.seek(max(0, self.log.stat().st_size - _MOST))
                text = stream.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-_LINES:])


def stacks(ranks: Sequence[RankProcess]) -> dict[int, str]:
    """What these processes are doing, as Python sees it: by rank, the calls that each of its threads is in."""
    before = {rank.rank: _size(rank.log) for rank in ranks}
    for rank in ranks:
        rank.process.send_signal(signal.SIGUSR1)  # the worker has them printed; one that ended is left alone
    sizes, until = before, time.monotonic() + 1
    while time.monotonic() < until:
        time.sleep(0.05)
        last, sizes = sizes, {rank.rank: _size(rank.log) for rank in ranks}
        if sizes == last and all(sizes[number] > before[number] for number in sizes):
            break
    found: dict[int, str] = {}
    for rank in ranks:
        with contextlib.suppress(OSError), rank.log.open("rb") as stream:
            stream.seek(before[rank.rank])
            found[rank.rank] = stream.read(_MOST).decode(errors="replace").strip()
    return found


def _size(log: Path) -> int:
    try:
        return log.stat().st_size
    except OSError:  # somebody tidied up
        return 0


def launched(launch: Launch, rank: int) -> RankProcess:
    """Starts the process of one rank; it reports over its channel when it has met the others."""
    ours, theirs = socket.socketpair()
    log = launch.home / f"rank{rank}.log"
    about = {
        "fd": theirs.fileno(),
        "rank": rank,
        "world": launch.world,
        "device": launch.device,
        "store": str(launch.home / "store"),
        "folder": str(launch.folder),
        "worker": launch.worker,
        "path": [entry or str(launch.current) for entry in sys.path],  # "" is the current folder
    }
    numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(launch.world)}
    try:
        with theirs, log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", _START, json.dumps(about)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=launch.current,
                env={**launch.environment, **numbers},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the owner
            )
    except BaseException:
        ours.close()
        raise
    return RankProcess(rank, process, Channel(ours), log)


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of ranks: the owner's, with what is set for one thread each and for nothing but loopback."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC_")}
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        found.setdefault(name, loopback)
    found.setdefault("OMP_NUM_THREADS", "1")
    found.setdefault("TOKENIZERS_PARALLELISM", "false")
    found["PYTHONUNBUFFERED"] = "1"  # what it printed last is what an error shows
    return {**found, **extra}
