"""Simulations of workers and models, and planted bugs that they must find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.simulation.node_world import NodeWorld, make_modules, run_node
from tests.simulation.planted import NODE_BUGS

STEPS = 2000
#: Events after which a planted bug has to be found.
MOST_EVENTS = 1_000_000
ENDS = {
    *("loaded", "refused", "not found", "cancelled", "unloaded", "not unloaded", "unreadable", "quiet", "killed"),
    *(
        "it dies",
        "it hangs",
        "it talks nonsense",
        "it disagrees with itself",
        "its connection ends",
        "it never starts",
    ),
    *("its load hangs", "its model ends it", "its batch is stuck", "it cannot be connected"),
}
#: A simulation that ends with an error leaves tasks that never began.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")


@pytest.mark.slow
def test_the_ledger_holds_in_every_world(run_worlds: Callable[..., Counter[str]]) -> None:
    modules = make_modules()
    assert set(run_worlds(lambda seed: run_node(seed, STEPS, modules))) >= ENDS


def test_a_seed_replays() -> None:
    def history(world: NodeWorld) -> tuple[object, ...]:
        return world.events, world.loop.now, dict(world.ends), next(world.numbers)

    modules = make_modules()
    assert history(run_node(5, STEPS, modules)) == history(run_node(5, STEPS, modules))
    assert history(run_node(5, STEPS, modules)) != history(run_node(6, STEPS, modules))


@pytest.mark.parametrize("name", NODE_BUGS)
def test_planted_bugs_are_found(name: str, find: Callable[[str, Any, int], None]) -> None:
    modules = make_modules(*NODE_BUGS[name])
    find(name, lambda seed: run_node(seed, STEPS, modules), MOST_EVENTS)
