"""OpenTelemetry spans of requests, created when a request has ended.

The span of an evaluation has two children: the time in the queue and the time of computing. OpenTelemetry's
environment variables set where spans are sent and which are sampled.
"""

from __future__ import annotations

from threading import Thread
from time import monotonic, time_ns
from typing import TYPE_CHECKING, Any

from hessquik_client.errors import StartUpError

from .http.messages import Request

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

__all__ = ["Tracer", "expect_opentelemetry"]

#: Time to send what is left at the end.
FLUSH_S = 2.0
_NAME = "hessquik-service"


class Tracer:
    """Creates a span for every request.

    Args:
        provider: The tracer provider; by default the process's own, or one that sends spans with OTLP over HTTP.

    Raises:
        StartUpError: OpenTelemetry is not installed.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        expect_opentelemetry()
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace, self._read = trace, TraceContextTextMapPropagator().extract
        self._provider = provider or _provider()
        self._tracer = self._provider.get_tracer(_NAME)

    def ended(self, request: Request, route: str, status: int) -> None:
        """Create the spans of a request that has ended."""
        head, now_s, now_ns = request.head, monotonic(), time_ns()

        def at(moment_s: float) -> int:
            return now_ns - round((now_s - moment_s) * 1e9)

        attributes: dict[str, Any] = {
            "http.request.method": head.method,
            "http.route": route,
            "http.response.status_code": status,
            "hessquik.request_id": request.id.decode(),
        }
        if request.model:
            attributes |= {"hessquik.model": request.model, "hessquik.rows": request.rows}
        parent = self._read({"traceparent": head.headers.get(b"traceparent", b"").decode("latin-1")})
        span = self._tracer.start_span(
            f"{head.method} {route}",
            parent,
            self._trace.SpanKind.SERVER,
            attributes,
            start_time=at(request.began_s),
        )
        if status >= 500:
            span.set_status(self._trace.StatusCode.ERROR)
        job = request.job
        if job is not None and job.queued_at:
            inside = self._trace.set_span_in_context(span)
            started_s = job.started_at or now_s
            self._tracer.start_span("queue", inside, start_time=at(job.queued_at)).end(at(started_s))
            if job.started_at:
                self._tracer.start_span("compute", inside, start_time=at(started_s)).end(now_ns)
        span.end(now_ns)

    def close(self) -> None:
        """Send the remaining spans, within a time limit, which OpenTelemetry does not keep by itself."""
        flush = getattr(self._provider, "force_flush", None)
        if flush is not None:
            flushing = Thread(target=flush, name="spans", daemon=True)
            flushing.start()
            flushing.join(FLUSH_S)


def _provider() -> Any:
    """Return the process's tracer provider if it has set one, or else create one that sends OTLP over HTTP."""
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    found = trace.get_tracer_provider()
    if isinstance(found, TracerProvider):
        return found
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # no variable names it
        resource = resource.merge(Resource({SERVICE_NAME: _NAME}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def expect_opentelemetry() -> None:
    """Check that spans can be made and sent.

    Raises:
        StartUpError: OpenTelemetry is not installed.
    """
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter  # noqa: F401
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError:
        raise StartUpError("expected OpenTelemetry for tracing; pip install 'hessquik-service[otel]'") from None
