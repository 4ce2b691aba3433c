"""Prometheus itself scrapes a live service, and every query of the dashboard and of the alerts finds data."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.live import ROOT, LiveServer

pytestmark = pytest.mark.xdist_group("monitoring")

MONITORING = ROOT / "deploy"
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboards" / "hessquik.json").read_text())
QUERIES = [
    pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
]
ALERTS = [
    rule
    for group in yaml.safe_load((MONITORING / "prometheus" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
START_S = 60.0
#: Scrapes a second apart: a rate needs two, and the queries look back this long.
RANGE = "30s"

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")), reason="needs Debian's package prometheus"
)


class Prometheus:
    """Prometheus with the shipped configuration, the target and the pace of scraping apart."""

    def __init__(self, folder: Path, target: str) -> None:
        config = yaml.safe_load((MONITORING / "prometheus" / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        (job,) = config["scrape_configs"]
        job["static_configs"] = [{"targets": [target]}]
        key = folder / "key"
        key.write_text("secret")
        job["authorization"] = {"credentials_file": str(key)}
        shutil.copy(MONITORING / "prometheus" / "alerts.yml", folder)
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
        self._folder = folder
        self.url = ""

    def wait(self, ask: Callable[[], object]) -> None:
        """Until it has scraped the target several times, which is asked in between."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, (self._folder / "log").read_text()
            match = re.search(r'msg="Listening on" address=127\.0\.0\.1:(\d+)', (self._folder / "log").read_text())
            if match is not None:
                self.url = f"http://127.0.0.1:{match[1]}"
                if self.query('count_over_time(up{job="hessquik"}[1m]) >= 4'):
                    return
            ask()
            time.sleep(0.1)
        pytest.fail("Prometheus did not scrape the service")

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return what the expression finds now."""
        reply = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}).raise_for_status().json()
        return list(reply["data"]["result"])

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(20)
        self._log.close()


@pytest.fixture(name="prometheus", scope="module")
def scrape(shipped_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with LiveServer(shipped_models, settings={"api_keys": "secret"}) as server:
        prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), f"127.0.0.1:{server.port}")
        try:
            with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer secret"}) as client:
                body = {"inputs": [[0.1, 0.2]]}
                prometheus.wait(lambda: client.post("/v1/models/peaks/hessian", json=body).raise_for_status())
            yield prometheus
        finally:
            prometheus.close()


def expand(expression: str) -> str:
    """Return an expression with its variables filled in, as Grafana does."""
    return expression.replace("$__rate_interval", RANGE).replace("$instance", ".*")


@needs_prometheus
@pytest.mark.parametrize("expression", QUERIES)
def test_dashboard_query_finds_data(expression: str, prometheus: Prometheus) -> None:
    found = prometheus.query(expand(expression))
    assert found
    assert all(sample["value"][1] != "NaN" for sample in found)


@needs_prometheus
@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_alert_asks_for_metrics_that_exist_and_is_quiet(rule: dict[str, Any], prometheus: Prometheus) -> None:
    assert prometheus.query(rule["expr"]) == []
    for metric in re.findall(r"\b(?:hessquik_\w+|up)\b(?=[{\[])", rule["expr"]):
        assert prometheus.query(metric), metric


@needs_prometheus
def test_query_for_a_metric_that_does_not_exist_finds_nothing(prometheus: Prometheus) -> None:
    assert prometheus.query("hessquik_requests_totally") == []


@needs_prometheus
def test_configuration_is_what_prometheus_takes(tmp_path: Path) -> None:
    text = (MONITORING / "prometheus" / "prometheus.yml").read_text()
    (tmp_path / "key").touch()
    (tmp_path / "prometheus.yml").write_text(text.replace("/run/secrets/hessquik_metrics_key", str(tmp_path / "key")))
    shutil.copy(MONITORING / "prometheus" / "alerts.yml", tmp_path)
    done = subprocess.run(
        ["promtool", "check", "config", tmp_path / "prometheus.yml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_dashboard_shows_what_an_operator_asks_for() -> None:
    shown = " ".join(parameter.values[0] for parameter in QUERIES)
    for metric in (
        "hessquik_requests_total",
        "hessquik_rows_total",
        "hessquik_request_seconds_bucket",
        "hessquik_queue_seconds_bucket",
        "hessquik_batch_rows_sum",
        "hessquik_batch_requests_sum",
        "hessquik_queue_requests",
        "hessquik_queue_rows",
        "hessquik_workers",
        "hessquik_worker_restarts_total",
        "hessquik_device_memory_bytes",
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
