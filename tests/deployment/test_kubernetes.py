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

from service.app import OPEN_PATHS
from service.settings import Settings

DEPLOY = Path(__file__).parents[2] / "deploy"
#: The newest and an old one that clusters still run.
VERSIONS = ("1.37", "1.29")
MANIFESTS = sorted(path for path in (DEPLOY / "kubernetes").glob("*.yaml") if path.name != "kustomization.yaml")
PODS = ("kubernetes/deployment.yaml", "kserve/servingruntime.yaml")
KSERVE = {"servingruntime.yaml": "V1alpha1ServingRuntime", "inferenceservice.yaml": "V1beta1InferenceService"}


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def kserve_validator(kind: str) -> Draft7Validator:
    """KServe's own types from its SDK, Kubernetes' from its schema, unknown fields refused in both."""
    schemas = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / "v1.37.0-local-strict"
    definitions = json.loads((schemas / "_definitions.json").read_text())["$defs"]
    definitions |= json.loads((DEPLOY / "kserve" / "kserve.schema.json").read_text())["$defs"]
    return Draft7Validator({"$ref": f"#/$defs/{kind}", "$defs": definitions})


@pytest.fixture(name="deployment", scope="module")
def read_deployment() -> dict[str, Any]:
    return read(DEPLOY / "kubernetes" / "deployment.yaml")


@pytest.fixture(name="container", scope="module")
def find_container(deployment: dict[str, Any]) -> dict[str, Any]:
    return deployment["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifest_fits_the_published_schema(path: Path, version: str) -> None:
    kubernetes_validate.validate(read(path), version, strict=True)


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
    listed = read(DEPLOY / "kubernetes" / "kustomization.yaml")["resources"]
    assert sorted(listed) == [path.name for path in MANIFESTS]


@pytest.mark.parametrize(
    "name", ["service.yaml", "poddisruptionbudget.yaml", "horizontalpodautoscaler.yaml"], ids=lambda name: name[:-5]
)
def test_manifest_points_at_the_deployment(name: str, deployment: dict[str, Any], container: dict[str, Any]) -> None:
    spec = read(DEPLOY / "kubernetes" / name)["spec"]
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
    spec = read(DEPLOY / name)["spec"]
    return spec.get("template", {}).get("spec", spec)


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
    assert container["resources"]["limits"].keys() >= {"memory", "nvidia.com/gpu"}
    assert {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")} == {"/tmp"}


def test_grace_period_outlasts_the_drain(deployment: dict[str, Any], container: dict[str, Any]) -> None:
    pause_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > pause_s + Settings().drain_s


def test_service_links_cannot_overwrite_settings(deployment: dict[str, Any]) -> None:
    """A Service called hessquik would put HESSQUIK_PORT=tcp://… into every pod's environment."""
    assert deployment["spec"]["template"]["spec"]["enableServiceLinks"] is False
