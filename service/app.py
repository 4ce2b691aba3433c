"""The application: the only place that wires parts together."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NoReturn

from fastapi import FastAPI
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route

from service.core import Core
from service.devices import resolve_devices
from service.door import Door
from service.errors import InvalidInput, MethodNotAllowed, NotFound
from service.routes.derivatives import Derivatives
from service.routes.health import Live, MetricsText, Ready
from service.routes.models import ListModels, LoadModel, ShowModel, UnloadModel
from service.settings import Settings

__all__ = ["create_app"]

logger = logging.getLogger(__name__)


class QuantityConvertor(Convertor[str]):
    """Path segments that are a quantity with a path of its own, or ``evaluate``."""

    regex = "value|gradient|hessian|laplacian|evaluate"

    def convert(self, value: str) -> str:
        """As it is."""
        return value

    def to_string(self, value: str) -> str:
        """As it is."""
        return value


register_url_convertor("quantity", QuantityConvertor())


def create_app(settings: Settings | None = None) -> FastAPI:
    """Make the service; its workers start with the application's lifespan and end with it.

    Args:
        settings: From the environment if not given.

    Raises:
        StartUpError: a device is asked for that is not there.
    """
    settings = settings or Settings()
    core = Core(settings, resolve_devices(settings.device, settings.workers))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await core.start()
        try:
            yield
        finally:
            await core.stop()

    app = FastAPI(title="hessquik-service", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.core = core
    app.add_middleware(Door, settings=settings, metrics=core.metrics)
    app.add_exception_handler(HTTPException, _translate)
    app.router.routes[:0] = [
        Route("/v1/models/{model}/{quantity:quantity}", Derivatives(core), methods=["POST"]),
        Route("/v1/models", ListModels(core), methods=["GET"]),
        Route("/v1/models/{model}", ShowModel(core), methods=["GET"]),
        Route("/v1/models/{model}/load", LoadModel(core), methods=["POST"]),
        Route("/v1/models/{model}/unload", UnloadModel(core), methods=["POST"]),
        Route("/livez", Live(), methods=["GET"]),
        Route("/readyz", Ready(core), methods=["GET"]),
        Route("/metrics", MetricsText(core), methods=["GET"]),
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
