"""Handling of every request: routing, keys, limits, the call of its operation, errors in each dialect, and metrics.

Connections and ASGI pass requests to :class:`Front`, which does not depend on FastAPI: its routes are
:class:`Operation`.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import re
from collections.abc import Callable, Collection, Coroutine, Mapping
from contextlib import nullcontext
from functools import partial
from time import monotonic
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import orjson

from hessquik_client.errors import (
    Forbidden,
    InternalError,
    InvalidInput,
    MethodNotAllowed,
    NotFound,
    NotReady,
    ReplyTooLarge,
    ServiceError,
    Unauthorized,
    UnsupportedMediaType,
)
from hessquik_client.question import Question, Shape

from .assets import ASSETS
from .core import Core
from .http.messages import LARGE_BYTES, Budget, Cancel, Head, Reply, Request
from .json_reader import SHORT_BYTES, expect_object, read_json, read_long_json
from .logs import AccessLog, log_administration
from .metrics import REFUSED
from .repository import Served
from .scheduler import Answers, Job, OnRows
from .tracing import Tracer

__all__ = ["NATIVE", "OPEN_PATHS", "Call", "Dialect", "Front", "Operation", "Target", "expect_known", "read_query"]

logger = logging.getLogger(__name__)

#: The only paths that never need a key: probes, and the pages' files, which hold no data.
OPEN_PATHS = frozenset({"/livez", "/readyz", *ASSETS})
#: The only paths that are answered before the models are loaded: a scrape sees that the service is starting.
_STARTING_PATHS = OPEN_PATHS | {"/metrics"}
#: Ends of paths that change what is served: they need an admin key, and are audited.
_ADMIN_ACTIONS = ("/load", "/unload")
#: Label of requests that match no path.
UNMATCHED = "unmatched"
#: Status label of requests whose client was gone before the reply.
NO_STATUS = 499
#: After refusing a larger body, the memory that it took is returned to the system.
RETURNED_BYTES = 1 << 18
#: Replies over this size are sent while their last rows are computed.
STREAMED_BYTES = 1 << 20
#: Size of numbers in JSON over their size in binary, an estimate.
TEXT_FACTOR = 3
#: Most parameters of a query.
MAX_PARAMETERS = 16


class Dialect(NamedTuple):
    """A protocol that the service speaks, and the format of its errors.

    Attributes:
        media_type: Media type of the error bodies.
        owns: Returns whether a path belongs to the dialect.
        write: Returns status and body of an error, given the error and the request id.
    """

    media_type: bytes
    owns: Callable[[str], bool]
    write: Callable[[ServiceError, str], tuple[int, bytes]]


#: The service's own: problem details, on all paths that no other dialect owns.
NATIVE = Dialect(
    b"application/problem+json",
    lambda path: True,
    lambda error, request_id: (error.status, error.problem(request_id)),
)


class Operation(NamedTuple):
    """A route: a path and the handler that answers on it.

    Attributes:
        path: The path, with placeholders.
        pattern: Pattern of matching paths; ``None`` if there are no placeholders.
        methods: The methods that are allowed.
        answer: The handler, which answers a call.
        label: Label of the route in metrics.
        parameters: Names of the query parameters; ``None`` if the handler parses the query.
        computes: Whether requests ask for an evaluation: they have a deadline, and count for their model.
        read_head: Called with the head and ``parameters``; returns :attr:`Target.encoding` and the parameters that
            are allowed with this head.
    """

    path: str
    pattern: re.Pattern[str] | None
    methods: frozenset[str]
    answer: Callable[[Call], Reply | Cancel]
    label: str
    parameters: frozenset[str] | None = None
    computes: bool = False
    read_head: Callable[[Head, frozenset[str]], tuple[Any, frozenset[str]]] | None = None


class Target(NamedTuple):
    """The result of routing a head.

    Attributes:
        label: Label of the route in metrics.
        dialect: The dialect, in which errors are written.
        operation: The operation; ``None`` if no path matches, or the key does not allow it.
        model: Name of the model in the path, or empty.
        version: Version in the path or the query, if any.
        query: The query parameters.
        time_s: Time limit of the whole request.
        encoding: Result of the operation's ``read_head``.
    """

    label: str
    dialect: Dialect
    operation: Operation | None
    model: str = ""
    version: str | None = None
    query: Mapping[str, str] = {}
    time_s: float = 0.0
    encoding: Any = None


class Call:
    """A complete request, as the operations of all dialects handle it.

    Args:
        front: The front that received it.
        request: The request.

    Attributes:
        core: The service.
        target: The result of routing.
        served: The version of the model, after :meth:`find`.
        shape: The sizes and limits of the model.
        document: The JSON object of the body, after :meth:`read`; long lists of numbers are arrays.
        may_be_booleans: Whether ``document`` may hold booleans, which numpy would convert to numbers.
        question: The checked request for the workers, after :meth:`ask`.
    """

    __slots__ = (
        "_front", "_write", "core", "document", "may_be_booleans", "question", "request", "served", "shape", "target",
    )  # fmt: skip
    served: Served
    shape: Shape
    document: dict[str, Any]
    may_be_booleans: bool
    question: Question
    _write: Callable[[Call, Answers], Reply]

    def __init__(self, front: Front, request: Request) -> None:
        self._front, self.core, self.request = front, front.core, request
        self.target: Target = request.head.target

    def find(self, name: str, version: str | None) -> Served:
        """Find the model, and check that the queue has room.

        Raises:
            Overloaded: the queue is full.
            ServiceError: there is no such model, or it is not ready.
        """
        core = self.core
        core.scheduler.queue.expect_room()
        served = self.served = core.repository.ready(name, version)
        self.shape = served.cache.get("shape") or core.shape(served)
        self.request.model = served.file.name
        return served

    def read(
        self, go_on: Callable[[Call], Reply | Cancel], text: bytes | None = None, may_have_text: bool = False
    ) -> Reply | Cancel:
        """Parse the JSON object of the body, and call the next step; a long body is parsed in slices, in a task.

        Args:
            go_on: The next step, called when ``document`` is set.
            text: The JSON, if it is not the whole body.
            may_have_text: See :func:`service.json_reader.read_long_json`.
        """
        body = self.request.body if text is None else text
        if len(body) > SHORT_BYTES:
            return self.run(self._read_long(go_on, body, may_have_text))
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError:
            document = read_json(body)
        self.document = document if type(document) is dict else expect_object(document)
        self.may_be_booleans = b"true" in body or b"false" in body
        return go_on(self)

    async def _read_long(
        self, go_on: Callable[[Call], Reply | Cancel], body: bytes, may_have_text: bool
    ) -> Reply | Cancel:
        core, served = self.core, getattr(self, "served", None)
        with nullcontext() if served is None else core.repository.holding(served):
            document, self.may_be_booleans = await read_long_json(body, core.settings.max_rows, may_have_text)
            self.document = expect_object(document)
            return go_on(self)

    def run(self, work: Coroutine[Any, Any, Reply | Cancel]) -> Cancel:
        """Run a coroutine as a task, and answer with its result."""
        return self._front.run(self.request, work)

    def hold_bytes(self, size: int) -> None:
        """Count the bytes of a large reply against the budget before it is created, until it is sent.

        Raises:
            Overloaded: the budget is exhausted.
        """
        if size > LARGE_BYTES:
            self._front.budget.take(size)
            self.request.held_bytes += size

    def ask(
        self,
        question: Question,
        form: str,
        write: Callable[[Call, Answers], Reply],
        on_rows: OnRows | None = None,
        time_s: float = 0.0,
    ) -> Cancel:
        """Queue a checked request for the workers; ``write`` turns their answers into the reply.

        The version of the model is held until then.

        Args:
            question: The checked request for the model that was found.
            form: Form of the answers, see :class:`~service.scheduler.BatchKey`.
            write: Writes the reply.
            on_rows: Sends the rows of a large reply as they arrive; ``write`` then gets no rows.
            time_s: Time limit of the whole request, if the body sets one.

        Returns:
            A function that cancels the work.

        Raises:
            ReplyTooLarge: the reply would exceed its limit.
            Overloaded: the queue or the budget is full.
            NotReady: workers cannot be kept alive.
            TooExpensive: one row takes longer than the time limit of a batch.
        """
        core, served, request = self.core, self.served, self.request
        inputs, _, quantities, dtype, weights, directions = question
        k = 0 if directions is None else directions.shape[1]
        known = (dtype, quantities, weights is not None, k, form)
        try:
            key = served.cache.get(known) or core.key(served, question, form)
            rows = request.rows = len(inputs)
            reply_bytes, most = rows * key.row_bytes, core.settings.max_reply_bytes
            if reply_bytes > most:
                raise too_large(reply_bytes, most)
            if form != "arrays":
                reply_bytes *= TEXT_FACTOR
            if reply_bytes > LARGE_BYTES:
                self.hold_bytes(reply_bytes)
                if reply_bytes <= STREAMED_BYTES or request.stream is None:
                    on_rows = None
            else:
                on_rows = None
            payload_bytes = inputs.nbytes
            payload_bytes += 0 if weights is None else weights.nbytes
            payload_bytes += 0 if directions is None else directions.nbytes
            deadline_s = request.began_s + (time_s or self.target.time_s)
            self.question, self._write = question, write
            job = Job(key, rows, inputs, weights, directions, payload_bytes, deadline_s, self._end, on_rows)
            core.scheduler.submit(job)
        except ServiceError:
            served.statistics.failed += 1
            raise
        core.repository.hold(served)
        request.job, request.body = job, b""
        return partial(core.scheduler.abandon, job)

    def _end(self, job: Job) -> None:
        """Answer the request when its job has ended."""
        self.core.repository.release(self.served)
        if job.failure is not None:
            self._front.fail(self.request, job.failure.error())
            return
        try:
            reply = self._write(self, job.answers)
        except Exception as error:
            self._front.fail(self.request, error)
        else:
            self._front.finish(self.request, reply)


class Front:
    """Routes and answers requests from connections and from ASGI.

    Args:
        core: The service.
        operations: The routes.
        dialects: The dialects; the first that owns a path is used, and the last owns all paths.
    """

    def __init__(self, core: Core, operations: Collection[Operation], dialects: tuple[Dialect, ...]) -> None:
        self.core = core
        self.budget = Budget(core.settings.max_held_bytes)
        self._dialects = dialects
        self._fixed = {operation.path: operation for operation in operations if operation.pattern is None}
        self._patterns = [operation for operation in operations if operation.pattern is not None]
        settings = core.settings
        self._watchers: list[AccessLog | Tracer] = [AccessLog()] if settings.access_log else []
        self._watchers += [Tracer()] if settings.tracing else []
        self._tasks: set[asyncio.Task[Any]] = set()

    def table(self) -> dict[str, frozenset[str]]:
        """Return the methods of every route, by path with placeholders."""
        return {one.path: one.methods for one in (*self._fixed.values(), *self._patterns)}

    # Steps that every request takes.

    def admit(self, head: Head) -> None:
        """Route a head and check its key; refuse the request if its body need not be read.

        Raises:
            ServiceError: the request is refused.
        """
        path = head.path
        operation, names = self._match(path)
        dialect = next(dialect for dialect in self._dialects if dialect.owns(path))
        label = UNMATCHED if operation is None else operation.label
        head.target = target = Target(label, dialect, None, names.get("model", ""), names.get("version"))
        self._check_key(head)
        if operation is None:
            raise NotFound("expected a path of this service, GET /openapi.json lists them")
        head.target = target = target._replace(operation=operation)
        methods = operation.methods
        if head.method not in methods and not (head.method == "HEAD" and "GET" in methods):
            raise MethodNotAllowed(f"expected {' or '.join(sorted(methods))} here, got {head.method}")
        coding = head.headers.get(b"content-encoding", b"identity")
        if coding.lower() not in (b"", b"identity"):
            raise UnsupportedMediaType("expected a body without Content-Encoding")
        if self.core.is_starting and path not in _STARTING_PATHS:
            raise NotReady("expected a service that has started, this one is still loading its models")
        if operation.parameters is not None:
            time_s = self.core.time_ms(head.headers.get(b"x-deadline-ms", b"")) / 1000 if operation.computes else 0.0
            read, known = operation.read_head, operation.parameters
            encoding, known = (None, known) if read is None else read(head, known)
            query = read_query(head.query, known)
            version = names.get("version") or query.get("version")
            head.target = target = target._replace(version=version, query=query, time_s=time_s, encoding=encoding)
        if operation.computes and (head.length is None or head.length > SHORT_BYTES):
            self.core.scheduler.queue.expect_room()  # refuse before the body is sent
            if target.model:
                self.core.repository.ready(target.model, target.version)

    def handle(self, request: Request) -> None:
        """Answer a complete request by calling its ``respond``, now or later."""
        target = request.head.target
        try:
            reply = target.operation.answer(Call(self, request))
        except Exception as error:
            self.fail(request, error)
            return
        if type(reply) is Reply:
            self.finish(request, reply)
        else:
            request.cancel = reply

    def finish(self, request: Request, reply: Reply) -> None:
        """Send the reply, and count the request in metrics and logs."""
        target: Target | None = request.head.target
        is_sent = request.respond(request, reply)
        request.cancel = None
        label, status = REFUSED if target is None else target.label, reply.status if is_sent else NO_STATUS
        evaluated = ""
        if target is not None and target.operation is not None:
            if not request.model and target.model in self.core.repository:  # other names are not logged or counted
                request.model = target.model
            if target.operation.computes:
                evaluated = request.model
        self.core.metrics.answered[label, evaluated, status].append(monotonic() - request.began_s)
        for watcher in self._watchers:
            try:
                watcher.ended(request, label, status)
            except Exception:  # of a library: other requests of the same batch are still to be answered
                logger.exception("request %s could not be logged or traced", request.id.decode())
        if target is not None and label.endswith(_ADMIN_ACTIONS):
            log_administration(request, label, target.model, status, _key(request.head))

    def fail(self, request: Request, error: Exception) -> None:
        """Answer with an error in the dialect of the path; log errors that the client did not cause."""
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
        if isinstance(error, MethodNotAllowed) and target is not None and target.operation is not None:
            methods = target.operation.methods
            allowed = methods | {"HEAD"} if "GET" in methods else methods
            headers.append((b"allow", ", ".join(sorted(allowed)).encode()))
        # If the body did not arrive completely, only its pieces took memory (held_bytes).
        was_large = max(len(request.body), request.held_bytes) > RETURNED_BYTES
        self.finish(request, Reply(status, dialect.media_type, [body], headers))
        if was_large:
            request.body = b""
            asyncio.get_running_loop().call_soon(_return_memory)

    def abandon(self, request: Request, error: ServiceError) -> None:
        """Cancel the work on a request, and answer it with an error unless it has been answered."""
        if request.cancel is None:
            self.fail(request, error)
        else:
            request.cancel(error)

    def run(self, request: Request, work: Coroutine[Any, Any, Reply | Cancel]) -> Cancel:
        """Run a coroutine as a task, and answer a request with its result.

        Returns:
            A function that cancels the task.
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

    def close(self) -> None:
        """Flush the access log and the spans."""
        for watcher in self._watchers:
            watcher.close()

    def _match(self, path: str) -> tuple[Operation | None, dict[str, str]]:
        """Return the operation of a path, if any, and the values of its placeholders."""
        operation = self._fixed.get(path)
        if operation is not None:
            return operation, {}
        for operation in self._patterns:
            assert operation.pattern is not None
            if (match := operation.pattern.match(path)) is not None:
                return operation, match.groupdict()
        return None, {}

    def _check_key(self, head: Head) -> None:
        """Check the API key of a request; all paths but :data:`OPEN_PATHS` need one.

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


def read_query(query: bytes, known: Collection[str] = ()) -> dict[str, str]:
    """Parse a query string.

    Raises:
        InvalidInput: a parameter is not in ``known`` or is repeated, or there are more than :data:`MAX_PARAMETERS`.
    """
    if not query:
        return {}
    try:
        pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=MAX_PARAMETERS)
    except ValueError:
        raise InvalidInput.of("query", f"at most {MAX_PARAMETERS} parameters", "more") from None
    expect_known([name for name, _ in pairs], set(known))
    return dict(pairs)


def expect_known(given: Collection[str], known: Collection[str]) -> None:
    """Check the names of query parameters.

    Raises:
        InvalidInput: a name is not known, or is given twice.
    """
    if not set(known).issuperset(given):
        expected = f"no parameter but {', '.join(sorted(known))}" if known else "no parameters"
        raise InvalidInput.of("query", expected, "another one")
    if len(set(given)) != len(given):
        raise InvalidInput.of("query", "each parameter once", "one twice")


def too_large(size: int, most: int) -> ReplyTooLarge:
    """Return the error for a reply that exceeds the limit."""
    detail = f"expected a reply of at most {most} bytes, got {size}"
    return ReplyTooLarge(detail, limit_bytes=most, reply_bytes=size)


def _key(head: Head) -> bytes:
    """Return the API key in a head, or empty bytes."""
    scheme, _, key = head.headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


def _return_memory() -> None:
    """Return free memory of the allocator to the system, where the C library can (``malloc_trim``)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
