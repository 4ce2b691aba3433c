"""The compose files, deployed by a Docker engine and asked over HTTP.

Run by ``make compose-test``, which builds the image first; needs Docker with Compose 2.24 or later. Images of
Prometheus and Alertmanager that cannot be pulled are built from Debian's packages.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.deployment.load import CALLS, Load, hessian, is_close
from tests.live import ROOT, free_ports, wait_until

IMAGE = "hessquik:cpu"
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
MODELS = sorted(path.stem for path in (ROOT / "models").glob("*.safetensors"))
WATCHING = {"prometheus": "prometheus", "alertmanager": "prometheus-alertmanager"}
WAIT_S = 60.0
IS_ROOT = os.geteuid() == 0
QUESTION = {"inputs": [[0.1, 0.2]]}

needs_docker = pytest.mark.skipif(
    subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode != 0
    or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode != 0,
    reason="needs a Docker engine with Compose 2.24 or later",
)
pytestmark = needs_docker


def docker(*arguments: str | Path) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Project:
    """The compose file under a name and with ports of its own.

    Args:
        folder: For settings, keys and an override of images.
        variables: What the compose file reads from the environment.
    """

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        ports = free_ports(4)
        names = ("HESSQUIK_PORT", "PROMETHEUS_PORT", "ALERTMANAGER_PORT", "GRAFANA_PORT")
        self.url, self.prometheus, self.alertmanager, self.grafana = (f"http://127.0.0.1:{port}" for port in ports)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("HESSQUIK_", "COMPOSE_"))},
            **dict(zip(names, map(str, ports), strict=True)),
            "HESSQUIK_ENV": str(folder / "hessquik.env"),
            **variables,
        }
        self.name = f"hessquik-{uuid.uuid4().hex[:8]}"
        self.files = [ROOT / "docker-compose.yml"]

    def run(self, *arguments: str, may_fail: bool = False) -> str:
        files = [word for file in self.files for word in ("--file", str(file))]
        command = ["docker", "compose", "--project-name", self.name, *files, *arguments]
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert may_fail or done.returncode == 0, done.stderr + self.run("logs", may_fail=True)[-4000:]
        return done.stdout.strip()

    def up(self, *arguments: str, may_fail: bool = False) -> None:
        """Run ``docker compose up`` and wait until what it starts is healthy."""
        self.run(*arguments, "up", "--detach", "--no-build", "--wait", "--wait-timeout", "90", may_fail=may_fail)

    def container(self, service: str = "hessquik") -> dict[str, Any]:
        """Return what the engine says of a service's container."""
        return json.loads(docker("inspect", self.run("ps", "--all", "--quiet", service)))[0]

    def is_healthy(self) -> bool:
        return self.container()["State"].get("Health", {}).get("Status") == "healthy"


@contextlib.contextmanager
def project(folder: Path, **variables: str) -> Iterator[Project]:
    """Yield a project, and remove its containers, networks and volumes."""
    deployed = Project(folder, **variables)
    try:
        yield deployed
    finally:
        deployed.run("--profile", "monitoring", "down", "--volumes", "--timeout", "30", may_fail=True)


@pytest.fixture(autouse=True, scope="session")
def expect_image() -> None:
    built = subprocess.run(["docker", "image", "inspect", IMAGE], capture_output=True, check=False)
    assert built.returncode == 0, f"expected the image {IMAGE}; build it with `make image`"


@pytest.fixture(name="deployed", scope="module")
def deploy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    with project(tmp_path_factory.mktemp("plain")) as deployed:
        deployed.up()
        yield deployed


def test_plain_up_serves_the_models_on_the_loopback_alone(deployed: Project) -> None:
    assert deployed.run("ps", "--services").split() == ["hessquik"]
    assert sorted(one["name"] for one in httpx.get(f"{deployed.url}/v1/models").json()["models"]) == MODELS
    reply = httpx.post(f"{deployed.url}/v1/models/peaks/hessian", json={"inputs": [[0.1, 0.2], [0.3, -0.4]]})
    assert is_close(reply.raise_for_status().json()["hessian"], hessian(ROOT / "models" / "peaks.safetensors"))
    (published,) = deployed.container()["NetworkSettings"]["Ports"]["8000/tcp"]
    assert published["HostIp"] == "127.0.0.1"


def test_engine_confines_the_container_as_the_file_says(deployed: Project) -> None:
    found = deployed.container()
    host = found["HostConfig"]
    assert (host["ReadonlyRootfs"], host["Init"], host["Memory"], host["PidsLimit"]) == (True, True, 4 << 30, 2048)
    assert (host["CapDrop"], host["SecurityOpt"]) == (["ALL"], ["no-new-privileges:true"])
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    assert found["Config"]["StopTimeout"] == 30
    assert {one["Destination"] for one in found["Mounts"] if not one["RW"]} >= {
        "/models",
        "/run/secrets/hessquik_api_keys",
    }
    status = deployed.run("exec", "hessquik", "cat", "/proc/self/status")
    lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert lines["Uid"].split() == ["10001"] * 4
    assert int(lines["CapEff"], 16) == 0
    attempt = "try: open('/models/x', 'w')\nexcept OSError as error: print(error.strerror)"
    assert deployed.run("exec", "hessquik", "python", "-c", attempt) == "Read-only file system"


