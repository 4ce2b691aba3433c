"""Log lines, as text or as JSON: one line per record, whatever a file's name or a client's header holds."""

from __future__ import annotations

import logging
import re
from typing import Any

import orjson

from service.settings import Settings

__all__ = ["JSONFormatter", "TextFormatter", "set_up_logging"]

#: Of a request, where a record is about one.
CONTEXT = ("request_id", "traceparent")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def printable(text: str) -> str:
    r"""Return text with control characters and undecodable bytes escaped, so that it cannot forge a line.

    Example:
        >>> printable("a\nb\x1b[31m\udcff")
        'a\\nb\\x1b[31m\\udcff'
    """
    escaped = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
    return escaped.encode("utf-8", "backslashreplace").decode()


class TextFormatter(logging.Formatter):
    """A line per record, with its traceback below."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Return the line, and what request it is about."""
        context = "".join(f" {name}={getattr(record, name)}" for name in CONTEXT if getattr(record, name, ""))
        return printable(super().formatMessage(record) + context)


class JSONFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's time, level, source, message, request and, if there is one, its traceback."""
        document: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": printable(record.getMessage()),
            **{name: printable(getattr(record, name)) for name in CONTEXT if getattr(record, name, "")},
        }
        if record.exc_info:
            document["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(document).decode()


def set_up_logging(settings: Settings) -> None:
    """Write log lines to stderr as the settings say."""
    handler = logging.StreamHandler()
    if settings.log_format == "json":
        handler.setFormatter(JSONFormatter())
    else:
        handler.setFormatter(TextFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
