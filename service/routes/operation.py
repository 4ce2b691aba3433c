"""The parts of routes: path operations that read the whole request, dialects, and how errors are documented."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple
from urllib.parse import parse_qsl

from fastapi import Depends, Header, Path, Query, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel

from hessquik_client import errors
from hessquik_client.errors import InvalidInput, ServiceError
from service.core import Core
from service.http import messages
from service.json_reader import SHORT_BYTES, expect_object, has_booleans, read_json, read_long_json

if TYPE_CHECKING:
    from service.app import Application

__all__ = [
    "ADMIN",
    "ANY",
    "ASKED",
    "NAMED",
    "NATIVE",
    "CoreOf",
    "Deadline",
    "Dialect",
    "Direct",
    "ModelName",
    "Strict",
    "VersionQuery",
    "read_query",
    "refusals",
    "with_object",
]

#: Most parameters of a query.
MAX_PARAMETERS = 16

Handler = Callable[["Application", messages.Request], "messages.Reply | messages.Cancel"]
HeadReader = Callable[["Application", messages.Head, Mapping[str, str]], Any]

# Parameters, as path operations name them.
ModelName = Annotated[str, Path(description="A served model.")]
VersionQuery = Annotated[
    str | None,
    Query(description="The highest that is ready if not given.", json_schema_extra={"pattern": "^[1-9][0-9]{0,8}$"}),
]
Deadline = Annotated[
    int | None,
    Header(alias="X-Deadline-Ms", ge=1, description="Milliseconds within which the answer has to be there."),
]


async def _core(request: Request) -> Core:
    core: Core = request.app.state.core
    return core


#: The service behind a path operation of FastAPI.
CoreOf = Annotated[Core, Depends(_core)]


class Dialect(NamedTuple):
    """A dialect: how errors are written on its paths.

    Attributes:
        media_type: Of the bodies.
        owns: Tells whether a path is one of the dialect's.
        write: Makes the status and body of an error, for a request id.
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


class Strict(APIRoute):
    """A path operation of FastAPI that refuses query parameters which it does not have."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """Return FastAPI's handler behind the check."""
        handle = super().get_route_handler()
        known = {field.alias for field in self.dependant.query_params}

        async def check(request: Request) -> Any:
            expect_known([name for name, _ in request.query_params.multi_items()], known)
            return await handle(request)

        return check


def _without_query(_: Application, head: messages.Head, names: Mapping[str, str]) -> Mapping[str, str]:
    read_query(head.query)
    return names


class Direct(APIRoute):
    """A path operation whose handler takes the whole request: from a connection, or over ASGI.

    FastAPI documents it, from its models and parameters; reading numbers through them would cost more than computing
    a small network.

    Args:
        path: With placeholders.
        handler: Called with the application and the request; its docstring documents the operation.
        read_head: Makes of a head and the path's parameters what the handler finds as ``request.head.target.asked``;
            the parameters themselves if not given.
        body: The model of the JSON body.
        parameters: A function with the signature of the parameters besides the path's.
        options: As :class:`fastapi.routing.APIRoute` takes them.
    """

    def __init__(
        self,
        path: str,
        handler: Handler,
        read_head: HeadReader | None = None,
        body: type[BaseModel] | None = None,
        parameters: Callable[..., None] | None = None,
        **options: Any,
    ) -> None:
        self.handler = handler
        self.read_head = read_head or _without_query
        given = [] if parameters is None else list(inspect.signature(parameters, eval_str=True).parameters.values())
        if body is not None:
            given.append(inspect.Parameter("body", inspect.Parameter.KEYWORD_ONLY, annotation=body))

        def documented() -> None:
            raise NotImplementedError  # the application calls the handler

        documented.__name__, documented.__doc__ = (
            getattr(handler, "__name__", path),
            options.pop("text", handler.__doc__),
        )
        documented.__signature__ = inspect.Signature(given)  # type: ignore[attr-defined]
        super().__init__(path, documented, **options)


def read_query(query: bytes, known: Collection[str] = ()) -> dict[str, str]:
    """Read a query's parameters, each of them known and given once at most.

    Raises:
        InvalidInput: one is not, or there are too many.
    """
    if not query:
        return {}
    try:
        pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True, max_num_fields=MAX_PARAMETERS)
    except ValueError:
        raise InvalidInput.of("query", f"at most {MAX_PARAMETERS} parameters", "more") from None
    expect_known([name for name, _ in pairs], set(known))
    return dict(pairs)


def with_object(
    application: Application,
    request: messages.Request,
    go_on: Callable[[dict[str, Any], bool], messages.Reply | messages.Cancel],
    may_have_text: bool = False,
) -> messages.Reply | messages.Cancel:
    """Go on with the JSON object in a request's body; a long body is read slice by slice, in a task.

    Args:
        application: What answers.
        request: The request.
        go_on: Called with the object, and whether it may hold booleans.
        may_have_text: As for :func:`service.json_reader.read_long_json`.
    """
    body = request.body
    if len(body) <= SHORT_BYTES:
        return go_on(expect_object(read_json(body)), has_booleans(body))

    async def read() -> messages.Reply | messages.Cancel:
        document, may_be_booleans = await read_long_json(body, application.core.settings.max_rows, may_have_text)
        return go_on(expect_object(document), may_be_booleans)

    return application.run(request, read())


def expect_known(given: list[str], known: set[str] | frozenset[str]) -> None:
    """Refuse names of query parameters that are not known, or are given twice.

    Raises:
        InvalidInput: there are some.
    """
    if not known.issuperset(given):
        expected = f"no parameter but {', '.join(sorted(known))}" if known else "no parameters"
        raise InvalidInput.of("query", expected, "another one")
    if len(set(given)) != len(given):
        raise InvalidInput.of("query", "each parameter once", "one twice")


def refusals(*faults: type[ServiceError]) -> dict[int | str, dict[str, Any]]:
    """Document errors as problem details by status, with the codes that each may have and an example of the first."""
    by_status: dict[int, list[type[ServiceError]]] = {}
    for fault in faults:
        by_status.setdefault(fault.status, []).append(fault)
    return {
        status: {
            "description": "; ".join(f"`{fault.code}`: {(fault.__doc__ or '').strip()}" for fault in same),
            "content": {
                "application/problem+json": {
                    "schema": {"$ref": "#/components/schemas/Problem"},
                    "example": _example(same[0]),
                }
            },
            **({"headers": {"Retry-After": {"schema": {"type": "integer"}}}} if same[0].retry_after_s else {}),
        }
        for status, same in sorted(by_status.items())
    }


def _example(fault: type[ServiceError]) -> dict[str, Any]:
    return {
        "type": f"urn:hessquik:error:{fault.code}",
        "title": fault.title,
        "status": fault.status,
        "detail": (fault.__doc__ or "").strip(),
        "code": fault.code,
        "request_id": "3f9a1c0b7d52-1",
    }


#: Errors of any path; then those of paths that name a model, compute, or administer.
ANY = (errors.Unauthorized, errors.MethodNotAllowed, errors.InvalidInput)
NAMED = (errors.ModelNotFound, errors.VersionNotFound)
ASKED = (
    errors.MalformedBody,
    errors.NotAcceptable,
    errors.OutsideDomain,
    errors.BodyTooLarge,
    errors.ReplyTooLarge,
    errors.UnsupportedMediaType,
    errors.EvaluationFailed,
    errors.NotReady,
    errors.Overloaded,
    errors.WorkerLost,
    errors.DeadlineExceeded,
)
ADMIN = (errors.ModelNotFound, errors.Forbidden, errors.NotReady)