@pytest.mark.skipif(not IS_ROOT, reason="needs root, to kill a container's process")
def test_server_that_is_killed_is_started_again_by_the_engine(tmp_path: Path) -> None:
    with project(tmp_path) as deployed:
        deployed.up()
        before = deployed.container()
        os.kill(before["State"]["Pid"], signal.SIGKILL)
        wait_until(lambda: deployed.container()["RestartCount"] == 1 and deployed.is_healthy(), WAIT_S)
        assert httpx.post(f"{deployed.url}/v1/models/peaks/value", json=QUESTION).status_code == 200


def test_stop_under_load_answers_what_was_accepted_and_ends_with_status_0(tmp_path: Path) -> None:
    with project(tmp_path) as deployed:
        deployed.up()
        expected = hessian(ROOT / "models" / "peaks.safetensors")
        load = Load(deployed.url, lambda found: is_close(found, expected))
        load.wait(CALLS)
        began = time.monotonic()
        deployed.run("stop")
        assert time.monotonic() - began < 25
        state = deployed.container()["State"]
        assert (state["ExitCode"], state["OOMKilled"]) == (0, False)
        with pytest.raises(AssertionError, match=r"ConnectError|RemoteProtocolError|ReadError"):
            load.wait(CALLS)  # refused connections are all that its clients meet
        assert load.statuses.keys() <= {"200", "503"}


def test_settings_come_from_the_env_file(tmp_path: Path) -> None:
    (tmp_path / "hessquik.env").write_text("# a node\nHESSQUIK_MAX_ROWS=3\nHESSQUIK_WORKERS=2\n")
    with project(tmp_path) as deployed:
        deployed.up()
        reply = httpx.post(f"{deployed.url}/v1/models/peaks/value", json={"inputs": [[0.0, 0.0]] * 4})
        assert (reply.status_code, reply.json()["code"]) == (422, "invalid_input")
        assert reply.json()["expected"] == "1 to 3 points"
        assert "max_rows=3" in deployed.run("logs", "hessquik")
        assert (
            len([line for line in docker("top", deployed.container()["Id"]).splitlines() if "run_worker" in line])
            == 2
        )


def test_line_that_is_no_setting_keeps_the_container_from_starting_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "hessquik.env").write_text("HESSQUIK_MAX_ROW=3\n")
    with project(tmp_path) as deployed:
        deployed.up(may_fail=True)
        assert deployed.container()["State"]["ExitCode"] == 2
        log = deployed.run("logs", "hessquik")
        assert "HESSQUIK_MAX_ROW" in log
        assert "HESSQUIK_MAX_ROWS" in log


def key_file(path: Path, keys: str, user: int = 10001) -> str:
    """Write a file as the documentation says, readable by the container's user alone if this one may give it away."""
    path.write_text(keys)
    path.chmod(0o400 if IS_ROOT else 0o444)
    if IS_ROOT:
        os.chown(path, user, user)
    return str(path)


def test_keys_come_from_files_and_are_read_again_when_they_change(tmp_path: Path) -> None:
    api = key_file(tmp_path / "api.key", "first\n")
    admin = key_file(tmp_path / "admin.key", "boss\n")
    with project(tmp_path, HESSQUIK_API_KEYS_FILE=api, HESSQUIK_ADMIN_KEYS_FILE=admin) as deployed:
        deployed.up()

        def status(key: str, path: str = "/v1/models") -> int:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            return httpx.request(
                "POST" if "load" in path else "GET", deployed.url + path, headers=headers
            ).status_code

        assert (status(""), status("second"), status("first")) == (401, 401, 200)
        assert status("boss", "/v1/models/peaks/load") == 200
        change(api, "first,second\n")
        wait_until(lambda: status("second") == 200, WAIT_S)
        change(api, "second\n")
        wait_until(lambda: status("first") == 401, WAIT_S)
        # An editor that puts a new file in the place of the old one is seen after a restart.
        Path(key_file(tmp_path / "new", "third\n")).replace(api)
        assert status("third") == 401
        deployed.run("up", "--detach", "--no-build", "--force-recreate", "--wait")
        assert status("third") == 200


def change(path: str, keys: str) -> None:
    """Write into the file that is there, which the container has mounted."""
    Path(path).chmod(0o600)
    Path(path).write_text(keys)
    Path(path).chmod(0o400 if IS_ROOT else 0o444)


