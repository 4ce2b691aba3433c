"""Models and versions: the files in a folder, and the table of the versions that are served.

``NAME.safetensors`` is version 1 of NAME, ``NAME/VERSION.safetensors`` another. Each file is read whole and handed to
the workers as bytes, so that a later change of the file has no effect until it is loaded again. A model's name in a
request is looked up in a table and never becomes part of a path.

:class:`Table` holds the served models; :class:`Repository` keeps it up to date with the folder.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import stat
from collections.abc import Coroutine, Hashable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from hessquik_client.errors import ModelNotFound, ModelRefused, NotReady, VersionNotFound

from .logs import printable
from .scheduler import Statistics
from .shared import Sealed, share
from .workers import LoadError, Workers

__all__ = ["Look", "ModelFile", "Repository", "Served", "Table", "scan"]

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
VERSION = re.compile(r"[1-9][0-9]{0,8}")
SUFFIX = ".safetensors"
MAX_FILE_BYTES = 512 << 20
#: Files that are read and loaded at a time.
CONCURRENT_LOADS = 4
#: The reason why a link is left out, be it to the folder itself.
LEADS_OUT = "it is a link that leads out of the folder"
#: The reason why a version is not served that was unloaded during its load.
UNLOADED = "expected a model that stays, it was unloaded while it was loaded"

#: A fingerprint of a file: its path, time, size and inode.
Stamp = tuple[str, int, int, int]


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file that holds one version of a model.

    Attributes:
        name: Name of the model.
        version: Number of the version, from 1.
        path: Path of the file.
        stamp: A fingerprint that changes when the file does.
    """

    name: str
    version: int
    path: Path
    stamp: Stamp = ("", 0, 0, 0)

    @property
    def size_bytes(self) -> int:
        """Return the size that the file had when the folder was scanned."""
        return self.stamp[2]

    def read(self, most_bytes: int = MAX_FILE_BYTES) -> bytes:
        """Return the bytes of the file.

        Args:
            most_bytes: Largest size that is accepted.

        Raises:
            LoadError: the file is missing, unreadable, not a regular file, or too large, also for the memory.
        """
        try:
            # Opened without blocking: the path may have become a FIFO.
            with open(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
                status = os.fstat(opened.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise LoadError("expected a regular file")
                if status.st_size > most_bytes:
                    raise LoadError(f"expected a file of at most {most_bytes} bytes, got {status.st_size}")
                return opened.read(most_bytes + 1)
        except OSError as error:
            raise LoadError(f"expected a file that can be read ({error.strerror})") from None
        except MemoryError:
            raise LoadError(f"expected a file that fits into memory, got {self.size_bytes} bytes") from None


class Look(NamedTuple):
    """The contents of a folder of models.

    Attributes:
        files: The files, one per version, ordered by name and version.
        left_out: The reason for each entry that is left out, by its path.
        unreadable: Subfolders whose contents are unknown, since they cannot be read; ``.`` for the folder itself.
    """

    files: list[ModelFile]
    left_out: dict[str, str]
    unreadable: set[str]


def scan(root: Path) -> Look:
    """Find the models in a folder."""
    look = Look([], {}, set())
    real_root = os.path.realpath(root) + os.sep
    found: dict[tuple[str, int], ModelFile] = {}
    for entry, folder in _candidates(root, real_root, look):
        path = Path(entry.path)
        shown = str(path.relative_to(root))
        name, version = (path.stem, "1") if folder is None else (folder, path.stem)
        if not NAME.fullmatch(name) or not VERSION.fullmatch(version):
            look.left_out[shown] = "its name is not that of a model and a version"
            continue
        try:
            status = entry.stat()
        except OSError as error:
            look.left_out[shown] = f"it cannot be read ({error.strerror})"
            continue
        key = name, int(version)
        if _leads_out(entry, real_root):
            look.left_out[shown] = LEADS_OUT
        elif not stat.S_ISREG(status.st_mode):
            look.left_out[shown] = "it is not a regular file"
        elif key in found:
            first = found[key].path.relative_to(root)
            look.left_out[shown] = f"{first} is version {version} of {name} already"
        else:
            found[key] = ModelFile(*key, path, (shown, status.st_mtime_ns, status.st_size, status.st_ino))
    look.files.extend(found[key] for key in sorted(found))
    return look


def _candidates(root: Path, real_root: str, look: Look) -> Iterator[tuple[os.DirEntry[str], str | None]]:
    """Yield every ``*.safetensors`` entry with ``None``, then those of subfolders with the name of the subfolder.

    Hidden subfolders are not looked at: Kubernetes keeps the files of a volume in such, new ones after each change.
    """
    folders = []
    for entry in _entries(root, ".", look):
        if entry.name.endswith(SUFFIX):
            yield entry, None
            continue
        try:
            if not entry.name.startswith(".") and entry.is_dir():
                folders.append(entry)
        except OSError as error:
            _miss(entry.name, error, look)
    for folder in folders:
        if _leads_out(folder, real_root):
            look.left_out[folder.name] = LEADS_OUT
            continue
        entries = [one for one in _entries(folder.path, folder.name, look) if one.name.endswith(SUFFIX)]
        if NAME.fullmatch(folder.name):
            yield from ((entry, folder.name) for entry in entries)
        elif entries:
            look.left_out[folder.name] = "its name is not that of a model"


def _entries(path: str | Path, name: str, look: Look) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return sorted(entries, key=attrgetter("name"))
    except OSError as error:
        _miss(name, error, look)
        return []


def _miss(name: str, error: OSError, look: Look) -> None:
    """Note a folder that cannot be read."""
    look.left_out[name] = f"it cannot be read ({error.strerror})"
    look.unreadable.add(name)


def _leads_out(entry: os.DirEntry[str], real_root: str) -> bool:
    """Return whether an entry is a link to a place that is not inside the folder."""
    return entry.is_symlink() and not os.path.realpath(entry.path).startswith(real_root)


@dataclass(slots=True, eq=False)
class Served:
    """One version of a model, as the workers hold it.

    Attributes:
        file: The file that it was loaded from.
        id: Its number in the workers; each load gets a new one.
        digest: SHA-256 of the file's bytes; a file with the same digest is not loaded again.
        cache: Cache of batch keys and shapes, filled by :class:`service.core.Core`.
        facts: Description by a worker (``d``, ``m``, ``dtype``, metadata …); empty until it is loaded.
        reason: Reason why it failed, or ``None``.
        users: Number of requests that hold it.
        is_retired: Whether it is freed when no request holds it.
        tried: Fingerprint of the file that was last tried for it, which may have been refused.
        is_outdated: Whether a newer file for it was refused, so that it is no longer served after a restart.
        statistics: Counts and times of its requests.
    """

    file: ModelFile
    id: int
    digest: bytes = b""
    cache: dict[Hashable, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    users: int = 0
    is_retired: bool = False
    tried: Stamp = ("", 0, 0, 0)
    is_outdated: bool = False
    statistics: Statistics = field(default_factory=Statistics)

    @property
    def state(self) -> str:
        """Return ``ready``, ``loading`` or ``failed``."""
        return "failed" if self.reason is not None else "ready" if self.facts else "loading"

    @property
    def outcome(self) -> dict[str, str | None]:
        """Return the result of loading its file, as replies have it."""
        return {"version": str(self.file.version), "state": self.state, "reason": self.reason}

    @property
    def d(self) -> int:
        """Return the number of inputs; the version must be loaded."""
        return int(self.facts["d"])

    @property
    def m(self) -> int:
        """Return the number of outputs; the version must be loaded."""
        return int(self.facts["m"])


class Table:
    """The served models, by name and version.

    Args:
        root: The folder of the models.
    """

    def __init__(self, root: Path) -> None:
        """Start with an empty table."""
        self.root = root
        self._table: dict[str, dict[int, Served]] = {}

    def __contains__(self, name: str) -> bool:
        """Return whether there is a model of this name, ready or not."""
        return name in self._table

    def names(self) -> list[str]:
        """Return the names of all models in order, including those that failed to load."""
        return sorted(self._table)

    def versions(self, name: str) -> dict[int, Served]:
        """Return all versions of a model by number.

        Raises:
            ModelNotFound: there is no such model.
        """
        versions = self._table.get(name)
        if not versions:
            raise ModelNotFound("expected the name of a served model; GET /v1/models lists them")
        return versions

    def default(self, name: str) -> Served:
        """Return the default version of a model: the highest that is ready, else the highest."""
        versions = self.versions(name).values()
        return max(versions, key=lambda served: (served.state == "ready", served.file.version))

    def get(self, name: str, version: str | None) -> Served:
        """Return a version of a model, ready or not; the default version if ``version`` is ``None``.

        Raises:
            ModelNotFound: there is no such model.
            VersionNotFound: it has no such version.
        """
        if version is None:
            return self.default(name)
        versions = self.versions(name)
        served = versions.get(int(version)) if VERSION.fullmatch(version) else None
        if served is None:
            raise VersionNotFound(f"expected one of the versions {', '.join(map(str, sorted(versions)))}")
        return served

    def ready(self, name: str, version: str | None) -> Served:
        """Return a version that can be evaluated; the default version if ``version`` is ``None``.

        Raises:
            ModelNotFound: there is no such model.
            VersionNotFound: it has no such version.
            NotReady: the version is being loaded, or failed to load.
        """
        versions = self._table.get(name)
        if version is None and versions is not None and len(versions) == 1:
            (served,) = versions.values()
            if served.facts and served.reason is None:
                return served
        served = self.get(name, version)
        if served.state != "ready":
            raise NotReady(f"expected a model that is ready, this one is {served.state}")
        return served

    @contextmanager
    def holding(self, served: Served) -> Iterator[Served]:
        """Hold a version within a ``with`` block, so that it is not freed while a request awaits something."""
        self.hold(served)
        try:
            yield served
        finally:
            self.release(served)

    def hold(self, served: Served) -> None:
        """Keep a version in the workers' memory, even if it is retired, until it is released."""
        served.users += 1

    def release(self, served: Served) -> None:
        """Undo one :meth:`hold`; the last one frees a retired version's memory."""
        served.users -= 1
        if served.is_retired and served.users == 0:
            self.free(served)

    def retire(self, served: Served) -> None:
        """Free a version's memory when no request holds it."""
        served.is_retired = True
        if served.users == 0:
            self.free(served)

    def free(self, served: Served) -> None:
        """Have the workers forget a version."""


class Repository(Table):
    """The served models, kept up to date with a folder.

    Looks at the folder, one after the other, say which files there are; commands say what is unloaded.
    :meth:`_settle` makes the table agree with both, one call at a time for each model: nothing else adds a version,
    and only :meth:`unload` removes one besides.

    Args:
        root: The folder of the models.
        workers: The worker processes that the models are loaded into.
    """

    def __init__(self, root: Path, workers: Workers) -> None:
        """Start with an empty table."""
        super().__init__(root)
        self._workers = workers
        self._ids = count(1)
        #: The last look at the folder, and its files by model.
        self._look = Look([], {}, set())
        self._files: dict[str, list[ModelFile]] = {}
        #: When models (version ``None``) and single versions were unloaded, in the order of ids.
        self._unloaded: dict[tuple[str, int | None], int] = {}
        self._looking = asyncio.Lock()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[list[Served]]] = set()

    async def load_all(self) -> None:
        """Load every file in the folder, several at a time, since nothing is served yet."""
        await self.follow(CONCURRENT_LOADS)

    async def load(self, name: str) -> list[Served]:
        """Load all versions of a model from disk; a version that is loaded replaces the one served so far.

        The load continues if the caller is cancelled.

        Returns:
            The versions that are served.

        Raises:
            ModelNotFound: the folder has no file for this name.
            ModelRefused: a file was refused or a folder cannot be read; the versions served so far stay.
        """
        return await self._run(self._load(name, next(self._ids)))

    def unload(self, name: str, version: int | None = None) -> None:
        """Stop serving a model, or one version, until :meth:`load`; requests in progress are still answered.

        Raises:
            ModelNotFound: there is no such model.
            VersionNotFound: it has no such version.
        """
        versions = self.versions(name)
        if version is not None:
            self.get(name, str(version))
        if version is None or len(versions) == 1:
            self._unloaded[name, None] = next(self._ids)
            self._keep(name, set())
            logger.info("%s is unloaded", name)
        else:
            self._unloaded[name, version] = next(self._ids)
            self._keep(name, versions.keys() - {version})
            logger.info("%s version %d is unloaded", name, version)

    async def follow(self, at_a_time: int = 1) -> None:
        """Load new and changed files of the folder, and drop versions whose files are gone.

        Models and versions that were unloaded stay unloaded, and a file that was refused is not tried again until it
        changes. If the folder cannot be read or is missing, nothing changes.

        Args:
            at_a_time: Number of models that are loaded at a time.
        """
        await self._scan()
        slots = asyncio.Semaphore(at_a_time)

        async def catch_up(name: str) -> None:
            async with slots:
                await self._run(self._catch_up(name))

        changed = [name for name in self._files.keys() | self._table.keys() if self._differs(name)]
        new_ones_first = sorted(changed, key=lambda name: (name in self._table, name))
        await asyncio.gather(*map(catch_up, new_ones_first))

    def refuse(self, model: int, why: str) -> None:
        """Mark a version as failed because a worker refused it.

        Args:
            model: Number of the version in the workers.
            why: The reason.
        """
        for versions in self._table.values():
            for served in versions.values():
                if served.id == model:
                    served.reason = why
                    logger.error(
                        "%s version %d failed and is no longer served: %s", served.file.name, served.file.version, why
                    )

    def free(self, served: Served) -> None:
        """Have the workers forget a version."""
        self._workers.unload(served.id)

    async def _run(self, work: Coroutine[Any, Any, list[Served]]) -> list[Served]:
        """Run a coroutine in a task, which continues if the caller is cancelled."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._end_task)
        return await asyncio.shield(task)

    def _end_task(self, task: asyncio.Task[list[Served]]) -> None:
        """Discard a finished task and mark its error as retrieved, since its caller may be gone."""
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()

    async def _scan(self) -> None:
        """Look at the folder, after the looks that are under way; log each entry that is left out once."""
        async with self._looking:
            look = await asyncio.get_running_loop().run_in_executor(None, scan, self.root)
            for path in sorted(look.left_out.keys() - self._look.left_out.keys()):
                logger.warning("%s is left out: %s", printable(path), look.left_out[path])
            self._look = look
            self._files = {name: list(files) for name, files in groupby(look.files, attrgetter("name"))}

    def _is_hidden(self, name: str) -> bool:
        """Return whether the folder, or the model's subfolder, could not be read."""
        return not {".", name}.isdisjoint(self._look.unreadable)

    def _is_unloaded(self, file: ModelFile) -> bool:
        """Return whether a version, or its model, was unloaded and not loaded since."""
        return (file.name, None) in self._unloaded or (file.name, file.version) in self._unloaded

    def _wanted(self, name: str) -> list[ModelFile]:
        """Return the files of a model that are to be served."""
        return [file for file in self._files.get(name, []) if not self._is_unloaded(file)]

    def _tried(self, name: str) -> dict[int, Stamp]:
        """Return the fingerprint of the file that was last tried for each version of a model."""
        return {version: served.tried for version, served in self._table.get(name, {}).items()}

    def _differs(self, name: str) -> bool:
        """Return whether the table differs from the folder about a model; not if the folder could not be read."""
        wanted = {file.version: file.stamp for file in self._wanted(name)}
        return wanted != self._tried(name) and not self._is_hidden(name)

    def _lock(self, name: str) -> asyncio.Lock:
        """Return the lock of those who settle a model."""
        return self._locks.setdefault(name, asyncio.Lock())

    async def _load(self, name: str, asked: int) -> list[Served]:
        """Load a model's versions, except those that were unloaded after the moment ``asked``."""
        async with self._lock(name):
            await self._scan()
            if self._is_hidden(name):
                raise ModelRefused("expected a folder that can be read, this one cannot", loaded=[])
            if name not in self._files:
                raise ModelNotFound("expected the name of a model that the folder holds")
            self._unloaded = {key: when for key, when in self._unloaded.items() if key[0] != name or when > asked}
            loaded = await self._settle(name, {})
        refused = [served for served in loaded if served.state == "failed"]
        if refused:
            raise ModelRefused(
                f"expected files that can be served, version {refused[0].file.version}: {refused[0].reason}",
                loaded=[served.outcome for served in loaded],
            )
        return loaded

    async def _catch_up(self, name: str) -> list[Served]:
        """Load a model's files that have changed since they were tried."""
        async with self._lock(name):
            return await self._settle(name, self._tried(name)) if self._differs(name) else []

    async def _settle(self, name: str, tried: dict[int, Stamp]) -> list[Served]:
        """Load the files of a model that were not tried, then drop the versions whose files are gone."""
        wanted = self._wanted(name)
        loaded = [await self._load_file(file) for file in wanted if file.stamp != tried.get(file.version)]
        for version in self._keep(name, {file.version for file in wanted}):
            logger.info("%s version %d is gone from the folder", name, version)
        return loaded

    def _keep(self, name: str, kept: Set[int]) -> Set[int]:
        """Drop the versions of a model except some, and return those that were dropped."""
        versions = self._table.get(name, {})
        dropped = versions.keys() - kept
        for version in dropped:
            self.retire(versions.pop(version))
        if not versions:
            self._table.pop(name, None)
        return dropped

    async def _load_file(self, file: ModelFile) -> Served:
        """Load a file, unless its bytes are those of the version served; what is unloaded meanwhile is discarded."""
        old = self._table.get(file.name, {}).get(file.version)
        new = Served(file, next(self._ids), tried=file.stamp)
        if old is not None:
            old.tried = file.stamp
        loop = asyncio.get_running_loop()
        since_s = loop.time()
        try:
            contents, new.digest = await loop.run_in_executor(None, _read, file)
            if self._is_unloaded(file):
                raise LoadError(UNLOADED)
            if old is not None and old.state == "ready" and old.digest == new.digest:
                old.file, old.is_outdated = file, False
                return old
            if old is None:
                self._put(new)
            new.facts = {**await self._workers.load(new.id, contents), "sha256": new.digest.hex()}
            if self._is_unloaded(file):
                raise LoadError(UNLOADED)
        except LoadError as error:
            new.reason = str(error)
            if old is not None:
                old.is_outdated = True
            logger.error("%s is refused: %s", file.path.relative_to(self.root), error)
        if self._is_unloaded(file):
            self.retire(new)
        elif new.reason is None or old is None or old.state != "ready":
            self._put(new)
        if new.reason is None:
            logger.info(
                "%s version %d is served: d=%d, m=%d, %s, loaded in %.2f s",
                *(file.name, file.version, new.d, new.m, new.facts["dtype"], loop.time() - since_s),
            )
        return new

    def _put(self, new: Served) -> None:
        """Put a version into the table, and retire the one that it replaces."""
        versions = self._table.setdefault(new.file.name, {})
        replaced = versions.get(new.file.version)
        versions[new.file.version] = new
        if replaced is not None and replaced is not new:
            self.retire(replaced)


def _read(file: ModelFile) -> tuple[bytes | Sealed, bytes]:
    """Return the contents of a file, shared if they are large, and their digest.

    Raises:
        LoadError: the file cannot be read.
    """
    data = file.read()
    return share(data), hashlib.sha256(data).digest()
