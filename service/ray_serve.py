"""Deployment on Ray Serve, which places, scales and supervises one ``hessquik serve`` per node, on that node's port.

    serve deploy deploy/ray/serve.yaml          (on a Ray cluster; docs/deployment.md)

Requests do not pass through Ray: clients, or a load balancer, connect to the ports of the nodes. For a small request,
Ray's proxy would take many times as long as the evaluation.
"""

from __future__ import annotations

import asyncio
import math
import os
import re
import signal
import subprocess
import sys
import time
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingContext

from .healthcheck import get
from .settings import PREFIX, Settings

__all__ = ["Node", "build", "desired_nodes"]

#: Time between looks while a server starts, and for the answer to one look.
LOOK_S, ANSWER_S = 0.2, 5.0
#: Requests in progress on a node above which another node is wanted: batching makes many at once cheap.
TARGET_REQUESTS = 64
#: The command ``hessquik``, which drains when the replica is gone, however that came about (PR_SET_PDEATHSIG).
_RUN = f"import ctypes; ctypes.CDLL(None).prctl(1, 15); from {__package__}.__main__ import main; main()"


@serve.deployment(name="hessquik")
class Node:
    """A Ray Serve replica that runs ``hessquik serve`` on its node as a child process.

    Args:
        settings: Settings by the names of :class:`~service.settings.Settings`; others come from the node's
            environment.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        """Start the server and wait until it is ready.

        Raises:
            RuntimeError: the server exited; the reason is in the replica's log.
        """
        given = {"host": ray.util.get_node_ip_address(), **settings}  # type: ignore[no-untyped-call]
        environment = os.environ | {f"{PREFIX}{name.upper()}": str(value) for name, value in given.items()}
        known = Settings(**given)
        self._address, self._drain_s = (known.host, known.port), known.drain_s
        keys = [key.get_secret_value() for key in known.api_keys[:1]]
        self._headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
        command = [sys.executable, "-P", "-c", _RUN, "serve", str(known.models)]
        self._server = subprocess.Popen(command, env=environment)
        while get(self._address, "/readyz", self._headers, ANSWER_S) is None:
            self._expect_running()
            time.sleep(LOOK_S)

    async def check_health(self) -> None:
        """Check that the server is alive; one that is busy or loads models passes.

        Raises:
            RuntimeError: the server exited, or its event loop does not answer.
        """
        self._expect_running()
        if await self._ask("/livez") is None:
            raise RuntimeError("expected an answer to GET /livez, got none")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the number of requests in progress on this node, for :func:`desired_nodes`."""
        text = await self._ask("/metrics")
        found = re.search(r"^hessquik_queue_requests (\S+)$", text or "", re.MULTILINE)
        return {"requests": 0.0 if found is None else float(found[1])}

    async def __del__(self) -> None:
        """Make the server drain and exit."""
        self._server.send_signal(signal.SIGTERM)
        await asyncio.to_thread(self._server.wait, self._drain_s + ANSWER_S)

    def _expect_running(self) -> None:
        status = self._server.poll()
        if status is not None:
            raise RuntimeError(f"hessquik serve ended with status {status}; this replica's log says why")

    async def _ask(self, path: str) -> str | None:
        """Return the body that the server answers on a path with status 200, or ``None``."""
        return await asyncio.to_thread(get, self._address, path, self._headers, ANSWER_S)


def desired_nodes(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Return the number of nodes for the requests in progress; Ray clips it to the limits of the configuration.

    Args:
        context: Ray's autoscaling state, with the results of :meth:`Node.record_autoscaling_stats`.
    """
    requests = sum((context.aggregated_metrics or {}).get("requests", {}).values())
    return max(1, math.ceil(requests / TARGET_REQUESTS)), {}


def build(args: dict[str, Any]) -> serve.Application:
    """Build the application that the configuration file imports.

    Args:
        args: Settings by their names, from ``args`` in the configuration file.
    """
    return Node.bind(args)  # type: ignore[attr-defined,no-any-return]
