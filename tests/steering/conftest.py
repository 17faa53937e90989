"""A tiny model that is spread in each of the ways that there are, beside the same on one device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.pretend import pretend_throughout as pretend_throughout  # the fixture
from tests.support.ranks import PoolOf
from tests.support.spread_models import Both, both, over_devices


@pytest.fixture(scope="module", params=["device_map", "tp2", "pp2"])
def spread(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, ranks_of: PoolOf
) -> Iterator[Both]:
    folder = tmp_path_factory.mktemp("steering")
    if request.param == "device_map":
        request.getfixturevalue("pretend_throughout")
        yield over_devices("llama", folder)
        return
    found = both("llama", folder, ranks_of, **({"tp": 2} if request.param == "tp2" else {"pp": 2}))
    yield found
    found.close()
