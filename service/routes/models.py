"""GET /v1/models and /v1/models/{model}; POST …/load and …/unload."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from service.codecs import MAX_DIRECTIONS
from service.core import Core
from service.quantities import QUANTITIES
from service.repository import Served
from service.routes.operation import ADMIN, ANY, NAMED, CoreOf, ModelName, Strict, VersionQuery, refusals
from service.schemas import Loaded, ModelDetails, ModelList, Unloaded

__all__ = ["router"]

router = APIRouter(prefix="/v1/models", tags=["models"], route_class=Strict)


@router.get("", responses=refusals(*ANY), response_model=ModelList, response_model_exclude_unset=True)
async def list_models(core: CoreOf) -> Any:
    """Every model, in the order of names."""
    return {"models": [_summary(core, name) for name in core.repository.names()]}


@router.get(
    "/{model}", responses=refusals(*ANY, *NAMED), response_model=ModelDetails, response_model_exclude_unset=True
)
async def show_model(core: CoreOf, model: ModelName, version: VersionQuery = None) -> Any:
    """One version of a model, with its architecture and limits."""
    served = core.repository.get(model, version)
    settings = core.settings
    return {
        **_summary(core, model),
        **_facts(served),
        "version": str(served.file.version),
        "architecture": served.facts.get("architecture"),
        "quantities": list(QUANTITIES),
        "dtypes": ["float32", "float64"],
        "limits": {
            "rows": settings.max_rows,
            "directions": MAX_DIRECTIONS,
            "body_bytes": settings.max_body_bytes,
            "reply_bytes": settings.max_reply_bytes,
        },
    }


@router.post(
    "/{model}/load", responses=refusals(*ANY, *ADMIN), response_model=Loaded, response_model_exclude_unset=True
)
async def load_model(core: CoreOf, model: ModelName) -> Any:
    """Read the model's files again; what fails leaves the old version serving."""
    loaded = await core.load(model)
    attempts = [{"version": str(one.file.version), "state": one.state, "reason": one.reason} for one in loaded]
    return {**_summary(core, model), "loaded": attempts}


@router.post("/{model}/unload", responses=refusals(*ANY, *ADMIN), response_model=Unloaded)
async def unload_model(core: CoreOf, model: ModelName) -> Any:
    """Stop serving a model."""
    await core.unload(model)
    return {"name": model, "state": "unloaded"}


def _summary(core: Core, name: str) -> dict[str, Any]:
    """Return what the list says of a model: its default version's facts."""
    versions = core.repository.versions(name)
    default = core.repository.default(name)
    return {
        "name": name,
        "versions": [str(version) for version in sorted(versions)],
        "default_version": str(default.file.version),
        **_facts(default),
    }


def _facts(served: Served) -> dict[str, Any]:
    """Return state, sizes and metadata of a version."""
    known = ("d", "m", "dtype", "device", "parameters", "metadata")
    reason = {} if served.reason is None else {"reason": served.reason}
    return {"state": served.state, **reason, **{name: served.facts.get(name) for name in known}}
