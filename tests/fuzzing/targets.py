"""Fuzz targets: the readers of untrusted bytes. A target takes any bytes and raises none but the declared errors."""

from __future__ import annotations

import contextlib
import logging
import math
import random
import re
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from hessquik import HessQuikError, from_onnx, storage
from hessquik_client.errors import ServiceError
from service import json_reader as json_reader_module
from service import wire
from tests.simulation.front import Front
from tests.simulation.test_leaks import LIMITS

Target = Callable[[bytes], None]
CORPUS = Path(__file__).parents[1] / "corpus"
JSON, BINARY = b"application/json", b"application/octet-stream"
#: Paths and media types of requests with fuzzed bodies; the first byte of an input selects one.
ROUTES = [
    (b"/v1/models/a/evaluate", JSON),
    (b"/v1/models/a/hvp", JSON),
    (b"/v1/models/a/evaluate", b"application/x-safetensors"),
    (b"/v1/models/a/hessian", b"application/x-safetensors"),
    (b"/v2/models/a/infer", JSON),
    (b"/v2/models/a/infer", BINARY),
    (b"/Evaluate", JSON),
    (b"/Gradient", JSON),
    (b"/ApplyJacobian", JSON),
    (b"/ApplyHessian", JSON),
    (b"/ModelInfo", JSON),
    (b"/tesseract/a/apply", JSON),
    (b"/tesseract/a/jacobian", JSON),
    (b"/tesseract/a/jacobian_vector_product", JSON),
    (b"/tesseract/a/vector_jacobian_product", JSON),
    (b"/tesseract/a/abstract_eval", JSON),
]
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
#: Longest input; longer ones are truncated.
MOST_BYTES = 1 << 16


_patch = pytest.MonkeyPatch()


@cache
def _front() -> Front:
    logging.disable(logging.CRITICAL)
    _patch.setattr("service.front._return_memory", lambda: None)
    return Front(_patch, **LIMITS)


def close_front() -> None:
    """Undo the changes that the simulated front end makes to the modules, which other tests use."""
    _patch.undo()
    _front.cache_clear()


def talk(pieces: list[bytes]) -> list[bytes]:
    """Send pieces over a connection and return the statuses; check that none is 500, and that nothing is held."""
    front = _front()
    client = front.connect()
    for piece in pieces:
        front.send(client, piece)
    for _ in range(70):
        if not front.worker.asked:
            break
        front.answer()
    sent = bytes(client.sent)
    client.close()
    front.settle()
    assert not front.loop.errors, front.loop.errors
    statuses: list[bytes] = _STATUS.findall(sent)
    assert b"500" not in statuses, sent[:1000]
    queue, budget = front.core.scheduler.queue, front.app.front.budget
    assert (queue.requests, queue.rows, queue.payload_bytes, budget.held_bytes) == (0, 0, 0, 0)
    assert not front.state.connections
    return statuses


def connection(data: bytes) -> None:
    """Send bytes to the HTTP parser and the application; the first byte gives the size of the packets."""
    if data:
        size, rest = data[0] * data[0] + 1, data[1:]
        talk([rest[start : start + size] for start in range(0, len(rest), size)])


def dialects(data: bytes) -> None:
    """Send a body to the codecs of all dialects; the first byte selects a route, the second a header's length."""
    if len(data) > 1:
        talk([request(data)])


def request(data: bytes) -> bytes:
    """Return the HTTP request that the bytes of an input describe."""
    path, media_type = ROUTES[data[0] % len(ROUTES)]
    body = data[2:]
    fields = b"inference-header-content-length: %d\r\n" % data[1] if data[1] else b""
    head = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-type: %b\r\n%b" % (path, media_type, fields)
    return head + b"content-length: %d\r\n\r\n%b" % (len(body), body)


def frames(data: bytes) -> None:
    """Read frames between processes; the first byte gives the size of the pieces in which they arrive."""
    reader, rest = wire.FrameReader(), memoryview(data[1:])
    with contextlib.suppress(wire.WireError):
        while rest:
            space = reader.space()
            assert len(space), "there is room for what comes"
            if len(space) > MOST_BYTES:
                return  # the frame is longer than any input
            size = min(len(space), len(rest), data[0] + 1)
            space[:size] = rest[:size]
            rest = rest[size:]
            reader.received(size)
            reader.head()


def json_reader(data: bytes) -> None:
    """Read a JSON body in slices and at once, and compare the results."""
    with contextlib.suppress(ServiceError):
        with patch.multiple(json_reader_module, SHORT_BYTES=64, SLICE_BYTES=64):
            reading = json_reader_module.read_long_json(data, 4000)
            try:
                while True:
                    reading.send(None)
            except StopIteration as end:
                in_slices, _ = end.value
        at_once = json_reader_module.read_json(data)
        assert repr(_plain(in_slices)) == repr(_plain(at_once)), "both readers read the same"


def _plain(value: Any) -> Any:
    """Return a document with lists in place of arrays, and floats in place of integers."""
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**1000 else math.inf
    return value


def model_files(data: bytes) -> None:
    """Parse a saved network."""
    with contextlib.suppress(HessQuikError):
        storage.parse(data)


def onnx_files(data: bytes) -> None:
    """Import an ONNX model."""
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        file.write(data)
        file.flush()
        with contextlib.suppress(HessQuikError):
            from_onnx(file.name, allow_kinks=True)


TARGETS: dict[str, Target] = {
    target.__name__: target for target in (connection, dialects, frames, json_reader, model_files, onnx_files)
}
#: Pieces that a mutation inserts.
WORDS = [
    *(
        b"\r\n",
        b"\r\n\r\n",
        b"0\r\n\r\n",
        b"Content-Length: 5\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Expect: 100-continue\r\n",
    ),
    *(
        b"null",
        b"true",
        b"NaN",
        b"1e999",
        b"-0",
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b'"',
        b"\\",
        b"\\ud800",
        b"\xff",
        b"\0",
    ),
    *(b"inputs", b"quantities", b"hessian", b"9007199254740993", b"18446744073709551616", b"[[]]", b"[[0.5,1]]"),
]


def mutated(seeds: list[bytes], draw: random.Random) -> bytes:
    """Return one of the seeds with random mutations."""
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 2, 4))):
        at, kind = draw.randrange(len(data) + 1), draw.randrange(6)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] = draw.randrange(256)
        elif kind == 1:
            data[at:at] = draw.choice(WORDS)
        elif kind == 2:
            del data[at : at + draw.choice((1, 2, 8, 64))]
        elif kind == 3:
            data[at:at] = data[at : at + draw.choice((1, 8, 64))]
        elif kind == 4:
            other = draw.choice(seeds)
            data[at:] = other[draw.randrange(len(other) + 1) :]
        else:
            data[at : at + 8] = draw.randbytes(8)
    return bytes(data[:MOST_BYTES])


def corpus(name: str) -> list[bytes]:
    """Return the seeds of a target."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
