"""Plans that are ready to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from hessquik.plan import Plan

__all__ = ["Bind", "Bound", "Runner", "refuse"]

#: A function of x, weights and directions: new results by name, or ``None`` for arguments that it does not take.
Bound = Callable[[Tensor, Tensor | None, Tensor | None], dict[str, Tensor] | None]
#: Makes such a function from the shapes of the inputs and of the results, and the largest number of rows.
Bind = Callable[[Mapping[str, tuple[int, ...]], Mapping[str, tuple[int, ...]], int], Bound]


def refuse(x: Tensor, weights: Tensor | None, directions: Tensor | None) -> None:
    """Return ``None``: a :data:`Bound` that takes no arguments."""


class Runner:
    """A plan that is ready to run; threads may share it.

    Args:
        plan: The plan.
        run: Computes rows ``start`` to ``stop`` of the results; inputs and results are in ``arrays`` by name.
        tile_rows: Returns the row counts of its tiles, ascending, which change when memory runs short.
        bind: Makes a function that checks its arguments, allocates the results and runs, all in one.

    Attributes:
        shared: Names of the inputs that all rows share.
        last_use: A number that grows with every use of a plan of the same evaluator.
    """

    def __init__(
        self,
        plan: Plan,
        run: Callable[[Mapping[str, Tensor], int, int], None],
        tile_rows: Callable[[], tuple[int, ...]],
        bind: Bind = lambda inputs, results, most_rows: refuse,
    ) -> None:
        """Name the shared inputs."""
        self.plan = plan
        self.run = run
        self.bind = bind
        given = {"weights": plan.ask.weights, "directions": plan.ask.directions}
        self.shared = frozenset(name for name, how in given.items() if how == "shared")
        self.last_use = 0
        self._tile_rows = tile_rows

    @property
    def tile_rows(self) -> tuple[int, ...]:
        """Row counts of the tiles, ascending."""
        return self._tile_rows()
