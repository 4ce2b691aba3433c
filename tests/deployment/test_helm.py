"""The Helm chart: linted and rendered by Helm's own code, and the same objects as the Kustomize overlays."""

from __future__ import annotations

import copy
import json
import runpy
import shutil
from operator import itemgetter
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

from service.settings import Settings
from tests.deployment.test_kubernetes import KUBERNETES, OVERLAYS, VERSIONS, by_kind, kustomize
from tests.live import ROOT

with_settings, SET_BY_THE_CHART = itemgetter("with_settings", "SET_BY_THE_CHART")(
    runpy.run_path(str(ROOT / "deploy" / "helm_schema.py"))
)

CHART = ROOT / "deploy" / "helm"
VALUES = {"cpu": {}, "gpu": yaml.safe_load((CHART / "gpu.yaml").read_text())}
INSTANCE = "app.kubernetes.io/instance"
#: Kinds of Kubernetes' own, whose schemas are at hand.
VALIDATED = {"Deployment", "Service", "HorizontalPodAutoscaler", "NetworkPolicy", "PodDisruptionBudget"}
ERROR = 3


def render(values: dict[str, Any], release: str = "hessquik") -> dict[str, dict[str, Any]]:
    """Return what ``helm template`` prints, by kinds."""
    with helm_python.Chart.load(CHART) as chart:
        files = chart.render(values, name=release, namespace="default")
    manifests = [yaml.safe_load(text) for name, text in files.items() if name.endswith(".yaml")]
    return by_kind(filter(None, manifests))


def without_instance(manifest: Any) -> Any:
    """Return a manifest without the label that distinguishes releases, which the overlays do not have."""
    if isinstance(manifest, dict):
        return {key: without_instance(value) for key, value in manifest.items() if key != INSTANCE}
    return [without_instance(one) for one in manifest] if isinstance(manifest, list) else manifest


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
def test_lint_finds_no_fault(values: dict[str, Any]) -> None:
    report = helm_python.lint(CHART, values, strict=True, kube_version="v1.37.0")
    assert report["errors"] == []
    assert [one["error"] for one in report["messages"]] == ["icon is recommended"]


def test_lint_finds_a_fault(tmp_path: Path) -> None:
    shutil.copytree(CHART, tmp_path / "hessquik")
    with (tmp_path / "hessquik" / "templates" / "service.yaml").open("a") as file:
        file.write("{{ .Values.missing.entry }}\n")
    assert max(one["severity"] for one in helm_python.lint(tmp_path / "hessquik")["messages"]) == ERROR


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_chart_and_overlay_are_the_same_objects(overlay: str) -> None:
    expect_same(render(VALUES[overlay]), KUBERNETES / overlay)


