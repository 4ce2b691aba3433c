"""The Kubernetes and KServe manifests fit the published schemas, and each other."""

from __future__ import annotations

import copy
import importlib.resources
import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft7Validator
from jsonschema.exceptions import ValidationError

from service.app import OPEN_PATHS, create_app
from service.settings import Settings

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
#: The newest and an old one that clusters still run.
VERSIONS = ("1.37", "1.29")
OVERLAYS = ("cpu", "gpu")
BASE = sorted(path.name for path in (KUBERNETES / "base").glob("*.yaml") if path.name != "kustomization.yaml")
PODS = (*OVERLAYS, "kserve/servingruntime.yaml")
KSERVE = {"servingruntime.yaml": "V1alpha1ServingRuntime", "inferenceservice.yaml": "V1beta1InferenceService"}


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def kserve_validator(kind: str) -> Draft7Validator:
    """Return a strict validator with KServe's types from its SDK and Kubernetes' from its schema."""
    schemas = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / "v1.37.0-local-strict"
    definitions = json.loads((schemas / "_definitions.json").read_text())["$defs"]
    definitions |= json.loads((DEPLOY / "kserve" / "kserve.schema.json").read_text())["$defs"]
    return Draft7Validator({"$ref": f"#/$defs/{kind}", "$defs": definitions})


def merged(manifest: Any, patch: Any) -> Any:
    """Return a strategic merge, as Kustomize makes it: lists of named things are merged by name."""
    if isinstance(manifest, dict) and isinstance(patch, dict):
        return manifest | {key: merged(manifest.get(key), value) for key, value in patch.items()}
    if isinstance(manifest, list) and isinstance(patch, list) and all("name" in one for one in [*manifest, *patch]):
        changed = {one["name"]: one for one in manifest}
        for one in patch:
            changed[one["name"]] = merged(changed.get(one["name"]), one)
        return list(changed.values())
    return copy.deepcopy(patch)


def render(overlay: str) -> dict[str, Any]:
    """Return the deployment that an overlay makes."""
    kustomization = read(KUBERNETES / overlay / "kustomization.yaml")
    assert kustomization["resources"] == ["../base"]
    deployment = read(KUBERNETES / "base" / "deployment.yaml")
    for patch in kustomization.get("patches", []):
        deployment = merged(deployment, read(KUBERNETES / overlay / patch["path"]))
    (image,) = kustomization["images"]
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    assert container["image"] == image["name"]
    container["image"] = f"{image['newName']}:{image['newTag']}"
    return deployment


@pytest.fixture(name="deployment", scope="module", params=OVERLAYS)
def render_deployment(request: pytest.FixtureRequest) -> dict[str, Any]:
    return render(request.param)


@pytest.fixture(name="container", scope="module")
def find_container(deployment: dict[str, Any]) -> dict[str, Any]:
    return deployment["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", BASE, ids=lambda name: name[:-5])
