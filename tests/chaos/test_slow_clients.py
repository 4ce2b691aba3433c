"""Slow clients cannot hold connections for ever, nor delay the answers of others."""

from __future__ import annotations

import asyncio
import json
import time

import psutil
import pytest

from tests.chaos.conftest import Start
from tests.chaos.traffic import Ledger, Question, Traffic, http_post, run
from tests.whole import Note, choose

TIMEOUT_S = choose(1.5, 3.0)
SOCKETS = choose(60, 500)
TRIES = 5
#: Time for the service to note that connections are gone; what it still holds of them then, it has kept.
FREED_WITHIN_S = 10.0
#: What a 99th percentile of a millisecond may be off by; the short form runs beside other tests.
SLACK_S = choose(0.05, 0.005)
#: What each kind of slow client sends at first, and then every now and then.
KINDS = (
    (b"GET /livez HTTP/1.1\r\nX: ", b"a"),
    (http_post("/v1/models/peaks/value", b"")[:-4].replace(b"Length: 0", b"Length: 900") + b"\r\n\r\n", b" "),
    (b"", b"\r\n"),
)


async def slow(port: int, kind: tuple[bytes, bytes]) -> float:
    """Act as a slow client until the server closes the connection; return how long it took."""
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(kind[0])
        while True:
            try:
                if not await asyncio.wait_for(reader.read(1 << 16), 0.5):
                    break
            except TimeoutError:
                writer.write(kind[1])
    except OSError:
        pass
    finally:
        writer.close()
    return time.monotonic() - began


async def stalled(port: int) -> float:
    """Request a large reply and read nothing; return how long it took until the server closed the connection."""
    body = json.dumps({"inputs": [[0.1, 0.2]] * 40_000, "quantities": ["value", "gradient", "hessian"]}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 12)
    writer.write(http_post("/v1/models/peaks/evaluate", body))
    assert (await reader.readexactly(12)).endswith(b"200")
    began = time.monotonic()
    try:
        while time.monotonic() - began < 60:
            writer.write(b"G")  # fails when the other side is gone
            await asyncio.sleep(0.25)
            await writer.drain()
            if writer.is_closing():
                break
    except OSError:
        pass
    finally:
        writer.transport.abort()
    return time.monotonic() - began


def test_slow_clients_are_cut_off_and_others_served(start: Start, asked: list[Question], note: Note) -> None:
    server = start(receive_timeout_s=TIMEOUT_S, send_timeout_s=TIMEOUT_S)
    # The latency of a service on the same machine at the same time that has no slow clients.
    control = start()
    front = psutil.Process(server.process.pid)

    async def good(port: int, seconds: float) -> Ledger:
        end = time.monotonic() + seconds
        return await Traffic(port, asked, is_over=lambda: time.monotonic() > end).run(2, 10**9)

    async def both(seconds: float) -> tuple[Ledger, Ledger]:
        return await asyncio.gather(good(control.port, seconds), good(server.port, seconds))

    async def work() -> tuple[Ledger, Ledger, list[float], int]:
        await both(0.5)
        before = front.num_fds()
        held = [asyncio.create_task(slow(server.port, KINDS[number % 3])) for number in range(SOCKETS)]
        usual, meanwhile = await both(TIMEOUT_S)
        closed = await asyncio.gather(*held)
        end = time.monotonic() + FREED_WITHIN_S
        while front.num_fds() > before and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return usual, meanwhile, closed, front.num_fds() - before

    for _ in range(TRIES):  # a busy machine may hold up one of the services and not the other
        usual, meanwhile, closed, descriptors = run(work())
        assert max(closed) <= TIMEOUT_S + 2
        assert min(closed) >= TIMEOUT_S - 0.5, "the control: they were let be slow for as long as they may"
        assert meanwhile.right == meanwhile.sent
        assert descriptors <= 0
        is_delayed = meanwhile.p(99) > 2 * usual.p(99) + SLACK_S
        if not is_delayed:
            break
    note(
        f"{SOCKETS} slow sockets cut off within {max(closed):.1f} s of {TIMEOUT_S:g} s, others p99 "
        f"{1e3 * meanwhile.p(99):.0f} ms (without {1e3 * usual.p(99):.0f} ms), descriptors {descriptors:+d}"
    )
    assert not is_delayed


@pytest.mark.whole
def test_a_client_that_takes_nothing_is_cut_off(start: Start, note: Note) -> None:
    server = start(receive_timeout_s=30, send_timeout_s=TIMEOUT_S)
    held_s = run(stalled(server.port))
    note(f"a client that takes nothing of its reply is cut off after {held_s:.1f} s of {TIMEOUT_S:g} s")
    assert held_s <= TIMEOUT_S + 2
    assert server.is_ready()
