"""Ranks for tests: one pool per world size for the whole session, since a start takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pytest

if TYPE_CHECKING:  # the fixture is known to all tests, and few use it
    from tracelens.backends.ranks.pool import Ranks

PoolOf: TypeAlias = "Callable[[int], Ranks]"


@pytest.fixture(scope="session")
def ranks_of() -> Iterator[PoolOf]:
    """``ranks_of(2)``: two ranks on the CPU, the same for all tests. They are not to be killed or closed."""
    from tracelens.backends.ranks.pool import Ranks

    pools: dict[int, Ranks] = {}

    def pool(world: int) -> Ranks:
        if world not in pools:
            pools[world] = Ranks(world, device="cpu", timeout=240)
        return pools[world]

    yield pool
    for ranks in pools.values():
        ranks.close()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama, as ranks load it. It is not to be changed."""
    from tests.support.families import FAMILIES

    found = tmp_path_factory.mktemp("tiny")
    FAMILIES["llama"].build().save_pretrained(found)
    return found


def fragile(world: int) -> Ranks:
    """Ranks that can be asked to go wrong."""
    from tracelens.backends.ranks.pool import Ranks

    return Ranks(world, device="cpu", timeout=60, _worker="tests.support.rank_worker")


def runs(pid: int) -> bool:
    """Is there such a process? One that ended and was not waited for yet is none."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"
