"""A worker process: it owns one device, holds the networks, and answers frames.

Three threads: one computes; one loads models, so that computing goes on meanwhile; one serves the control socket.

From the supervisor, on the control socket:

    attach    {"op", "fds": 1}                     a socket of a front end, which sends the frames below
    load      {"op", "model"} + uint8 "file"       → {"op": "loaded", "model", …facts} or {…, "error"}; a large file
                                                     comes as sealed memory, "fds": 1
    unload    {"op", "model"}                      → nothing
    ping      {"op"}                               → {"op": "pong", "memory_bytes", "busy_s", "stalled_s",
                                                      "busy_total_s", "checked_rows"}; the last counts
                                                      since the last pong

A worker whose self-check fails sends {"op": "disagreed", "model"} and exits.

From a front end; replies carry the "number" of the frame that they answer:

    plan      {"op", "number", "model", "dtype", "quantities", "is_weighted", "k"}
                                                   → {"op": "planned", "row_cost", "row_s"} or {…, "error"}
    evaluate  {"op", "number", "model", "dtype", "quantities", "form", "sizes", "is_alone", "is_small", "buffer"?}
              + "inputs", "weights"?, "directions"?
                                                   → {"op": "done"} and one array per quantity, in the buffer if
                                                     there is one; for a form other than "arrays", "lengths" and
                                                     "text" instead: the text of each request's rows of each
                                                     quantity; or {…, "error"}
    drop      {"op", "buffer"}                     → nothing

Run as ``python -P -m service.run_worker FD DEVICE THREADS SPIN_US LIMIT_S CHECKED_SHARE``; FD is our end of the
control socket.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import queue
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from random import random
from typing import Any

import numpy as np
import torch

from hessquik import HessQuikError, storage
from hessquik.backends import names as backends
from hessquik_client.evaluators import TORCH_DTYPES, Evaluators
from hessquik_client.quantities import DOMAIN_DISTANCE, row_shapes

from . import wire
from .child import SWITCH_S, end_with_parent
from .codecs import json_rows

__all__ = ["main"]

#: Words of torch's error when memory runs out on a CPU; it has no class of its own.
CPU_OUT_OF_MEMORY = "DefaultCPUAllocator"
#: Most bytes of a result that is computed for warm-up.
MAX_WARM_UP_BYTES = 64 << 20
#: Size of the socket buffer for results.
SEND_BUFFER_BYTES = 2 << 20
#: Numbers that are written as JSON in half a millisecond or so.
NUMBERS_BETWEEN = 8192
#: Most operations of a call that is made for warm-up, and of the one that measures a speed if no other is made.
MAX_WARM_UP_OPERATIONS = 1e10
#: Most directions of that one.
MOST_DIRECTIONS = 64
#: Parameters up to which an evaluator is made at once when it is asked for, and not by the loading thread.
QUICK_PARAMETERS = 1 << 20
#: Rows of a batch that a self-check computes again at most.
CHECKED_ROWS = 256
#: Exit status after an error that may have spoiled the device's context, and after a self-check that failed.
SPOILED = 71

#: Functions that arrange a request's rows before they are written as text, by the form of the answer.
_VIEWS: dict[str, Callable[[wire.Array], wire.Array]] = {
    "json": lambda rows: rows,
    "flat": lambda rows: rows.reshape(-1),
    "vectors": lambda rows: rows.reshape(len(rows), -1),
    "transposed": lambda rows: np.ascontiguousarray(rows.swapaxes(-1, -2)),
}


class Late(Exception):
    """A batch exceeded its time limit."""


class Disagreement(Exception):
    """Results differ from those of the same rows computed in another batch."""


class Model(Evaluators):
    """A network on the worker's device.

    Attributes:
        parameters: Number of parameters.
        operation_s: Shortest measured time per operation, in seconds.
    """

    def __init__(self, saved: storage.SavedNetwork, device: torch.device, threads: int) -> None:
        """Create the evaluator in the network's own dtype, and check its derivatives."""
        super().__init__(saved, device, threads)
        self.parameters = sum(parameter.numel() for parameter in saved.network.parameters())
        self.operation_s = 0.0

    def is_prepared(self, head: dict[str, Any], is_weighted: bool) -> bool:
        """Return whether a call needs neither the slow creation of an evaluator nor the proof of a quantity."""
        dtype = TORCH_DTYPES[head["dtype"]]
        if dtype not in self._evaluators:
            return self.parameters <= QUICK_PARAMETERS
        return not self.unproven(dtype, head["quantities"], is_weighted)

    def warm_up(self) -> None:
        """Run a tile of every size once, so that no request is slowed by a first call, and measure the speed."""
        evaluate = self.evaluator(self.dtype)
        common = (("value", "gradient", "laplacian"), ("value", "gradient", "hessian"), *evaluate.compiled)
        for asked in common:
            if self.unproven(self.dtype, asked, False):
                continue
            for rows in evaluate.tile_rows:
                is_whole = "hessian" in asked
                if is_whole and rows * evaluate.d**2 * evaluate.m * self.dtype.itemsize > MAX_WARM_UP_BYTES:
                    continue
                if rows == 1 or rows * evaluate.operations(asked) <= MAX_WARM_UP_OPERATIONS:
                    self._measure(evaluate, rows, asked)
        if not self.operation_s:  # a large network: value and slopes along as many directions as are fast
            each = evaluate.operations(("jvp",), None, (1, 1, evaluate.d))
            self._measure(evaluate, 1, ("jvp",), min(MOST_DIRECTIONS, max(1, int(MAX_WARM_UP_OPERATIONS / each))))

    def _measure(self, evaluate: Any, rows: int, asked: Sequence[str], directions: int = 0) -> None:
        """Evaluate points once, and keep the time per operation if it is the shortest."""
        x = torch.zeros(rows, evaluate.d, dtype=self.dtype)
        v = torch.zeros(rows, directions, evaluate.d, dtype=self.dtype) if directions else None
        began = time.perf_counter()
        evaluate(x, asked, directions=v)
        took_s = (time.perf_counter() - began) / (rows * evaluate.operations(asked, directions=v))
        self.operation_s = min(self.operation_s or took_s, took_s)

    def plan(self, head: dict[str, Any]) -> dict[str, Any]:
        """Return the cost of a row, in operations and in seconds."""
        evaluate, k = self.evaluator(TORCH_DTYPES[head["dtype"]]), head["k"]
        weights = (1, evaluate.m) if head["is_weighted"] else None
        directions = (1, k, evaluate.d) if k else None
        computed = [name for name in head["quantities"] if name != DOMAIN_DISTANCE]
        cost = evaluate.operations(computed, weights, directions) if computed else evaluate.d
        return {"row_cost": cost, "row_s": cost * self.operation_s}

    def facts(self) -> dict[str, Any]:
        """Return the description of the model that front ends need: sizes, dtype, metadata and so on."""
        evaluate = self.evaluator(self.dtype)
        return {
            "d": evaluate.d,
            "m": evaluate.m,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "parameters": self.parameters,
            "members": self.members,
            "architecture": self.saved.architecture,
            "metadata": self.saved.metadata,
        }