def test_manifest_fits_the_published_schema(name: str, version: str) -> None:
    kubernetes_validate.validate(read(KUBERNETES / "base" / name), version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_the_overlays_make_fits_the_published_schema(deployment: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(deployment, version, strict=True)


def test_models_may_come_as_an_image_volume() -> None:
    patch = read(KUBERNETES / "models" / "image-volume.yaml")
    patched = merged(render("gpu"), patch)
    kubernetes_validate.validate(patched, VERSIONS[0], strict=True)
    pod = patched["spec"]["template"]["spec"]
    assert {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]} >= {"/models", "/tmp"}
    assert [volume["name"] for volume in pod["volumes"]] == ["keys", "tmp", "models"]


def test_gpu_overlay_asks_for_a_gpu_and_needs_no_spare_one() -> None:
    cpu, gpu = render("cpu"), render("gpu")
    limits = [one["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"] for one in (cpu, gpu)]
    assert ["nvidia.com/gpu" in limit for limit in limits] == [False, True]
    assert cpu["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert gpu["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    devices = [one["spec"]["template"]["spec"]["containers"][0]["env"][0]["value"] for one in (cpu, gpu)]
    assert devices == ["cpu", "cuda"]


def test_keys_come_as_files_that_the_service_reads_again(
    deployment: dict[str, Any], container: dict[str, Any]
) -> None:
    (folder,) = [one["value"] for one in container["env"] if one["name"] == "HESSQUIK_SECRETS"]
    (mount,) = [one for one in container["volumeMounts"] if one["mountPath"] == folder]
    assert "subPath" not in mount, "a file that is mounted alone does not follow its secret"
    (volume,) = [one for one in deployment["spec"]["template"]["spec"]["volumes"] if one["name"] == mount["name"]]
    names = {one["path"].removeprefix("hessquik_") for one in volume["secret"]["items"]}
    assert names == {"api_keys", "admin_keys"} <= Settings.model_fields.keys()
    assert volume["secret"]["optional"]


def test_network_policy_lets_the_port_in_and_nothing_out(
    deployment: dict[str, Any], container: dict[str, Any]
) -> None:
    spec = read(KUBERNETES / "base" / "networkpolicy.yaml")["spec"]
    assert spec["podSelector"]["matchLabels"] == deployment["spec"]["template"]["metadata"]["labels"]
    assert (spec["policyTypes"], spec["egress"]) == (["Ingress", "Egress"], [])
    (rule,) = spec["ingress"]
    assert {port["port"] for port in rule["ports"]} == {port["name"] for port in container["ports"]}


def test_autoscaler_follows_a_metric_that_the_service_has_and_the_adapter_passes_on() -> None:
    metrics = read(KUBERNETES / "base" / "horizontalpodautoscaler.yaml")["spec"]["metrics"]
    (name,) = [one["pods"]["metric"]["name"] for one in metrics if one["type"] == "Pods"]
    (rule,) = read(KUBERNETES / "monitoring" / "adapter-values.yaml")["rules"]["custom"]
    assert rule["name"]["matches"] == name
    assert rule["seriesQuery"].startswith(name + "{")
    core = create_app(Settings(device="cpu")).core
    assert f"\n{name} 0.0\n" in core.metrics.text().decode()


def test_pod_monitor_scrapes_the_pods_under_the_name_that_the_rules_know(
    deployment: dict[str, Any], container: dict[str, Any]
) -> None:
    monitor = read(KUBERNETES / "monitoring" / "podmonitor.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    assert monitor["spec"]["selector"]["matchLabels"] == labels
    assert labels[monitor["spec"]["jobLabel"]] == "hessquik"
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in container["ports"]}
    assert endpoint["path"] == "/metrics"


def test_kubernetes_schema_refuses_an_unknown_field(deployment: dict[str, Any]) -> None:
    broken = copy.deepcopy(deployment)
    broken["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        kubernetes_validate.validate(broken, VERSIONS[0], strict=True)


@pytest.mark.parametrize("name", KSERVE)
def test_kserve_manifest_fits_the_published_models(name: str) -> None:
    kserve_validator(KSERVE[name]).validate(read(DEPLOY / "kserve" / name))


@pytest.mark.parametrize(
    ("name", "path", "field"),
    [
        ("servingruntime.yaml", ("spec",), "supportedModels"),
        ("servingruntime.yaml", ("spec", "containers", 0), "ressources"),
        ("inferenceservice.yaml", ("spec", "predictor", "model"), "modelformat"),
    ],
    ids=["kserve", "kubernetes-inside-kserve", "model"],
)
def test_kserve_schema_refuses_an_unknown_field(name: str, path: tuple[str | int, ...], field: str) -> None:
    manifest: Any = read(DEPLOY / "kserve" / name)
    place = manifest
    for key in path:
        place = place[key]
    place[field] = {}
    with pytest.raises(ValidationError, match=field):
        kserve_validator(KSERVE[name]).validate(manifest)


def test_kustomization_lists_every_manifest() -> None:
    assert sorted(read(KUBERNETES / "base" / "kustomization.yaml")["resources"]) == BASE


@pytest.mark.parametrize(
    "name", ["service.yaml", "poddisruptionbudget.yaml", "horizontalpodautoscaler.yaml"], ids=lambda name: name[:-5]
)
def test_manifest_points_at_the_deployment(name: str, deployment: dict[str, Any], container: dict[str, Any]) -> None:
    spec = read(KUBERNETES / "base" / name)["spec"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    match name:
        case "service.yaml":
            assert spec["selector"] == labels
            assert {port["targetPort"] for port in spec["ports"]} <= {port["name"] for port in container["ports"]}
        case "poddisruptionbudget.yaml":
            assert spec["selector"]["matchLabels"] == labels
            assert spec["maxUnavailable"] == 1
        case _:
            target = spec["scaleTargetRef"]
            assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
            assert "replicas" not in deployment["spec"]


def find_pod(name: str) -> dict[str, Any]:
    if name in OVERLAYS:
        return render(name)["spec"]["template"]["spec"]
    return read(DEPLOY / name)["spec"]


@pytest.mark.parametrize("name", PODS)
def test_probes_ask_the_right_questions_without_a_key(name: str) -> None:
    container = find_pod(name)["containers"][0]
    expected = {"startupProbe": "/readyz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}
    assert {probe: container[probe]["httpGet"]["path"] for probe in expected} == expected
    assert set(expected.values()) <= OPEN_PATHS


@pytest.mark.parametrize("name", PODS)
def test_image_settings_in_the_manifest_exist(name: str) -> None:
    names = {
        variable["name"].removeprefix("HESSQUIK_").lower() for variable in find_pod(name)["containers"][0]["env"]
    }
    assert names <= Settings.model_fields.keys()


@pytest.mark.parametrize("name", PODS)
def test_pod_is_confined(name: str) -> None:
    pod = find_pod(name)
    container = pod["containers"][0]
    context = pod.get("securityContext", {}) | container["securityContext"]
    assert context["runAsNonRoot"]
    assert context["runAsUser"] == 10001
    assert context["readOnlyRootFilesystem"]
    assert not context["allowPrivilegeEscalation"]
    assert context["capabilities"] == {"drop": ["ALL"]}
    seccomp = context["seccompProfile"]
    assert seccomp == {"type": "RuntimeDefault"}
    assert container["resources"]["limits"].keys() - {"nvidia.com/gpu"} == {"memory"}
    assert {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")} == {"/tmp"}


def test_grace_period_outlasts_the_drain(deployment: dict[str, Any], container: dict[str, Any]) -> None:
    pause_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > pause_s + Settings().drain_s


def test_grace_period_of_kserve_outlasts_the_drain() -> None:
    container = find_pod("kserve/servingruntime.yaml")["containers"][0]
    pause_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    predictor = read(DEPLOY / "kserve" / "inferenceservice.yaml")["spec"]["predictor"]
    assert predictor["terminationGracePeriodSeconds"] > pause_s + Settings().drain_s


def test_service_links_cannot_overwrite_settings(deployment: dict[str, Any]) -> None:
    """A Service called hessquik would put HESSQUIK_PORT=tcp://… into every pod's environment."""
    assert deployment["spec"]["template"]["spec"]["enableServiceLinks"] is False
