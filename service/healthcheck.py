"""Health check of a container: exits with 0 if the server on this machine is ready, with 1 if not."""

from __future__ import annotations

import http.client
import os
import sys
from collections.abc import Mapping

__all__ = ["get"]

#: Below the three seconds after which a container's health check counts as failed.
TIMEOUT_S = 2.0


def get(
    address: tuple[str, int], path: str, headers: Mapping[str, str] | None = None, limit_s: float = TIMEOUT_S
) -> str | None:
    """Return the body that a server answers on a path with status 200, or ``None``."""
    connection = http.client.HTTPConnection(*address, timeout=limit_s)
    try:
        connection.request("GET", path, headers=headers or {})
        reply = connection.getresponse()
        text = reply.read().decode(errors="replace")
        return text if reply.status == http.HTTPStatus.OK else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


if __name__ == "__main__":
    # Linux takes a connection to the wildcard address 0.0.0.0 as one to this machine.
    here = os.environ.get("HESSQUIK_HOST") or "127.0.0.1", int(os.environ.get("HESSQUIK_PORT") or 8000)
    sys.exit(get(here, "/readyz") is None)
