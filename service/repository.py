"""Files on disk ↔ served models and versions.

``NAME.safetensors`` is version 1 of NAME, ``NAME/VERSION.safetensors`` another. Each file is read whole and handed to
the workers as bytes, so that a later change of the file changes nothing until it is loaded again. Requests name
models; a name is looked up in a table and never becomes part of a path.

:class:`Table` is what is served, as requests see it; :class:`Repository` keeps it up to date with the folder.
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
from service.metrics import ModelStatistics
from service.workers import LoadError, Workers

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
        name: The model's.
        version: From 1.
        path: The file.
        stamp: What changes when the file does.
    """

    name: str
    version: int
    path: Path
    stamp: Stamp = ("", 0, 0, 0)

    @property
    def size_bytes(self) -> int:
        """Return the file's size when it was found."""
        return self.stamp[2]

    def read(self, most_bytes: int = MAX_FILE_BYTES) -> bytes:
        """Return its bytes.

        Args:
            most_bytes: A larger file is refused.

        Raises:
            LoadError: it cannot be read, or is too large.
        """
        try:
            # Opened without waiting: a FIFO may have taken the file's place.
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
        The files, ordered by name and version, one for each; and why what else is there is left out, by its path.
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
    """Yield what is named like a model's file and the folder of its own that it is in, if any; such come last."""
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
    r"""Return a name as one line of text that a terminal can take.

    Example:
        >>> printable("peaks.safetensors"), printable("a\nb\udcff")
        ('peaks.safetensors', "'a\\nb\\udcff'")
    """
    return str(text) if str(text).isprintable() else ascii(str(text))


@dataclass(slots=True, eq=False)
class Served:
    """One version of a model, as the workers hold it.

    Attributes:
        file: Where it came from.
        id: What the workers know it by; each loading gets a new one.
        digest: Of the file's bytes; a file that did not change is not loaded again.
        kinds: Keys of batches, kept by whoever asks.
        facts: What a worker said of it.
        reason: Why it is not served.
        users: Requests that hold it.
        statistics: What it has answered.
    """

    file: ModelFile
    id: int
    digest: bytes = b""
    kinds: dict[Hashable, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    users: int = 0
    is_retired: bool = False
    statistics: ModelStatistics = field(default_factory=ModelStatistics)

    @property
    def state(self) -> str:
        """``ready``, ``loading`` or ``failed``."""
        return "failed" if self.reason is not None else "ready" if self.facts else "loading"

    @property
    def d(self) -> int:
        """Inputs."""
        return int(self.facts["d"])

    @property
    def m(self) -> int:
        """Outputs."""
        return int(self.facts["m"])


class Table:
    """The served models, by name and version.

    Args:
        root: The folder that it comes from.
    """

    def __init__(self, root: Path) -> None:
        """Start with an empty table."""
        self.root = root
        self._table: dict[str, dict[int, Served]] = {}

    def names(self) -> list[str]:
        """Return the names of all models, also of failed ones."""
        return sorted(self._table)

    def versions(self, name: str) -> dict[int, Served]:
        """Return all versions of a model.

        Raises:
            ModelNotFound: there is no such model.
        """
        versions = self._table.get(name)
        if not versions:
            raise ModelNotFound("expected the name of a served model; GET /v1/models lists them")
        return versions

    def default(self, name: str) -> Served:
        """Return the version that is meant when none is named: the highest that is ready, else the highest."""
        versions = self.versions(name).values()
        return max(versions, key=lambda served: (served.state == "ready", served.file.version))

    def get(self, name: str, version: str | None) -> Served:
        """Return a version of a model, ready or not.

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
        """Return a version that can be evaluated.

        Raises:
            ModelNotFound: there is no such model.
            VersionNotFound: it has no such version.
            NotReady: it is being loaded, or failed to load.
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
        """Hold a version for a request while something is awaited."""
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
    """The table, and the folder that it follows.

    Args:
        root: The folder.
        workers: What holds the models.
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
        """Load a model's versions from disk; each replaces the one served so far when it is ready, else not at all.

        A caller that is cancelled leaves the load to go on.

        Returns:
            What is served.

        Raises:
            ModelNotFound: the folder has no file for this name.
            ModelRefused: a file was refused or a folder cannot be read; what is served is served on.
        """
        return await self._load(name, next(self._ids))

    async def _load(self, name: str, asked: int) -> list[Served]:
        """Load a model's versions but those that were unloaded, and that nobody asked for since; see :meth:`load`."""
        task = asyncio.get_running_loop().create_task(self._load_model(name, asked))
        self._tasks.add(task)
        task.add_done_callback(self._end_task)
        return await asyncio.shield(task)

    def _end_task(self, task: asyncio.Task[list[Served]]) -> None:
        """Forget a load that is over; nobody may be left to take its error."""
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
        """Stop serving a model, or one version, until :meth:`load`; requests that hold it are answered.

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
        """Load what is new or changed in the folder and drop what is gone; what was unloaded stays so.

        A folder that cannot be read now, or is gone as a whole, changes nothing.
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
                continue  # said in the log, and not tried again until the file changes

    def refuse(self, model: int, why: str) -> None:
        """Serve a model no more that a worker refused."""
        for versions in self._table.values():
            for served in versions.values():
                if served.id == model:
                    served.reason = why
                    logger.error("%s version %d is served no more: %s", served.file.name, served.file.version, why)

    def free(self, served: Served) -> None:
        """Have the workers forget a version."""
        self._workers.unload(served.id)

    def _is_unloaded(self, name: str, version: int, since: int = 0) -> bool:
        """Return whether a version, or its model, was unloaded after a moment."""
        return max(self._unloaded.get((name, None), 0), self._unloaded.get((name, version), 0)) > since

    def _is_hidden(self, name: str) -> bool:
        """Return whether the folder, or a model's own one, could not be read."""
        return "." in self._left_out or name in self._left_out

    def _drop(self, name: str, versions: dict[int, Served]) -> None:
        del self._table[name]
        for served in versions.values():
            self.retire(served)

    async def _scan(self) -> dict[str, list[ModelFile]]:
        """Return the files by name; say once what is left out."""
        found, left_out = await asyncio.get_running_loop().run_in_executor(None, scan, self.root)
        for path in left_out.keys() - self._left_out.keys():
            logger.warning("%s is left out: %s", printable(path), left_out[path])
        self._left_out = left_out
        files: dict[str, list[ModelFile]] = {}
        for file in found:
            files.setdefault(file.name, []).append(file)
        return files

    async def _load_files(self, name: str, files: list[ModelFile]) -> list[Served]:
        """Load a model's files, and drop the versions that have none any more."""
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
        """Forget what was unloaded while it was loaded: the later word counts."""
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
        """Load a file, unless it holds what is served; what is unloaded after ``began`` is not brought back."""
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
