"""A client of the service that needs numpy, httpx and safetensors only.

with Client("http://127.0.0.1:8000") as client:
    peaks = client.model("peaks")
    out = peaks.evaluate(x, ["value", "gradient", "hessian"])

The names below are imported on first use, because the service imports only the errors, the quantities and the checks
of requests from this package. Nothing here imports the service.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hessquik_client.client import AsyncClient, AsyncModel, Client, Model
    from hessquik_client.errors import (
        BodyTooLarge,
        ClientError,
        ConnectionLost,
        DeadlineExceeded,
        EvaluationFailed,
        Forbidden,
        InternalError,
        InvalidInput,
        MalformedBody,
        MethodNotAllowed,
        ModelNotFound,
        ModelRefused,
        NotAcceptable,
        NotFound,
        NotReady,
        OutsideDomain,
        Overloaded,
        ReplyTooLarge,
        ServiceError,
        TooExpensive,
        Unauthorized,
        UnexpectedReply,
        UnsupportedMediaType,
        VersionNotFound,
        WorkerLost,
    )
    from hessquik_client.messages import Answer
    from hessquik_client.steps import OutsideDomainWarning

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncModel",
    "BodyTooLarge",
    "Client",
    "ClientError",
    "ConnectionLost",
    "DeadlineExceeded",
    "EvaluationFailed",
    "Forbidden",
    "InternalError",
    "InvalidInput",
    "MalformedBody",
    "MethodNotAllowed",
    "Model",
    "ModelNotFound",
    "ModelRefused",
    "NotAcceptable",
    "NotFound",
    "NotReady",
    "OutsideDomain",
    "OutsideDomainWarning",
    "Overloaded",
    "ReplyTooLarge",
    "ServiceError",
    "TooExpensive",
    "Unauthorized",
    "UnexpectedReply",
    "UnsupportedMediaType",
    "VersionNotFound",
    "WorkerLost",
]

_MODULES = {
    "Answer": "messages",
    "AsyncClient": "client",
    "AsyncModel": "client",
    "Client": "client",
    "Model": "client",
    "OutsideDomainWarning": "steps",
}


def __getattr__(name: str) -> Any:
    """Import an exported name when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'hessquik_client' has no attribute {name!r}")
    value = getattr(import_module(f"hessquik_client.{_MODULES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
