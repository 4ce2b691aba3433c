"""Building blocks of routes: path operations, their parameters, and the documentation of errors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_args

from fastapi import Depends, Header, Path, Query, Request, params
from fastapi.routing import APIRoute
from pydantic import BaseModel

from hessquik_client import errors
from hessquik_client.errors import ServiceError

from ..core import Core
from ..front import Call, Operation, expect_known
from ..http.messages import Cancel, Head, Reply

__all__ = [
    "ADMIN",
    "ANY",
    "ASKED",
    "NAMED",
    "CoreOf",
    "Deadline",
    "Direct",
    "ModelName",
    "Strict",
    "VersionQuery",
    "faults",
    "refusals",
]

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


_REQUIRED = inspect.Parameter.empty


async def _core(request: Request) -> Core:
    core: Core = request.app.state.core
    return core


#: The service behind a path operation of FastAPI.
CoreOf = Annotated[Core, Depends(_core)]


class Strict(APIRoute):
    """A path operation of FastAPI that refuses unknown and repeated query parameters."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """Return FastAPI's handler, wrapped in the check of the query parameters."""
        handle = super().get_route_handler()
        known = {field.alias for field in self.dependant.query_params}

        async def check(request: Request) -> Any:
            expect_known([name for name, _ in request.query_params.multi_items()], known)
            return await handle(request)

        return check


class Direct(APIRoute):
    """A path operation whose handler takes the whole request, from the HTTP server here or over ASGI.

    FastAPI only documents it: parsing numbers with pydantic would take longer than evaluating a small network.

    Args:
        path: The path, with placeholders for its parameters.
        answer: The handler, which answers a call; its docstring documents the operation.
        read_head: See :class:`service.front.Operation`.
        body: The pydantic model of the JSON body.
        parameters: Annotations of the parameters by name; those that are not in the path are optional.
        options: Options of :class:`fastapi.routing.APIRoute`.

    Attributes:
        operation: The operation as :mod:`service.front` uses it; its query parameters, and whether it takes a
            deadline, follow from ``parameters``.
    """

    def __init__(
        self,
        path: str,
        answer: Callable[[Call], Reply | Cancel],
        read_head: Callable[[Head, frozenset[str]], tuple[Any, frozenset[str]]] | None = None,
        body: type[BaseModel] | None = None,
        parameters: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        parameters = parameters or {}
        options.setdefault("operation_id", options.get("name"))
        kinds = {name: get_args(annotation)[1] for name, annotation in parameters.items()}
        given = [
            _parameter(name, annotation, _REQUIRED if isinstance(kinds[name], params.Path) else None)
            for name, annotation in parameters.items()
        ]
        if body is not None:
            given.append(_parameter("body", body, _REQUIRED))

        def documented() -> None:
            raise NotImplementedError  # the front calls the operation

        name = getattr(answer, "__name__", path)
        documented.__name__, documented.__doc__ = name, options.pop("text", answer.__doc__)
        documented.__signature__ = inspect.Signature(given)  # type: ignore[attr-defined]
        super().__init__(path, documented, **options)
        self.operation = Operation(
            path,
            self.path_regex if "{" in path else None,
            frozenset(self.methods or ()),
            answer,
            path,
            frozenset(name for name, kind in kinds.items() if isinstance(kind, params.Query)),
            "x_deadline_ms" in kinds,
            read_head,
        )


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


#: Default descriptions of a dialect's errors, by status.
_FAULTS = {
    400: "The request does not fit.",
    401: "A key is needed.",
    403: "An admin key is needed.",
    404: "There is no such model or version.",
    405: "The path does not have this method.",
    406: "The encoding is not one that is served.",
    413: "The body or the reply is too large.",
    415: "The body is encoded.",
    422: "The request does not fit.",
    500: "The model could not be evaluated.",
    503: "The service is overloaded or not ready.",
    504: "The answer was not there in time.",
}


def faults(model: type[BaseModel], *statuses: int, texts: Mapping[int, str] = _FAULTS) -> dict[int | str, Any]:
    """Return the ``responses`` of a dialect's errors: descriptions by status, and the pydantic model of the body."""
    return {status: {"model": model, "description": texts[status]} for status in statuses}


def refusals(*faults: type[ServiceError]) -> dict[int | str, dict[str, Any]]:
    """Return the ``responses`` of a path operation that can fail with the given errors, by status.

    Each response lists the error codes of its status and has an example of the first.
    """
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
