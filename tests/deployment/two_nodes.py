"""A Ray cluster of two nodes on this machine, each with its own loopback address, started by ``ray start``."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import httpx
import psutil

from tests.live import ROOT, free_ports

#: The second one does not hold Ray's own controller.
FIRST, SECOND, THIRD = "127.0.0.3", "127.0.0.2", "127.0.0.4"
START_S = 150.0
#: Where the kernel takes shares of processor time, by its first interface.
CPU_GROUPS = Path("/sys/fs/cgroup/cpu")
BIN = Path(sys.executable).parent


class TwoNodes:
    """Two nodes, on which ``serve deploy`` has put the shipped application; it takes two of the four CPUs of each.

    Args:
        models: What they serve.
        folder: For logs and Ray's own files; sockets are in it, so its path has to be short.
    """

    def __init__(self, models: Path, folder: Path) -> None:
        gcs, dashboard, client, *agents, self.port = free_ports(6, FIRST)
        # Ports from 10,002 to 19,999 are for Ray's workers; those of the system come from above.
        self._log_path = folder / "log"
        self._log = self._log_path.open("w")
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",  # or a token of the user's is wanted from everybody who asks the dashboard
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # two nodes on loopback addresses
            "RAY_worker_niceness": "0",
            "HESSQUIK_MODELS": str(models),
            "HESSQUIK_PORT": str(self.port),
        }
        #: The address at which programs join the cluster.
        self.address = f"{FIRST}:{gcs}"
        self._nodes: list[psutil.Process] = []
        try:
            self._begin(folder, gcs, dashboard, client, agents)
        except BaseException:
            self.close()
            raise

    def _begin(self, folder: Path, gcs: int, dashboard: int, client: int, agents: list[int]) -> None:
        """Start the nodes and deploy the application."""
        head = ["--head", "--port", gcs, "--dashboard-host", FIRST, "--dashboard-port", dashboard]
        head += ["--ray-client-server-port", client, "--temp-dir", folder / "ray"]
        self._dashboard = f"http://{FIRST}:{dashboard}"
        began = time.monotonic()
        self.first = self._start(FIRST, agents[0], *head)
        self._await(f"{self._dashboard}/api/version", began)
        self.second = self._start(SECOND, agents[1], "--address", f"{FIRST}:{gcs}")
        done = subprocess.run(
            [BIN / "serve", "deploy", ROOT / "deploy" / "ray" / "serve.yaml", "--address", self._dashboard],
            env=self.environment, stdout=self._log, stderr=self._log, check=False,
        )  # fmt: skip
        assert done.returncode == 0, self.log()
        for address in (FIRST, SECOND):
            self._await(f"{self.url(address)}/readyz", began)
        self.started_s = time.monotonic() - began

    def add_third(self) -> None:
        """Start one more node, on which nothing is placed yet."""
        (agent,) = free_ports(1, FIRST)
        self.third = self._start(THIRD, agent, "--address", self.address)

    def url(self, address: str) -> str:
        """Return where a node's server answers."""
        return f"http://{address}:{self.port}"

    def log(self) -> str:
        """Return the end of what Ray said."""
        return self._log_path.read_text()[-4000:]

    def server(self, node: psutil.Process) -> psutil.Process:
        """Return the process of a node's server."""
        return next(one for one in node.children(recursive=True) if "serve" in _arguments(one))

    def _start(self, address: str, agent: int, *arguments: object) -> psutil.Process:
        resources = ["--num-cpus", 4, "--num-gpus", 1, "--dashboard-agent-listen-port", agent]
        command = [BIN / "ray", "start", "--block", "--node-ip-address", address, *resources, *arguments]
        node = psutil.Popen(list(map(str, command)), env=self.environment, stdout=self._log, stderr=self._log)
        self._nodes.append(node)
        return node

    def _await(self, url: str, began: float) -> None:
        while True:
            try:
                if httpx.get(url, timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            assert time.monotonic() - began < START_S, self.log()
            time.sleep(0.2)

    def kill(self, node: psutil.Process) -> None:
        """Kill all processes of a node at once, as a power cut would."""
        if node.is_running():
            for process in [*node.children(recursive=True), node]:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            node.wait()

    def __enter__(self) -> TwoNodes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill the nodes, the first one last."""
        for node in reversed(self._nodes):
            self.kill(node)
        self._log.close()


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


@contextlib.contextmanager
def limited(server: psutil.Process, cores: float) -> Iterator[None]:
    """Give a server and its workers a share of the processor's cores, as a node of that size would.

    Args:
        server: A process, whose children are included.
        cores: Time that they may use together, per second.
    """
    group = CPU_GROUPS / f"hessquik-{server.pid}"
    group.mkdir()
    try:
        (group / "cpu.cfs_period_us").write_text("20000")
        (group / "cpu.cfs_quota_us").write_text(str(int(20_000 * cores)))
        for process in [server, *server.children(recursive=True)]:
            (group / "cgroup.procs").write_text(str(process.pid))
        yield
    finally:
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                (CPU_GROUPS / "cgroup.procs").write_text(pid)
        group.rmdir()
