"""A proxy between a client and the service that delays, drips, resets, truncates, floods, refuses and hangs."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from types import TracebackType

#: Faults and how often each takes place; the rest goes through as it is.
SHARES = {"delay": 0.08, "trickle": 0.04, "reset": 0.04, "reset in reply": 0.04, "truncation": 0.04}
SHARES |= {"storm": 0.01, "nonsense": 0.02, "hang": 0.004, "hints": 0.02, "endless": 0.02, "drip": 0.004}
#: Faults that a few hundred requests need not meet.
RARE = {"storm", "hang", "drip"}
#: Requests refused by one storm.
STORM = 8
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nbusy"
HINTS = b"HTTP/1.1 103 Early Hints\r\nlink: </style.css>\r\n\r\n" * 50
ENDLESS = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNK = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
NONSENSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 13\r\n\r\n<html></html>"


class FaultProxy:
    """A context manager that listens on a free port and injects random faults.

    Args:
        port: Port of the service.
        seed: Seed of the random faults.

    Attributes:
        counts: Number of times that each fault was injected.
    """

    def __init__(self, port: int, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.port = 0
        self._upstream = port
        self._random = random.Random(seed)
        self._storm = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0)

    async def _stop(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        try:
            while True:
                request = await _read_message(reader)
                fault = self._pick()
                self.counts[fault] += 1
                if fault == "storm":
                    writer.write(REFUSAL)
                elif fault == "nonsense":
                    writer.write(NONSENSE)
                elif fault == "hang":
                    await asyncio.sleep(60)
                elif fault == "endless":
                    writer.write(ENDLESS)
                    await _repeat(writer, CHUNK)
                elif fault == "drip":
                    writer.write(b"HTTP/1.1 200 OK\r\nx: ")
                    await _repeat(writer, b"a", pause_s=0.05)
                elif fault == "reset":
                    return _reset(writer)
                else:
                    up_writer.write(request)
                    reply = await _read_message(up_reader)
                    if not await _pass_on(writer, reply, fault, self._random):
                        return
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            up_writer.close()

    def _pick(self) -> str:
        if self._storm:
            self._storm -= 1
            return "storm"
        dice = self._random.random()
        for fault, share in SHARES.items():
            if dice < share:
                self._storm = STORM if fault == "storm" else 0
                return fault
            dice -= share
        return "none"


async def _pass_on(writer: asyncio.StreamWriter, reply: bytes, fault: str, dice: random.Random) -> bool:
    """Send a reply with a fault injected; return whether the connection can still be used."""
    if fault == "hints":
        writer.write(HINTS)
    elif fault == "delay":
        await asyncio.sleep(dice.uniform(0, 0.1))
    elif fault == "trickle":
        for start in range(0, len(reply), len(reply) // 5):
            writer.write(reply[start : start + len(reply) // 5])
            await asyncio.sleep(0.01)
        return True
    elif fault in {"truncation", "reset in reply"}:
        writer.write(reply[: dice.randrange(1, len(reply))])
        await writer.drain()
        if fault == "reset in reply":
            _reset(writer)
        return False
    writer.write(reply)
    return True


async def _repeat(writer: asyncio.StreamWriter, piece: bytes, pause_s: float = 0.0) -> None:
    """Send the same bytes repeatedly until the client closes the connection."""
    while True:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(pause_s)


async def _read_message(reader: asyncio.StreamReader) -> bytes:
    """Read one request or reply, with a body of the length in its head."""
    head = await reader.readuntil(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return head + await reader.readexactly(int(lengths[0].split(b":")[1]) if lengths else 0)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Abort the connection with a TCP reset."""
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
