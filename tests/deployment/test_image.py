"""The promises of the Dockerfile and the compose file. ``make image-test`` builds and runs the image itself."""

from __future__ import annotations

import copy
import importlib.resources
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from service.settings import Settings

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
GPU = yaml.safe_load((ROOT / "deploy" / "compose" / "gpu.yml").read_text())
#: Instructions of the Dockerfile, comments and continuations removed, stage by stage.
STAGES = [
    [line.split(maxsplit=1) for line in stage.splitlines() if line.strip()]
    for stage in re.split(
        r"^(?=FROM )", re.sub(r"^\s*#.*\n|\\\n", "", DOCKERFILE, flags=re.MULTILINE), flags=re.MULTILINE
    )
]
PINNED = re.compile(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}")
KILLED_AFTER_S = 30.0


def instructions(name: str, stage: int = -1) -> list[str]:
    return [words[1] for words in STAGES[stage] if words[0] == name]


@pytest.fixture(name="compose", scope="module")
def read_compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def compose_validator() -> Draft202012Validator:
    vendored = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    return Draft202012Validator(json.loads(vendored.read_text()))


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_base_is_pinned_by_digest_and_every_stage_starts_from_it() -> None:
    (base,) = re.findall(r"^ARG BASE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert PINNED.fullmatch(base)
    assert {instructions("FROM", stage)[0].split()[0] for stage in range(1, len(STAGES))} == {
        "${BASE}",
        "dependencies",
    }


def test_everything_is_installed_by_hash_or_without_an_index() -> None:
    """But for the C compiler, which comes from the distribution; what only builds stays in the stage that does."""
    lines = [line for line in DOCKERFILE.replace("\\\n", "").split("RUN ") if " install " in line]
    locked, compiler, mypyc, project = (re.sub(" +", " ", line) for line in lines)
    assert compiler.startswith("apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev &&")
    assert DOCKERFILE.index("apt-get") < DOCKERFILE.index(" AS service")
    assert "--require-hashes" in locked
    assert "--require-hashes" in mypyc
    assert "--target /compiler" in mypyc
    assert "--no-index" in project
    assert project.startswith("HESSQUIK_KERNEL=required HESSQUIK_COMPILE=1 "), "or a slow image is built"
    assert not re.search(
        r"\b(apt-get|apk|curl|wget|git)\b", DOCKERFILE.replace("RUN apt-get", "").replace("&& apt-get", "")
    )


def test_dependencies_are_a_layer_that_a_change_of_the_code_leaves_alone() -> None:
    """The stage of dependencies takes the lock and nothing of the project; the code comes from one on top of it."""
    names = [instructions("FROM", stage)[0].split()[-1] for stage in range(1, len(STAGES))]
    assert names == ["dependencies", "code", "service"]
    assert instructions("FROM", 2) == ["dependencies AS code"]
    taken = {copied.split()[0] for copied in instructions("COPY", 1)}
    assert taken == {"requirements/${LOCK}.lock", "deploy/image/trim.py"}
    sources = [copied.split()[:2] for copied in instructions("COPY") if copied.startswith("--from")]
    assert sources == [["--from=dependencies", "/opt/hessquik"], ["--from=code", "/layer"]]


def test_module_that_triton_compiles_is_built_where_the_compiler_is() -> None:
    """At its first start a service on a GPU would look for a compiler, which the image does not have."""
    assert any("python -P -m hessquik.backends.gpu_driver" in command for command in instructions("RUN", 2))


def test_image_has_the_labels_that_registries_show() -> None:
    (labels,) = instructions("LABEL")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', labels))
    assert found.keys() == {"title", "description", "licenses", "version", "revision"}
    assert found["title"] == project["name"]
    assert found["licenses"] == project["license"]
    assert instructions("ARG")[-2:] == [f"VERSION={project['version']}", "REVISION=unknown"]
    # Whoever builds says the revision.
    assert "--build-arg REVISION=$$(git rev-parse HEAD)" in (ROOT / "Makefile").read_text()
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    (build,) = [step for step in release["jobs"]["image"]["steps"] if "build-push-action" in step.get("uses", "")]
    assert "REVISION=${{ github.sha }}" in build["with"]["build-args"].splitlines()


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_start_without_a_gpu_is_refused_with_status_3(device: str) -> None:
    """As the CUDA image starts, where there is none."""
    if Path("/dev/nvidiactl").exists():
        pytest.skip("needs a machine without a GPU, on which asking for one is refused")
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "HESSQUIK_DEVICE": device, "HESSQUIK_PORT": "0"}
    command = [sys.executable, "-m", "service", "serve", str(ROOT / "models")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "CUDA device" in done.stderr


def test_trimming_keeps_licences_and_what_pages_load(tmp_path: Path) -> None:
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    kept = [
        "torch/lib/libtorch.so",
        "torch/bin/torch_shm_manager",
        "torch/testing/a.py",
        "plotly/__init__.py",
        "plotly/package_data/plotly.min.js",
    ]
    gone = [
        "torch/test/a",
        "torch/include/a/b.h",
        "torch/bin/protoc",
        "plotly/graph_objs/a.py",
        "plotly/package_data/x",
    ]
    for name in kept + gone:
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text("x" * 10)
    info = packages / "torch-2.dist-info"
    (info / "licenses").mkdir(parents=True)
    (info / "METADATA").write_text("Name: torch\nVersion: 2\nLicense-Expression: BSD-3-Clause\n")
    (info / "licenses" / "LICENSE").write_text("Redistribution and use …")
    done = subprocess.run(
        [sys.executable, ROOT / "deploy" / "image" / "trim.py", tmp_path], capture_output=True, text=True, check=True
    )
    assert done.stdout == "0 MB removed\n"
    assert {name for name in kept + gone if (packages / name).exists()} == set(kept)
    notices = (tmp_path / "THIRD_PARTY_LICENSES.txt").read_text()
    assert "torch 2: BSD-3-Clause" in notices
    assert "Redistribution and use" in notices


def test_last_stage_runs_as_nobody_in_particular() -> None:
    assert instructions("USER") == ["10001:10001"]
    assert [words[0] for words in STAGES[-1]].index("USER") > [words[0] for words in STAGES[-1]].index("COPY")
    assert not any("--chown" in copied for copied in instructions("COPY"))
    (owned,) = re.findall(r"chown hessquik: (\S+)", DOCKERFILE)
    (kept,) = (volume.split(":")[1] for volume in GPU["services"]["hessquik"]["volumes"])
    assert owned == kept == GPU["services"]["hessquik"]["environment"]["TRITON_CACHE_DIR"]


def test_models_are_readable_by_the_service_whatever_the_checkout_allows() -> None:
    """By modes that every builder knows: Docker before 28 and buildah refuse letters."""
    for text in (DOCKERFILE, (ROOT / "deploy" / "kubernetes" / "models" / "Dockerfile").read_text()):
        assert re.search(r"^COPY --chmod=755 (models|\.) /", text, re.MULTILINE)


def test_last_stage_copies_no_tests_and_no_tools() -> None:
    assert [copied.split()[-1] for copied in instructions("COPY")] == [
        "/opt/hessquik",
        "/opt/hessquik/sbom.cdx.json",
        "/opt/hessquik",
        "/models",
    ]
    kept = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    packages = {"hessquik", "hessquik_client", "service"}
    parts = {"requirements", "pyproject.toml", "README.md", "LICENSE", "models", *packages}
    assert kept == parts | {"deploy/image/trim.py"}
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()


def test_command_is_in_exec_form_and_health_is_asked_without_a_shell() -> None:
    assert [json.loads(line) for line in instructions("ENTRYPOINT") + instructions("CMD")] == [
        ["hessquik"],
        ["serve"],
    ]
    (health,) = instructions("HEALTHCHECK")
    options, command = health.split("CMD")
    assert json.loads(command) == ["python", "-m", "hessquik_service.healthcheck"]
    seconds = dict(re.findall(r"--(\w[\w-]*)=(\d+)", options))
    from service.healthcheck import TIMEOUT_S

    assert TIMEOUT_S < int(seconds["timeout"]) <= int(seconds["interval"])
    # So that `docker compose up --wait` waits for as long as the service gives its workers and models.
    assert int(seconds["start-period"]) >= Settings().start_timeout_s + Settings().load_timeout_s


def test_stop_signal_is_the_one_that_drains_and_outlasts_the_drain(compose: dict[str, Any]) -> None:
    assert instructions("STOPSIGNAL") == ["SIGTERM"]
    assert Settings().drain_s < KILLED_AFTER_S
    assert compose["services"]["hessquik"]["stop_grace_period"] == f"${{HESSQUIK_STOP_GRACE:-{KILLED_AFTER_S:.0f}s}}"


def test_image_sets_only_settings_that_exist() -> None:
    environment = re.findall(r"HESSQUIK_(\w+)=", " ".join(instructions("ENV")))
    assert environment
    assert {name.lower() for name in environment} <= Settings.model_fields.keys()


def test_compose_files_fit_the_published_schema(compose: dict[str, Any]) -> None:
    compose_validator().validate(compose)
    compose_validator().validate(GPU)


def test_compose_schema_refuses_an_unknown_key(compose: dict[str, Any]) -> None:
    broken = copy.deepcopy(compose)
    broken["services"]["hessquik"]["cap_dropp"] = ["ALL"]
    with pytest.raises(ValidationError, match="cap_dropp"):
        compose_validator().validate(broken)


@pytest.mark.parametrize("name", ["hessquik", "prometheus", "alertmanager", "grafana"])
def test_compose_service_is_confined(name: str, compose: dict[str, Any]) -> None:
    service = compose["services"][name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert service["pids_limit"]
    assert all(port.startswith(("127.0.0.1:", "${HESSQUIK_PUBLISH:-127.0.0.1}:")) for port in service["ports"])
    mounts = [volume for volume in service["volumes"] if not re.match(r"\w+:", volume)]
    assert mounts
    assert all(mount.endswith(":ro") for mount in mounts)
    assert not service.keys() & {"privileged", "cap_add", "network_mode", "pid", "ipc", "devices"}
    assert PINNED.fullmatch(service["image"]) or "build" in service


def test_a_plain_up_starts_the_service_alone_and_the_profile_what_watches_it(compose: dict[str, Any]) -> None:
    watching = {name for name, service in compose["services"].items() if service.get("profiles") == ["monitoring"]}
    assert watching == {"prometheus", "alertmanager", "grafana"}
    assert compose["services"].keys() - watching == {"hessquik"}
    assert "profiles" not in compose["services"]["hessquik"]


def test_gpu_file_changes_image_memory_and_devices_and_nothing_that_confines(compose: dict[str, Any]) -> None:
    (service,) = GPU["services"].values()
    assert GPU["services"].keys() == {"hessquik"}
    assert service.keys() == {"image", "build", "mem_limit", "environment", "volumes", "deploy"}
    assert service["build"]["args"] == {"TARGET": "cuda"}
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


def test_every_setting_passes_through_the_env_file(compose: dict[str, Any], tmp_path: Path) -> None:
    """The file takes any setting; the container's own wiring comes from the compose file."""
    service = compose["services"]["hessquik"]
    assert service["env_file"] == [{"path": "${HESSQUIK_ENV:-hessquik.env}", "required": False}]
    wired = {name.removeprefix("HESSQUIK_").lower() for name in service["environment"]}
    assert wired == {"secrets", "host", "port", "models"}
    assert wired <= Settings.model_fields.keys()
    assert "hessquik.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_what_watches_reads_the_files_that_are_tested(compose: dict[str, Any]) -> None:
    for name, program in (("prometheus", "prometheus"), ("alertmanager", "alertmanager")):
        service = compose["services"][name]
        assert f"./deploy/{name}:/etc/{program}:ro" in service["volumes"]
        assert f"--config.file=/etc/{program}/{name}.yml" in service["command"]
        assert (ROOT / "deploy" / name / f"{name}.yml").is_file()
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    assert config["alerting"]["alertmanagers"] == [{"static_configs": [{"targets": ["alertmanager:9093"]}]}]
    assert config["scrape_configs"][0]["static_configs"] == [{"targets": ["hessquik:8000"]}]


def test_compose_holds_no_key(compose: dict[str, Any]) -> None:
    for secret in compose["secrets"].values():
        assert re.fullmatch(r"\$\{HESSQUIK_\w+_FILE:-\./deploy/no-keys\}", secret["file"])
    assert (ROOT / "deploy" / "no-keys").read_text() == ""


def test_keys_made_as_the_page_says_are_distinct_and_prometheus_has_one_of_them(tmp_path: Path) -> None:
    """Without a line's end: the operator passes it on as it is, and Prometheus sends no key with one."""
    page = (ROOT / "docs" / "deployment.md").read_text().partition("\n## Keys\n")[2]
    commands = page.partition("```sh\n")[2].partition("```")[0]
    (tmp_path / "chown").write_text("#!/bin/sh\n")
    (tmp_path / "chown").chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    run = ["bash", "-euc", f"{commands}\nenv | grep ^HESSQUIK_"]
    done = subprocess.run(run, cwd=tmp_path, env={"PATH": path}, capture_output=True, text=True, check=True)
    assert dict(line.split("=", 1) for line in done.stdout.splitlines()) == {
        f"HESSQUIK_{name}_FILE": f"./{file}.key"
        for name, file in (("API_KEYS", "api"), ("ADMIN_KEYS", "admin"), ("METRICS_KEY", "metrics"))
    }
    api, admin, metrics = ((tmp_path / f"{name}.key").read_text() for name in ("api", "admin", "metrics"))
    settings = Settings.of({"api_keys": api, "admin_keys": admin})
    keys = [key.get_secret_value() for key in settings.api_keys + settings.admin_keys]
    assert [len(key) for key in keys] == [48] * 3
    assert len(set(keys)) == 3
    assert metrics == keys[1]
    assert all((tmp_path / f"{name}.key").stat().st_mode & 0o077 == 0 for name in ("api", "admin", "metrics"))


@pytest.mark.parametrize("name", ["api", "admin"])
def test_keys_come_from_the_secrets_that_compose_mounts(name: str, compose: dict[str, Any], tmp_path: Path) -> None:
    secrets = compose["services"]["hessquik"]["secrets"]
    assert f"hessquik_{name}_keys" in secrets
    for secret in secrets:
        (tmp_path / secret).write_text("")
    (tmp_path / f"hessquik_{name}_keys").write_text("one,two\n")
    code = f"from service.settings import Settings as S; print([k.get_secret_value() for k in S().{name}_keys])"
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "HESSQUIK_SECRETS": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "['one', 'two']\n"
    assert compose["services"]["hessquik"]["environment"]["HESSQUIK_SECRETS"] == "/run/secrets"
