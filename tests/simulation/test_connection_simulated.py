"""The HTTP connection in simulated worlds, and bugs planted into it that these worlds must find."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.simulation.planted import CONNECTION_BUGS
from tests.simulation.wire_world import WireWorld, make_module, run_wire
from tests.whole import Note, choose

STEPS = 800
#: Events after which a planted bug has to be found.
MOST_EVENTS = 2_000_000


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_the_ledger_holds_in_every_world(note: Note) -> None:
    module, seconds, events, ends, seed = make_module(), choose(8.0, 3600.0), 0, Counter[str](), 0
    began_s = time.process_time()
    while time.process_time() - began_s < seconds:
        world = run_wire(seed, STEPS, module)
        events, ends, seed = events + world.events, ends + world.ends, seed + 1
    per_minute = events / (time.process_time() - began_s) * 60
    note(f"{events} events in {seed} worlds, {per_minute:,.0f} a minute; {dict(ends)}")
    common = {"answered", "abandoned", "good", "refused 400", "refused 413", "refused 503"}
    assert common <= set(ends)


def test_a_seed_replays() -> None:
    def history(world: WireWorld) -> tuple[object, ...]:
        return world.events, world.numbers, world.clock.now, dict(world.ends)

    module = make_module()
    assert history(run_wire(5, STEPS, module)) == history(run_wire(5, STEPS, module))
    assert history(run_wire(5, STEPS, module)) != history(run_wire(6, STEPS, module))


@pytest.mark.parametrize("name", CONNECTION_BUGS)
def test_planted_bugs_are_found(name: str, note: Note) -> None:
    module, events, seed = make_module(*CONNECTION_BUGS[name]), 0, 0
    while events < MOST_EVENTS:
        try:
            events += run_wire(seed, STEPS, module).events
        except Exception as error:
            note(f"found after {events + error.events} events: {error}")  # type: ignore[attr-defined]
            return
        seed += 1
    pytest.fail(f"not found in {events} events")
