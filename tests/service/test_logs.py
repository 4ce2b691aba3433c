"""Log lines: one per record, with the request and the trace that they are about."""

from __future__ import annotations

import json
import logging

import pytest

from service.logs import JSONFormatter, TextFormatter

HOSTILE = ["a\n2026-01-01 INFO forged", "a\r\x1b[2Kb", "caf\udce9", "a\u2028b"]


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("service", logging.ERROR, "", 0, "%s is left out", (message,), None)
    made.__dict__ |= extra
    return made


@pytest.mark.parametrize("name", HOSTILE)
def test_a_record_is_one_printable_line(name: str) -> None:
    text = TextFormatter("%(levelname)s %(message)s").format(record(name))
    assert len(text.splitlines()) == 1
    assert text.isprintable()
    assert len(JSONFormatter().format(record(name)).splitlines()) == 1
    assert json.loads(JSONFormatter().format(record(name)))["level"] == "error"


@pytest.mark.parametrize("name", HOSTILE)
def test_tracebacks_and_fields_are_written_whatever_text_is_in_them(name: str) -> None:
    made = record("x", fields={"settings": {"models": name}})
    try:
        raise OSError(name)
    except OSError as error:
        made.exc_info = type(error), error, error.__traceback__
    line = JSONFormatter().format(made)
    line.encode()
    assert len(line.splitlines()) == 1
    document = json.loads(line)
    assert document["traceback"].endswith(f"OSError: {name}")
    assert document["settings"] == {"models": name}


def test_a_record_says_what_request_and_trace_it_is_about() -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    made = record("x", request_id="run-7", traceparent=trace)
    document = json.loads(JSONFormatter().format(made))
    assert (document["request_id"], document["traceparent"]) == ("run-7", trace)
    assert TextFormatter("%(message)s").format(made) == f"x is left out request_id=run-7 traceparent={trace}"
    assert "request_id" not in json.loads(JSONFormatter().format(record("x")))
