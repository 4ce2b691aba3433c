"""Length of the simulations, and the search for planted bugs."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.simulation.planted import FIRST_SEEDS
from tests.whole import Note, choose

Run = Callable[[int], Any]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Disable logging, since the service logs every simulated failure."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def run_worlds(note: Note) -> Callable[[Run], Counter[str]]:
    """Return a function that runs simulations for a fixed time and counts how their requests ended."""

    def run_worlds(run: Run) -> Counter[str]:
        events, ends, seed, began_s = 0, Counter[str](), 0, time.process_time()
        while time.process_time() - began_s < choose(26.0, 1200.0):
            world = run(seed)
            events, ends, seed = events + world.events, ends + world.ends, seed + 1
        per_minute = events / (time.process_time() - began_s) * 60
        note(f"{events} events in {seed} worlds, {per_minute:,.0f} a minute; {dict(ends)}")
        return ends

    return run_worlds


@pytest.fixture
def find(note: Note) -> Callable[[str, Run, int], None]:
    """Return a function that fails unless simulations with a planted bug raise an error within a number of events."""

    def find(bug: str, run: Run, most_events: int) -> None:
        events, seed = 0, choose(FIRST_SEEDS.get(bug, 0), 0)
        while events < most_events:
            try:
                events += run(seed).events
            except Exception as error:
                events += error.events  # type: ignore[attr-defined]
                note(f"found after {events} events, in the world of seed {seed}: {error}")
                return
            seed += 1
        pytest.fail(f"not found in {events} events")

    return find
