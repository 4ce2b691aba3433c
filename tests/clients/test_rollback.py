"""A version is unloaded, and the one before it is the default again: by method, route and command."""

from __future__ import annotations

import json

import httpx
import numpy as np
import pytest
from typer.testing import CliRunner

from hessquik_client import Client, Forbidden, VersionNotFound
from service.cli import app
from tests.clients.conftest import ADMIN, Zoo

pytestmark = pytest.mark.xdist_group("clients")

X = np.array([0.5, -1.0, 2.0])


def test_rollback_and_back(zoo: Zoo) -> None:
    with Client(zoo.url, api_key=ADMIN) as client:
        vector = client.model("vector")
        values = {version: client.model("vector", version).value(X) for version in (1, 2)}
        assert (vector.value(X) == values[2]).all()
        assert client.unload("vector", 2) == {"name": "vector", "state": "unloaded", "version": "2"}
        assert (client.model("vector").value(X) == values[1]).all()
        with pytest.raises(VersionNotFound):
            client.model("vector", 2).value(X)
        with pytest.raises(VersionNotFound):
            client.unload("vector", 2)
        assert client.load("vector")["versions"] == ["1", "2"]
        assert (client.model("vector").value(X) == values[2]).all()


def test_the_command_needs_an_admin_key(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HESSQUIK_API_KEY", raising=False)
    refused = CliRunner().invoke(app, ["unload", zoo.url, "vector", "--version", "2"])
    assert (refused.exit_code, refused.stderr) == (1, "hessquik: expected an admin key\n")
    monkeypatch.setenv("HESSQUIK_API_KEY", ADMIN)
    done = CliRunner().invoke(app, ["unload", zoo.url, "vector", "--version", "2"])
    assert json.loads(done.stdout)["version"] == "2"
    back = CliRunner().invoke(app, ["load", zoo.url, "vector"])
    assert json.loads(back.stdout)["default_version"] == "2"
    with Client(zoo.url) as client, pytest.raises(Forbidden):
        client.unload("vector", 2)


def test_versions_that_are_none_are_named(zoo: Zoo) -> None:
    for version in ("9", "x", "-1", "01"):
        reply = httpx.post(
            f"{zoo.url}/v1/models/vector/unload?version={version}", headers={"authorization": f"Bearer {ADMIN}"}
        )
        assert (reply.status_code, reply.json()["code"]) == (404, "version_not_found")
