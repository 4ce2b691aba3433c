"""Fixtures of the engine's tests."""

import pytest

from hessquik.quantities import QUANTITIES, Quantity, register


@pytest.fixture
def registered():
    """Register quantities for the length of a test: its own ones by name, axes, order and formula."""
    before = set(QUANTITIES)
    yield lambda *quantity: register(Quantity(*quantity))
    for name in set(QUANTITIES) - before:
        del QUANTITIES[name]
