"""Simulations of HTTP connections, and planted bugs that they must find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.simulation.planted import CONNECTION_BUGS
from tests.simulation.wire_world import WireWorld, make_module, run_wire

STEPS = 800
#: Events after which a planted bug has to be found.
MOST_EVENTS = 2_000_000
ENDS = {"answered", "abandoned", "good", "refused 400", "refused 413", "refused 503"}


@pytest.mark.slow
def test_the_ledger_holds_in_every_world(run_worlds: Callable[..., Counter[str]]) -> None:
    module = make_module()
    assert set(run_worlds(lambda seed: run_wire(seed, STEPS, module))) >= ENDS


def test_a_seed_replays() -> None:
    def history(world: WireWorld) -> tuple[object, ...]:
        return world.events, world.numbers, world.clock.now, dict(world.ends)

    module = make_module()
    assert history(run_wire(5, STEPS, module)) == history(run_wire(5, STEPS, module))
    assert history(run_wire(5, STEPS, module)) != history(run_wire(6, STEPS, module))


@pytest.mark.parametrize("name", CONNECTION_BUGS)
def test_planted_bugs_are_found(name: str, find: Callable[[str, Any, int], None]) -> None:
    module = make_module(*CONNECTION_BUGS[name])
    find(name, lambda seed: run_wire(seed, STEPS, module), MOST_EVENTS)
