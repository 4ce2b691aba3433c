"""A server whose limits are small, so that they can be met exactly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live import LiveServer

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


@pytest.fixture(scope="session")
def narrow(shipped_models: Path) -> Iterator[LiveServer]:
    """Yield a server with :data:`LIMITS`."""
    with LiveServer(shipped_models, settings=LIMITS) as live:
        yield live
