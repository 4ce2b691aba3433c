"""Settings of the service, from flags, environment variables named ``HESSQUIK_…`` and files of secrets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import DirectoryPath, Field, PrivateAttr, SecretStr, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
)

from hessquik_client.domain import Outside

__all__ = ["PREFIX", "Settings", "unknown_variables"]

Keys = Annotated[tuple[SecretStr, ...], NoDecode]
PREFIX = "HESSQUIK_"
#: Variables of other parts: the client's key and the build of the kernel.
OTHER_VARIABLES = frozenset({"HESSQUIK_API_KEY", "HESSQUIK_COMPILE", "HESSQUIK_KERNEL", "HESSQUIK_KEY"})


class Settings(BaseSettings):
    """The service's settings; each is also a flag, and the environment variable ``HESSQUIK_`` + its name in capitals.

    A flag comes first, then the variable, then a file of the variable's name in small letters in the folder
    ``secrets``, such as ``/run/secrets/hessquik_api_keys``.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    _flags: dict[str, Any] = PrivateAttr(default_factory=dict)

    models: Path = Field(Path("models"), description="Folder of the saved networks.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    device: str = Field("auto", description="auto, cpu, cuda, or a list such as cuda:0,cuda:1.")
    workers: int = Field(1, ge=1, le=64, description="Worker processes per device.")
    threads: int = Field(1, ge=1, le=256, description="Threads that a CPU worker computes with.")
    spin_us: int = Field(
        500,
        ge=0,
        le=10_000,
        description="Microseconds that a worker polls for the next request before it sleeps, and a front end for the "
        "answer, while requests come one by one.",
    )
    processes: int = Field(1, ge=1, le=64, description="Front ends that share the port, each a process.")
    watch_s: float = Field(
        0.0, ge=0, description="Hot reload: how often the folder is looked at for changes, in seconds; 0 is never."
    )

    api_keys: Keys = Field((), description="Keys, separated by commas, that may use the service; none: anybody.")
    admin_keys: Keys = Field((), description="Keys that may also load and unload models; none: nobody.")
    secrets: DirectoryPath | None = Field(
        None,
        description="Folder of files that set what is not set otherwise, such as hessquik_api_keys. Keys are read "
        "again when their file changes, and at SIGHUP.",
    )

    max_body_bytes: int = Field(16 << 20, ge=1024, description="Largest request body.")
    max_reply_bytes: int = Field(256 << 20, ge=1024, description="Largest reply, counted as binary.")
    outside: Outside = Field(
        "allow", description="Treatment of points outside a model's bounds where a request does not say."
    )
    max_rows: int = Field(1 << 16, ge=1, description="Most points in one request.")
    max_header_bytes: int = Field(16 << 10, ge=256, description="Largest request head.")
    max_headers: int = Field(64, ge=8, description="Most header fields.")
    receive_timeout_s: float = Field(30.0, gt=0, description="Time within which a request has to arrive whole.")
    send_timeout_s: float = Field(30.0, gt=0, description="Time that a client may take nothing of its reply.")
    keep_alive_s: float = Field(75.0, gt=0, description="Time that an idle connection is kept.")
    max_connections: int = Field(4096, ge=1, description="Most connections at once.")
    max_held_bytes: int = Field(
        1 << 30,
        ge=1 << 20,
        description="Most bytes of large requests and replies held at once; above it large requests get 503.",
    )

    deadline_ms: int = Field(30_000, ge=1, description="Time for a request that names no deadline.")
    max_deadline_ms: int = Field(120_000, ge=1, description="Longest deadline that a request may name.")
    max_queue_requests: int = Field(1024, ge=1, description="Most requests waiting.")
    max_queue_rows: int = Field(1 << 17, ge=1, description="Most rows waiting.")
    max_queue_bytes: int = Field(256 << 20, ge=1024, description="Most bytes of points waiting.")

    start_timeout_s: float = Field(120.0, gt=0, description="Time for a worker to start.")
    load_timeout_s: float = Field(120.0, gt=0, description="Time for a worker to load one model.")
    batch_timeout_s: float = Field(10.0, gt=0, description="Time for one batch, after which its worker is replaced.")
    self_check: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of batches that are computed again in other company and compared bit by bit before they "
        "are answered; a worker that disagrees with itself is replaced.",
    )
    drain_s: float = Field(20.0, ge=0, description="Time to finish what was accepted when told to stop.")
    log_format: Literal["text", "json"] = Field("text", description="How log lines are written.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="What is logged.")
    access_log: bool = Field(False, description="A JSON line on standard output for every request.")
    tracing: bool = Field(
        False, description="An OpenTelemetry span for every request, sent as the OTEL_ variables say; needs [otel]."
    )

    @field_validator("models")
    @classmethod
    def _expect_utf8(cls, folder: Path) -> Path:
        """Refuse a path that frames between processes, which are JSON, cannot hold."""
        try:
            str(folder).encode()
        except UnicodeEncodeError:
            raise ValueError(f"expected a path in UTF-8, got {str(folder)!a}") from None
        return folder

    @field_validator("api_keys", "admin_keys", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        """Split a string of keys, separated by commas, into a list."""
        if isinstance(value, str):
            return tuple(key.strip() for key in value.split(",") if key.strip())
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources in order: arguments, environment variables, files in the folder ``secrets``."""
        folder = {**env_settings(), **init_settings()}.get("secrets")
        files = (SecretsSettingsSource(settings_cls, secrets_dir=folder),) if folder and Path(folder).is_dir() else ()
        return (init_settings, env_settings, *files)

    @classmethod
    def of(cls, flags: Mapping[str, Any]) -> Settings:
        """Return settings from flags, which :meth:`again` can read again."""
        settings = cls(**flags)
        settings._flags = dict(flags)
        return settings

    def again(self) -> Settings:
        """Return the settings from the same flags, and from the environment and files as they are now."""
        return self.of(self._flags)

    def shown(self) -> dict[str, Any]:
        """Return all settings in a form that may be logged; of keys, only their number."""
        shown = self.model_dump(mode="json")
        return {name: f"{len(value)} keys" if name.endswith("_keys") else value for name, value in shown.items()}


def unknown_variables(environment: Iterable[str]) -> list[str]:
    """Return an error message for every variable ``HESSQUIK_…`` that is not a setting.

    Examples:
        >>> unknown_variables(["HESSQUIK_MAX_ROW", "HESSQUIK_PORT", "HOME"])
        ['HESSQUIK_MAX_ROW is no setting; the nearest is HESSQUIK_MAX_ROWS']
    """
    known = OTHER_VARIABLES | {PREFIX + name.upper() for name in Settings.model_fields}
    unknown = sorted(name for name in environment if name.upper().startswith(PREFIX) and name.upper() not in known)
    return [
        f"{name} is no setting; the nearest is {get_close_matches(name.upper(), sorted(known), 1, 0.0)[0]}"
        for name in unknown
    ]
