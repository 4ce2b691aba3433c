"""The same application as a deployment of Ray Serve: placed on GPUs, scaled, checked and replaced by it.

    serve deploy deploy/ray/serve.yaml          (on a Ray cluster; docs/deployment.md)

Each replica is a front with its workers, as ``hessquik serve`` starts one, on the GPUs that Ray gave it.
"""

from __future__ import annotations

from typing import Any

from ray import serve

from service.app import create_app
from service.core import Core
from service.http.asgi import Message, Receive, Scope, Send
from service.settings import Settings

__all__ = ["Replica", "build"]


@serve.deployment(name="hessquik")
@serve.ingress()
class Replica:
    """One service in the cluster.

    Args:
        settings: By the names of :class:`~service.settings.Settings`; the node's environment fills the rest.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        """Wire the service; its workers start with the application."""
        self._app = create_app(Settings(**settings))

    def __serve_build_asgi_app__(self) -> Any:
        """The application that answers this replica's requests."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_bytes(message: Message) -> None:
                # Ray carries messages between processes, which a view of memory cannot be.
                await send({**message, "body": bytes(message["body"])} if "body" in message else message)

            await self._app(scope, receive, send_bytes)

        return app

    def check_health(self) -> None:
        """Tell Ray whether to keep this replica.

        Raises:
            RuntimeError: its workers cannot be kept alive. A replica that is only busy or loading is kept.
        """
        core: Core = self._app.state.core
        if core.is_given_up:
            raise RuntimeError("expected workers that can be kept alive, they die again and again")


def build(settings: dict[str, Any]) -> serve.Application:
    """Build the application that the configuration file imports.

    Args:
        settings: ``args`` of the configuration file.
    """
    return Replica.bind(settings)  # type: ignore[attr-defined,no-any-return]