@pytest.mark.parametrize("files", [[], ["deploy/compose/gpu.yml"]], ids=["cpu", "gpu"])
def test_compose_reads_the_files_as_they_are_meant(files: list[str], tmp_path: Path) -> None:
    found = Project(tmp_path)
    found.files += [ROOT / file for file in files]
    services = json.loads(found.run("--profile", "monitoring", "config", "--format", "json"))["services"]
    assert services.keys() == COMPOSE.keys()
    ours = services["hessquik"]
    assert ours["build"]["args"] == {"TARGET": "cuda" if files else "cpu"}
    assert int(ours["mem_limit"]) == (32 if files else 4) << 30
    assert ours.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", []) == (
        [{"driver": "nvidia", "count": -1, "capabilities": ["gpu"]}] if files else []
    )
    for service in services.values():
        assert (service["cap_drop"], service["read_only"]) == (["ALL"], True)


def can_pull(image: str) -> bool:
    return subprocess.run(["docker", "pull", "--quiet", image], capture_output=True, check=False).returncode == 0


@pytest.fixture(name="images", scope="session")
def find_images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return other images for services whose own cannot be pulled: Debian's program, as the original image has it."""
    others = {}
    for service, program in WATCHING.items():
        if can_pull(COMPOSE[service]["image"]):
            continue
        path = shutil.which(program)
        if path is None:
            pytest.skip(f"needs a registry with the image of {service}, or Debian's package {program}")
        folder = tmp_path_factory.mktemp(service)
        shutil.copy(path, folder / service)
        shared = Path("/usr/share/prometheus") / service  # templates that Debian keeps apart from the program
        shutil.copytree(shared, folder / "shared") if shared.is_dir() else (folder / "shared").mkdir()
        (folder / "Dockerfile").write_text(
            f"FROM {IMAGE}\nUSER 0\nCOPY {service} /bin/{service}\nCOPY shared {shared}\n"
            f"RUN mkdir /{service} && chown 65534 /{service}\n"
            f'USER 65534\nHEALTHCHECK NONE\nWORKDIR /{service}\nENTRYPOINT ["/bin/{service}"]\n'
        )
        others[service] = f"hessquik-test/{service}"
        docker("build", "--quiet", "--tag", others[service], folder)
    return others


def alerts(deployed: Project) -> set[tuple[str, str]]:
    """Return name and instance of the alerts that Alertmanager has."""
    with contextlib.suppress(httpx.TransportError):
        found = httpx.get(f"{deployed.alertmanager}/api/v2/alerts").raise_for_status().json()
        return {(one["labels"]["alertname"], one["labels"]["instance"]) for one in found}
    return set()


def query(deployed: Project, expression: str) -> list[dict[str, Any]]:
    with contextlib.suppress(httpx.TransportError):
        reply = httpx.get(f"{deployed.prometheus}/api/v1/query", params={"query": expression})
        return list(reply.raise_for_status().json()["data"]["result"]) if reply.is_success else []
    return []


def test_monitoring_watches_the_service_and_is_told_when_it_is_down(images: dict[str, str], tmp_path: Path) -> None:
    """With keys, so that Prometheus has to send its own; alerts reach Alertmanager by the network of the project."""
    api = key_file(tmp_path / "api.key", "secret,watcher\n")
    metrics = key_file(tmp_path / "metrics.key", "watcher", 65534)
    with project(tmp_path, HESSQUIK_API_KEYS_FILE=api, HESSQUIK_METRICS_KEY_FILE=metrics) as deployed:
        if images:
            override = {"services": {name: {"image": image} for name, image in images.items()}}
            (tmp_path / "images.yml").write_text(yaml.safe_dump(override))
            deployed.files.append(tmp_path / "images.yml")
        services = ["hessquik", *WATCHING]
        deployed.run("--profile", "monitoring", "up", "--detach", "--no-build", *services)
        wait_until(lambda: query(deployed, 'up{job="hessquik"} == 1'), WAIT_S)
        wait_until(lambda: query(deployed, "hessquik_build_info"), WAIT_S)
        rules = httpx.get(f"{deployed.prometheus}/api/v1/rules").json()["data"]["groups"]
        assert sum(len(group["rules"]) for group in rules) > 10
        deployed.run("stop", "hessquik")
        wait_until(lambda: ("HessquikDown", "hessquik:8000") in alerts(deployed), 3 * WAIT_S)  # after two minutes


def test_grafana_opens_on_the_dashboard(tmp_path: Path) -> None:
    if not can_pull(COMPOSE["grafana"]["image"]):
        pytest.skip("needs a registry with the image of Grafana")
    with project(tmp_path) as deployed:
        deployed.run("--profile", "monitoring", "up", "--detach", "--no-build", "hessquik", "prometheus", "grafana")

        def is_up() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{deployed.grafana}/api/health").is_success
            return False

        wait_until(is_up, 2 * WAIT_S)
        home = httpx.get(f"{deployed.grafana}/api/dashboards/home").raise_for_status().json()
        assert (
            home["dashboard"]["title"]
            == json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "hessquik.json").read_text())["title"]
        )
