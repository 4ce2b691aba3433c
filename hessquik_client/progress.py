"""The progress bar for the parts of a split batch, drawn with rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hessquik_client.steps import Gather

__all__ = ["bar", "check"]


def check(shows_progress: bool) -> None:
    """Check that a progress bar can be shown, if it is requested.

    Raises:
        ImportError: rich is not installed.
    """
    if shows_progress:
        try:
            import rich  # noqa: F401
        except ImportError:
            raise ImportError(
                "progress: expected the package rich; pip install 'hessquik-service[progress]'"
            ) from None


@contextmanager
def bar(step: Gather) -> Iterator[Callable[[int], None]]:
    """Show a progress bar if the step asks for one; yield the function that advances it."""
    if not step.shows_progress:
        yield lambda size: None
        return
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        *Progress.get_default_columns()[:-1],
        MofNCompleteColumn(),
        TextColumn(step.unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as drawn:
        task = drawn.add_task("evaluating", total=sum(step.sizes))
        yield lambda size: drawn.advance(task, size)
