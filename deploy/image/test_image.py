"""The built image at work: confined by runc as Docker would confine it, asked over HTTP, stopped by its own signal.

Run by ``make image-test`` after ``deploy/image/build``; it needs root.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import yaml

import hessquik

ROOT = Path(__file__).parents[2]
IMAGE = "localhost/hessquik:cpu"
STORE = ["--storage-driver", "vfs", "--root", f"{ROOT}/build/containers", "--runroot", f"{ROOT}/build/containers-run"]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["hessquik"]
MODELS = sorted((ROOT / "models").glob("*.safetensors"))
QUANTITIES = ["value", "gradient", "hessian", "laplacian", "hessian_diagonal", "jvp", "hvp", "curvature"]
START_S = 60.0
#: The same mathematics in float64 by two ways; what is left is rounding.
TOLERANCE = 1e-10
UNITS = {"m": 2**20, "g": 2**30}


def run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@dataclass(frozen=True)
class Container:
    """A container that runc runs, and where its server listens."""

    name: str
    url: str
    config: dict[str, Any]
    process: subprocess.Popen[bytes]

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["runc", "exec", self.name, *command], capture_output=True, text=True, check=False)

    def healthcheck(self) -> int:
        kind, *command = self.config["Healthcheck"]["Test"]
        assert kind == "CMD", "a health check without a shell"
        began = time.monotonic()
        status = self.execute(*command).returncode
        assert time.monotonic() - began < self.config["Healthcheck"]["Timeout"] / 1e9
        return status

    def stop(self) -> None:
        run("runc", "kill", self.name, self.config["StopSignal"])


@pytest.fixture(name="config", scope="session")
def inspect_image() -> dict[str, Any]:
    return json.loads(run("buildah", *STORE, "inspect", "--type", "image", IMAGE))["Docker"]["config"]


@contextlib.contextmanager
def mounted(image: str) -> Iterator[Path]:
    """Yield the folder at which a container of an image is mounted."""
    container = run("buildah", *STORE, "from", "--pull-never", image)
    yield Path(run("buildah", *STORE, "mount", container))
    run("buildah", *STORE, "rm", container)


@pytest.fixture(name="root", scope="session")
def mount_image() -> Iterator[Path]:
    with mounted(IMAGE) as root:
        yield root


def confine(root: Path, config: dict[str, Any], command: list[str], port: int) -> dict[str, Any]:
    """Return the runtime's configuration for the image's own user and environment and the compose file's limits."""
    uid, gid = map(int, config["User"].split(":"))
    (tmp,) = COMPOSE["tmpfs"]
    place, options = tmp.split(":")
    memory = COMPOSE["mem_limit"].removeprefix("${HESSQUIK_MEMORY:-").removesuffix("}")
    assert COMPOSE["read_only"]
    assert COMPOSE["cap_drop"] == ["ALL"]
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
        {"destination": place, "type": "tmpfs", "source": "tmpfs", "options": [*options.split(","), "mode=1777"]},
    ]
    return {
        "ociVersion": "1.0.0",
        "process": {
            "user": {"uid": uid, "gid": gid},
            "args": command,
            "env": [*config["Env"], "HESSQUIK_HOST=127.0.0.1", f"HESSQUIK_PORT={port}"],
            "cwd": config.get("WorkingDir") or "/",
            "capabilities": {name: [] for name in ("bounding", "effective", "permitted", "inheritable", "ambient")},
            "noNewPrivileges": "no-new-privileges:true" in COMPOSE["security_opt"],
        },
        "root": {"path": str(root), "readonly": True},
        "mounts": mounts,
        "linux": {
            # The network is the host's, so that the test reaches the server on the loopback.
            "namespaces": [{"type": name} for name in ("pid", "mount", "ipc", "uts")],
            "resources": {
                "memory": {"limit": int(memory[:-1]) * UNITS[memory[-1]]},
                "pids": {"limit": COMPOSE["pids_limit"]},
            },
        },
    }


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def start(root: Path, config: dict[str, Any], bundle: Path, *command: str) -> Container:
    port, name = free_port(), f"hessquik-{uuid.uuid4().hex[:8]}"
    arguments = list(command) or config["Entrypoint"] + config["Cmd"]
    (bundle / "config.json").write_text(json.dumps(confine(root, config, arguments, port)))
    process = subprocess.Popen(["runc", "run", "--bundle", bundle, name])
    return Container(name, f"http://127.0.0.1:{port}", config, process)


