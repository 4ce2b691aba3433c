"""Health check of a container: exits with 0 if the server on this machine is ready, with 1 if not."""

from __future__ import annotations

import http.client
import os
import sys

__all__ = ["is_ready"]

#: Below the three seconds after which a container's health check counts as failed.
TIMEOUT_S = 2.0


def is_ready(host: str, port: int) -> bool:
    """Return whether ``GET /readyz`` is answered with 200 within the time limit."""
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    # Linux takes a connection to the wildcard address 0.0.0.0 as one to this machine.
    ready = is_ready(os.environ.get("HESSQUIK_HOST", "127.0.0.1"), int(os.environ.get("HESSQUIK_PORT", "8000")))
    sys.exit(0 if ready else 1)
