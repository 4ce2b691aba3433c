"""The scheduler in simulated worlds, and bugs planted into it that these worlds must find."""

from __future__ import annotations

import inspect
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator
from types import ModuleType

import pytest

from service import scheduler
from tests.simulation.planted import BUGS
from tests.simulation.world import World, run
from tests.whole import Note, choose

STEPS = 500
#: Events after which a planted bug has to be found.
MOST_EVENTS = 200_000


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_the_ledger_holds_in_every_world(note: Note) -> None:
    seconds, events, ends, seed = choose(8.0, 3600.0), 0, Counter[str](), 0
    began_s = time.process_time()
    while time.process_time() - began_s < seconds:
        world = run(seed, STEPS)
        events, ends, seed = events + world.events, ends + world.ends, seed + 1
    per_minute = events / (time.process_time() - began_s) * 60
    note(f"{events} events in {seed} worlds, {per_minute:,.0f} a minute; {dict(ends)}")
    common = {"ok", "deadline_exceeded", "client_gone", "evaluation_failed", "too_expensive", "overloaded"}
    assert common <= set(ends)


def test_a_seed_replays() -> None:
    def history(world: World) -> tuple[object, ...]:
        return world.events, world.accepted, world.clock.now, dict(world.ends)

    assert history(run(5, STEPS)) == history(run(5, STEPS))
    assert history(run(5, STEPS)) != history(run(6, STEPS))


def planted(old: str, new: str) -> ModuleType:
    """Return a copy of the scheduler's module with a piece of its source replaced."""
    source = inspect.getsource(scheduler)
    assert source.count(old) == 1, f"{source.count(old)} places have {old!r}"
    module = ModuleType("planted")
    module.__dict__["__file__"] = scheduler.__file__
    sys.modules["planted"] = module  # where dataclasses look for it
    try:
        exec(compile(source.replace(old, new), "planted", "exec"), module.__dict__)
    finally:
        del sys.modules["planted"]
    return module


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name: str, note: Note) -> None:
    module, events, seed = planted(*BUGS[name]), 0, 0
    while events < MOST_EVENTS:
        try:
            events += run(seed, STEPS, module).events
        except Exception as error:
            note(f"found after {events + error.events} events: {error}")  # type: ignore[attr-defined]
            return
        seed += 1
    pytest.fail(f"not found in {events} events")