def test_releases_of_one_namespace_do_not_meet() -> None:
    one, other = render({}, "one"), render({}, "other")
    for kind, manifest in one.items():
        assert manifest["metadata"]["name"] == "one", kind
    labels = [which["Deployment"]["spec"]["template"]["metadata"]["labels"] for which in (one, other)]
    assert labels[0] != labels[1]
    assert one["Service"]["spec"]["selector"] == labels[0]
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert one[kind]["spec"]["selector"]["matchLabels"] == labels[0]
    assert one["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels[0]
    assert one["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == "one"


def test_values_become_settings_models_and_a_monitor() -> None:
    values = {
        "settings": {
            "watch_s": 5,
            "access_log": True,
            "max_body_bytes": 33554432,
            "outside": "refuse",
            "host": "::",  # in a cluster with IPv6 alone
        },
        "modelsImage": "registry.example.com/hessquik-models:1",
        "podMonitor": {"enabled": True},
        "nodeSelector": {"pool": "fast"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "allowedNamespaces": [],
    }
    manifests = render(values)
    kubernetes_validate.validate(copy.deepcopy(manifests["Deployment"]), VERSIONS[0], strict=True)
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    environment = {one["name"]: one["value"] for one in pod["containers"][0]["env"]}
    given = {name.removeprefix("HESSQUIK_").lower(): value for name, value in environment.items()}
    given.pop("secrets")  # a folder of the pod
    settings = Settings(**given)  # numbers are written out, not in exponents
    assert (settings.watch_s, settings.access_log, settings.max_body_bytes) == (5, True, 33554432)
    assert settings.host == "::"
    (volume,) = [one for one in pod["volumes"] if one["name"] == "models"]
    assert volume["image"]["reference"] == values["modelsImage"]
    assert (pod["nodeSelector"], pod["tolerations"]) == (values["nodeSelector"], values["tolerations"])
    assert manifests["NetworkPolicy"]["spec"]["ingress"][0]["from"] == [{"podSelector": {}}]
    monitor = yaml.safe_load((KUBERNETES / "monitoring" / "podmonitor.yaml").read_text())
    assert without_instance(manifests["PodMonitor"]) == monitor
    values["podMonitor"] = {"enabled": True, "key": ""}
    del monitor["spec"]["podMetricsEndpoints"][0]["authorization"]
    assert without_instance(render(values)["PodMonitor"]) == monitor, "where there are no keys"


def test_pod_is_given_the_time_that_its_drain_takes() -> None:
    for settings, grace_s in (({}, 40), ({"drain_s": 20}, 40), ({"drain_s": 60}, 80), ({"drain_s": 1.5}, 22)):
        pod = render({"settings": settings})["Deployment"]["spec"]["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] == grace_s, settings


def test_cluster_may_ask_for_labels_variables_and_a_secret_of_its_registry() -> None:
    """kube-prometheus-stack wants a label; settings of OpenTelemetry are variables."""
    variables = [{"name": "OTEL_TRACES_SAMPLER", "value": "parentbased_traceidratio"}]
    values = {
        "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "env": variables,
        "imagePullSecrets": [{"name": "registry"}],
    }
    manifests = render(values)
    labels = manifests["PodMonitor"]["metadata"]["labels"]
    assert labels == render({})["Deployment"]["metadata"]["labels"] | {"release": "prometheus"}
    kubernetes_validate.validate(copy.deepcopy(manifests["Deployment"]), VERSIONS[0], strict=True)
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["env"][-1:] == variables
    assert pod["imagePullSecrets"] == values["imagePullSecrets"]


def test_names_that_yaml_takes_for_something_else_stay_names() -> None:
    values = {
        "keysSecret": "123",
        "podMonitor": {"enabled": True, "key": "1e3"},
        "tracing": {"endpoint": "http://collector:4318", "namespace": "0x10"},
    }
    for release in ("true", "null", "on"):
        for kind, manifest in render(values, release).items():
            metadata = manifest["metadata"]
            assert (metadata["name"], metadata["labels"][INSTANCE]) == (release, release), kind
            if kind in VALIDATED:
                kubernetes_validate.validate(copy.deepcopy(manifest), VERSIONS[0], strict=True)
    monitor = render(values)["PodMonitor"]["spec"]["podMetricsEndpoints"][0]
    assert monitor["authorization"]["credentials"] == {"name": "123", "key": "1e3"}


def test_schema_has_the_settings_of_the_service() -> None:
    text = (CHART / "values.schema.json").read_text()
    assert text == with_settings(text), "run `python deploy/helm_schema.py`"
    settings = json.loads(text)["properties"]["settings"]
    assert settings["properties"].keys() == Settings.model_fields.keys() - SET_BY_THE_CHART
    assert settings["additionalProperties"] is False


def test_tracing_is_that_of_the_kustomize_component(tmp_path: Path) -> None:
    folder = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, folder)
    overlay = folder / "cpu" / "kustomization.yaml"
    overlay.write_text(overlay.read_text() + "components: [../tracing]\n")
    expect_same(render({"tracing": {"endpoint": "http://collector.monitoring:4318"}}), folder / "cpu")


def expect_same(rendered: dict[str, dict[str, Any]], overlay: Path) -> None:
    """Check that the chart renders the objects of an overlay, and that these are valid."""
    expected = by_kind(kustomize(overlay))
    for manifests in (rendered, expected):
        pod = manifests["Deployment"]["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        for named in (container["env"], container["volumeMounts"], pod["volumes"]):  # their order means nothing
            named.sort(key=lambda one: one["name"])
    assert {kind: without_instance(one) for kind, one in rendered.items()} == expected
    for version in VERSIONS:
        for manifest in rendered.values():
            kubernetes_validate.validate(copy.deepcopy(manifest), version, strict=True)


@pytest.mark.parametrize(
    "values",
    [
        {"setings": {"watch_s": 5}},
        {"settings": {"HESSQUIK_WATCH_S": 5}},
        {"settings": {"max_row": 5}},
        {"settings": {"max_rows": 0}},
        *({"settings": {name: "1"}} for name in sorted(SET_BY_THE_CHART)),
        {"podMonitor": True},
        {"tracing": {"endpoint": "collector"}},
        {"image": {"tag": ""}},
        {"resources": {"limits": {"cpu": 1, "memory": None}}},
        {"autoscaling": {"minReplicas": 0}},
        {"device": "cpu:0"},
        {"device": "cuda,cuda:1"},
        {"env": [{"name": "HESSQUIK_PORT", "value": "9000"}]},
    ],
    ids=str,
)
def test_values_that_do_not_fit_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(helm_python.HelmError, match="values don't meet the specifications of the schema"):
        render(values)


def test_fewest_pods_are_at_most_the_most() -> None:
    with pytest.raises(helm_python.HelmError, match="expected maxReplicas to be at least minReplicas"):
        render({"autoscaling": {"minReplicas": 9, "maxReplicas": 2}})
