"""The part of the service that a machine has once: its workers, and the folder of models."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, NamedTuple, Protocol

from hessquik_client.errors import StartUpError
from service.repository import Repository, Served, Table
from service.settings import Settings
from service.workers import WorkerProcess, Workers

__all__ = ["Health", "Node", "NodeLike", "User"]

logger = logging.getLogger(__name__)


class Health(NamedTuple):
    """The state of the workers.

    Attributes:
        is_loaded: Whether the first load of the folder is over.
        is_fresh: Whether a worker was well lately.
        states: How many workers are in each state.
        devices: Of the workers.
        memory_bytes: Of the workers.
        restarts: How many workers were replaced.
        checked_rows: How many rows self-checks computed again.
        mismatches: How many self-checks failed.
    """

    is_loaded: bool = False
    is_fresh: bool = False
    states: dict[str, int] = {}  # noqa: RUF012 - never written to
    devices: tuple[str, ...] = ()
    memory_bytes: tuple[int, ...] = ()
    restarts: int = 0
    checked_rows: int = 0
    mismatches: int = 0


class User(Protocol):
    """The user of the workers."""

    def attach(self, worker: WorkerProcess) -> None:
        """Use a worker that has become ready."""

    def give_up(self) -> None:
        """End everything, since workers cannot be kept alive."""


class NodeLike(Protocol):
    """The interface of a node that :class:`~service.core.Core` uses: this process's own, or the supervisor's."""

    @property
    def repository(self) -> Table:
        """The repository of models."""

    async def start(self, user: Any) -> None:
        """Start the workers and load the models, unless that is done."""

    async def stop(self) -> None:
        """End the workers."""

    def health(self) -> Health:
        """Return how the workers are."""

    async def load(self, name: str) -> list[Served]:
        """Load a model from the folder, for everybody."""

    async def unload(self, name: str, version: int | None = None) -> None:
        """Stop serving a model, for everybody."""

    async def metrics_text(self, own: bytes) -> bytes:
        """Return everybody's metrics, of which ours are given."""


class Node:
    """The workers and the models of this machine.

    Args:
        settings: Limits and places.
        devices: One per worker.
    """

    def __init__(self, settings: Settings, devices: list[str]) -> None:
        """Wire the parts together; nothing runs yet."""
        self.settings = settings
        self.workers = Workers(self, devices, settings)
        self.repository = Repository(settings.models, self.workers)
        self.is_loaded = False
        self._user: User | None = None
        self._watching: asyncio.Task[None] | None = None

    async def start(self, user: User) -> None:
        """Start the workers and load the models, unless that is done.

        Raises:
            StartUpError: there is no folder, or no worker comes up.
        """
        if self._user is not None:
            return
        self._user = user
        path = self.settings.models
        if not path.is_dir():
            found = "a file" if path.exists() else "nothing"
            raise StartUpError(f"expected a folder of models at {path}, found {found}")
        await self.workers.start()
        await self.repository.load_all()
        self.is_loaded = True
        if self.settings.watch_s > 0 and not self.workers.is_closing:
            self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def stop(self) -> None:
        """End the workers."""
        if self._watching is not None:
            self._watching.cancel()
        await self.workers.close()

    def health(self) -> Health:
        """Return how the workers are."""
        workers = self.workers
        states = {state.value: count for state, count in workers.states().items()}
        devices = tuple(worker.device for worker in workers.workers)
        memory_bytes = tuple(worker.memory_bytes for worker in workers.workers)
        counts = (workers.restarts, workers.checked_rows, workers.mismatches)
        return Health(self.is_loaded, workers.is_fresh(), states, devices, memory_bytes, *counts)

    async def load(self, name: str) -> list[Served]:
        """Load a model from the folder; see :meth:`Repository.load <service.repository.Repository.load>`."""
        return await self.repository.load(name)

    async def unload(self, name: str, version: int | None = None) -> None:
        """Stop serving a model or a version; see :meth:`Repository.unload <service.repository.Repository.unload>`."""
        self.repository.unload(name, version)

    async def metrics_text(self, own: bytes) -> bytes:
        """Return the metrics: there are no others than ours."""
        return own

    def attach(self, worker: WorkerProcess) -> None:
        """Hand on a worker that has become ready."""
        if self._user is not None:
            self._user.attach(worker)

    def refuse(self, model: int, why: str) -> None:
        """Serve a model no more that a worker refused."""
        self.repository.refuse(model, why)

    def give_up(self) -> None:
        """Hand on that workers cannot be kept alive."""
        if self._user is not None:
            self._user.give_up()

    async def _watch(self) -> None:
        """Follow the folder for ever."""
        while True:
            await asyncio.sleep(self.settings.watch_s)
            try:
                await self.repository.follow()
            except Exception:
                logger.exception("the models' folder could not be followed; again in %g s", self.settings.watch_s)