@contextlib.contextmanager
def running(root: Path, config: dict[str, Any], bundle: Path) -> Iterator[Container]:
    """Yield a container whose server is ready."""
    container = start(root, config, bundle)
    try:
        began = time.monotonic()
        while not is_ready(container):
            assert container.process.poll() is None, "the container ended"
            assert time.monotonic() - began < START_S, "the container did not become ready"
            time.sleep(0.1)
        yield container
    finally:
        subprocess.run(["runc", "delete", "--force", container.name], check=False, capture_output=True)
        container.process.wait(10)


def is_ready(container: Container) -> bool:
    try:
        return httpx.get(f"{container.url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(name="container", scope="session")
def share_container(
    root: Path, config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Container]:
    with running(root, config, tmp_path_factory.mktemp("bundle")) as container:
        yield container


@pytest.fixture(name="mortal")
def run_container(root: Path, config: dict[str, Any], tmp_path: Path) -> Iterator[Container]:
    """Yield a container that its test may stop."""
    with running(root, config, tmp_path) as container:
        yield container


def differentiate(path: Path, x: np.ndarray, directions: np.ndarray) -> dict[str, np.ndarray]:
    """Return every quantity from the network's value alone, by torch's own differentiation in float64."""
    network = hessquik.load(path).double()

    def value(point: torch.Tensor) -> torch.Tensor:
        return network(point[None])[0][0]

    points, k = torch.from_numpy(x), torch.from_numpy(directions)
    f = torch.func.vmap(value)(points)
    jacobian = torch.func.vmap(torch.func.jacrev(value))(points)
    hessian = torch.func.vmap(torch.func.hessian(value))(points)
    found = {
        "value": f,
        "gradient": jacobian.transpose(1, 2),
        "hessian": hessian.permute(0, 2, 3, 1),
        "laplacian": torch.einsum("nmdd->nm", hessian),
        "hessian_diagonal": torch.einsum("nmdd->ndm", hessian),
        "jvp": torch.einsum("nmd,kd->nkm", jacobian, k),
        "hvp": torch.einsum("nmde,ke->nkdm", hessian, k),
        "curvature": torch.einsum("nmde,kd,ke->nkm", hessian, k, k),
    }
    return {name: array.detach().numpy() for name, array in found.items()}


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_image_answers_every_quantity_of_a_shipped_model(path: Path, container: Container) -> None:
    model = httpx.get(f"{container.url}/v1/models/{path.stem}").raise_for_status().json()
    random = np.random.default_rng(8)
    x, directions = random.uniform(-1, 1, (5, model["d"])), random.normal(size=(3, model["d"]))
    question = {"inputs": x.tolist(), "directions": directions.tolist(), "quantities": QUANTITIES, "dtype": "float64"}
    reply = httpx.post(
        f"{container.url}/v1/models/{path.stem}/evaluate", json=question, timeout=30
    ).raise_for_status()
    for name, expected in differentiate(path, x, directions).items():
        got = np.array(reply.json()[name])
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= TOLERANCE * max(1.0, np.abs(expected).max()), name


def test_image_with_models_of_ones_own_serves_these_alone(config: dict[str, Any], tmp_path: Path) -> None:
    """Whatever the modes of the files: the service is another user."""
    models, bundle = tmp_path / "models", tmp_path / "bundle"
    (models / "mine").mkdir(parents=True)
    bundle.mkdir()
    for path in (models / "mine" / "7.safetensors", models / "other.safetensors"):
        shutil.copy(MODELS[0], path)
        path.chmod(0o600)
    (models / "mine").chmod(0o700)
    file = ROOT / "deploy" / "kubernetes" / "models" / "Dockerfile"
    build = ["build", "--isolation", "chroot", "--format", "docker", "--pull-never", "--build-arg", f"BASE={IMAGE}"]
    run("buildah", *STORE, *build, "--file", file, "--tag", "localhost/hessquik:models", models)
    try:
        with mounted("localhost/hessquik:models") as root, running(root, config, bundle) as container:
            found = httpx.get(f"{container.url}/v1/models").raise_for_status().json()["models"]
    finally:
        run("buildah", *STORE, "rmi", "localhost/hessquik:models")
    assert [(one["name"], one["versions"], one["state"]) for one in found] == [
        ("mine", ["7"], "ready"), ("other", ["1"], "ready"),
    ]  # fmt: skip


@pytest.mark.parametrize("page", ["/docs", "/openapi.json", "/metrics", "/v2"])
def test_image_holds_what_this_page_needs(page: str, container: Container) -> None:
    assert httpx.get(f"{container.url}{page}").status_code == 200


def test_image_computes_with_the_compiled_kernel(container: Container) -> None:
    done = container.execute("python", "-c", "from hessquik.backends import names; print(*names())")
    assert done.stdout.split()[0] == "cpu", done.stderr


def test_image_can_trace(container: Container) -> None:
    done = container.execute("python", "-c", "from hessquik_service.tracing import Tracer; Tracer().close()")
    assert done.returncode == 0, done.stderr


def test_image_is_confined(container: Container) -> None:
    status = container.execute("cat", "/proc/1/status").stdout
    lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert lines["Uid"].split() == ["10001"] * 4
    assert {lines[name] for name in lines if name.startswith("Cap")} == {"0" * 16}
    assert lines["NoNewPrivs"] == "1"
    refused = container.execute("python", "-c", "open('/opt/hessquik/x', 'w')")
    assert "Read-only file system" in refused.stderr
    assert container.execute("python", "-c", "open('/tmp/x', 'w')").returncode == 0


@pytest.mark.parametrize("tool", ["pip", "gcc", "cc", "make", "curl", "git", "pytest"])
def test_image_lacks_what_it_does_not_need(tool: str, root: Path, config: dict[str, Any]) -> None:
    (path,) = (entry.removeprefix("PATH=") for entry in config["Env"] if entry.startswith("PATH="))
    assert not shutil.which(tool, path=":".join(f"{root}{folder}" for folder in path.split(":")))


def test_health_check_of_a_live_a_draining_and_a_dead_server(
    mortal: Container, root: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    assert mortal.healthcheck() == 0

    # A request whose body is not whole yet keeps the server draining for as long as the test wants.
    path = MODELS[0]
    d = httpx.get(f"{mortal.url}/v1/models/{path.stem}").json()["d"]
    body = json.dumps({"inputs": [0.5] * d}).encode()
    host, port = httpx.URL(mortal.url).host, httpx.URL(mortal.url).port
    with socket.create_connection((host, port or 0), timeout=30) as connection:
        head = f"POST /v1/models/{path.stem}/value HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body[:5])
        time.sleep(0.5)
        mortal.stop()
        time.sleep(1.0)
        assert mortal.process.poll() is None
        assert mortal.healthcheck() == 1
        connection.sendall(body[5:])
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    assert mortal.process.wait(25) == 0

    alone = tmp_path / "alone"
    alone.mkdir()
    dead = start(root, config, alone, *config["Healthcheck"]["Test"][1:])
    assert dead.process.wait(10) == 1
    subprocess.run(["runc", "delete", "--force", dead.name], check=False, capture_output=True)


def test_stop_signal_ends_an_idle_container_without_waiting_for_the_drain(mortal: Container) -> None:
    began = time.monotonic()
    mortal.stop()
    assert mortal.process.wait(10) == 0
    assert time.monotonic() - began < 10.0


def test_image_names_its_licences_and_itself(container: Container, config: dict[str, Any]) -> None:
    notices = container.execute("cat", "/opt/hessquik/THIRD_PARTY_LICENSES.txt").stdout
    for name in ("torch", "numpy", "fastapi", "uvloop"):
        assert re.search(rf"^{name} \d\S*: ", notices, re.MULTILINE), name
    assert config["Labels"]["org.opencontainers.image.title"] == "hessquik-service"
    shown = container.execute("hessquik", "--version").stdout
    assert shown.startswith(f"hessquik {config['Labels']['org.opencontainers.image.version'].split('-')[0]} ")
    assert "compiled modules" in shown


def test_code_that_changes_is_small(root: Path) -> None:
    """A new version of the project is pushed as a layer of less than 20 MB, apart from the dependencies."""
    packages = root / "opt" / "hessquik" / "lib" / "python3.11" / "site-packages"
    own = [packages / name for name in ("hessquik", "hessquik_client", "hessquik_service")]
    size = sum(path.stat().st_size for folder in own for path in folder.rglob("*") if path.is_file())
    assert size < 20e6


def test_cuda_is_refused_with_status_3_without_a_gpu(root: Path, config: dict[str, Any], tmp_path: Path) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    container = start(root, config, tmp_path, "hessquik", "serve", "--device", "cuda")
    try:
        assert container.process.wait(START_S) == 3
    finally:
        subprocess.run(["runc", "delete", "--force", container.name], check=False, capture_output=True)
