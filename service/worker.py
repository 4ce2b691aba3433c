"""What runs inside a worker process: it owns one device, holds the networks, and answers one frame at a time.

    load      {"op", "model"} + uint8 "file"       → {"op": "loaded", "model", …facts} or {…, "error"}
    unload    {"op", "model"}                      → nothing
    evaluate  {"op", "model", "dtype", "quantities", "form", "sizes"} + "inputs", "weights"?, "directions"?
                                                   → {"op": "done", "row_cost"} + one array per quantity; if the
                                                     form is "json", "lengths" + "text": for each quantity that of
                                                     each request's rows, whose "sizes" are given; or {…, "error"}
    ping      {"op"}                               → {"op": "done", "memory_bytes"}, after an evaluation

Run as ``python -m service.worker FD DEVICE THREADS SPIN_US``; FD is our end of a socket pair with the front.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
from typing import Any

import numpy as np
import torch

from hessquik import Evaluator, HessQuikError, storage
from hessquik.proof import prove_quickly
from service import wire
from service.codecs import json_rows

__all__ = ["main"]

_DTYPES = {"float32": torch.float32, "float64": torch.float64}
#: How torch says that memory ran out on a CPU, in an error of no class of its own.
CPU_OUT_OF_MEMORY = "DefaultCPUAllocator"
#: Largest result that is computed only to warm up.
MAX_WARM_UP_BYTES = 64 << 20
#: Room for an answer on its way to the front.
SEND_BUFFER_BYTES = 2 << 20
#: Exit status after an error that may have spoiled the device's context.
SPOILED = 71


class Model:
    """A network on the worker's device, with an evaluator for each dtype that was asked for."""

    def __init__(self, saved: storage.SavedNetwork, device: torch.device, threads: int) -> None:
        """Prove the network's derivatives and keep it."""
        bounds = (saved.metadata.get("lower_bounds"), saved.metadata.get("upper_bounds"))
        prove_quickly(saved.network, *bounds)
        self.saved = saved
        self.device = device
        self.threads = threads
        self.dtype = next(saved.network.parameters()).dtype
        self._evaluators: dict[torch.dtype, Evaluator] = {}

    def evaluator(self, dtype: torch.dtype) -> Evaluator:
        """The evaluator in a dtype, made when it is first asked for."""
        if dtype not in self._evaluators:
            self._evaluators[dtype] = Evaluator(self.saved.network, self.device, dtype, self.threads)
        return self._evaluators[dtype]

    def warm_up(self) -> None:
        """Run every tile once, so that no request pays for a first call; not what would fill the memory."""
        evaluate = self.evaluator(self.dtype)
        for rows in evaluate.ladder:
            x = torch.zeros(rows, evaluate.d, dtype=self.dtype)
            evaluate(x, ("value", "gradient", "laplacian"))
            if rows * evaluate.d**2 * evaluate.m * self.dtype.itemsize <= MAX_WARM_UP_BYTES:
                evaluate(x, ("value", "gradient", "hessian"))

    def facts(self) -> dict[str, Any]:
        """What the front needs to know of the model."""
        evaluate, network = self.evaluator(self.dtype), self.saved.network
        return {
            "d": evaluate.d,
            "m": evaluate.m,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "tile_rows": evaluate.ladder[-1],
            "architecture": self.saved.architecture,
            "metadata": self.saved.metadata,
        }


