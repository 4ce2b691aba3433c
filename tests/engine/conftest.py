"""Fixtures of the engine's tests."""

import pytest

from hessquik.quantities import QUANTITIES, Quantity, register


@pytest.fixture
def registered():
    """Return a function that registers a quantity until the end of the test."""
    before = set(QUANTITIES)
    yield lambda *quantity: register(Quantity(*quantity))
    for name in set(QUANTITIES) - before:
        del QUANTITIES[name]
