"""The application: it connects the parts of the service with FastAPI."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NoReturn

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from fastapi.routing import APIRouter
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp

from hessquik_client.errors import InvalidInput, NotFound

from .core import Core
from .devices import resolve_devices
from .front import NATIVE, OPEN_PATHS, Call, Front, Operation
from .http import asgi
from .http.messages import Cancel
from .node import Node, NodeLike
from .routes import derivatives, health, inference_protocol, models, pages, tesseract, umbridge
from .routes.operation import Direct
from .schemas import Problem
from .settings import Settings

__all__ = ["OPEN_PATHS", "Application", "create_app"]

DIALECTS = (umbridge.DIALECT, inference_protocol.DIALECT, tesseract.DIALECT, NATIVE)
#: Objects after which the collector looks at young ones: hundreds of requests hold thousands, none in a cycle.
COLLECT = (20_000, 20, 20)


class Application(FastAPI):
    """The FastAPI application, whose requests, also those over ASGI, the front answers.

    Routes that take the whole request (:class:`~service.routes.operation.Direct`) are called directly; FastAPI's own
    routes are called over ASGI, in a task.

    Args:
        core: The service.
        routers: The routes.
        options: Options of :class:`fastapi.FastAPI`.

    Attributes:
        front: The front, to which connections pass their requests.
    """

    def __init__(self, core: Core, routers: tuple[APIRouter, ...], **options: Any) -> None:
        super().__init__(**options)
        self.core = self.state.core = core
        for router in routers:
            self.include_router(router)
        routes = [route for part in (*routers, self.router) for route in part.routes if isinstance(route, Route)]
        self.front = Front(core, [self._operation(route) for route in routes], DIALECTS)

    def _operation(self, route: Route) -> Operation:
        """Return the operation of a route."""
        if isinstance(route, Direct):
            return route.operation
        pattern = route.path_regex if "{" in route.path else None
        return Operation(route.path, pattern, frozenset(route.methods or ()), self._call_fastapi, route.path)

    def _call_fastapi(self, call: Call) -> Cancel:
        return call.run(asgi.call(super().__call__, call.request))

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        """Answer a request of an ASGI server."""
        if scope["type"] == "http":
            await asgi.answer(self.front, self.core.settings.max_body_bytes, scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    async def start(self) -> None:
        """Start the workers and load the models; requests are answered when this returns.

        Raises:
            StartUpError: the folder does not exist, or no worker becomes ready.
        """
        await self.core.start()
        # Objects that are alive now stay: the collector need not look at them again and again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*COLLECT)
        self.core.is_starting = False

    async def stop(self) -> None:
        """Stop the workers, and flush the access log."""
        await self.core.stop()
        self.front.close()

    def build_middleware_stack(self) -> ASGIApp:
        """Return the middleware, which translates the framework's errors and lets all errors reach the front."""
        handlers = {HTTPException: _translate, RequestValidationError: _translate_invalid}
        return ExceptionMiddleware(AsyncExitStackMiddleware(self.router), handlers=handlers)

    def openapi(self) -> dict[str, Any]:
        """Return FastAPI's OpenAPI document with the schema of errors, the keys, and the configured limits added."""
        if self.openapi_schema is not None:
            return self.openapi_schema
        document = super().openapi()
        settings, schemas = self.core.settings, document["components"]["schemas"]
        schemas["Problem"] = Problem.model_json_schema()
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for name in ("QuantityRequest", "EvaluateRequest"):
            schemas[name]["properties"]["inputs"]["anyOf"][1]["maxItems"] = settings.max_rows
        for operation in (one for methods in document["paths"].values() for one in methods.values()):
            if "HTTPValidationError" in str(operation["responses"].get("422")):
                del operation["responses"]["422"]  # FastAPI's own, which is never sent
            for parameter in operation.setdefault("parameters", []):
                schema = parameter["schema"]
                # A parameter that is not given is no null.
                schema = parameter["schema"] = {**schema, **schema.pop("anyOf", [{}])[0]}
                if parameter["name"] == "X-Deadline-Ms":
                    schema["maximum"] = settings.max_deadline_ms
                elif parameter["name"] == "quantities":
                    schema["uniqueItems"], parameter["explode"] = True, False
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        if self.core.keys.are_needed:
            document["security"] = [{"key": []}]
        return document


def create_app(settings: Settings | None = None, node: NodeLike | None = None) -> Application:
    """Create the application; its workers start and stop with the application's lifespan.

    Args:
        settings: The settings; read from the environment if not given.
        node: The workers and models; by default new ones of this process.

    Raises:
        StartUpError: the machine does not have a device that the settings name.
    """
    settings = settings or Settings()
    core = Core(settings, node or Node(settings, resolve_devices(settings.device, settings.workers)))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        assert isinstance(app, Application)
        await app.start()
        try:
            yield
        finally:
            await app.stop()

    parts = (derivatives, models, health, umbridge, inference_protocol, tesseract, pages)
    return Application(
        core,
        tuple(part.router for part in parts),
        title="hessquik-service",
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect would repeat the request's Host
        telemetry={"tracing": False, "metrics": False, "logs": False},  # it would see its own routes only
    )


_DESCRIPTION = (
    "Exact values, gradients, Hessians and more of saved networks. Every reply carries X-Request-Id. "
    "The same server speaks UM-Bridge 1.0 (/Info, /Evaluate, …), the Open Inference Protocol v2 (/v2/…) "
    "and the interface of Tesseracts (/tesseract/{model}/…)."
)


def _translate(_: Any, error: Exception) -> NoReturn:
    """Raise the service's error for an HTTP error of the framework."""
    status = getattr(error, "status_code", 500)
    if status == 404:
        raise NotFound("expected a path of this service, GET /openapi.json lists them")
    raise InvalidInput("expected a request that fits the schema, GET /openapi.json has it")


def _translate_invalid(_: Any, error: Exception) -> NoReturn:
    """Raise the service's error for a parameter that FastAPI refuses, without repeating the value."""
    assert isinstance(error, RequestValidationError)
    fault = error.errors()[0]
    raise InvalidInput.of(str(fault["loc"][-1])[:32], fault["msg"], "something else")
