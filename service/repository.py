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
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from hessquik_client.errors import ModelNotFound, ModelRefused, NotReady, ServiceError, VersionNotFound

from .metrics import ModelStatistics
from .workers import LoadError, Workers

__all__ = ["ModelFile", "Repository", "Served", "Table", "find_files", "printable", "scan"]

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
VERSION = re.compile(r"[1-9][0-9]{0,8}")
SUFFIX = ".safetensors"
MAX_FILE_BYTES = 512 << 20
#: Files that are read and loaded at a time.
CONCURRENT_LOADS = 4

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
            LoadError: the file is missing, unreadable, not a regular file, or too large.
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


def scan(root: Path) -> tuple[list[ModelFile], dict[str, str]]:
    """Find the models in a folder.

    Returns:
        The files, one per version, ordered by name and version; and the reason for each entry left out, by its path.
    """
    found: dict[tuple[str, int], ModelFile] = {}
    left_out: dict[str, str] = {}
    real_root = os.path.realpath(root)
    for entry, folder in _candidates(root, left_out):
        path = Path(entry.path)
        shown = str(path.relative_to(root))
        name, version = (path.stem, "1") if folder is None else (folder.name, path.stem)
        if not NAME.fullmatch(name) or not VERSION.fullmatch(version):
            left_out[shown] = "its name is not that of a model and a version"
            continue
        try:
            status = entry.stat()
        except OSError as error:
            left_out[shown] = f"it cannot be read ({error.strerror})"
            continue
        key = name, int(version)
        is_linked = entry.is_symlink() or (folder is not None and folder.is_symlink())
        if is_linked and not os.path.realpath(path).startswith(real_root + os.sep):
            left_out[shown] = "it leads out of the folder"
        elif not stat.S_ISREG(status.st_mode):
            left_out[shown] = "it is not a regular file"
        elif key in found:
            first = found[key].path.relative_to(root)
            left_out[shown] = f"{first} is version {version} of {name} already"
        else:
            found[key] = ModelFile(*key, path, (shown, status.st_mtime_ns, status.st_size, status.st_ino))
    return [found[key] for key in sorted(found)], left_out


def find_files(root: Path) -> Iterator[ModelFile]:
    """Yield the models' files in a folder, ordered by name and version."""
    yield from scan(root)[0]


def _candidates(root: Path, left_out: dict[str, str]) -> Iterator[tuple[os.DirEntry[str], os.DirEntry[str] | None]]:
    """Yield every ``*.safetensors`` entry with ``None``, then those of subfolders with the entry of the subfolder."""
    folders = []
    for entry in _entries(root, root, left_out):
        if entry.name.endswith(SUFFIX):
            yield entry, None
        else:
            try:
                if entry.is_dir():
                    folders.append(entry)
            except OSError as error:
                left_out[entry.name] = f"it cannot be read ({error.strerror})"
    for folder in folders:
        for entry in _entries(Path(folder.path), root, left_out):
            if entry.name.endswith(SUFFIX):
                yield entry, folder


