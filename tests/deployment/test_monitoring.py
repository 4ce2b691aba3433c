"""Prometheus itself scrapes live services, and every query of the dashboard and of the alerts finds data.

One service is asked, the other one never: its panels are not empty either. It has a file that is refused, and another
that is overwritten with what is refused; at the end it is killed. All these alerts reach Alertmanager.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
import yaml

from tests.live import ROOT, LiveServer, free_ports, wait_until
from tests.service.faulty_worker import RAISES

pytestmark = pytest.mark.xdist_group("monitoring")

MONITORING = ROOT / "deploy"
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboards" / "hessquik.json").read_text())
QUERIES = [
    pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
]
RECORDS, ALERTS = (
    [
        rule
        for group in yaml.safe_load((MONITORING / "prometheus" / name).read_text())["groups"]
        for rule in group["rules"]
    ]
    for name in ("rules.yml", "alerts.yml")
)
RULES = ("rules.yml", "alerts.yml")
START_S = 60.0
#: Scrapes a second apart: a rate needs two, and the queries look back this long.
RANGE = "30s"

PROGRAMS = ("prometheus", "promtool", "prometheus-alertmanager", "amtool")
needs_prometheus = pytest.mark.skipif(
    not all(map(shutil.which, PROGRAMS)), reason="needs Debian's packages prometheus and prometheus-alertmanager"
)


class Alertmanager:
    """Alertmanager with the shipped configuration."""

    def __init__(self, folder: Path) -> None:
        self.address = f"127.0.0.1:{free_ports(1)[0]}"
        self._log = (folder / "alertmanager.log").open("w")
        self._process = subprocess.Popen(
            [
                "prometheus-alertmanager",
                f"--config.file={MONITORING}/alertmanager/alertmanager.yml",
                f"--storage.path={folder}/alertmanager",
                f"--web.listen-address={self.address}",
                "--cluster.listen-address=",
            ],
            stderr=self._log,
        )

    def alerts(self) -> set[tuple[str, str, str]]:
        """Return name, instance and model, or empty, of every alert that it was sent."""
        labels = [
            one["labels"] for one in httpx.get(f"http://{self.address}/api/v2/alerts").raise_for_status().json()
        ]
        return {(one["alertname"], one["instance"], one.get("model", "")) for one in labels}

    def close(self) -> None:
        """Stop the process."""
        self._process.terminate()
        self._process.wait(20)
        self._log.close()


class Prometheus:
    """Prometheus with the shipped configuration, but for addresses and pace: a second takes the place of minutes."""

    def __init__(self, folder: Path, targets: list[str], alertmanager: str) -> None:
        config = yaml.safe_load((MONITORING / "prometheus" / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        (job,) = config["scrape_configs"]
        job["static_configs"] = [{"targets": targets}]
        config["alerting"]["alertmanagers"] = [{"static_configs": [{"targets": [alertmanager]}]}]
        key = folder / "key"
        key.write_text("secret")
        job["authorization"] = {"credentials_file": str(key)}
        for name in RULES:
            text = (MONITORING / "prometheus" / name).read_text()
            (folder / name).write_text(re.sub(r"for: \d+[sm]", "for: 1s", text))
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._log = (folder / "log").open("w")
        self._process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                "--web.listen-address=127.0.0.1:0",
            ],
            stderr=self._log,
        )
        self._folder, self._targets = folder, len(targets)
        self.url = ""

    def wait(self, ask: Callable[[], object]) -> None:
        """Wait until Prometheus has scraped the target several times, and send it requests meanwhile."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, (self._folder / "log").read_text()
            match = re.search(r'msg="Listening on" address=127\.0\.0\.1:(\d+)', (self._folder / "log").read_text())
            if match is not None:
                self.url = f"http://127.0.0.1:{match[1]}"
                is_ready = httpx.get(f"{self.url}/-/ready").is_success
                if is_ready and len(self.query('count_over_time(up{job="hessquik"}[1m]) >= 4')) == self._targets:
                    return
            ask()
            time.sleep(0.1)
        pytest.fail("Prometheus did not scrape the service")

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return what the expression finds now."""
        reply = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}).raise_for_status().json()
        return list(reply["data"]["result"])

    def close(self) -> None:
        """Stop the process."""
        self._process.terminate()
        self._process.wait(20)
        self._log.close()


class Watched(NamedTuple):
    """A service with requests, one without, and the monitoring of both."""

    prometheus: Prometheus
    alertmanager: Alertmanager
    busy: LiveServer
    idle: LiveServer


@pytest.fixture(name="watched", scope="module")
def watch(shipped_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "models").mkdir()
    shutil.copy(shipped_models / "peaks.safetensors", folder / "models")
    (folder / "models" / "broken.safetensors").write_bytes(b"no network")
    settings = {"api_keys": "secret", "watch_s": 0.2}
    with contextlib.ExitStack() as stack:
        servers = [LiveServer(models, settings=settings) for models in (shipped_models, folder / "models")]
        busy, idle = (stack.enter_context(server) for server in servers)
        alertmanager = Alertmanager(folder)
        stack.callback(alertmanager.close)
        targets = [f"127.0.0.1:{server.port}" for server in servers]
        prometheus = Prometheus(folder, targets, alertmanager.address)
        stack.callback(prometheus.close)
        client = stack.enter_context(httpx.Client(base_url=busy.url, headers={"Authorization": "Bearer secret"}))
        body = {"inputs": [[0.1, 0.2]]}
        prometheus.wait(lambda: client.post("/v1/models/peaks/hessian", json=body).raise_for_status())
        yield Watched(prometheus, alertmanager, busy, idle)


@pytest.fixture(name="prometheus", scope="module")
def choose_prometheus(watched: Watched) -> Prometheus:
    return watched.prometheus


def expand(expression: str, instance: str = ".*") -> str:
    """Return an expression with its variables filled in, as Grafana does."""
    return expression.replace("$__rate_interval", RANGE).replace("$instance", instance)


def has_values(found: list[dict[str, Any]]) -> bool:
    """Return whether a query found something, and only numbers.

    It finds nothing for a second after the machine was too busy for a scrape, so that this is waited for.
    """
    return bool(found) and all(sample["value"][1] != "NaN" for sample in found)


@needs_prometheus
@pytest.mark.parametrize("which", ["busy", "idle"])
@pytest.mark.parametrize("expression", QUERIES)
def test_dashboard_query_finds_data(expression: str, which: str, watched: Watched) -> None:
    server: LiveServer = getattr(watched, which)
    expression = expand(expression, f"127.0.0.1:{server.port}")
    wait_until(lambda: has_values(watched.prometheus.query(expression)))


@needs_prometheus
@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_alert_asks_for_metrics_that_exist_and_is_quiet(rule: dict[str, Any], watched: Watched) -> None:
    idle, query = f"127.0.0.1:{watched.idle.port}", watched.prometheus.query
    wait_until(lambda: {one["metric"].get("instance") for one in query(rule["expr"])} <= {idle})
    for metric in re.findall(r"\b(?:instance:\w+:\w+|hessquik_\w+|up)\b(?=[{\[ ])", rule["expr"]):
        wait_until(lambda metric=metric: query(metric))


@needs_prometheus
@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record["record"])
def test_recorded_rules_have_values_for_both(record: dict[str, Any], prometheus: Prometheus) -> None:
    # Two nodes, or at least two models.
    wait_until(lambda: len(found := prometheus.query(record["record"])) >= 2 and has_values(found))


@needs_prometheus
def test_every_alert_fires_on_what_it_is_for(tmp_path: Path) -> None:
    """The unit tests of the rules that ship; there is one for each alert."""
    tests = MONITORING / "prometheus" / "alerts.test.yml"
    done = subprocess.run(["promtool", "test", "rules", tests], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    fired = {
        one["alertname"]
        for test in yaml.safe_load(tests.read_text())["tests"]
        for one in test.get("alert_rule_test", [])
        if one.get("exp_alerts")
    }
    assert fired == {rule["alert"] for rule in ALERTS}
    # A threshold that is never passed is found.
    for name in (*RULES, tests.name):
        text = (MONITORING / "prometheus" / name).read_text()
        (tmp_path / name).write_text(text.replace("hessquik_queue_age_seconds > 2", "hessquik_queue_age_seconds > 9"))
    done = subprocess.run(["promtool", "test", "rules", tmp_path / tests.name], capture_output=True, check=False)
    assert done.returncode != 0


@needs_prometheus
def test_alertmanager_hears_of_refused_files_and_of_a_node_that_is_killed(watched: Watched) -> None:
    idle = f"127.0.0.1:{watched.idle.port}"
    wait_for(watched, {("HessquikModelFailed", idle, "broken")})
    (watched.idle.models / "peaks.safetensors").write_bytes(b"no network any more")
    wait_for(watched, {("HessquikModelFailed", idle, "peaks")})
    assert watched.idle.metric('hessquik_model_ready{model="peaks",version="1"}', "secret") == 1
    watched.idle.process.kill()
    wait_for(watched, {("HessquikDown", idle, "")})


def wait_for(watched: Watched, expected: set[tuple[str, str, str]]) -> None:
    deadline = time.monotonic() + START_S
    while not expected <= watched.alertmanager.alerts():
        assert time.monotonic() < deadline, watched.alertmanager.alerts()
        time.sleep(0.2)
    assert {one[1] for one in watched.alertmanager.alerts()} == {one[1] for one in expected}


def kill_worker(server: LiveServer) -> None:
    """Kill the worker, and wait for the next one."""
    (worker,) = server.workers()
    worker.kill()
    server.wait_until_ready()


def kill_front(server: LiveServer) -> None:
    """Kill a front end, and wait for the next one."""
    lines = len(server.log)
    children = psutil.Process(server.process.pid).children()
    next(one for one in children if "service.frontend" in one.cmdline()).kill()
    wait_until(lambda: any("the front end serves" in line for line in server.log[lines:]))


@needs_prometheus
@pytest.mark.whole
@pytest.mark.timeout(600)
def test_every_alert_fires_on_a_service_in_trouble(shipped_models: Path, tmp_path: Path) -> None:
    """A worker hangs, fails and dies again and again, two requests fill the queue; at last the service is killed.

    Another service has two front ends, which die again and again. Only the unit tests of the rules know a Prometheus
    without targets, and restarts at one address.
    """
    models, seen, statuses = tmp_path / "models", set[str](), set[int]()
    expected = {rule["alert"] for rule in ALERTS} - {"HessquikNoTarget", "HessquikRestarts"}
    models.mkdir()
    shutil.copy(shipped_models / "peaks.safetensors", models)
    (models / "broken.safetensors").write_bytes(b"no network")
    settings = {"api_keys": "secret", "batch_timeout_s": 60, "max_queue_requests": 2}
    with contextlib.ExitStack() as stack:
        servers = [
            LiveServer(models, settings=settings, command=("-m", "tests.service.faulty_serve")),
            LiveServer(shipped_models, settings={"api_keys": "secret", "processes": 2}),
        ]
        server, other = (stack.enter_context(one) for one in servers)
        alertmanager = Alertmanager(tmp_path)
        stack.callback(alertmanager.close)
        targets = [f"127.0.0.1:{one.port}" for one in servers]
        prometheus = Prometheus(tmp_path, targets, alertmanager.address)
        stack.callback(prometheus.close)
        client = stack.enter_context(
            httpx.Client(base_url=server.url, headers={"Authorization": "Bearer secret"}, timeout=60)
        )

        def ask(deadline_s: float, x: float = 0.1) -> int:
            head = {"X-Deadline-Ms": str(int(1000 * deadline_s))}
            return client.post("/v1/models/peaks/value", json={"inputs": [x, 0.2]}, headers=head).status_code

        def until(names: set[str], act: Callable[[], object]) -> None:
            deadline = time.monotonic() + 3 * START_S
            while not names <= seen:
                assert time.monotonic() < deadline, (names - seen, server.log[-5:])
                act()
                seen.update(name for name, _, _ in alertmanager.alerts())
                time.sleep(0.2)

        def hang() -> None:
            """Stop the worker while more requests come than may wait; one is too late, one slow."""
            (worker,) = server.workers()
            worker.suspend()
            with ThreadPoolExecutor(4) as pool:
                asked = [pool.submit(ask, seconds) for seconds in (30, 3, 30, 3)]
                time.sleep(6)
                worker.resume()
            statuses.update(one.result() for one in asked)

        prometheus.wait(lambda: ask(30))
        until({"HessquikModelFailed"}, lambda: None)
        until({"HessquikQueueAge", "HessquikOverloaded", "HessquikSlow"}, hang)
        assert statuses == {200, 503, 504}
        assert "HessquikErrors" not in seen, "late answers are no errors"
        until({"HessquikErrors"}, lambda: ask(30, RAISES))
        until({"HessquikFrontEndsDie"}, lambda: kill_front(other))
        assert not seen & {"HessquikDown", "HessquikNoWorker", "HessquikWorkersDie"}
        until({"HessquikNoWorker", "HessquikNotReady", "HessquikWorkersDie"}, lambda: kill_worker(server))
        assert "HessquikDown" not in seen
        server.process.kill()
        until(expected, lambda: None)
    assert seen == expected


@needs_prometheus
def test_query_for_a_metric_that_does_not_exist_finds_nothing(prometheus: Prometheus) -> None:
    assert prometheus.query("hessquik_requests_totally") == []


@needs_prometheus
def test_configuration_is_what_prometheus_takes(tmp_path: Path) -> None:
    text = (MONITORING / "prometheus" / "prometheus.yml").read_text()
    (tmp_path / "key").touch()
    (tmp_path / "prometheus.yml").write_text(text.replace("/run/secrets/hessquik_metrics_key", str(tmp_path / "key")))
    for name in RULES:
        shutil.copy(MONITORING / "prometheus" / name, tmp_path)
    shutil.copytree(MONITORING / "prometheus" / "nodes", tmp_path / "nodes")
    for command in (
        ["promtool", "check", "config", tmp_path / "prometheus.yml"],
        ["amtool", "check-config", MONITORING / "alertmanager" / "alertmanager.yml"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_dashboard_shows_what_an_operator_asks_for() -> None:
    shown = " ".join(parameter.values[0] for parameter in QUERIES)
    for metric in (
        "hessquik_requests_total",
        "hessquik_rows_total",
        "hessquik_queue_seconds_bucket",
        "hessquik_batch_rows_sum",
        "hessquik_batch_requests_sum",
        "hessquik_queue_requests",
        "hessquik_queue_rows",
        "hessquik_workers",
        "hessquik_worker_restarts_total",
        "hessquik_front_restarts_total",
        "hessquik_start_time_seconds",
        "hessquik_model_outdated",
        "hessquik_device_memory_bytes",
        "hessquik_device_busy_seconds_total",
        "hessquik_ready",
        "hessquik_models",
        "hessquik_queue_age_seconds",
        "hessquik_model_requests_total",
        "hessquik_model_request_seconds_bucket",
        "process_resident_memory_bytes",
    ):
        assert metric in shown


def test_provisioning_points_at_the_dashboard_and_its_data_source() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    provisioning = MONITORING / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "hessquik.yml").read_text())["providers"]
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {source["uid"]}
    assert source["url"] == "http://prometheus:9090"
    assert "prometheus" in compose
    mounted = {volume.split(":")[0]: volume.split(":")[1] for volume in compose["grafana"]["volumes"]}
    assert mounted["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert mounted["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
