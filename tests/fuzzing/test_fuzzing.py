"""Fuzzing with the stored corpora and random mutations; ``make fuzz`` searches further, guided by coverage."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzzing.targets import CORPUS, MOST_BYTES, TARGETS, close_front, corpus, mutated, request, talk
from tests.whole import Note, choose

#: Mutations for each target; reading ONNX takes longest.
COUNTS = {"onnx_files": (60, 2000), "model_files": (200, 20_000)}


@pytest.fixture(scope="module", autouse=True)
def unpatched() -> Iterator[None]:
    """Restore the modules of the service after the last test."""
    yield
    close_front()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Switch off the log lines of the front about malformed input."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.filterwarnings("ignore")  # of readers of other formats, about what they are given
def test_nothing_but_what_is_declared_is_raised(name: str, note: Note) -> None:
    seeds, draw = corpus(name), random.Random(name)
    for data in seeds:
        TARGETS[name](data)
    count = choose(*COUNTS.get(name, (400, 50_000)))
    for number in range(count):
        data = mutated(seeds, draw)
        try:
            TARGETS[name](data)
        except Exception as error:
            error.add_note(f"mutation {number}: {data[:2000]!r}")
            raise
    note(f"{len(seeds)} seeds and {count} mutations")


@pytest.mark.parametrize("path", sorted((CORPUS / "dialects").glob("[!x]*")), ids=lambda path: path.name)
def test_the_seeds_of_dialects_are_answered(path: Path) -> None:
    """Seeds are valid requests, since mutations of invalid ones would be refused early."""
    assert talk([request(path.read_bytes())]) == [b"200"]


def test_corpora_are_small() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)
    sizes = [path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()]
    assert sum(sizes) < 200_000
    assert max(sizes) < MOST_BYTES
