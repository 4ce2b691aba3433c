"""Files on disk ↔ served models and versions.

A folder is looked at when told to; each file is read whole and handed to the workers as bytes, so that a later change
of the file changes nothing. Requests name models; a name is looked up in a table and never becomes part of a path.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from service.errors import ModelNotFound, NotReady, VersionNotFound
from service.pool import LoadError, Pool
from service.statistics import ModelStatistics

__all__ = ["ModelFile", "Repository", "Served", "find_files"]

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
VERSION = re.compile(r"[1-9][0-9]{0,8}")
SUFFIX = ".safetensors"
MAX_FILE_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file that holds one version of a model.

    Attributes:
        name: The model's.
        version: From 1.
        path: The file.
    """

    name: str
    version: int
    path: Path

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            LoadError: it cannot be read, or is too large.
        """
        try:
            size = self.path.stat().st_size
            if size > MAX_FILE_BYTES:
                raise LoadError(f"expected a file of at most {MAX_FILE_BYTES} bytes, got {size}")
            return self.path.read_bytes()
        except OSError as error:
            raise LoadError(f"expected a file that can be read ({error.strerror})") from None

    def stamp(self) -> tuple[int, int]:
        """What changes when the file does: its time and size."""
        try:
            status = self.path.stat()
        except OSError:
            return (0, 0)
        return status.st_mtime_ns, status.st_size


def find_files(root: Path) -> Iterator[ModelFile]:
    """The models' files in a folder: ``NAME.safetensors`` and ``NAME/VERSION.safetensors``, inside it really."""
    real_root = root.resolve()
    for path in sorted(root.glob(f"*{SUFFIX}")) + sorted(root.glob(f"*/*{SUFFIX}")):
        name, version = (path.stem, "1") if path.parent == root else (path.parent.name, path.stem)
        if not NAME.fullmatch(name) or not VERSION.fullmatch(version):
            logger.warning("%s is left out: its name is not that of a model and a version", path.relative_to(root))
        elif not path.resolve().is_relative_to(real_root):
            logger.warning("%s is left out: it leads out of the folder", path.relative_to(root))
        elif path.is_file():
            yield ModelFile(name, int(version), path)


@dataclass(slots=True, eq=False)
class Served:
    """One version of a model, as the workers hold it.

    Attributes:
        file: Where it came from.
        id: What the workers know it by; each loading gets a new one.
        stamp: The file's when it was read.
        digest: Of its bytes; a file that did not change is not loaded again.
        kinds: Of the questions that were asked, for whoever asks them.
        facts: What a worker said of it.
        reason: Why it is not served.
        users: Requests that hold it.
        statistics: What it has answered.
    """

    file: ModelFile
    id: int
    stamp: tuple[int, int] = (0, 0)
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


class Repository:
    """The table of what is served.

    Args:
        root: The folder.
        pool: The workers.
    """

    def __init__(self, root: Path, pool: Pool) -> None:
        """Start with an empty table."""
        self.root = root
        self._pool = pool
        self._ids = count(1)
        self._table: dict[str, dict[int, Served]] = {}
        self._lock = asyncio.Lock()

    def names(self) -> list[str]:
        """Names of all models, also of failed ones."""
        return sorted(self._table)

    def versions(self, name: str) -> dict[int, Served]:
        """All versions of a model.

        Raises:
            ModelNotFound: there is no such model.
        """
        versions = self._table.get(name)
        if not versions:
            raise ModelNotFound("expected the name of a served model; GET /v1/models lists them")
        return versions

    def default(self, name: str) -> Served:
        """The version that is meant when none is named: the highest that is ready, else the highest."""
        versions = self.versions(name).values()
        return max(versions, key=lambda served: (served.state == "ready", served.file.version))

    def get(self, name: str, version: str | None) -> Served:
        """A version of a model, ready or not.

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
        """A version that can be evaluated.

        Raises:
            ModelNotFound: there is no such model.
            VersionNotFound: it has no such version.
            NotReady: it is being loaded, or failed to load.
        """
        served = self.get(name, version)
        if served.state != "ready":
            raise NotReady(f"expected a model that is ready, this one is {served.state}")
        return served

    async def load_all(self) -> None:
        """Load every file in the folder that is new or was changed, and drop what is gone."""
        files = list(find_files(self.root))
        found = {file.name for file in files}
        await asyncio.gather(*(self.load(name) for name in sorted(found)))
        for name in set(self._table) - found:
            self.unload(name)

    async def load(self, name: str) -> list[Served]:
        """Load a model's versions from disk; each replaces the one served so far when it is ready, else not at all.

        Returns:
            What was loaded or refused.

        Raises:
            ModelNotFound: the folder has no file for this name.
        """
        files = [file for file in find_files(self.root) if file.name == name]
        if not files:
            raise ModelNotFound("expected the name of a model that the folder holds")
        async with self._lock:
            loaded = [await self._load(file) for file in files]
            gone = set(self._table.get(name, {})) - {file.version for file in files}
            for version in gone:
                self._retire(self._table[name].pop(version))
        return loaded

    def unload(self, name: str) -> None:
        """Stop serving a model; requests that hold it are answered.

        Raises:
            ModelNotFound: there is no such model.
        """
        for served in self.versions(name).values():
            self._retire(served)
        del self._table[name]

    def changed(self) -> set[str]:
        """Names of models whose files are new, changed or gone."""
        on_disk = {(file.name, file.version): file.stamp() for file in find_files(self.root)}
        in_table = {
            (name, version): served.stamp
            for name, versions in self._table.items()
            for version, served in versions.items()
        }
        return {name for name, _ in dict(on_disk.items() ^ in_table.items())}

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
        """Undo one :meth:`hold`; the last one out frees a retired version's memory."""
        served.users -= 1
        if served.is_retired and served.users == 0:
            self._pool.unload(served.id)

    async def _load(self, file: ModelFile) -> Served:
        versions = self._table.setdefault(file.name, {})
        old = versions.get(file.version)
        new = Served(file, next(self._ids), file.stamp())
        try:
            data = file.read()
            new.digest = hashlib.sha256(data).digest()
            if old is not None and old.state == "ready" and old.digest == new.digest:
                old.stamp = new.stamp
                return old
            if old is None:
                versions[file.version] = new
            new.facts = await self._pool.load(new.id, data)
        except LoadError as error:
            new.reason = str(error)
            logger.error("%s is refused: %s", file.path.relative_to(self.root), error)
            if old is not None and old.state == "ready":
                return new
        versions[file.version] = new
        if old is not None:
            self._retire(old)
        return new

    def _retire(self, served: Served) -> None:
        served.is_retired = True
        if served.users == 0:
            self._pool.unload(served.id)
