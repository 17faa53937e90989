"""A tiny model that is spread in each of the ways that there are, beside the same on one device."""

from tests.support.pretend import pretend_throughout as pretend_throughout  # the fixture
from tests.support.spread_models import EVERY_WAY, fixture_of

spread = fixture_of(EVERY_WAY)
