"""GET /v1/models, /v1/models/{model} and /v1/models/{model}/file; POST …/load and …/unload."""

from __future__ import annotations

import asyncio
import hashlib
from base64 import b64encode
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from hessquik_client import errors
from hessquik_client.errors import NotReady, ReplyTooLarge
from hessquik_client.quantities import quantities_of
from hessquik_client.question import MAX_DIRECTIONS

from ..codecs import SAFETENSORS
from ..core import Core
from ..front import Call
from ..http.messages import Cancel, Reply
from ..repository import Served
from ..routes.operation import (
    ADMIN,
    ANY,
    NAMED,
    CoreOf,
    Direct,
    ModelName,
    Strict,
    VersionQuery,
    refusals,
)
from ..schemas import Loaded, ModelDetails, ModelList, Unloaded
from ..workers import LoadError

__all__ = ["router"]

router = APIRouter(prefix="/v1/models", tags=["models"], route_class=Strict)


UnloadQuery = Annotated[
    str | None,
    Query(description="All versions if not given.", json_schema_extra={"pattern": "^[1-9][0-9]{0,8}$"}),
]


@router.get("", responses=refusals(*ANY), response_model=ModelList, response_model_exclude_unset=True)
async def list_models(core: CoreOf) -> Any:
    """List all models, ordered by name."""
    return {"models": [_summary(core, name) for name in core.repository.names()]}


@router.get(
    "/{model}", responses=refusals(*ANY, *NAMED), response_model=ModelDetails, response_model_exclude_unset=True
)
async def show_model(core: CoreOf, model: ModelName, version: VersionQuery = None) -> Any:
    """Describe one version of a model, with its architecture and limits."""
    served = core.repository.get(model, version)
    settings = core.settings
    return {
        **_summary(core, model),
        **_facts(served),
        "version": str(served.file.version),
        "architecture": served.facts.get("architecture"),
        "sha256": served.facts.get("sha256"),
        "quantities": list(quantities_of(served.facts.get("members", 1))),
        "dtypes": ["float32", "float64"],
        "limits": {
            "rows": settings.max_rows,
            "directions": MAX_DIRECTIONS,
            "body_bytes": settings.max_body_bytes,
            "reply_bytes": settings.max_reply_bytes,
        },
    }


def send_file(call: Call) -> Cancel:
    """Send the model's file, with its SHA-256 and version in the headers."""
    return call.run(_send_file(call, call.core.repository.ready(call.target.model, call.target.version)))


async def _send_file(call: Call, served: Served) -> Reply:
    most, size = call.core.settings.max_reply_bytes, served.file.size_bytes
    if size > most:
        raise ReplyTooLarge(f"expected a file of at most {most} bytes, got {size}", limit_bytes=most)
    call.hold_bytes(size)  # before the file is read, so that memory stays bounded
    loop = asyncio.get_running_loop()
    try:
        data = await loop.run_in_executor(None, served.file.read, size)
    except LoadError as error:
        raise NotReady(f"the file of this model: {error}") from None
    digest = await loop.run_in_executor(None, hashlib.sha256, data)
    if digest.hexdigest() != served.facts["sha256"]:
        raise NotReady("expected the file that is served, the folder has another one that is not loaded yet")
    name, version = served.file.name, served.file.version
    headers = [
        (b"repr-digest", b"sha-256=:%b:" % b64encode(digest.digest())),
        (b"etag", b'"%b"' % digest.hexdigest().encode()),
        (b"x-model-version", b"%d" % version),
        (b"content-disposition", b'attachment; filename="%b"' % f"{name}.safetensors".encode()),
    ]
    return Reply(200, SAFETENSORS.encode(), [data], headers)


router.routes.append(
    Direct(
        "/v1/models/{model}/file",
        send_file,
        parameters={"model": ModelName, "version": VersionQuery},
        methods=["GET"],
        name="file",
        summary="The served file",
        tags=["models"],
        response_class=Response,
        responses={
            200: {"content": {SAFETENSORS: {"schema": {"type": "string", "format": "binary"}}}},
            **refusals(*ANY, *NAMED, errors.ReplyTooLarge, errors.NotReady),
        },
    )
)


@router.post(
    "/{model}/load", responses=refusals(*ANY, *ADMIN), response_model=Loaded, response_model_exclude_unset=True
)
async def load_model(core: CoreOf, model: ModelName) -> Any:
    """Load the model's files again; if a file is refused, the version served so far stays."""
    loaded = await core.node.load(model)
    return {**_summary(core, model), "loaded": [served.outcome for served in loaded]}


@router.post(
    "/{model}/unload",
    responses=refusals(*ANY, *ADMIN, errors.VersionNotFound),
    response_model=Unloaded,
    response_model_exclude_unset=True,
)
async def unload_model(core: CoreOf, model: ModelName, version: UnloadQuery = None) -> Any:
    """Stop serving a model, or one version of it, until the next load; the highest other version is the default."""
    if version is None:
        await core.node.unload(model)
        return {"name": model, "state": "unloaded"}
    core.repository.get(model, version)
    await core.node.unload(model, int(version))
    return {"name": model, "state": "unloaded", "version": version}


def _summary(core: Core, name: str) -> dict[str, Any]:
    """Return a model's entry in the list: its versions, and the description of the default one."""
    versions = core.repository.versions(name)
    default = core.repository.default(name)
    return {
        "name": name,
        "versions": [str(version) for version in sorted(versions)],
        "default_version": str(default.file.version),
        **_facts(default),
    }


def _facts(served: Served) -> dict[str, Any]:
    """Return the state, sizes and metadata of a version."""
    known = ("d", "m", "dtype", "device", "parameters", "members", "metadata")
    reason = {} if served.reason is None else {"reason": served.reason}
    return {"state": served.state, **reason, **{name: served.facts.get(name) for name in known}}