def _entries(folder: Path, root: Path, left_out: dict[str, str]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        left_out[str(folder.relative_to(root))] = f"it cannot be read ({error.strerror})"
        return []


def printable(text: object) -> str:
    r"""Return text that is safe to print as one line on a terminal.

    Examples:
        >>> printable("peaks.safetensors"), printable("a\nb\udcff")
        ('peaks.safetensors', "'a\\nb\\udcff'")
    """
    return str(text) if str(text).isprintable() else ascii(str(text))


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
    statistics: ModelStatistics = field(default_factory=ModelStatistics)

    @property
    def state(self) -> str:
        """Return ``ready``, ``loading`` or ``failed``."""
        return "failed" if self.reason is not None else "ready" if self.facts else "loading"

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

    Args:
        root: The folder of the models.
        workers: The worker processes that the models are loaded into.
    """

    def __init__(self, root: Path, workers: Workers) -> None:
        """Start with an empty table."""
        super().__init__(root)
        self._workers = workers
        self._ids = count(1)
        self._locks: dict[str, asyncio.Lock] = {}
        self._seen: dict[tuple[str, int], Stamp] = {}
        #: When models (version ``None``) and single versions were unloaded, in the order of ids.
        self._unloaded: dict[tuple[str, int | None], int] = {}
        self._left_out: dict[str, str] = {}
        self._tasks: set[asyncio.Task[list[Served]]] = set()

    async def load_all(self) -> None:
        """Load every file in the folder."""
        files = await self._scan()
        slots = asyncio.Semaphore(CONCURRENT_LOADS)

        async def load(name: str) -> None:
            async with slots:
                await self._load_files(name, files[name])

        await asyncio.gather(*(load(name) for name in files))

    async def load(self, name: str) -> list[Served]:
        """Load all versions of a model from disk; a version that is loaded replaces the one served so far.

        The load continues if the caller is cancelled.

        Returns:
            The versions that are served.

        Raises:
            ModelNotFound: the folder has no file for this name.
            ModelRefused: a file was refused or a folder cannot be read; the versions served so far stay.
        """
        return await self._load(name, next(self._ids))

    async def _load(self, name: str, asked: int) -> list[Served]:
        """Load a model's versions in a task, except those that were unloaded after the moment ``asked``."""
        task = asyncio.get_running_loop().create_task(self._load_model(name, asked))
        self._tasks.add(task)
        task.add_done_callback(self._end_task)
        return await asyncio.shield(task)

    def _end_task(self, task: asyncio.Task[list[Served]]) -> None:
        """Discard a finished load and mark its error as retrieved, since its caller may be gone."""
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()

    async def _load_model(self, name: str, asked: int) -> list[Served]:
        files = (await self._scan()).get(name)
        if self._is_hidden(name):
            raise ModelRefused("expected a folder that can be read, this one cannot", loaded=[])
        if files is None:
            raise ModelNotFound("expected the name of a model that the folder holds")
        self._unloaded = {key: when for key, when in self._unloaded.items() if key[0] != name or when > asked}
        files = [file for file in files if not self._is_unloaded(name, file.version)]
        loaded = await self._load_files(name, files)
        refused = [served for served in loaded if served.state == "failed"]
        if refused:
            raise ModelRefused(
                f"expected files that can be served, version {refused[0].file.version}: {refused[0].reason}",
                loaded=[_attempt(served) for served in loaded],
            )
        return loaded

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
            self._drop(name, versions)
            logger.info("%s is unloaded", name)
        else:
            self._unloaded[name, version] = next(self._ids)
            self.retire(versions.pop(version))
            logger.info("%s version %d is unloaded", name, version)

    async def follow(self) -> None:
        """Load new and changed files of the folder, and drop versions whose files are gone.

        Models and versions that were unloaded stay unloaded. If the folder cannot be read or is missing, nothing
        changes.
        """
        files = await self._scan()
        stamps = {(file.name, file.version): file.stamp for group in files.values() for file in group}
        differing = dict(stamps.items() ^ self._seen.items()).keys()
        changed = {name for name, version in differing if not self._is_unloaded(name, version)}
        for name in sorted(changed, key=lambda name: (name in self._table, name)):  # new ones first
            try:
                await self._load(name, 0)
            except ModelNotFound:
                self._seen = {key: stamp for key, stamp in self._seen.items() if key[0] != name}
                if name in self._table:
                    self._drop(name, self._table[name])
                    logger.info("%s is gone from the folder", name)
            except ServiceError:
                continue  # logged already, and not tried again until the file changes

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

    def _is_unloaded(self, name: str, version: int, since: int = 0) -> bool:
        """Return whether a version, or its model, was unloaded after the moment ``since``."""
        return max(self._unloaded.get((name, None), 0), self._unloaded.get((name, version), 0)) > since

    def _is_hidden(self, name: str) -> bool:
        """Return whether the folder, or the model's subfolder, could not be read."""
        return "." in self._left_out or name in self._left_out

    def _drop(self, name: str, versions: dict[int, Served]) -> None:
        del self._table[name]
        for served in versions.values():
            self.retire(served)

    async def _scan(self) -> dict[str, list[ModelFile]]:
        """Return the files by model; log each entry that is left out once."""
        found, left_out = await asyncio.get_running_loop().run_in_executor(None, scan, self.root)
        for path in left_out.keys() - self._left_out.keys():
            logger.warning("%s is left out: %s", printable(path), left_out[path])
        self._left_out = left_out
        files: dict[str, list[ModelFile]] = {}
        for file in found:
            files.setdefault(file.name, []).append(file)
        return files

    async def _load_files(self, name: str, files: list[ModelFile]) -> list[Served]:
        """Load a model's files, and drop the versions whose files are gone."""
        began = next(self._ids)
        async with self._locks.setdefault(name, asyncio.Lock()):
            loaded = [await self._load_file(file, began) for file in files]
            versions, kept = self._table.get(name, {}), {file.version for file in files}
            for version in set(versions) - kept:
                self.retire(versions.pop(version))
            self._seen = {key: stamp for key, stamp in self._seen.items() if key[0] != name or key[1] in kept}
            if not versions:
                self._table.pop(name, None)
        return loaded

    def _leave_unloaded(self, new: Served) -> Served:
        """Discard a version that was unloaded during its load, since the later request counts."""
        name, version = new.file.name, new.file.version
        new.reason = new.reason or "expected a model that stays, it was unloaded while it was loaded"
        versions = self._table.get(name, {})
        if versions.get(version) is new:
            del versions[version]
            if not versions:
                del self._table[name]
        self.retire(new)
        return new

    async def _load_file(self, file: ModelFile, began: int) -> Served:
        """Load a file, unless its bytes are those of the version served, or it was unloaded after ``began``."""
        self._seen[file.name, file.version] = file.stamp
        old = self._table.get(file.name, {}).get(file.version)
        new = Served(file, next(self._ids))
        if self._is_unloaded(file.name, file.version, began):
            return self._leave_unloaded(new)
        loop = asyncio.get_running_loop()
        since_s = loop.time()
        try:
            data = await loop.run_in_executor(None, file.read)
            new.digest = await loop.run_in_executor(None, _digest, data)
            if old is not None and old.state == "ready" and old.digest == new.digest:
                old.file = file
                return old
            if old is None:
                self._table.setdefault(file.name, {})[file.version] = new
            facts = await self._workers.load(new.id, data)
            new.facts = {**facts, "sha256": new.digest.hex()}
        except LoadError as error:
            new.reason = str(error)
            logger.error("%s is refused: %s", file.path.relative_to(self.root), error)
            if old is not None and old.state == "ready":
                return new
        if self._is_unloaded(file.name, file.version, began):
            return self._leave_unloaded(new)
        versions = self._table.setdefault(file.name, {})
        replaced = versions.get(file.version)
        versions[file.version] = new
        if replaced is not None and replaced is not new:
            self.retire(replaced)
        if new.reason is None:
            logger.info(
                "%s version %d is served: d=%d, m=%d, %s, loaded in %.2f s",
                *(file.name, file.version, new.d, new.m, new.facts["dtype"], loop.time() - since_s),
            )
        return new


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _attempt(served: Served) -> dict[str, Any]:
    return {"version": str(served.file.version), "state": served.state, "reason": served.reason}
