"""Every error of the service, once: code, status, title and meaning, for the server and for the Python client.

Each class is one code of the HTTP interface. Its message gives what was expected and what was received; it never
contains a traceback, a path, an address or the input itself. The server sends these errors in the format of each
dialect; the client raises the same classes. Only the standard library is imported here.

    ClientError                base of all errors of the client
    ├── ConnectionLost         no complete reply was received
    └── ServiceError           an error with a code, one class each; has status, code, detail and request_id
        └── UnexpectedReply    a reply that the service does not send, for instance one of a proxy
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple, Self

__all__ = [
    "BY_CODE",
    "BodyTooLarge",
    "ClientError",
    "ClientGone",
    "ConnectionLost",
    "DeadlineExceeded",
    "EvaluationFailed",
    "Failure",
    "Forbidden",
    "InternalError",
    "InvalidInput",
    "InvalidOutput",
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
    "StartUpError",
    "TooExpensive",
    "Unauthorized",
    "UnexpectedReply",
    "UnsupportedMediaType",
    "VersionNotFound",
    "WorkerLost",
]


class StartUpError(Exception):
    """The service cannot start; the message is the reason, in one line."""


class ClientError(Exception):
    """Base of all errors of the client."""


class ConnectionLost(ClientError):
    """The service could not be reached, or the connection broke before the reply was complete."""


class ServiceError(ClientError):
    """Base of the errors that have a code.

    Args:
        detail: One sentence: what was expected and what was received.
        status: The HTTP status received, if it differs from that of the class; 0 if no reply was received.
        request_id: The id of the request in the service's log, if known.
        retry_after_s: Seconds to wait before a retry, if it differs from that of the class.
        extra: Further members of the body, such as ``field``, ``row``, ``expected``, ``got``.
    """

    status: int = 500
    code: str = "internal_error"
    title: str = "Internal error"
    retry_after_s: float | None = None

    def __init__(
        self,
        detail: str,
        *,
        status: int | None = None,
        request_id: str = "",
        retry_after_s: float | None = None,
        **extra: Any,
    ) -> None:
        """Keep the parts; the message is the sentence."""
        super().__init__(detail)
        self.detail = detail
        self.request_id = request_id
        self.extra = extra
        if status is not None:
            self.status = status
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s

    @property
    def failure(self) -> Failure:
        """Return this error as a value, which can be stored without keeping a traceback alive."""
        return Failure(type(self), self.detail, self.extra)

    def problem(self, request_id: str) -> bytes:
        """Return the body in the problem details format (RFC 9457)."""
        members = {
            "type": f"urn:hessquik:error:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            "request_id": request_id,
            **self.extra,
        }
        return json.dumps(members, separators=(",", ":")).encode()

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that belong to this error."""
        return [] if self.retry_after_s is None else [(b"retry-after", b"%d" % self.retry_after_s)]


class Failure(NamedTuple):
    """An error as a value, which keeps no traceback and no frames alive.

    Attributes:
        kind: Class of the error.
        detail: Message of the error.
        extra: Further members of its body.

    Examples:
        >>> failure = Overloaded("expected at most 1024 requests waiting").failure
        >>> failure.error() is failure.error()
        False
        >>> failure.error()
        Overloaded('expected at most 1024 requests waiting')
    """

    kind: type[ServiceError]
    detail: str
    extra: dict[str, Any]

    def error(self) -> ServiceError:
        """Return a new exception to raise."""
        return self.kind(self.detail, **self.extra)


class InternalError(ServiceError):
    """Something went wrong in the service; its log has it under the request id."""


class MalformedBody(ServiceError):
    """The body is not what its content type says."""

    status, code, title = 400, "malformed_body", "Malformed body"


class Unauthorized(ServiceError):
    """A key is needed."""

    status, code, title = 401, "unauthorized", "Unauthorized"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the header that says how to authenticate."""
        return [(b"www-authenticate", b"Bearer")]


class Forbidden(ServiceError):
    """The key does not allow this."""

    status, code, title = 403, "forbidden", "Forbidden"


class NotFound(ServiceError):
    """There is nothing at this path."""

    status, code, title = 404, "not_found", "Not found"


class ModelNotFound(ServiceError):
    """No model has this name."""

    status, code, title = 404, "model_not_found", "Model not found"


class VersionNotFound(ServiceError):
    """The model has no such version."""

    status, code, title = 404, "version_not_found", "Version not found"


class MethodNotAllowed(ServiceError):
    """The path exists, but not for this method."""

    status, code, title = 405, "method_not_allowed", "Method not allowed"


class NotAcceptable(ServiceError):
    """None of the accepted media types can be made."""

    status, code, title = 406, "not_acceptable", "Not acceptable"


class BodyTooLarge(ServiceError):
    """The body is over its limit."""

    status, code, title = 413, "body_too_large", "Body too large"


class ReplyTooLarge(ServiceError):
    """The reply would be over its limit."""

    status, code, title = 413, "reply_too_large", "Reply too large"


class UnsupportedMediaType(ServiceError):
    """The body's media type or encoding is not one that is read."""

    status, code, title = 415, "unsupported_media_type", "Unsupported media type"


class InvalidInput(ServiceError):
    """A field of the request does not fit the model."""

    status, code, title = 422, "invalid_input", "Invalid input"

    @classmethod
    def of(cls, field: str, expected: str, got: str, row: int | None = None) -> Self:
        """Return the error for a field, or its first row, that does not fit."""
        where = field if row is None else f"{field}, row {row}"
        extra: dict[str, Any] = {} if row is None else {"row": row}
        return cls(f"{where}: expected {expected}, got {got}", field=field, expected=expected, got=got, **extra)


class OutsideDomain(ServiceError):
    """A point is outside the model's bounds, and the request or the service refuses such."""

    status, code, title = 422, "outside_domain", "Outside the domain"


class TooExpensive(ServiceError):
    """A row takes longer to compute than a batch may."""

    status, code, title = 422, "too_expensive", "Too expensive"


class ModelRefused(ServiceError):
    """A model's file cannot be served."""

    status, code, title = 422, "model_refused", "Model refused"


class EvaluationFailed(ServiceError):
    """The network could not be evaluated at this point."""

    status, code, title = 500, "evaluation_failed", "Evaluation failed"


class InvalidOutput(ServiceError):
    """The answer is not one that the dialect can express."""

    status, code, title = 500, "invalid_output", "Invalid output"


class Overloaded(ServiceError):
    """The queue is full."""

    status, code, title, retry_after_s = 503, "overloaded", "Overloaded", 1


class NotReady(ServiceError):
    """No worker, or the model on none of them, is ready."""

    status, code, title, retry_after_s = 503, "not_ready", "Not ready", 1


class WorkerLost(ServiceError):
    """The worker died and no other could take over."""

    status, code, title, retry_after_s = 503, "worker_lost", "Worker lost", 1


class DeadlineExceeded(ServiceError):
    """The answer was not there in time."""

    status, code, title = 504, "deadline_exceeded", "Deadline exceeded"


class ClientGone(ServiceError):
    """The client closed its connection; nobody will read this."""

    status, code, title = 499, "client_gone", "Client gone"


class UnexpectedReply(ServiceError):
    """The reply is not one that this service sends for the request."""

    code, title = "", "Unexpected reply"


#: The class of every code that the native interface answers with: nobody reads client_gone, invalid_output is
#: UM-Bridge's, and an unexpected reply has none.
BY_CODE: dict[str, type[ServiceError]] = {
    kind.code: kind
    for kind in ServiceError.__subclasses__()
    if kind not in {ClientGone, InvalidOutput, UnexpectedReply}
}
