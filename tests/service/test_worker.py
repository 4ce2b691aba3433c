"""The parts of a worker process, run in this process: threads and sockets, but no process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hessquik
from hessquik import HessQuikError, proof, storage
from hessquik.activations import softplusActivation
from hessquik.errors import DerivativeError
from hessquik.networks import resnetNN
from hessquik_client import evaluators
from service import shared, wire
from service import worker as worker_module
from tests.live import ROOT

PEAKS = (ROOT / "models" / "peaks.safetensors").read_bytes()
HEAD = {"op": "evaluate", "model": 1, "dtype": "float64", "quantities": ["hessian"], "is_alone": False}


def make(threads: int = 1, limit_s: float = 10.0, checked_share: float = 0.0) -> worker_module.Worker:
    device = torch.device("cpu")
    return worker_module.Worker(device, threads, spin_s=0.0, limit_s=limit_s, checked_share=checked_share)


def loaded(**options: Any) -> worker_module.Worker:
    worker = make(**options)
    facts = worker.load(1, PEAKS)
    assert facts["d"] == 2
    return worker


#: What the test that runs has opened.
OPEN: list[Callable[[], object]] = []


@pytest.fixture(autouse=True)
def close_everything() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop()()
    time.sleep(0.05)  # the worker's threads close their ends


class Front:
    """The other side of a worker's connection: sends frames and receives replies."""

    def __init__(self, worker: worker_module.Worker) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(30)
        self._receiver, self._frames = wire.Receiver(self.sock), []
        self._sender = ThreadPoolExecutor(1)
        OPEN.append(self.close)
        worker.attach(theirs)

    def send(self, head: dict[str, Any], fields: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        data = b"".join(map(bytes, wire.encode({**head, "fds": len(fds)} if fds else head, fields)))
        if fds:
            socket.send_fds(self.sock, [data[:1]], list(fds))
            data = data[1:]
        self._sender.submit(self._send, data)

    def _send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self.sock.sendall(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self._sender.shutdown()
        self.sock.close()

    def receive(self, count: int = 1) -> list[wire.Frame]:
        while len(self._frames) < count:
            frames = self._receiver.receive()
            assert frames is not None, "the worker closed the connection"
            self._frames += frames
        found, self._frames = self._frames[:count], self._frames[count:]
        return found


@contextlib.contextmanager
def serving(worker: worker_module.Worker) -> Iterator[worker_module.Worker]:
    """Run a worker's threads until the end of the test; they are daemons."""
    for work in (worker.serve, worker.load_for_ever):
        threading.Thread(target=work, daemon=True).start()
    yield worker


# Evaluation.


def test_a_worker_computes_with_the_threads_it_is_given() -> None:
    """And gives the same bits with all of them."""
    points = np.random.default_rng(0).uniform(-1, 1, (20_000, 2))
    found = []
    for threads in (1, 3):
        worker = loaded(threads=threads)
        _, fields = worker.evaluate(
            {**HEAD, "form": "arrays", "number": 1, "sizes": [len(points)]}, {"inputs": points}
        )
        found.append(fields["hessian"])
        started = [thread for thread in threading.enumerate() if thread.name.startswith("evaluator")]
        assert bool(started) == (threads > 1)
    assert np.array_equal(*found)


@pytest.mark.parametrize("form", ["arrays", "json"])
def test_small_batches_are_answered_between_the_tiles_of_a_large_one(form: str) -> None:
    """Also those of another front, which does not know; and all have the bits that they have alone."""
    points = np.random.default_rng(0).uniform(-1, 1, (30_000, 2))
    host = ({**HEAD, "form": form, "number": 1, "sizes": [20_000, 10_000], "is_small": False}, {"inputs": points})
    guests = [
        ({**HEAD, "form": form, "number": number, "sizes": [1], "is_small": True}, {"inputs": points[number, None]})
        for number in (2, 3)
    ]
    worker = loaded()
    front, other = Front(worker), Front(worker)
    front.send(*host)
    front.send(*guests[0])
    other.send(*guests[1])
    with serving(worker):
        frames = front.receive(2)
        (theirs,) = other.receive()
    assert [head["number"] for head, _ in frames] == [2, 1]
    alone = loaded()
    for (head, fields), asked in zip([frames[1], frames[0], theirs], (host, *guests), strict=True):
        expected = alone.evaluate(*asked)
        assert head == expected[0]
        assert {name: bytes(field) for name, field in fields.items()} == {
            name: bytes(field) for name, field in expected[1].items()
        }


def test_a_large_batch_of_another_front_waits_and_what_failed_before_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both have arrived while the first is computed, and the order is that in which the worker begins to reply."""
    points = np.random.default_rng(0).uniform(-1, 1, (20_000, 2))
    large = {**HEAD, "form": "arrays", "sizes": [len(points)], "is_small": False}
    small = {**HEAD, "form": "arrays", "sizes": [1], "is_small": True}
    worker = loaded()
    front, other = Front(worker), Front(worker)
    order: list[int] = []
    between, send = worker._between, worker_module.Connection.send

    def between_with_both_waiting() -> None:
        while worker._is_alone and len(worker._waiting) < 2:
            worker._receive()
        between()

    def send_and_note(connection: worker_module.Connection, head: dict[str, Any], fields: dict[str, Any]) -> None:
        order.append(head["number"])
        send(connection, head, fields)

    monkeypatch.setattr(worker, "_between", between_with_both_waiting)
    monkeypatch.setattr(worker_module.Connection, "send", send_and_note)
    with serving(worker):
        front.send({**large, "number": 1, "is_alone": True}, {"inputs": points})
        while not worker._busy_since_s:
            time.sleep(0.001)
        other.send({**large, "number": 3}, {"inputs": points})
        other.send({**small, "number": 2}, {"inputs": points[:1]})
        front.receive()
        other.receive(2)
    assert order == [1, 2, 3]


def test_a_batch_that_takes_too_long_is_stopped_between_tiles_and_costs_no_worker() -> None:
    worker = loaded(limit_s=0.01)
    front, points = Front(worker), np.zeros((2_000_000, 2))
    head = {**HEAD, "form": "arrays", "sizes": [len(points)], "is_small": False}
    with serving(worker):
        front.send({**head, "number": 1}, {"inputs": points})
        assert front.receive()[0][0]["error"] == "late"
        front.send({**head, "number": 2, "sizes": [1]}, {"inputs": points[:1]})
        assert "error" not in front.receive()[0][0]


@pytest.mark.parametrize(
    ("change", "error"),
    [({"model": 2}, "no such model"), ({"quantities": ["hvp"]}, "ShapeError"), ({"sizes": [3]}, "rows are missing")],
)
def test_what_cannot_be_computed_is_an_error_and_not_a_death(change: dict[str, Any], error: str) -> None:
    head = {**HEAD, "form": "arrays", "number": 7, "sizes": [2], **change}
    reply, fields = loaded().evaluate(head, {"inputs": np.zeros((2, 2))})
    assert (reply, fields) == ({"op": "done", "number": 7, "error": error}, {})


@pytest.mark.parametrize("n", [1, 7, 700])
def test_a_self_check_finds_equal_bits_whatever_is_asked(n: int) -> None:
    worker = loaded(checked_share=1.0)
    generator = np.random.default_rng(n)
    fields = {
        "inputs": generator.normal(size=(n, 2)),
        "weights": generator.normal(size=(n, 1)),
        "directions": generator.normal(size=(n, 3, 2)),
    }
    head = {**HEAD, "form": "arrays", "sizes": [n], "number": 0, "quantities": ["hessian", "hvp", "domain_distance"]}
    for dtype in ("float64", "float32"):
        given = {name: array.astype(dtype) for name, array in fields.items()}
        reply, results = worker.evaluate({**head, "dtype": dtype}, given)
        assert reply["op"] == "done"
        assert "error" not in reply
        assert results["hessian"].shape == (n, 2, 2, 1)
    assert worker.pong()["checked_rows"] == 2 * min(n, worker_module.CHECKED_ROWS)
    assert worker.pong()["checked_rows"] == 0


def test_a_self_check_that_takes_too_long_costs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = loaded(checked_share=1.0)
    evaluate, calls = worker_module.Model.evaluate, count()

    def late_at_last(*given: Any) -> dict[str, Any]:
        if next(calls):
            raise worker_module.Late
        return evaluate(*given)

    monkeypatch.setattr(worker_module.Model, "evaluate", late_at_last)
    head = {**HEAD, "form": "arrays", "sizes": [5], "number": 0}
    reply, results = worker.evaluate(head, {"inputs": np.ones((5, 2))})
    assert "error" not in reply
    assert results["hessian"].shape == (5, 2, 2, 1)


def test_a_self_check_tells_of_one_bit_and_gives_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    worker, told = loaded(checked_share=1.0), []
    worker._tell = told.append
    evaluate, calls = worker_module.Model.evaluate, count()

    def wrong_at_first(*given: Any) -> dict[str, Any]:
        results = evaluate(*given)
        if next(calls) == 0:
            results["hessian"][3, 0, 0] = np.nextafter(results["hessian"][3, 0, 0], np.inf)
        return results

    monkeypatch.setattr(worker_module.Model, "evaluate", wrong_at_first)
    head = {**HEAD, "form": "arrays", "sizes": [5], "number": 0}
    with pytest.raises(worker_module.Disagreement):
        worker.evaluate(head, {"inputs": np.ones((5, 2))})
    assert told == [{"op": "disagreed", "model": 1}]


def test_numbers_alone_are_the_rows_without_brackets() -> None:
    points = np.random.default_rng(0).uniform(-1, 1, (3000, 2))
    points[7] = np.inf
    texts = {}
    for form in ("json", "flat"):
        head = {**HEAD, "form": form, "number": 1, "sizes": [1000, 2000]}
        reply, fields = loaded().evaluate(head, {"inputs": points})
        first, text = reply["lengths"][0], bytes(fields["text"])
        assert sum(reply["lengths"]) == len(text)
        texts[form] = json.loads(b"[" + text[:first] + b"," + text[first:] + b"]")
    assert None in texts["flat"]
    assert texts["flat"] == [number for row in texts["json"] for column in row for rows in column for number in rows]


def test_out_of_memory_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = loaded()

    def out_of_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(worker.models[1], "evaluator", lambda _: out_of_memory)
    reply, _ = worker.evaluate({**HEAD, "form": "arrays", "number": 1, "sizes": [1]}, {"inputs": np.zeros((1, 2))})
    assert reply["error"] == "memory"


# Shared memory.


def test_results_go_where_the_front_wants_them() -> None:
    worker, points = loaded(), np.random.default_rng(1).uniform(-1, 1, (5000, 2))
    front = Front(worker)
    shapes = [(5000, 1), (5000, 2, 2, 1)]
    places, size = shared.offsets(shapes, 8)
    buffer = shared.Buffer(3, size)
    head = {**HEAD, "quantities": ["value", "hessian"], "form": "arrays", "sizes": [5000], "is_small": False}
    head["buffer"] = [3, buffer.size, *places]
    with serving(worker):
        for number, fds in ((1, (buffer.fd,)), (2, ())):
            front.send({**head, "number": number}, {"inputs": points}, fds)
            ((reply, fields),) = front.receive()
            assert (reply["number"], reply["shapes"], fields) == (number, [list(shape) for shape in shapes], {})
            found = buffer.arrays(shapes, "float64")
            _, expected = loaded().evaluate({**head, "number": 1}, {"inputs": points})
            assert np.array_equal(found[0], expected["value"])
            assert np.array_equal(found[1], expected["hessian"])
        front.send({"op": "drop", "buffer": 3}, {})
        front.send({**head, "number": 4, "buffer": [3, buffer.size, *places]}, {"inputs": points})
        with pytest.raises(AssertionError, match="closed"):  # a buffer that it does not have is a breach
            front.receive()


# Costs.


def test_a_plan_tells_what_a_row_costs_before_it_is_computed() -> None:
    worker = loaded()
    front, evaluate = Front(worker), worker.models[1].evaluator(torch.float64)
    head = {"op": "plan", "model": 1, "dtype": "float64", "quantities": ["hvp"], "is_weighted": True, "k": 5}
    with serving(worker):
        front.send({**head, "number": 1}, {})
        front.send({**head, "number": 2, "model": 9}, {})
        (first, _), (second, _) = front.receive(2)
    assert first["row_cost"] == evaluate.plan(["hvp"], (1, 1), (1, 5, 2)).operations
    assert 0 < first["row_s"] < 1e-3
    assert second["error"] == "KeyError"


# Loading.


@pytest.mark.parametrize(
    "error", [OverflowError, TypeError, RecursionError, MemoryError, KeyError, HessQuikError, UnicodeDecodeError]
)
def test_whatever_a_file_raises_is_a_refusal(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_it(data: bytes) -> None:
        raise error("ascii", b"", 0, 1, "?") if error is UnicodeDecodeError else error("made up")

    worker = loaded()
    monkeypatch.setattr(storage, "parse", raise_it)
    facts = worker.load(2, b"")
    assert set(facts) == {"error"}
    assert 2 not in worker.models
    assert 1 in worker.models


def test_memory_that_cannot_be_mapped_is_a_refusal() -> None:
    worker = loaded()
    read_end, write_end = os.pipe()
    try:
        assert set(worker.load(2, read_end)) == {"error"}
    finally:
        os.close(read_end)
        os.close(write_end)
    assert 2 not in worker.models


@pytest.mark.parametrize("field", ["h", "beta", "threshold"])
def test_an_integer_of_400_digits_is_refused(field: str, tmp_path: Path) -> None:
    hessquik.save(resnetNN(2, 2, act=softplusActivation()), tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    texts = header["__metadata__"]
    del texts["sha256"]
    texts["network"] = re.sub(rf'"{field}": [0-9.]+', f'"{field}": 1{"0" * 400}', texts["network"])
    assert "0" * 400 in texts["network"]
    text = json.dumps(header).encode()
    facts = make().load(1, len(text).to_bytes(8, "little") + text + data[8 + size :])
    assert facts["error"]


def test_batches_are_answered_while_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control thread hears everything; the loading thread is held up; the computing thread goes on."""
    worker, ours_and_theirs = loaded(), socket.socketpair()
    control, theirs = ours_and_theirs
    OPEN.extend([control.close, theirs.close])
    control.settimeout(30)
    going_on = threading.Event()
    load = worker.load

    def slow(model: int, data: bytes) -> dict[str, Any]:
        going_on.wait(30)
        return load(model, data)

    monkeypatch.setattr(worker, "load", slow)
    threading.Thread(target=worker.control, args=(theirs,), daemon=True).start()
    receiver, front = wire.Receiver(control), Front(worker)

    def next_head() -> dict[str, Any]:
        frames: list[wire.Frame] = []
        while not frames:
            frames = receiver.receive() or []
        return frames[0][0]

    with serving(worker):
        assert next_head()["op"] == "ready"
        wire.send(control, {"op": "load", "model": 2}, {"file": PEAKS})
        head = {**HEAD, "form": "arrays", "sizes": [1], "is_small": True}
        for number in range(20):
            front.send({**head, "number": number}, {"inputs": np.zeros((1, 2))})
            assert front.receive()[0][0]["number"] == number
            wire.send(control, {"op": "ping"}, {})
            assert next_head()["op"] == "pong"
        going_on.set()
        assert next_head()["op"] == "loaded"
        front.send({**head, "number": 99, "model": 2}, {"inputs": np.zeros((1, 2))})
        assert "error" not in front.receive()[0][0]
        wire.send(control, {"op": "unload", "model": 2}, {})
        for _ in range(500):
            if 2 not in worker.models:
                break
            time.sleep(0.01)
        assert list(worker.models) == [1]


@pytest.fixture
def unproven(monkeypatch: pytest.MonkeyPatch) -> worker_module.Worker:
    """Return a worker whose model's Laplacian takes more operations than are spent on it at load."""
    monkeypatch.setattr(proof, "QUICK_OPERATIONS", 1.0)
    worker = loaded()
    monkeypatch.setattr(proof, "QUICK_OPERATIONS", 1e10)
    assert ("laplacian", False) in worker.models[1]._unproven[torch.float64]
    return worker


LAPLACIAN = {**HEAD, "quantities": ["laplacian"], "form": "arrays", "sizes": [1], "is_small": True}
PLAN = {"op": "plan", "model": 1, "dtype": "float64", "quantities": ["laplacian"], "is_weighted": False, "k": 0}


def test_a_quantity_is_proven_before_it_is_first_used(
    unproven: worker_module.Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loading thread does it, and the computing thread answers others meanwhile."""
    going_on, by, prove = threading.Event(), [], evaluators.prove_quickly

    def slow(*arguments: Any, **keywords: Any) -> Any:
        by.append(threading.current_thread().name)
        going_on.wait(30)
        return prove(*arguments, **keywords)

    with serving(unproven):
        front = Front(unproven)
        value = {**LAPLACIAN, "quantities": ["value"]}
        front.send({**value, "number": 0}, {"inputs": np.zeros((1, 2))})
        assert "error" not in front.receive()[0][0]
        monkeypatch.setattr(evaluators, "prove_quickly", slow)
        front.send({**LAPLACIAN, "number": 1}, {"inputs": np.zeros((1, 2))})
        for number in range(2, 12):
            front.send({**value, "number": number}, {"inputs": np.zeros((1, 2))})
            assert front.receive()[0][0]["number"] == number
        assert unproven.pong()["busy_s"] == 0.0
        going_on.set()
        (head, results) = front.receive()[0]
        assert head["number"] == 1
        assert results["laplacian"].shape == (1, 1)
        front.send({**LAPLACIAN, "number": 12}, {"inputs": np.zeros((1, 2))})
        assert "error" not in front.receive()[0][0]
    assert len(by) == 1
    assert "load_for_ever" in by[0]


def test_a_plan_proves_what_it_is_for_unless_a_row_takes_too_long(unproven: worker_module.Worker) -> None:
    model, front = unproven.models[1], Front(unproven)
    with serving(unproven):
        unproven.limit_s = 0.0
        front.send({**PLAN, "number": 1}, {})
        assert front.receive()[0][0]["row_s"] > 0.0
        assert model.unproven(torch.float64, ["laplacian"], False)
        unproven.limit_s = 10.0
        front.send({**PLAN, "number": 2}, {})
        assert front.receive()[0][0]["row_s"] > 0.0
    assert not model.unproven(torch.float64, ["laplacian"], False)


def test_a_quantity_that_is_wrong_is_refused_whenever_it_is_asked_for(
    unproven: worker_module.Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def wrong(*arguments: Any, **keywords: Any) -> None:
        tried.append(keywords["asked"])
        raise DerivativeError("made up")

    front = Front(unproven)
    with serving(unproven):
        unproven.models[1].prove(torch.float64, ["value"], False)
        monkeypatch.setattr(evaluators, "prove_quickly", wrong)
        for number in range(3):
            front.send({**LAPLACIAN, "number": number}, {"inputs": np.zeros((1, 2))})
            assert front.receive()[0][0]["error"] == "DerivativeError"
        front.send({**PLAN, "number": 3}, {})
        assert front.receive()[0][0]["error"] == "DerivativeError"
        front.send({**LAPLACIAN, "quantities": ["value"], "number": 4}, {"inputs": np.zeros((1, 2))})
        assert "error" not in front.receive()[0][0]
    assert tried == [[("laplacian", False)]]


def test_the_speed_of_a_large_network_is_measured_without_its_hessian(
    unproven: worker_module.Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = unproven.models[1], []
    assert model.operation_s > 0
    model.operation_s = 0.0
    evaluate = model.evaluator(torch.float64)
    monkeypatch.setattr(
        type(evaluate), "__call__", lambda self, x, quantities, **keywords: asked.append((len(x), tuple(quantities)))
    )
    model.warm_up()
    assert asked == [(1, ("jvp",))]


def test_a_pong_says_for_how_long_the_batch_has_run() -> None:
    worker = loaded()
    assert worker.pong()["busy_s"] == 0.0
    began_s = time.monotonic()
    worker._busy_since_s, worker._looked_s = began_s - 5, began_s - 1
    pong = worker.pong()
    assert 5 <= pong["busy_s"] <= 5 + time.monotonic() - began_s
    assert 1 <= pong["stalled_s"] <= 1 + time.monotonic() - began_s


def test_a_pong_says_how_long_all_batches_took() -> None:
    worker = loaded()
    front, points = Front(worker), np.zeros((10_000, 2))
    head, totals_s = {**HEAD, "form": "arrays", "sizes": [len(points)], "is_small": False}, [0.0]
    with serving(worker):
        for number in range(2):
            began_s = time.monotonic()
            front.send({**head, "number": number}, {"inputs": points})
            front.receive()
            totals_s.append(worker.pong()["busy_total_s"])
            assert 0.0 < totals_s[-1] - totals_s[-2] <= time.monotonic() - began_s
        assert worker.pong()["busy_total_s"] == totals_s[-1]


# A front that goes.


def test_a_front_that_goes_takes_nothing_with_it() -> None:
    worker = loaded()
    first, second = Front(worker), Front(worker)
    head = {**HEAD, "form": "arrays", "sizes": [1], "is_small": True, "number": 1}
    with serving(worker):
        first.send(head, {"inputs": np.zeros((1, 2))})
        first.close()
        for _ in range(3):
            second.send(head, {"inputs": np.zeros((1, 2))})
            assert second.receive()[0][0]["number"] == 1
        third = Front(worker)
        third.send(head, {"inputs": np.zeros((1, 2))})
        assert third.receive()[0][0]["number"] == 1
    assert len(worker._connections) == 2


def test_a_front_that_takes_no_results_is_given_up() -> None:
    worker = loaded(limit_s=1.0)
    stuck, other = Front(worker), Front(worker)
    points = np.zeros((200_000, 2))
    head = {**HEAD, "form": "arrays", "number": 1, "is_small": False, "sizes": [len(points)]}
    with serving(worker):
        stuck.send(head, {"inputs": points})
        time.sleep(0.1)
        other.send({**head, "sizes": [1]}, {"inputs": points[:1]})
        assert other.receive()[0][0]["number"] == 1
