"""The static files of the pages: a fixed table of paths and files of installed packages. No other file is read.

The files hold no data, so their paths need no key; the pages request data with the user's key.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

__all__ = ["ASSETS", "Asset", "load"]

_MODULES = ("api", "docs", "explorer", "figures", "linear", "paths", "picture", "slice", "snippets")

#: Path → package and file in it.
ASSETS: dict[str, tuple[str, str]] = {
    "/": (__package__, "explorer/index.html"),
    "/docs": (__package__, "explorer/docs.html"),
    "/explorer/explorer.css": (__package__, "explorer/explorer.css"),
    "/explorer/docs.css": (__package__, "explorer/docs.css"),
    "/explorer/icon.svg": (__package__, "explorer/icon.svg"),
    **{f"/explorer/{name}.js": (__package__, f"explorer/{name}.js") for name in _MODULES},
    "/explorer/plotly.min.js": ("plotly", "package_data/plotly.min.js"),
    "/explorer/swagger-ui.js": ("fastapi_offline", "static/swagger-ui-bundle.js"),
    "/explorer/swagger-ui.css": ("fastapi_offline", "static/swagger-ui.css"),
}

_MEDIA_TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """A file, ready to be sent.

    Attributes:
        media_type: Media type of the file.
        etag: Entity tag, which changes when the file does.
        plain: Bytes of the file.
        packed: Bytes of the file, compressed with gzip.
    """

    media_type: bytes
    etag: bytes
    plain: bytes
    packed: bytes


@cache
def load(path: str) -> Asset:
    """Read and compress the file of a path of :data:`ASSETS`; the result is cached.

    Raises:
        FileNotFoundError: the installed package lacks the file.
    """
    package, file = ASSETS[path]
    spec = find_spec(package)  # finds the folder without running the package
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"expected the package {package} to be installed")
    content = (Path(spec.submodule_search_locations[0]) / file).read_bytes()
    etag = b'"%s"' % hashlib.sha256(content).hexdigest()[:32].encode()
    return Asset(_MEDIA_TYPES[Path(file).suffix], etag, content, gzip.compress(content, 6, mtime=0))
