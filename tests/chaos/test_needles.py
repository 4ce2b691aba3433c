"""A row's answer has the same bits alone and together with any other rows, over HTTP."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from tests.chaos.conftest import Start
from tests.chaos.traffic import Connection, http_post, run
from tests.live import LiveServer
from tests.whole import Note, choose

QUANTITIES = ["value", "gradient", "hessian", "laplacian"]
#: Numbers of rows of a request, and kinds of the other rows.
SIZES = (2, 7, 8, 9, 33)
KINDS = ("others", "zeros", "large", "denormal", "copies")


def company(needle: np.ndarray, size: int, kind: str, random_: np.random.Generator) -> tuple[np.ndarray, int]:
    """Return rows with the needle among them, and its index."""
    rows = {
        "others": random_.uniform(0.5, 1.5, (size, len(needle))) * needle,
        "zeros": np.zeros((size, len(needle))),
        "large": np.full((size, len(needle)), 1e30),
        "denormal": np.full((size, len(needle)), 5e-324),
        "copies": np.tile(needle, (size, 1)),
    }[kind]
    place = int(random_.integers(size))
    rows[place] = needle
    return rows, place


async def differing(port: int, count: int, companies: int, seed: int) -> tuple[int, int]:
    """Return the number of answers compared and the number of bytes that differ."""
    random_ = np.random.default_rng(seed)
    connections = [await Connection.open(port) for _ in range(4)]

    async def ask(connection: Connection, rows: np.ndarray) -> dict[str, np.ndarray]:
        body = json.dumps({"inputs": rows.tolist(), "quantities": QUANTITIES}).encode()
        status, _, reply = await connection.ask(http_post("/v1/models/peaks/evaluate", body), 60)
        assert status == 200, reply
        document = json.loads(reply)
        return {name: np.array(document[name], dtype=np.float64) for name in QUANTITIES}

    compared, bytes_ = 0, 0
    for _ in range(count):
        needle = random_.uniform(-3, 3, 2)
        alone = await ask(connections[0], needle[None])
        places = [company(needle, SIZES[number % 5], KINDS[number // 5 % 5], random_) for number in range(companies)]
        for start in range(0, companies, 4):  # four at once, so that requests share batches too
            some = places[start : start + 4]
            found = await asyncio.gather(
                *(ask(connection, rows) for connection, (rows, _) in zip(connections, some, strict=False))
            )
            for answer, (_, place) in zip(found, some, strict=True):
                for name in QUANTITIES:
                    one, other = alone[name][0].tobytes(), answer[name][place].tobytes()
                    bytes_ += sum(a != b for a, b in zip(one, other, strict=True))
                    compared += 1
    for connection in connections:
        connection.abort()
    return compared, bytes_


def test_company_changes_no_bit(busy: LiveServer, note: Note) -> None:
    needles, companies = choose((8, 25), (500, 25))
    compared, bytes_ = run(differing(busy.port, needles, companies, seed=10))
    note(f"{needles} needles in {companies} companies: {compared} answers compared, {bytes_} bytes differ")
    assert compared == needles * companies * len(QUANTITIES)
    assert bytes_ == 0


@pytest.mark.whole
def test_bits_that_depend_on_company_are_caught(start: Start, note: Note) -> None:
    """Control: workers that compute rows as they come, without fixed tiles, are found."""
    server = start("untiled")
    compared, bytes_ = run(differing(server.port, 5, 25, seed=11))
    note(f"control: {compared} answers compared, {bytes_} bytes differ")
    assert bytes_ > 0


@pytest.mark.parametrize("model", ["borehole", "ising_ring"])
def test_bulk_and_single_points_agree_bit_for_bit(busy: LiveServer, shipped_models: Path, model: str) -> None:
    """Requests of a thousand rows are split into batches and tiles, and their results joined again."""
    from tests.chaos.traffic import questions

    bulk = [
        question
        for question in questions(shipped_models, 4, seed=12, rows=(1000,))
        if b"/models/%b/" % model.encode() in question.request
    ]

    async def work() -> list[bool]:
        connection = await Connection.open(busy.port)
        answered = [(await connection.ask(question.request, 60))[2] == question.answer for question in bulk]
        connection.abort()
        return answered

    assert run(work()) == [True] * 4
