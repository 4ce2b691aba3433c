"""A client of the service that needs numpy, httpx and safetensors only.

with Client("http://127.0.0.1:8000") as client:
    peaks = client.model("peaks")
    out = peaks.evaluate(x, ["value", "gradient", "hessian"])
"""

from service.client.client import AsyncClient, AsyncModel, Client, Model
from service.client.errors import (
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
from service.client.messages import Answer
from service.client.steps import OutsideDomainWarning

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
