"""The errors that a call can raise: the service's own classes, and two for what came from no service.

ClientError
├── ConnectionLost        no whole reply came
└── ServiceError          a reply came that is an error; has status, code, detail and request_id
    ├── MalformedBody … DeadlineExceeded, one per documented code
    └── UnexpectedReply   a reply that the service does not send, say a proxy's
"""

from __future__ import annotations

from service.errors import (
    BY_CODE,
    BodyTooLarge,
    ClientError,
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
    UnsupportedMediaType,
    VersionNotFound,
    WorkerLost,
)

__all__ = [
    "BY_CODE",
    "BodyTooLarge",
    "ClientError",
    "ConnectionLost",
    "DeadlineExceeded",
    "EvaluationFailed",
    "Forbidden",
    "InternalError",
    "InvalidInput",
    "MalformedBody",
    "MethodNotAllowed",
    "ModelNotFound",
    "ModelRefused",
    "NotAcceptable",
    "NotFound",
    "NotReady",
    "OutsideDomain",
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


class ConnectionLost(ClientError):
    """The service could not be reached, or the connection broke before the reply was whole."""


class UnexpectedReply(ServiceError):
    """The reply is not one that this service sends for the request."""

    code, title = "", "Unexpected reply"
