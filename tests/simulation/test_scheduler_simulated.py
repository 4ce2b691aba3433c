"""Simulations of the scheduler, and planted bugs that they must find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from service import scheduler
from tests.simulation.planted import BUGS, planted
from tests.simulation.world import World, run

STEPS = 500
#: Events after which a planted bug has to be found.
MOST_EVENTS = 200_000
ENDS = {"ok", "deadline_exceeded", "client_gone", "evaluation_failed", "too_expensive", "overloaded"}


@pytest.mark.slow
def test_the_ledger_holds_in_every_world(run_worlds: Callable[..., Counter[str]]) -> None:
    assert set(run_worlds(lambda seed: run(seed, STEPS))) >= ENDS


def test_a_seed_replays() -> None:
    def history(world: World) -> tuple[object, ...]:
        return world.events, world.accepted, world.clock.now, dict(world.ends)

    assert history(run(5, STEPS)) == history(run(5, STEPS))
    assert history(run(5, STEPS)) != history(run(6, STEPS))


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_found(name: str, find: Callable[[str, Any, int], None]) -> None:
    module = planted(scheduler, *BUGS[name])
    find(name, lambda seed: run(seed, STEPS, module), MOST_EVENTS)
