"""The workers and the folder of models of a machine, which all front ends share."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, NamedTuple, Protocol

from hessquik_client.errors import StartUpError

from .repository import Repository, Served, Table
from .settings import Settings
from .workers import User, WorkerProcess, Workers

__all__ = ["Health", "Node", "NodeLike"]

logger = logging.getLogger(__name__)


class Health(NamedTuple):
    """The state of the workers.

    Attributes:
        is_loaded: Whether the first load of the folder is complete.
        is_fresh: Whether a worker has answered recently.
        states: Number of workers in each state.
        devices: Device of each worker.
        memory_bytes: Memory of each worker.
        busy_total_s: Time that each worker has spent on batches since its start.
        began_s: When the service started, in seconds since 1970.
        front_restarts: Number of front ends that were replaced.
        restarts: Number of workers that were replaced.
        checked_rows: Number of rows that self-checks computed again.
        mismatches: Number of self-checks that failed.
    """

    is_loaded: bool = False
    is_fresh: bool = False
    states: dict[str, int] = {}  # noqa: RUF012 - never written to
    devices: tuple[str, ...] = ()
    memory_bytes: tuple[int, ...] = ()
    busy_total_s: tuple[float, ...] = ()
    began_s: float = 0.0
    front_restarts: int = 0
    restarts: int = 0
    checked_rows: int = 0
    mismatches: int = 0


class NodeLike(Protocol):
    """The interface of a node, of this process or of the supervisor, that :class:`~service.core.Core` uses."""

    @property
    def repository(self) -> Table:
        """Return the table of served models."""

    async def start(self, user: Any) -> None:
        """Start the workers and load the models; do nothing if they are started."""

    async def stop(self) -> None:
        """End the workers."""

    def health(self) -> Health:
        """Return how the workers are."""

    async def load(self, name: str) -> list[Served]:
        """Load a model's versions from the folder, for all front ends.

        Raises:
            ModelNotFound: the folder has no file for this name.
            ModelRefused: a file was refused; the version served so far stays.
        """

    async def unload(self, name: str, version: int | None = None) -> None:
        """Stop serving a model or a version, in all front ends, until it is loaded again.

        Raises:
            ModelNotFound: there is no such model.
            VersionNotFound: it has no such version.
        """

    async def metrics_text(self, own: bytes) -> bytes:
        """Return the metrics of all front ends together; ``own`` are those of this one."""


class Node:
    """The workers and the models of this machine.

    Args:
        settings: Settings of the service.
        devices: The device of each worker.

    Attributes:
        front_restarts: Number of front ends that were replaced, which the supervisor counts.
    """

    def __init__(self, settings: Settings, devices: list[str]) -> None:
        """Connect the parts; :meth:`start` starts them."""
        self.settings = settings
        self.workers = Workers(self, devices, settings)
        self.repository = Repository(settings.models, self.workers)
        self.is_loaded = False
        self.front_restarts = 0
        self._began_s = time.time()
        self._user: User | None = None
        self._watching: asyncio.Task[None] | None = None

    async def start(self, user: User) -> None:
        """Start the workers and load the models; do nothing if they are started.

        Raises:
            StartUpError: the folder does not exist, or no worker starts.
        """
        if self._user is not None:
            return
        self._user = user
        path = self.settings.models
        try:
            found = "" if path.is_dir() else "a file" if path.exists() else "nothing"
        except OSError as error:  # such as a folder above it that is closed to this user
            found = f"none that can be read ({error.strerror})"
        if found:
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
        busy_total_s = tuple(worker.busy_total_s for worker in workers.workers)
        return Health(
            self.is_loaded,
            workers.is_fresh(),
            states,
            devices,
            memory_bytes,
            busy_total_s,
            self._began_s,
            self.front_restarts,
            workers.restarts,
            workers.checked_rows,
            workers.mismatches,
        )

    async def load(self, name: str) -> list[Served]:
        """Load a model from the folder; see :meth:`Repository.load <service.repository.Repository.load>`."""
        return await self.repository.load(name)

    async def unload(self, name: str, version: int | None = None) -> None:
        """Stop serving a model or a version; see :meth:`Repository.unload <service.repository.Repository.unload>`."""
        self.repository.unload(name, version)

    async def metrics_text(self, own: bytes) -> bytes:
        """Return ``own``, since there is only one front end."""
        return own

    def attach(self, worker: WorkerProcess) -> None:
        """Pass a worker that has become ready to the user."""
        if self._user is not None:
            self._user.attach(worker)

    def refuse(self, model: int, why: str) -> None:
        """Stop serving a model that a worker refused."""
        self.repository.refuse(model, why)

    def give_up(self) -> None:
        """Tell the user that workers cannot be kept alive."""
        if self._user is not None:
            self._user.give_up()

    async def _watch(self) -> None:
        """Follow the folder periodically until cancelled."""
        while True:
            await asyncio.sleep(self.settings.watch_s)
            try:
                await self.repository.follow()
            except Exception:
                logger.exception("the models' folder could not be followed; again in %g s", self.settings.watch_s)
