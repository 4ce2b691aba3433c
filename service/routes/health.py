"""GET /livez, /readyz and /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response

from ..routes.operation import ANY, CoreOf, refusals
from ..schemas import Liveness, Readiness

__all__ = ["router"]

router = APIRouter(tags=["operation"])
_OPEN: dict[str, object] = {"security": []}


@router.get("/livez", openapi_extra=_OPEN, responses=refusals(*ANY[1:]))
async def live() -> Liveness:
    """Return 200 while the event loop answers."""
    return Liveness(live=True)


@router.get(
    "/readyz",
    openapi_extra=_OPEN,
    responses={503: {"model": Readiness, "description": "Not ready, and why."}, **refusals(*ANY[1:])},
)
async def ready(core: CoreOf, response: Response) -> Readiness:
    """Return 200 if a worker has answered an evaluation recently and a model is ready, else 503."""
    reasons = core.why_not_ready()
    if reasons:
        response.status_code = 503
        response.headers["retry-after"] = "1"
    return Readiness(ready=not reasons, reasons=reasons)


class MetricsText(Response):
    """A response in Prometheus' text format."""

    media_type = "text/plain"


@router.get("/metrics", response_class=MetricsText, responses=refusals(*ANY))
async def metrics(core: CoreOf) -> Response:
    """Return the metrics in Prometheus' text format."""
    return MetricsText(await core.node.metrics_text(core.metrics), media_type="text/plain; version=0.0.4")
