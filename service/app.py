"""The application: the only place that wires parts together."""

from __future__ import annotations

import gc
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp

from service.assets import ASSETS
from service.core import Core
from service.devices import resolve_devices
from service.door import Door, Receive, Scope, Send
from service.errors import InvalidInput, MethodNotAllowed, NotFound
from service.exchange import ShortWay
from service.node import Node, NodeLike
from service.routes import inference_protocol, umbridge
from service.routes.derivatives import Derivatives
from service.routes.health import Live, MetricsText, Ready
from service.routes.models import ListModels, LoadModel, ShowModel, UnloadModel
from service.routes.pages import Page
from service.schemas import document
from service.settings import Settings

__all__ = ["Application", "create_app"]

logger = logging.getLogger(__name__)


#: When the collector looks at young objects: hundreds of requests hold thousands of them, none in a circle.
COLLECT = (20_000, 20, 20)


class Application(FastAPI):
    """The ASGI application: the door, behind it the derivatives and FastAPI for all else.

    Most requests ask for derivatives, and FastAPI's way to a route costs more than computing a small network; so
    their path is taken apart here.

    Attributes:
        short_way: What a server may hand small requests for derivatives to, instead of making messages of them.
    """

    def __init__(self, core: Core, settings: Settings, **options: Any) -> None:
        """Keep the service where routes find it."""
        super().__init__(**options)
        self.state.core = core
        self._settings = settings
        self._derivatives = Derivatives(core)
        dialects = (umbridge.DIALECT, inference_protocol.DIALECT)
        self._door = Door(self._route, settings, core.metrics, dialects)
        self.short_way = ShortWay(self._door, self._derivatives, settings.max_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Through the door."""
        await self._door(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        """The interface's description."""
        if self.openapi_schema is None:
            self.openapi_schema = document(self._settings, self.version)
        return self.openapi_schema

    def build_middleware_stack(self) -> ASGIApp:
        """Only what puts the framework's errors into our words: all errors go on to the door, unanswered."""
        return ExceptionMiddleware(self.router, handlers={HTTPException: _translate})

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            target = Derivatives.target(scope["path"])
            if target is not None:
                await self._derivatives(*target, scope, receive, send)
                return
        await super().__call__(scope, receive, send)


def create_app(settings: Settings | None = None, node: NodeLike | None = None) -> Application:
    """Make the service; its workers start with the application's lifespan and end with it.

    Args:
        settings: From the environment if not given.
        node: The workers and models; of this process's own if not given.

    Raises:
        StartUpError: a device is asked for that is not there.
    """
    settings = settings or Settings()
    core = Core(settings, node or Node(settings, resolve_devices(settings.device, settings.workers)))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await core.start()
        # What lives now lives on: the collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*COLLECT)
        try:
            yield
        finally:
            await core.stop()

    app = Application(
        core,
        settings,
        title="hessquik-service",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect would repeat the request's Host
    )
    app.router.routes[:0] = [
        Route("/v1/models", ListModels(core), methods=["GET"]),
        Route("/v1/models/{model}", ShowModel(core), methods=["GET"]),
        Route("/v1/models/{model}/load", LoadModel(core), methods=["POST"]),
        Route("/v1/models/{model}/unload", UnloadModel(core), methods=["POST"]),
        Route("/livez", Live(), methods=["GET"]),
        Route("/readyz", Ready(core), methods=["GET"]),
        Route("/metrics", MetricsText(core), methods=["GET"]),
        *umbridge.routes(core),
        *inference_protocol.routes(core),
        *(Route(path, Page(), methods=["GET"]) for path in ASSETS),
    ]
    return app


def _translate(request: Request, error: Exception) -> NoReturn:
    """The framework's own errors in our words."""
    match getattr(error, "status_code", 500):
        case 404:
            raise NotFound("expected a path of this service, GET /openapi.json lists them")
        case 405:
            allowed = (getattr(error, "headers", None) or {}).get("Allow", "another method")
            raise MethodNotAllowed(f"expected {allowed} here, got {request.method}")
        case _:
            raise InvalidInput("expected a request that fits the schema, GET /openapi.json has it")
