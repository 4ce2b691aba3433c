"""A server whose limits are small, so that they can be met exactly, and one that needs keys."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live import LiveServer

FOLDER = Path(__file__).parent
LIMITS = {
    "max_body_bytes": 4096,
    "max_reply_bytes": 1024,
    "max_rows": 100,
    "max_header_bytes": 1024,
    "max_headers": 16,
    "receive_timeout_s": 1,
    "send_timeout_s": 2,
    "max_connections": 40,
}


KEYS = {"api_keys": "user-key-1,user-key-2", "admin_keys": "admin-key"}
SPARE = "spare"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run all in one process, for its servers."""
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("security"))


@pytest.fixture(scope="session")
def narrow(shipped_models: Path) -> Iterator[LiveServer]:
    """Yield a server with :data:`LIMITS`."""
    with LiveServer(shipped_models, settings=LIMITS) as live:
        yield live


@pytest.fixture(scope="session")
def locked(shipped_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Yield a server with :data:`KEYS`, and with a model :data:`SPARE` that may be loaded and unloaded."""
    folder = tmp_path_factory.mktemp("models")
    for path in shipped_models.glob("*.safetensors"):
        shutil.copy(path, folder)
    shutil.copy(shipped_models / "peaks.safetensors", folder / f"{SPARE}.safetensors")
    with LiveServer(folder, settings=KEYS) as live:
        yield live
