"""What the service can answer instead of numbers: every error's name, status and title, once.

Each class is one code of the HTTP interface. Its message says what was expected and what came; it never holds a
traceback, a path, an address or the input itself. Dialects turn these into bodies of their own, in one place each.
"""

from __future__ import annotations

from typing import Any, ClassVar

import orjson

__all__ = [
    "BodyTooLarge",
    "ClientGone",
    "DeadlineExceeded",
    "EvaluationFailed",
    "Forbidden",
    "InvalidInput",
    "InvalidOutput",
    "MalformedBody",
    "MethodNotAllowed",
    "ModelNotFound",
    "NotAcceptable",
    "NotFound",
    "NotReady",
    "Overloaded",
    "ReplyTooLarge",
    "ServiceError",
    "StartUpError",
    "Unauthorized",
    "UnsupportedMediaType",
    "VersionNotFound",
    "WorkerLost",
]


class StartUpError(Exception):
    """The service cannot start; the message is the one line that says why."""


class ServiceError(Exception):
    """Base of every error that a client sees."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Internal error"
    #: Seconds after which trying again makes sense, where it does.
    retry_after_s: ClassVar[int | None] = None

    def __init__(self, detail: str, **extra: Any) -> None:
        """Keep the sentence for the client and further members of the body."""
        super().__init__(detail)
        self.detail = detail
        self.extra = extra

    def problem(self, request_id: str) -> bytes:
        """The body, as RFC 9457 has it."""
        return orjson.dumps(
            {
                "type": f"urn:hessquik:error:{self.code}",
                "title": self.title,
                "status": self.status,
                "detail": self.detail,
                "code": self.code,
                "request_id": request_id,
                **self.extra,
            }
        )

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Headers that belong to this error."""
        return [] if self.retry_after_s is None else [(b"retry-after", b"%d" % self.retry_after_s)]


class MalformedBody(ServiceError):
    """The body is not what its content type says."""

    status, code, title = 400, "malformed_body", "Malformed body"


class Unauthorized(ServiceError):
    """A key is needed."""

    status, code, title = 401, "unauthorized", "Unauthorized"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """How to authenticate."""
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
    def of(cls, field: str, expected: str, got: str, row: int | None = None) -> InvalidInput:
        """The error for a field, or its first row, that does not fit."""
        where, extra = (field, {}) if row is None else (f"{field}, row {row}", {"row": row})
        return cls(f"{where}: expected {expected}, got {got}", field=field, expected=expected, got=got, **extra)


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
