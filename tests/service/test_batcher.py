"""The batcher alone: no clock, no tensors, no workers."""

from __future__ import annotations

import pytest

from service.batcher import Batch, Batcher, Entry
from service.errors import Overloaded


def make(max_requests: int = 100, max_rows: int = 1000, max_bytes: int = 10_000, batch_cost: float = 10) -> Batcher:
    return Batcher(max_requests, max_rows, max_bytes, batch_cost, batch_bytes=1 << 20)


def entry(rows: int, key: str = "a", row_cost: float = 1.0, payload_bytes: int = 1) -> Entry:
    return Entry(key, rows, row_cost, row_bytes=1, payload_bytes=payload_bytes)


def cut(batch: Batch | None) -> list[tuple[Entry, int, int]]:
    assert batch is not None
    return [tuple(part) for part in batch.slices]


def test_requests_that_wait_share_a_batch() -> None:
    batcher, entries = make(), [entry(1) for _ in range(4)]
    for one in entries:
        batcher.put(one)
    assert cut(batcher.take()) == [(one, 0, 1) for one in entries]
    assert batcher.take() is None


def test_a_batch_is_cut_at_its_cost_and_a_bulk_request_goes_on_later() -> None:
    batcher, bulk = make(), entry(25)
    batcher.put(bulk)
    assert [cut(batcher.take()) for _ in range(3)] == [[(bulk, 0, 10)], [(bulk, 10, 20)], [(bulk, 20, 25)]]
    assert batcher.take() is None


def test_a_row_that_costs_more_than_a_batch_still_runs() -> None:
    batcher, heavy = make(), entry(2, row_cost=1000)
    batcher.put(heavy)
    assert cut(batcher.take()) == [(heavy, 0, 1)]


def test_different_keys_do_not_share_a_batch() -> None:
    batcher, first, second = make(), entry(1, "a"), entry(1, "b")
    batcher.put(first)
    batcher.put(second)
    assert [cut(batcher.take()), cut(batcher.take())] == [[(first, 0, 1)], [(second, 0, 1)]]


def test_a_small_request_overtakes_a_bulk_one_that_was_served() -> None:
    batcher, bulk, small = make(), entry(100, "bulk"), entry(1, "small")
    batcher.put(bulk)
    batcher.take()
    batcher.put(small)
    assert cut(batcher.take()) == [(small, 0, 1)]


def test_a_bulk_request_moves_on_although_small_ones_keep_coming() -> None:
    batcher, bulk = make(), entry(100, "bulk")
    batcher.put(bulk)
    rounds = 0
    while bulk.taken < bulk.rows:
        rounds += 1
        batcher.put(entry(1, "small"))
        batch = batcher.take()
        assert batch is not None
        for part in batch.slices:
            if part.entry is not bulk:
                batcher.close(part.entry)
    # Of every two units of cost that are served it gets about one: 10 batches of 10, and about 100 of 1.
    assert 50 < rounds < 200


@pytest.mark.parametrize(
    ("limits", "load"),
    [
        ({"max_requests": 3}, {"rows": 1}),
        ({"max_rows": 6}, {"rows": 2}),
        ({"max_bytes": 30}, {"rows": 1, "payload_bytes": 10}),
    ],
    ids=["requests", "rows", "bytes"],
)
def test_exactly_what_is_over_a_limit_is_refused(limits: dict[str, int], load: dict[str, int]) -> None:
    batcher = make(**limits)
    entries = [entry(**load) for _ in range(3)]
    for one in entries:
        batcher.put(one)
    with pytest.raises(Overloaded, match="try again later"):
        batcher.put(entry(**load))
    batcher.close(entries[0])
    batcher.put(entry(**load))


def test_room_is_known_before_a_request_is_read() -> None:
    batcher, entries = make(max_requests=2), [entry(1), entry(1)]
    for one in entries:
        batcher.expect_room()
        batcher.put(one)
    with pytest.raises(Overloaded):
        batcher.expect_room()
    batcher.close(entries[0])
    batcher.expect_room()


def test_what_was_closed_is_not_computed() -> None:
    batcher, gone, stays = make(), entry(5), entry(5)
    batcher.put(gone)
    batcher.put(stays)
    batcher.close(gone)
    batcher.close(gone)
    assert (batcher.requests, batcher.rows, batcher.payload_bytes) == (1, 5, 1)
    assert cut(batcher.take()) == [(stays, 0, 5)]


def test_a_batch_given_back_goes_next_without_what_was_closed() -> None:
    batcher, first, second, third = make(), entry(1), entry(1), entry(1)
    for one in (first, second):
        batcher.put(one)
    batch = batcher.take()
    assert batch is not None
    batcher.put(third)
    batcher.close(first)
    batcher.put_again(batch)
    assert cut(batcher.take()) == [(second, 0, 1)]
    assert cut(batcher.take()) == [(third, 0, 1)]


def test_counts_are_zero_when_all_is_done() -> None:
    batcher, entries = make(), [entry(rows) for rows in (1, 30, 7)]
    for one in entries:
        batcher.put(one)
    while batcher.take() is not None:
        pass
    for one in entries:
        batcher.close(one)
    assert (batcher.requests, batcher.rows, batcher.payload_bytes) == (0, 0, 0)


def test_small_entries_are_taken_alone_and_larger_ones_are_left() -> None:
    batcher, small, smaller, bulk = make(), entry(2), entry(1), entry(25)
    batcher.put(small)
    batcher.put(smaller)
    assert cut(batcher.take_small(4.0)) == [(small, 0, 2), (smaller, 0, 1)]
    assert batcher.take_small(4.0) is None
    batcher.put(bulk)
    assert batcher.take_small(4.0) is None
    assert cut(batcher.take()) == [(bulk, 0, 10)]


def test_what_failed_is_never_taken_as_something_small() -> None:
    batcher, one = make(), entry(1)
    batcher.put(one)
    failed = batcher.take()
    assert failed is not None
    batcher.put_again(Batch(failed.key, failed.slices, 1))
    batcher.put(entry(1))
    assert batcher.take_small(4.0) is None
    assert cut(batcher.take()) == [(one, 0, 1)]


def test_what_a_batch_costs() -> None:
    batcher = make()
    batcher.put(entry(2, row_cost=1.5))
    batcher.put(entry(1, row_cost=2.0))
    batch = batcher.take()
    assert batch is not None
    assert batch.cost == 5.0