class Worker:
    """Answers frames on one device.

    Args:
        device: The device.
        threads: Threads to compute with, on a CPU.
        spin_s: Time to look for the next frame before sleeping, while requests come one by one.
    """

    def __init__(self, device: torch.device, threads: int, spin_s: float) -> None:
        """Hold no model yet."""
        self.device = device
        self.threads = threads
        self.spin_s = spin_s
        self._is_alone = False
        self.models: dict[int, Model] = {}

    def answer(self, head: dict[str, Any], fields: dict[str, Any]) -> wire.Frame | None:
        """Do what a frame asks and return the frame to send back, if any.

        Errors that say something about the request come back as ``{"error"}``; any other ends the process.
        """
        match head["op"]:
            case "load":
                try:
                    model = Model(storage.parse(bytes(fields["file"])), self.device, self.threads)
                    model.warm_up()
                except HessQuikError as error:
                    return {"op": "loaded", "model": head["model"], "error": str(error)}, {}
                self.models[head["model"]] = model
                return {"op": "loaded", "model": head["model"], **model.facts()}, {}
            case "unload":
                self.models.pop(head["model"], None)
                return None
            case "evaluate":
                self._is_alone = len(head["sizes"]) == 1
                return _written(head, *self._evaluate(head, fields))
            case "ping":
                self._prove_alive()
                return {"op": "done", "memory_bytes": self._memory_bytes()}, {}
            case other:
                raise wire.WireError(f"expected load, unload, evaluate or ping, got {other!r}")

    def _prove_alive(self) -> None:
        """Compute something real: the first network's value at one point."""
        for model in self.models.values():
            evaluate = model.evaluator(model.dtype)
            evaluate(torch.zeros(1, evaluate.d, dtype=model.dtype))
            return

    def _memory_bytes(self) -> int:
        """What the networks and their work take: memory of the device, or of the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.memory_reserved(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _evaluate(self, head: dict[str, Any], fields: dict[str, Any]) -> wire.Frame:
        if head["model"] not in self.models:
            return {"op": "done", "error": "no such model"}, {}
        evaluate = self.models[head["model"]].evaluator(_DTYPES[head["dtype"]])
        given = {name: torch.from_numpy(array) for name, array in fields.items()}
        try:
            found = evaluate(given["inputs"], head["quantities"], given.get("weights"), given.get("directions"))
            answers = {name: getattr(found, name).cpu().numpy() for name in head["quantities"]}
        except (HessQuikError, torch.OutOfMemoryError, MemoryError, ValueError) as error:
            return {"op": "done", "error": type(error).__name__}, {}
        except RuntimeError as error:
            if CPU_OUT_OF_MEMORY not in str(error):
                raise
            return {"op": "done", "error": "OutOfMemoryError"}, {}
        plan = evaluate.plan(head["quantities"], given.get("weights"), given.get("directions"))
        return {"op": "done", "row_cost": plan.operations}, answers

    def serve(self, sock: socket.socket) -> None:
        """Answer frames until the front closes its end."""
        for frame in wire.receive(sock, lambda: self.spin_s if self._is_alone else 0.0):
            reply = self.answer(*frame)
            if reply is not None:
                wire.send(sock, *reply)


def _written(head: dict[str, Any], reply: dict[str, Any], answers: dict[str, wire.Array]) -> wire.Frame:
    """An answer in the form that is wanted."""
    if "error" in reply or head["form"] != "json":
        return reply, answers
    if any(len(array) != sum(head["sizes"]) for array in answers.values()):
        return {"op": "done", "error": "rows are missing"}, {}
    texts = [
        text
        for array in answers.values()
        for text in map(json_rows, wire.cut(np.ascontiguousarray(array, np.float64), head["sizes"]))
    ]
    return {**reply, "lengths": list(map(len, texts))}, {"text": b"".join(texts)}


def main(arguments: list[str]) -> int:
    """Run a worker until its front is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the front decides
    descriptor, device, threads, spin_us = int(arguments[0]), torch.device(arguments[1]), *map(int, arguments[2:])
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    with socket.socket(fileno=descriptor) as sock:
        # Room for an answer, as far as the system allows it, so that the next batch need not wait until this is read.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        torch.zeros(1, device=device)
        wire.send(sock, {"op": "ready", "pid": os.getpid(), "torch": torch.__version__}, {})
        try:
            Worker(device, threads, spin_us / 1e6).serve(sock)
        except (ConnectionError, KeyboardInterrupt):
            return 0
        except torch.AcceleratorError as error:
            sys.stderr.write(f"worker on {device}: {type(error).__name__}, giving up the device's context\n")
            return SPOILED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
