"""GET / and GET /docs: the pages and their static files."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter

from ..assets import ASSETS, load
from ..front import Call
from ..http.messages import Cancel, Reply, Request
from ..http.negotiation import best
from ..routes.operation import Direct

__all__ = ["router"]

#: Content security policy: scripts and requests of this origin only. Plotly and Swagger UI set inline styles.
_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-cache"),
    (b"vary", b"accept-encoding"),
)


def page(call: Call) -> Cancel:
    """Send a file of the pages."""
    return call.run(_answer(call.request))


async def _answer(request: Request) -> Reply:
    """Send a file, compressed if the client accepts it, or 304 if the client's copy is current."""
    asset = await asyncio.to_thread(load, request.head.path)
    given = request.head.headers.get
    # A tag belongs to one form of the file (RFC 9110, 8.8.3).
    coding = best(given(b"accept-encoding", b"identity"), ("gzip", "identity"))
    is_packed = coding == "gzip"
    etag = asset.etag[:-1] + b'-gzip"' if is_packed else asset.etag
    headers = [*_HEADERS, (b"etag", etag)]
    tags = [tag.strip().removeprefix(b"W/") for tag in given(b"if-none-match", b"").split(b",")]
    # A client may hold the other form of the same file, which is as good.
    if not {asset.etag, asset.etag[:-1] + b'-gzip"', b"*"}.isdisjoint(tags):
        return Reply(304, asset.media_type, [], headers)
    if is_packed:
        headers.append((b"content-encoding", b"gzip"))
    return Reply(200, asset.media_type, [asset.packed if is_packed else asset.plain], headers)


def _route(path: str) -> Direct:
    """Return the route of a file; all files share a label in metrics, and any query is accepted."""
    route = Direct(path, page, methods=["GET"], include_in_schema=False)
    route.operation = route.operation._replace(label="pages", parameters=None)
    return route


router = APIRouter()
router.routes += map(_route, ASSETS)