class Connection:
    """The socket of a front end, and the shared memory that the front end lends.

    Args:
        sock: The worker's end.
        limit_s: Time after which a front end that reads no results is disconnected.
    """

    def __init__(self, sock: socket.socket, limit_s: float) -> None:
        """Set up the receiver of frames."""
        # Room for results, as far as the system allows it, so that the next batch need not wait until they are read.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", max(1, int(limit_s)), 0))
        self.sock = sock
        self._receiver = wire.Receiver(sock, most_fds=1)
        self._lock = threading.Lock()
        self._buffers: dict[int, mmap.mmap] = {}

    def receive(self) -> list[wire.Frame]:
        """Return the frames that are complete.

        Raises:
            ConnectionError: the front end closed the connection.
            WireError: the bytes received are not a frame.
        """
        try:
            frames = self._receiver.receive(socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        if frames is None:
            raise ConnectionError("the front is gone")
        return frames

    def send(self, head: dict[str, Any], fields: dict[str, Any]) -> None:
        """Send a frame; if the front end is gone or reads nothing, the next :meth:`receive` raises."""
        try:
            with self._lock:
                wire.send(self.sock, head, fields)
        except OSError:
            self.end()

    def end(self) -> None:
        """Shut the connection down, so that the next :meth:`receive` raises."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def buffer(self, number: int, size: int, fds: list[int]) -> mmap.mmap:
        """Return the shared memory with this number; the front end sends its descriptor with the first use.

        Raises:
            WireError: the front end has not sent it.
        """
        for fd in fds:
            self._buffers[number] = mmap.mmap(fd, size)
            os.close(fd)
        if number not in self._buffers:
            raise wire.WireError(f"expected a buffer that was sent, got number {number}")
        return self._buffers[number]

    def drop(self, number: int) -> None:
        """Close the shared memory with this number."""
        self._buffers.pop(number, None)

    def close(self) -> None:
        """Close the socket and all shared memory."""
        self._buffers.clear()
        self._receiver.close()


class Worker:
    """Answers frames on one device.

    Args:
        device: The device.
        threads: Threads to compute with, on a CPU.
        spin_s: Time to poll for the next frame before sleeping, while requests come one by one.
        limit_s: Time limit of a batch.
        checked_share: Share of batches that are computed again and compared.
    """

    def __init__(
        self, device: torch.device, threads: int, spin_s: float, limit_s: float = 10.0, checked_share: float = 0.0
    ) -> None:
        """Start without models and connections."""
        self.device, self.threads, self.spin_s, self.limit_s = device, threads, spin_s, limit_s
        self.models: dict[int, Model] = {}
        self.checked_share, self.checked_rows = checked_share, 0
        self._tell: Callable[[dict[str, Any]], None] = lambda head: None
        self._connections: list[Connection] = []
        self._attached: deque[Connection] = deque()
        self._waiting: deque[tuple[Connection, dict[str, Any], dict[str, Any]]] = deque()
        self._prepared: deque[tuple[Connection, dict[str, Any], dict[str, Any]]] = deque()
        self._loads: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._woken, self._wake = os.pipe()
        self._poll = select.poll()
        self._poll.register(self._woken, select.POLLIN)
        self._is_single = False
        self._is_between = False
        self._is_alone = False
        self._waited_s = 0.0
        self._busy_since_s = 0.0
        self._looked_s = 0.0
        self.busy_total_s = 0.0

    # The computing thread.

    def serve(self) -> None:
        """Compute batches until the process ends."""
        while True:
            while self._waiting:
                self._answer(*self._waiting.popleft())
            self._wait()

    def _answer(self, connection: Connection, head: dict[str, Any], fields: dict[str, Any]) -> None:
        """Execute a frame of a front end; end the connection if the frame is malformed."""
        try:
            self._do(connection, head, fields)
        except wire.WireError:
            connection.end()

    def _wait(self) -> None:
        """Wait for frames.

        Waking up from sleep takes longer than computing a small batch. So while requests come one by one after short
        waits, the sockets are polled for ``spin_s`` before sleeping.
        """
        began = time.perf_counter()
        if self._is_single and self._waited_s < self.spin_s:
            while not self._waiting and time.perf_counter() < began + self.spin_s:
                self._receive()
                os.sched_yield()
        if not self._waiting:
            if any(descriptor == self._woken for descriptor, _ in self._poll.poll()):
                os.read(self._woken, 64)
            self._receive()
        self._waited_s = time.perf_counter() - began

    def _receive(self) -> None:
        """Receive the frames that have arrived, from every front end, without blocking."""
        while self._prepared:
            self._waiting.append(self._prepared.popleft())
        while self._attached:
            connection = self._attached.popleft()
            self._connections.append(connection)
            self._poll.register(connection.sock, select.POLLIN)
        gone = []
        for connection in self._connections:
            try:
                self._waiting += [(connection, *frame) for frame in connection.receive()]
            except (OSError, wire.WireError):
                gone.append(connection)
        for connection in gone:
            self._connections.remove(connection)
            self._poll.unregister(connection.sock)
            connection.close()

    def _between(self) -> None:
        """Between two tiles of a large batch, answer small batches.

        Raises:
            Late: the batch exceeds its time limit.
        """
        self._looked_s = now = time.monotonic()
        if self._is_between:
            return
        if 0 < self._busy_since_s < now - self.limit_s:
            raise Late
        self._receive()
        if self._is_alone:
            return
        self._is_between = True
        try:
            waiting, self._waiting = self._waiting, deque()
            for connection, head, fields in waiting:
                if head.get("is_small") or head["op"] != "evaluate":
                    self._answer(connection, head, fields)
                else:
                    self._waiting.append((connection, head, fields))
        finally:
            self._is_between = False

    def _do(self, connection: Connection, head: dict[str, Any], fields: dict[str, Any]) -> None:
        """Execute a frame of a front end. Errors that a request can cause are sent back; others end the process."""
        match head["op"]:
            case "evaluate":
                model = self.models.get(head["model"])
                if model is not None and not model.is_prepared(head, "weights" in fields):
                    self._loads.put(partial(self._prepare, model, connection, head, fields))
                    return
                if self._is_between:
                    connection.send(*self.evaluate(head, fields, connection))
                    return
                self._is_single, self._is_alone = len(head["sizes"]) == 1, head["is_alone"]
                self._busy_since_s = self._looked_s = time.monotonic()
                reply = self.evaluate(head, fields, connection)
                self.busy_total_s += time.monotonic() - self._busy_since_s
                self._busy_since_s = 0.0
                connection.send(*reply)
            case "plan":
                model = self.models.get(head["model"])
                if model is None or model.is_prepared(head, head["is_weighted"]):
                    self._plan(connection, head)
                else:
                    self._loads.put(partial(self._plan, connection, head))
            case "drop":
                connection.drop(head["buffer"])
            case other:
                raise wire.WireError(f"expected evaluate, plan or drop, got {other!r}")

    def evaluate(
        self, head: dict[str, Any], fields: dict[str, Any], connection: Connection | None = None
    ) -> wire.Frame:
        """Compute a batch and return the reply."""
        buffer = None
        if connection is not None and "buffer" in head:
            number, size, *places = head["buffer"]
            buffer = connection.buffer(number, size, head.get("fds", []))
        reply, results = self._evaluate(head, fields, None if buffer is None else partial(_places, buffer, places))
        if "error" not in reply and any(len(array) != sum(head["sizes"]) for array in results.values()):
            reply, results = {"op": "done", "error": "rows are missing"}, {}
        if "error" not in reply and head["form"] != "arrays":
            reply, results = self._texts(head, results)
        elif buffer is not None:
            reply["shapes"] = [array.shape for array in results.values()]
            results = {}
        return {**reply, "number": head["number"]}, results

    def _evaluate(
        self,
        head: dict[str, Any],
        fields: dict[str, Any],
        places: Callable[[Model, dict[str, Any], dict[str, Any]], dict[str, wire.Array]] | None = None,
    ) -> wire.Frame:
        """Compute a batch, into ``places`` if given; return an error that a request can cause as the reply."""
        if head["model"] not in self.models:
            return {"op": "done", "error": "no such model"}, {}
        model, dtype = self.models[head["model"]], TORCH_DTYPES[head["dtype"]]
        try:
            out = None if places is None else places(model, head, fields)
            results = model.evaluate(fields, dtype, head["quantities"], self._between, out)
            if self.checked_share and random() < self.checked_share:
                with contextlib.suppress(Late):  # no time is left to check: the answer is sent
                    self._check(head, fields, results)
            return {"op": "done"}, results
        except (HessQuikError, MemoryError, RuntimeError, ValueError, Late) as error:
            return {"op": "done", "error": _reason(error)}, {}

    def _check(self, head: dict[str, Any], fields: dict[str, Any], results: dict[str, wire.Array]) -> None:
        """Compute the first rows again, without the others and in reverse order, and compare the bits.

        Raises:
            Disagreement: the results differ.
        """
        order = np.arange(min(len(fields["inputs"]), CHECKED_ROWS))[::-1]
        given = {name: np.ascontiguousarray(array[order]) for name, array in fields.items()}
        again = self.models[head["model"]].evaluate(
            given, TORCH_DTYPES[head["dtype"]], head["quantities"], self._between
        )
        self.checked_rows += len(order)
        if any(results[name][order].tobytes() != array.tobytes() for name, array in again.items()):
            self._tell({"op": "disagreed", "model": head["model"]})
            raise Disagreement

    def _texts(self, head: dict[str, Any], results: dict[str, wire.Array]) -> wire.Frame:
        """Write results as JSON."""
        view = _VIEWS[head["form"]]
        try:
            texts = [
                self._text(view(rows))
                for array in results.values()
                for rows in wire.cut(np.ascontiguousarray(array, np.float64), head["sizes"])
            ]
        except Late as error:
            return {"op": "done", "error": _reason(error)}, {}
        return {"op": "done", "lengths": list(map(len, texts))}, {"text": b"".join(texts)}

    def _text(self, rows: wire.Array) -> bytes:
        """Return the JSON text of some rows, in parts, since writing takes longer than computing."""
        step = max(1, NUMBERS_BETWEEN * len(rows) // rows.size)
        if len(rows) <= step:
            return json_rows(rows)
        texts = []
        for start in range(0, len(rows), step):
            self._between()
            texts.append(json_rows(rows[start : start + step]))
        return b",".join(texts)

    def _prepare(self, model: Model, connection: Connection, head: dict[str, Any], fields: dict[str, Any]) -> None:
        """Prepare a batch in the loading thread and hand it back to the computing one, or answer with the error."""
        try:
            model.prove(TORCH_DTYPES[head["dtype"]], head["quantities"], "weights" in fields)
        except (HessQuikError, MemoryError, RuntimeError, ValueError) as error:
            connection.send({"op": "done", "error": _reason(error), "number": head["number"]}, {})
            return
        self._prepared.append((connection, head, fields))
        os.write(self._wake, b".")

    def _plan(self, connection: Connection, head: dict[str, Any]) -> None:
        try:
            model = self.models[head["model"]]
            found = model.plan(head)
            if found["row_s"] <= self.limit_s:  # else no batch comes
                model.prove(TORCH_DTYPES[head["dtype"]], head["quantities"], head["is_weighted"])
        except Exception as error:
            found = {"error": _reason(error)}
        connection.send({"op": "planned", "number": head["number"], **found}, {})

    # The loading thread.

    def load(self, model: int, file: bytes | int) -> dict[str, Any]:
        """Load a model; return its description, or the reason why it is refused, whatever its file raises.

        Args:
            model: Number of the model.
            file: The bytes of its file, or the descriptor of memory that has them and never changes.
        """
        try:
            if isinstance(file, int):
                saved = storage.parse(mmap.mmap(file, 0, prot=mmap.PROT_READ), f"/proc/self/fd/{file}")
            else:
                saved = storage.parse(file)
            loaded = Model(saved, self.device, self.threads)
            loaded.warm_up()
            facts = loaded.facts()
        except HessQuikError as error:
            return {"error": str(error)}
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if isinstance(error, MemoryError | torch.OutOfMemoryError) or CPU_OUT_OF_MEMORY in str(error):
                return {"error": "expected a network that fits the memory of the device, this one does not"}
            return {"error": f"expected a saved network, got a file that raises {type(error).__name__}"}
        self.models[model] = loaded
        return facts

    def load_for_ever(self) -> None:
        """Run queued loads, one after the other, until the process ends."""
        while True:
            self._loads.get()()

    # The control thread.

    def control(self, sock: socket.socket) -> None:
        """Execute the frames of the supervisor until it closes the connection."""
        receiver, lock = wire.Receiver(sock, most_fds=1), threading.Lock()

        def send(head: dict[str, Any]) -> None:
            with lock:
                wire.send(sock, head, {})

        self._tell = send

        def load(model: int, fields: dict[str, Any], fds: list[int]) -> None:
            facts = self.load(model, fds[0] if fds else bytes(fields.pop("file")))  # the frame is freed before
            for fd in fds:
                os.close(fd)
            send({"op": "loaded", "model": model, **facts})

        send({"op": "ready", "pid": os.getpid(), "torch": torch.__version__, "backend": backends(self.device)[0]})
        while (frames := receiver.receive()) is not None:
            for head, fields in frames:
                match head["op"]:
                    case "attach":
                        self.attach(socket.socket(fileno=head["fds"][0]))
                    case "load":
                        self._loads.put(partial(load, head["model"], fields, head.get("fds", [])))
                    case "unload":
                        self._loads.put(partial(self.models.pop, head["model"], None))
                    case "ping":
                        send(self.pong())
                    case other:
                        raise wire.WireError(f"expected attach, load, unload or ping, got {other!r}")

    def attach(self, sock: socket.socket) -> None:
        """Accept the connection of another front end."""
        self._attached.append(Connection(sock, self.limit_s))
        os.write(self._wake, b".")

    def pong(self) -> dict[str, Any]:
        """Return the state of the computing thread; if it is idle, evaluate one point here to test the device."""
        now, busy_since_s = time.monotonic(), self._busy_since_s
        busy_s, stalled_s = (now - busy_since_s, now - self._looked_s) if busy_since_s else (0.0, 0.0)
        model = next(iter(list(self.models.values())), None)
        if not busy_since_s and model is not None:
            evaluate = model.evaluator(model.dtype)
            evaluate(torch.zeros(1, evaluate.d, dtype=model.dtype))
        checked_rows, self.checked_rows = self.checked_rows, 0
        return {
            "op": "pong",
            "memory_bytes": self._memory_bytes(),
            "busy_s": busy_s,
            "stalled_s": stalled_s,
            "busy_total_s": self.busy_total_s,
            "checked_rows": checked_rows,
        }

    def _memory_bytes(self) -> int:
        """Return the memory in use, in bytes: of the device, or on a CPU of the process."""
        if self.device.type == "cuda":
            return torch.cuda.memory_reserved(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _places(
    buffer: mmap.mmap, offsets: list[int], model: Model, head: dict[str, Any], fields: dict[str, Any]
) -> dict[str, wire.Array]:
    """Return arrays in shared memory for the results of each quantity."""
    evaluate, inputs, directions = (
        model.evaluator(TORCH_DTYPES[head["dtype"]]),
        fields["inputs"],
        fields.get("directions"),
    )
    k = 0 if directions is None else directions.shape[1]
    shapes = row_shapes(tuple(head["quantities"]), evaluate.d, evaluate.m, k, "weights" in fields)
    return {
        name: np.ndarray((len(inputs), *shape), head["dtype"], buffer, place)
        for name, shape, place in zip(head["quantities"], shapes, offsets, strict=True)
    }


def _reason(error: Exception) -> str:
    """Return the reason that is sent to the front end for an error that a request can cause.

    Raises:
        Exception: the error itself, if a request cannot cause it or it may have corrupted the device's context.
    """
    if isinstance(error, Late):
        return "late"
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or CPU_OUT_OF_MEMORY in str(error):
        return "memory"
    if isinstance(error, RuntimeError) and not isinstance(error, HessQuikError):
        raise error
    return type(error).__name__


def _run(device: str, work: Callable[[], None]) -> None:
    """Run the work of a thread, and end the process when it returns or raises."""
    status = 0
    try:
        work()
    except (ConnectionError, KeyboardInterrupt):
        pass
    except torch.AcceleratorError as error:
        sys.stderr.write(f"worker on {device}: {type(error).__name__}, giving up the device's context\n")
        status = SPOILED
    except Disagreement:
        sys.stderr.write(f"worker on {device}: a batch's results differ from those of its rows in other company\n")
        status = SPOILED
    except BaseException:
        status = 1
        sys.excepthook(*sys.exc_info())
    sys.stderr.flush()
    os._exit(status)


def main(arguments: list[str]) -> None:
    """Run a worker until its supervisor closes the connection."""
    gc.freeze()  # what modules define stays: the collector need not look at it again and again
    gc.enable()
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole group; the supervisor decides
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    descriptor, device, threads, spin_us, limit_s, checked_share = arguments
    torch.set_num_threads(int(threads))
    torch.set_float32_matmul_precision("highest")
    sys.setswitchinterval(SWITCH_S)
    torch.zeros(1, device=torch.device(device))
    worker = Worker(torch.device(device), int(threads), int(spin_us) / 1e6, float(limit_s), float(checked_share))
    sock = socket.socket(fileno=int(descriptor))
    for work in (worker.load_for_ever, lambda: worker.control(sock)):
        threading.Thread(target=_run, args=(device, work), daemon=True).start()
    _run(device, worker.serve)
