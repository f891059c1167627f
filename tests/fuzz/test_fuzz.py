"""A few examples of every property from a fixed seed. `make fuzz` draws new ones for an hour."""

import pytest
from hypothesis import HealthCheck, given, settings

from .properties import PROPERTIES

QUICK = settings(
    max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name):
    prop = PROPERTIES[name]
    QUICK(given(prop.strategy)(prop.check))()
