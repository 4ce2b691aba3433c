"""What a call can raise: one class per code of the HTTP interface, and two for what came from no service.

ClientError
├── ConnectionLost        no whole reply came
└── ServiceError          a reply came that is an error; has status, code, detail and request_id
    ├── MalformedBody … DeadlineExceeded, one per documented code
    └── UnexpectedReply   a reply that the service does not send, say a proxy's
"""

from __future__ import annotations

from typing import Any, ClassVar

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
    "NotAcceptable",
    "NotFound",
    "NotReady",
    "Overloaded",
    "ReplyTooLarge",
    "ServiceError",
    "Unauthorized",
    "UnexpectedReply",
    "UnsupportedMediaType",
    "VersionNotFound",
    "WorkerLost",
]


class ClientError(Exception):
    """Base of everything a call raises."""


class ConnectionLost(ClientError):
    """The service could not be reached, or the connection broke before the reply was whole."""


class ServiceError(ClientError):
    """The service's answer is an error.

    Args:
        detail: The service's sentence: what was expected and what came.
        status: HTTP status.
        request_id: What the service's log has it under.
        retry_after_s: After what time the service asks to be tried again, if it does.
        extra: Further members of the body, such as ``field``, ``row``, ``expected``, ``got``.
    """

    code: ClassVar[str] = ""

    def __init__(
        self,
        detail: str,
        status: int = 0,
        request_id: str = "",
        retry_after_s: float | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Keep the parts; the message is the sentence."""
        super().__init__(detail)
        self.detail = detail
        self.status = status
        self.request_id = request_id
        self.retry_after_s = retry_after_s
        self.extra = extra or {}


class UnexpectedReply(ServiceError):
    """What came is not a reply of this service."""


class InternalError(ServiceError):
    """Something went wrong in the service; its log has it under the request id."""

    code = "internal_error"


class MalformedBody(ServiceError):
    """The body is not what its content type says."""

    code = "malformed_body"


class Unauthorized(ServiceError):
    """A key is needed."""

    code = "unauthorized"


class Forbidden(ServiceError):
    """The key does not allow this."""

    code = "forbidden"


class NotFound(ServiceError):
    """There is nothing at this path."""

    code = "not_found"


class ModelNotFound(ServiceError):
    """No model has this name."""

    code = "model_not_found"


class VersionNotFound(ServiceError):
    """The model has no such version."""

    code = "version_not_found"


class MethodNotAllowed(ServiceError):
    """The path exists, but not for this method."""

    code = "method_not_allowed"


class NotAcceptable(ServiceError):
    """None of the accepted media types can be made."""

    code = "not_acceptable"


class BodyTooLarge(ServiceError):
    """The body is over the service's limit."""

    code = "body_too_large"


class ReplyTooLarge(ServiceError):
    """The reply would be over the service's limit."""

    code = "reply_too_large"


class UnsupportedMediaType(ServiceError):
    """The body's media type or encoding is not one that is read."""

    code = "unsupported_media_type"


class InvalidInput(ServiceError):
    """A field of the request does not fit the model."""

    code = "invalid_input"


class EvaluationFailed(ServiceError):
    """The network could not be evaluated at this point."""

    code = "evaluation_failed"


class Overloaded(ServiceError):
    """The service's queue is full."""

    code = "overloaded"


class NotReady(ServiceError):
    """No worker, or the model on none of them, is ready."""

    code = "not_ready"


class WorkerLost(ServiceError):
    """The worker died and no other could take over."""

    code = "worker_lost"


class DeadlineExceeded(ServiceError):
    """The answer was not there in time; without a status if it is the client that stopped waiting."""

    code = "deadline_exceeded"


#: The class of every code.
BY_CODE: dict[str, type[ServiceError]] = {kind.code: kind for kind in ServiceError.__subclasses__() if kind.code}
