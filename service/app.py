"""The application: the only place that wires parts together, and what every request passes.

Route table, keys, errors in each dialect, counting. A connection and ASGI both call :meth:`Application.handle`.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple, NoReturn

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from fastapi.routing import APIRouter
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp

from hessquik_client.errors import (
    Forbidden,
    InternalError,
    InvalidInput,
    MethodNotAllowed,
    NotFound,
    NotReady,
    ServiceError,
    Unauthorized,
    UnsupportedMediaType,
)
from hessquik_client.question import Question
from service.assets import ASSETS
from service.core import Core
from service.devices import resolve_devices
from service.http import asgi
from service.http.messages import LARGE_BYTES, Budget, Cancel, Head, Reply, Request
from service.logs import AccessLog, log_administration
from service.metrics import REFUSED
from service.node import Node, NodeLike
from service.repository import Served
from service.routes import derivatives, health, inference_protocol, models, pages, tesseract, umbridge
from service.routes.operation import NATIVE, Dialect, Direct
from service.scheduler import Answers, Job, OnRows
from service.schemas import Problem
from service.settings import Settings

__all__ = ["OPEN_PATHS", "Application", "Target", "create_app"]

logger = logging.getLogger(__name__)

#: The only paths that never need a key: probes, and the pages' files, which hold no data.
OPEN_PATHS = frozenset({"/livez", "/readyz", *ASSETS})
_ADMIN_ACTIONS = ("/load", "/unload")
DIALECTS = (umbridge.DIALECT, inference_protocol.DIALECT, tesseract.DIALECT, NATIVE)
#: Route label of requests that match no route.
UNMATCHED = "unmatched"
#: Status label of requests whose client was gone before the reply.
NO_STATUS = 499
#: After refusing a larger body, the memory that it took is returned to the system.
RETURNED_BYTES = 1 << 18
#: Replies over this size are sent while their last rows are computed.
STREAMED_BYTES = 1 << 20
#: Size of numbers in JSON over their size in binary, an estimate.
TEXT_FACTOR = 3
#: Objects after which the collector looks at young ones: hundreds of requests hold thousands, none in a cycle.
COLLECT = (20_000, 20, 20)


class Target(NamedTuple):
    """The target that a head was resolved to.

    Attributes:
        route: The path with its placeholders, as requests are counted.
        handler: Answers the request.
        dialect: Of its errors.
        asked: What the head asks for, as the route reads it.
        methods: Those that the path has.
    """

    route: str
    handler: Callable[[Request], Reply | Cancel]
    dialect: Dialect
    asked: Any = None
    methods: frozenset[str] = frozenset()


class Application(FastAPI):
    """FastAPI's application, whose requests come as :class:`~service.http.messages.Request`.

    Routes that take the whole request (:class:`~service.routes.operation.Direct`) are called as they are; FastAPI's
    own routes are called over ASGI, in a task.

    Args:
        core: The service.
        routers: The routes.
        options: As FastAPI takes them.
    """

    def __init__(self, core: Core, routers: tuple[APIRouter, ...], **options: Any) -> None:
        super().__init__(**options)
        self.core = self.state.core = core
        settings = core.settings
        self.budget = Budget(settings.max_held_bytes)
        self._access_log = AccessLog() if settings.access_log else None
        self.is_starting = False
        self._tasks: set[asyncio.Task[Any]] = set()
        for router in routers:
            self.include_router(router)
        routes = [route for part in (*routers, self.router) for route in part.routes if isinstance(route, Route)]
        self._fixed = {route.path: route for route in routes if "{" not in route.path}
        self._patterns = [route for route in routes if "{" in route.path]

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        """Answer an ASGI server."""
        if scope["type"] == "http":
            await asgi.answer(self, self.core.settings.max_body_bytes, scope, receive, send)
        else:
            await super().__call__(scope, receive, send)

    async def start(self) -> None:
        """Start the workers and load the models; requests are answered from then on.

        Raises:
            StartUpError: there is no folder, or no worker becomes ready.
        """
        await self.core.start()
        # Objects that are alive now stay: the collector need not look at them again and again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*COLLECT)
        self.is_starting = False

    async def stop(self) -> None:
        """End the workers, and write what is left of the access log."""
        await self.core.stop()
        if self._access_log is not None:
            self._access_log.close()

    def why_not_ready(self) -> list[str]:
        """Return the reasons why the service is not ready; none if it is."""
        reasons = self.core.why_not_ready()
        return reasons if not self.is_starting else ["the service is still loading its models", *reasons]

    # Steps that every request takes.

    def admit(self, head: Head) -> None:
        """Resolve a head's target, and decide whether the body is read.

        Raises:
            ServiceError: the request is refused.
        """
        path = head.path
        route, names = self._match(path)
        dialect = next(dialect for dialect in DIALECTS if dialect.owns(path))
        label = UNMATCHED if route is None else "pages" if path in ASSETS else route.path
        methods = frozenset(route.methods or ()) if route is not None else frozenset()
        head.target = Target(label, self._call_fastapi, dialect, names, methods)
        self._check_key(head)
        if route is None:
            raise NotFound("expected a path of this service, GET /openapi.json lists them")
        if head.method not in methods and not (head.method == "HEAD" and "GET" in methods):
            raise MethodNotAllowed(f"expected {' or '.join(sorted(methods))} here, got {head.method}")
        encoding = head.headers.get(b"content-encoding", b"identity")
        if encoding.lower() not in (b"", b"identity"):
            raise UnsupportedMediaType("expected a body without Content-Encoding")
        if self.is_starting and path not in OPEN_PATHS:
            raise NotReady("expected a service that has started, this one is still loading its models")
        if isinstance(route, Direct):
            asked = route.read_head(self, head, names)
            head.target = Target(label, partial(route.handler, self), dialect, asked, methods)

    def handle(self, request: Request) -> None:
        """Answer a request whose body has arrived: now or later, by its ``respond``."""
        try:
            reply = request.head.target.handler(request)
        except Exception as error:
            self.fail(request, error)
            return
        if type(reply) is Reply:
            self.finish(request, reply)
        else:
            request.cancel = reply

    def finish(self, request: Request, reply: Reply) -> None:
        """Send the reply, and count how the request ended."""
        target: Target | None = request.head.target
        is_sent = request.respond(request, reply)
        request.cancel = None
        route, status = REFUSED if target is None else target.route, reply.status if is_sent else NO_STATUS
        self.core.metrics.answered(route, request.model, status, request.began_s)
        if self._access_log is not None:
            self._access_log.write(request, route, status)
        if target is not None and route in models.ADMINISTERED:
            log_administration(request, route, target.asked["model"], status, _key(request.head))

    def fail(self, request: Request, error: Exception) -> None:
        """Answer with an error in the path's dialect; what is nobody's fault but ours goes to the log."""
        id_ = request.id.decode()
        context = {"request_id": id_, "traceparent": request.head.headers.get(b"traceparent", b"").decode("latin-1")}
        if not isinstance(error, ServiceError):
            logger.error("request %s failed", id_, exc_info=error, extra=context)
            error = InternalError("something went wrong; the log has it under this request id")
        elif error.status >= 500 and error.retry_after_s is None:
            logger.error("%s %s: %s", id_, error.code, error.detail, extra=context)
        target: Target | None = request.head.target
        dialect = NATIVE if target is None else target.dialect
        status, body = dialect.write(error, id_)
        headers = error.headers()
        if isinstance(error, MethodNotAllowed) and target is not None:
            allowed = target.methods | {"HEAD"} if "GET" in target.methods else target.methods
            headers.append((b"allow", ", ".join(sorted(allowed)).encode()))
        # Of a body that did not arrive whole only the pieces were there.
        was_large = max(len(request.body), request.held_bytes) > RETURNED_BYTES
        self.finish(request, Reply(status, dialect.media_type, [body], headers))
        if was_large:
            request.body = b""
            asyncio.get_running_loop().call_soon(_return_memory)

    def abandon(self, request: Request, error: ServiceError) -> None:
        """Stop working on a request, and answer with an error unless it has been answered."""
        if request.cancel is None:
            self.fail(request, error)
        else:
            request.cancel(error)

    # Methods that handlers call.

    def ask(
        self,
        request: Request,
        served: Served,
        question: Question,
        form: str,
        deadline_s: float,
        write: Callable[[Answers], Reply],
        on_rows: OnRows | None = None,
    ) -> Cancel:
        """Have the workers answer a question, and the request with what ``write`` makes of their answers.

        Args:
            request: The request.
            served: The model.
            question: What is asked of it.
            form: What the workers are to answer: ``arrays``, ``json`` or ``flat``.
            deadline_s: On the monotonic clock.
            write: Makes the reply.
            on_rows: Sends the rows of a large reply as they come; then ``write`` is given none of them.

        Returns:
            What stops it.

        Raises:
            ServiceError: any that a client may see.
        """

        def end(job: Job) -> None:
            if job.failure is not None:
                self.fail(request, job.failure.error())
                return
            try:
                reply = write(job.answers)
            except Exception as error:
                self.fail(request, error)
            else:
                self.finish(request, reply)

        job = self.core.ask(served, question, form, deadline_s, end)
        request.rows = job.rows
        reply_bytes = job.rows * job.key.row_bytes * (1 if form == "arrays" else TEXT_FACTOR)
        if reply_bytes > STREAMED_BYTES and request.stream is not None:
            job.on_rows = on_rows
        if reply_bytes > LARGE_BYTES:
            try:
                self.budget.take(reply_bytes)
                request.held_bytes += reply_bytes
            except ServiceError as error:
                self.core.abandon(job, error)  # which answers the request
        request.body = b""
        return partial(self.core.abandon, job)

    def run(self, request: Request, work: Coroutine[Any, Any, Reply | Cancel]) -> Cancel:
        """Answer a request with what a coroutine returns, which runs as a task.

        Returns:
            What stops it.
        """
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # or it might be collected while it waits
        stopped_by: list[ServiceError] = []

        def end(task: asyncio.Task[Reply | Cancel]) -> None:
            self._tasks.discard(task)
            if task.cancelled():
                self.fail(request, stopped_by.pop() if stopped_by else NotReady("the service is stopping"))
            elif (error := task.exception()) is not None:
                self.fail(request, error if isinstance(error, Exception) else InternalError("something went wrong"))
            elif type(reply := task.result()) is Reply:
                self.finish(request, reply)
            else:
                request.cancel = reply  # type: ignore[assignment]
                if stopped_by:
                    self.abandon(request, stopped_by.pop())

        def stop(error: ServiceError) -> None:
            stopped_by.append(error)
            task.cancel()

        task.add_done_callback(end)
        return stop

    # FastAPI.

    def _call_fastapi(self, request: Request) -> Cancel:
        return self.run(request, asgi.call(super().__call__, request))

    def build_middleware_stack(self) -> ASGIApp:
        """Put the framework's errors into our words, and let all errors through to :meth:`fail`."""
        handlers = {HTTPException: _translate, RequestValidationError: _translate_invalid}
        return ExceptionMiddleware(AsyncExitStackMiddleware(self.router), handlers=handlers)

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document: FastAPI's, with the errors' schema, the keys, and limits that can be set."""
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

    def table(self) -> dict[str, frozenset[str]]:
        """Return the methods of every path with placeholders."""
        return {route.path: frozenset(route.methods or ()) for route in (*self._fixed.values(), *self._patterns)}

    def _match(self, path: str) -> tuple[Route | None, dict[str, str]]:
        """Return the route of a path, and its placeholders' values."""
        route = self._fixed.get(path)
        if route is not None:
            return route, {}
        for route in self._patterns:
            if (match := route.path_regex.match(path)) is not None:
                return route, match.groupdict()
        return None, {}

    def _check_key(self, head: Head) -> None:
        """Decide on the path that is routed: every path needs a key, but for a short list.

        Raises:
            Unauthorized: a key is needed.
            Forbidden: an admin key is needed.
        """
        keys = self.core.keys
        is_admin = head.method == "POST" and head.path.endswith(_ADMIN_ACTIONS)
        if head.path in OPEN_PATHS or not (keys.are_needed or is_admin):
            return
        given = _key(head)
        if keys.are_needed and not keys.is_known(given):
            raise Unauthorized("expected Authorization: Bearer and a valid key")
        if is_admin and not keys.is_admin(given):
            raise Forbidden("expected an admin key")


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
    )


_DESCRIPTION = (
    "Exact values, gradients, Hessians and more of saved networks. Every reply carries X-Request-Id. "
    "The same server speaks UM-Bridge 1.0 (/Info, /Evaluate, …), the Open Inference Protocol v2 (/v2/…) "
    "and the interface of Tesseracts (/tesseract/{model}/…)."
)


def _key(head: Head) -> bytes:
    """Return the key that a head carries, or nothing."""
    scheme, _, key = head.headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


def _return_memory() -> None:
    """Have the allocator return free memory to the system, which it would keep for long, where it can be told."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _translate(_: Any, error: Exception) -> NoReturn:
    """Raise an error of ours for one of the framework's."""
    status = getattr(error, "status_code", 500)
    if status == 404:
        raise NotFound("expected a path of this service, GET /openapi.json lists them")
    raise InvalidInput("expected a request that fits the schema, GET /openapi.json has it")


def _translate_invalid(_: Any, error: Exception) -> NoReturn:
    """Raise an error of ours for a parameter that FastAPI refuses, without what was given."""
    assert isinstance(error, RequestValidationError)
    fault = error.errors()[0]
    raise InvalidInput.of(str(fault["loc"][-1])[:32], fault["msg"], "something else")
