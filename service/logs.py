"""Logging as text or as JSON, one line per record; control characters in names and headers are escaped."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from datetime import UTC, datetime
from queue import SimpleQueue
from threading import Thread
from time import monotonic, sleep
from typing import Any

import orjson

from .http.messages import Request
from .settings import Settings
from .versions import versions

__all__ = [
    "AccessLog",
    "JSONFormatter",
    "TextFormatter",
    "log_administration",
    "log_start",
    "printable",
    "set_up_logging",
]

logger = logging.getLogger(__name__)
audit = logging.getLogger("service.audit")

#: Attributes of a record that name the request, and the number of lines that were lost before it.
CONTEXT = ("request_id", "traceparent", "lost_lines")
#: Most lines of the access log that wait to be written, and the interval between writes.
MAX_LINES, GATHER_S = 1 << 16, 0.05
#: Most lines of the log that wait; those with a traceback are long.
MAX_RECORDS = 1 << 12
#: Time to write what is left at the end.
CLOSE_S = 1.0
#: The version in the query of an unload.
VERSION = re.compile(rb"(?:^|&)version=([0-9]{1,9})(?:&|$)")
#: Bytes that a pipe takes at once, so that the lines of several processes are not mixed.
WRITE_BYTES = 4096


def printable(text: str) -> str:
    r"""Return text with all characters escaped that are not printable, so that it cannot forge a line.

    Examples:
        >>> printable("a\nb\x1b[31m\udcff\u202e")
        'a\\nb\\x1b[31m\\udcff\\u202e'
    """
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class TextFormatter(logging.Formatter):
    """Format a record as one line of text, followed by its traceback."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Return the line with the request's id and traceparent appended."""
        context = "".join(f" {name}={getattr(record, name)}" for name in CONTEXT if getattr(record, name, ""))
        return printable(super().formatMessage(record) + context)


class JSONFormatter(logging.Formatter):
    """Format a record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's time, level, logger, message, request and, if there is one, its traceback."""
        document: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": printable(record.getMessage()),
            **{name: printable(str(getattr(record, name))) for name in CONTEXT if getattr(record, name, "")},
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return json.dumps(document)  # in ASCII, so that parts of files' names that are no text can be written


def set_up_logging(settings: Settings) -> None:
    """Set up the root logger to write to stderr in the format and at the level of the settings.

    The lines of the start and of the audit are written at any level: what runs, and who changed it.
    """
    handler = LogHandler(Lines(2, MAX_RECORDS))
    if settings.log_format == "json":
        handler.setFormatter(JSONFormatter())
    else:
        handler.setFormatter(TextFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
    for one in (logger, audit):
        one.setLevel(logging.INFO)


def log_start(settings: Settings) -> None:
    """Log the versions and the settings in effect; of API keys, log only their number."""
    shown, found = settings.shown(), versions()
    logger.info(
        "hessquik-service %s, Python %s, torch %s, %s modules", *found.values(), extra={"fields": {"versions": found}}
    )
    text = ", ".join(f"{name}={value}" for name, value in shown.items())
    logger.info("settings: %s", text, extra={"fields": {"settings": shown}})
    if not settings.api_keys:
        level, where = (logging.WARNING, f" in {settings.secrets}") if settings.secrets else (logging.INFO, "")
        logger.log(level, "no API keys%s: every request is answered", where)


def log_administration(request: Request, route: str, model: str, status: int, key: bytes) -> None:
    """Log a request to load or unload a model: what is asked, status, request id and a digest of the API key.

    Of the query only the version is logged: a client may have put its key there by mistake.
    """
    action = route.rpartition("/")[2]
    # So that the same key is recognized and none can be read.
    digest = hashlib.sha256(key).hexdigest()[:8] if key else "none"
    version = VERSION.search(request.head.query)
    number = "" if version is None else version[1].decode()
    fields = {"action": action, "model": model, "version": number, "status": status, "key": digest}
    audit.info(
        "%s %s%s: status %d, key %s", action, model, number and f" version {number}", status, digest,
        extra={"request_id": request.id.decode(), "fields": fields},
    )  # fmt: skip


class Lines:
    """Lines for a descriptor, written by a background thread.

    A slow reader does not block the service: lines that do not fit into the buffer are dropped, and the next line
    gives their number as ``lost_lines``.

    Args:
        descriptor: The file descriptor to write to.
        most: Most lines that wait to be written.
        gather_s: Time to wait for more lines, which are written together.
    """

    def __init__(self, descriptor: int, most: int, gather_s: float = 0.0) -> None:
        """Start the thread."""
        self._descriptor, self._most, self._gather_s = descriptor, most, gather_s
        self._lines: SimpleQueue[bytes | None] = SimpleQueue()
        self._lost = 0
        self._thread = Thread(target=self._run, name="log lines", daemon=True)
        self._thread.start()

    def lost(self) -> int | None:
        """Return the number of lines lost before the next, or ``None`` if there is no room and that is lost, too."""
        if self._lines.qsize() >= self._most:
            self._lost += 1
            return None
        lost, self._lost = self._lost, 0
        return lost

    def put(self, line: bytes) -> None:
        """Have a line written."""
        self._lines.put(line)

    def close(self) -> None:
        """Write the buffered lines within :data:`CLOSE_S`, and end the thread."""
        self._lines.put(None)
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        is_open = True
        while is_open:
            lines = [self._lines.get()]
            sleep(self._gather_s)
            while not self._lines.empty():
                lines.append(self._lines.get())
            is_open = None not in lines
            chunk = b""
            for line in filter(None, lines):
                if len(chunk) + len(line) > WRITE_BYTES:
                    _write(self._descriptor, chunk)
                    chunk = b""
                chunk += line
            _write(self._descriptor, chunk)


class LogHandler(logging.Handler):
    """Formats records as lines.

    Args:
        lines: Writes them.
    """

    def __init__(self, lines: Lines) -> None:
        """Set up the handler."""
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, if there is room for it."""
        try:
            if (lost := self._lines.lost()) is not None:
                record.lost_lines = lost
                self._lines.put(f"{self.format(record)}\n".encode(errors="backslashreplace"))
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """Write the buffered lines; called when the process ends."""
        self._lines.close()
        super().close()


class AccessLog(Lines):
    """An access log with one JSON line per answered request."""

    def __init__(self, descriptor: int = 1) -> None:
        """Start the thread."""
        super().__init__(descriptor, MAX_LINES, GATHER_S)

    def ended(self, request: Request, route: str, status: int) -> None:
        """Write a request's line: time, id, method, route, model, rows, status and milliseconds."""
        if (lost := self.lost()) is None:
            return
        line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": request.id.decode(),
            "method": request.head.method,
            "route": route,
            "model": request.model,
            "rows": request.rows,
            "status": status,
            "milliseconds": round((monotonic() - request.began_s) * 1000, 3),
        }
        if lost:
            line["lost_lines"] = lost
        self.put(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))


def _write(descriptor: int, chunk: bytes) -> None:
    """Write all bytes; ignore errors, such as a closed pipe."""
    try:
        while chunk:
            chunk = chunk[os.write(descriptor, chunk) :]
    except OSError:
        return
