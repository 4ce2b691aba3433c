"""One question has one answer: the same bits by every dialect, encoding, split and front end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.live import LiveServer
from tests.ways import QUANTITIES, WAYS, Numbers, Way, expect_same_bits, expect_same_bits_by, in_process

#: Difference between backends, relative to the largest number of a quantity.
TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def expected(shipped_models: Path) -> Numbers:
    return in_process(shipped_models)


@pytest.fixture(scope="module")
def two_front_ends(shipped_models: Path) -> Iterator[LiveServer]:
    with LiveServer(shipped_models, settings={"processes": 2}) as live:
        yield live


@pytest.mark.parametrize("rows", [1, 7, 67], ids=lambda rows: f"{rows} at a time")
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("carrier", ["server", pytest.param("two_front_ends", marks=pytest.mark.whole)])
def test_every_dialect_encoding_split_and_front_end_gives_the_same_bits(
    request: pytest.FixtureRequest, expected: Numbers, carrier: str, way: Way, rows: int
) -> None:
    """A connection each, so that either front end answers some."""
    with httpx.Client(base_url=request.getfixturevalue(carrier).url, timeout=30) as client:
        expect_same_bits_by(way, client, rows, expected)


def test_another_backend_gives_the_same_numbers(expected: Numbers, shipped_models: Path) -> None:
    found = in_process(shipped_models, "torch")
    for name in QUANTITIES:
        assert np.abs(found[name] - expected[name]).max() <= TOLERANCE * np.abs(expected[name]).max()


def test_one_bit_of_difference_is_seen(expected: Numbers) -> None:
    """The control."""
    moved = {name: array.copy() for name, array in expected.items()}
    moved["gradient"].flat[5] = np.nextafter(moved["gradient"].flat[5], 9)
    with pytest.raises(AssertionError, match="gradient"):
        expect_same_bits(moved, expected)
