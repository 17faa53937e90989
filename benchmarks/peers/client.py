"""The other end of a worker: starts it in the environment that suits its peer, and asks it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

REPOSITORY = Path(__file__).resolve().parents[2]


class PeerFailedError(Exception):
    """A peer could not do a case; the text says why."""


class PeerProcess:
    """A peer in a process of its own. ``absent`` says why there is none, if so."""

    def __init__(self, name: str, python: str, threads: int) -> None:
        self.name = name
        environment = os.environ | {
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._process: subprocess.Popen[str] | None = None
        self.absent: str | None = None
        self.version = ""
        self.versions: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        try:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.peers.worker", name, str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
                cwd=REPOSITORY,
            )
            greeting = self._reply()
        except (OSError, PeerFailedError) as error:
            self.absent = str(error)
            return
        self.absent = greeting.get("absent")
        if self.absent is None:
            self.version, self.versions = greeting["version"], greeting["versions"]
            self.notes = greeting["notes"]

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for the reply; raises :class:`PeerFailedError` with what the peer said."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise PeerFailedError(f"the process has ended: {error}") from error
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerFailedError(f"the process ended with status {self._process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        if "failure" in reply:
            raise PeerFailedError(reply["failure"])
        return reply

    def close(self) -> None:
        """Ends the process."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(OSError):  # it has ended already, with a request unread
            self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
