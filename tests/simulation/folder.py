"""A folder of models in memory, which replaces the module ``os`` in a copy of ``service.repository``."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any


@dataclass
class File:
    """A file, a pipe or a link."""

    data: bytes
    number: int
    mode: int = stat.S_IFREG
    leads_out: bool = False


@dataclass(frozen=True)
class Status:
    """The result of ``stat``."""

    st_mode: int
    st_size: int
    st_mtime_ns: int
    st_ino: int


class Entry:
    """An entry that ``scandir`` yields."""

    def __init__(self, path: str, file: File | None) -> None:
        self.path, self.name, self._file = path, path.rpartition("/")[2], file

    def is_dir(self) -> bool:
        return self._file is None

    def is_symlink(self) -> bool:
        return self._file is not None and self._file.leads_out

    def stat(self) -> Status:
        assert self._file is not None
        return status(self._file)


class Opened(BytesIO):
    """An open file."""

    def __init__(self, file: File) -> None:
        super().__init__(file.data)
        self.file = file

    def fileno(self) -> Any:
        return self


def status(file: File) -> Status:
    return Status(file.mode, len(file.data), file.number, file.number)


class Folder:
    """A folder with its subfolders, each listed in random order.

    Args:
        root: Path of the folder.
        shuffle: Shuffles a list.

    Attributes:
        files: The files by path under the root.
        unreadable: Folders that cannot be listed, and files that cannot be opened; the root is "".
        refused: Contents of the files that could not be opened.
        last_number: Number of the file that was written last.
    """

    O_RDONLY, O_NONBLOCK, O_CLOEXEC = os.O_RDONLY, os.O_NONBLOCK, os.O_CLOEXEC
    sep = "/"

    def __init__(self, root: str, shuffle: Callable[[list[Any]], None]) -> None:
        self.root, self._shuffle = root, shuffle
        self.files: dict[str, File] = {}
        self.unreadable: set[str] = set()
        self.refused: set[bytes] = set()
        self.path = self
        self.last_number = 0

    def put(self, path: str, data: bytes, **kind: Any) -> None:
        """Write or replace a file."""
        self.last_number += 1
        self.files[path] = File(data, self.last_number, **kind)

    def touch(self, path: str) -> None:
        """Change the modification time of a file."""
        self.put(path, self.files[path].data)

    # The module's functions.

    def realpath(self, path: Any) -> str:
        file = self.files.get(self._relative(path))
        return "/elsewhere" if file is not None and file.leads_out else str(path)

    @contextmanager
    def scandir(self, folder: Any) -> Iterator[list[Entry]]:
        relative = self._relative(folder)
        if relative in self.unreadable:
            raise OSError(errno.EIO, "Input/output error")
        prefix = f"{relative}/" if relative else ""
        names = sorted({path[len(prefix) :].partition("/")[0] for path in self.files if path.startswith(prefix)})
        self._shuffle(names)
        yield [Entry(f"{folder}/{name}", self.files.get(prefix + name)) for name in names]

    def open(self, path: Any, flags: int) -> Opened:
        relative = self._relative(path)
        if relative in self.unreadable:
            self.refused |= {file.data for path, file in self.files.items() if path == relative}
            raise OSError(errno.EIO, "Input/output error")
        if relative not in self.files:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return Opened(self.files[relative])

    def fstat(self, opened: Opened) -> Status:
        return status(opened.file)

    def _relative(self, path: Any) -> str:
        return str(path)[len(self.root) :].strip("/")
