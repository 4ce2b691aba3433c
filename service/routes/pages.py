"""GET / and GET /docs: the pages, and the files that they are made of."""

from __future__ import annotations

import asyncio

from service.assets import load
from service.door import Receive, Reply, Scope, Send, header, send_reply

__all__ = ["Page"]

#: The pages run their own files only and talk to this service only. Plotly and Swagger UI set inline styles.
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


class Page:
    """One file of the pages."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, packed where that is accepted, or say that the client's copy is still good."""
        scope["hessquik.route"] = "pages"
        asset = await asyncio.to_thread(load, scope["path"])
        headers = [*_HEADERS, (b"etag", asset.etag)]
        if header(scope, b"if-none-match") == asset.etag:
            await send_reply(send, Reply(304, asset.media_type, [b""], headers))
        elif b"gzip" in header(scope, b"accept-encoding"):
            headers.append((b"content-encoding", b"gzip"))
            await send_reply(send, Reply(200, asset.media_type, [asset.packed], headers))
        else:
            await send_reply(send, Reply(200, asset.media_type, [asset.plain], headers))
