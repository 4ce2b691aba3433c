"""Settings of the service, from flags, environment variables named ``HESSQUIK_…`` and files of secrets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import DirectoryPath, Field, PrivateAttr, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from hessquik_client.domain import Outside

__all__ = ["CLIENT_KEYS", "PREFIX", "Settings", "explain", "unknown_names"]

PREFIX = "HESSQUIK_"
#: Variables of the client, each with its key.
CLIENT_KEYS = ("HESSQUIK_API_KEY", "HESSQUIK_KEY")
#: Variables of other parts: of the client, and of the build of the kernel.
OTHER_VARIABLES = frozenset({*CLIENT_KEYS, "HESSQUIK_COMPILE", "HESSQUIK_KERNEL"})

Keys = Annotated[tuple[SecretStr, ...], NoDecode]
# Every number has an upper bound: infinity and numbers beyond 64 bits are refused here, not where they are used.
Count = Annotated[int, Field(ge=1, le=1 << 30)]
Bytes = Annotated[int, Field(ge=1024, le=1 << 40)]
Milliseconds = Annotated[int, Field(ge=1, le=86_400_000)]
Seconds = Annotated[float, Field(ge=0.001, le=86_400)]


class Settings(BaseSettings):
    """The service's settings; each is also a flag, and the environment variable ``HESSQUIK_`` + its name in capitals.

    A flag comes first, then the variable, then a file of the variable's name in small letters in the folder
    ``secrets``, such as ``/run/secrets/hessquik_api_keys``.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="forbid")

    _flags: dict[str, Any] = PrivateAttr(default_factory=dict)

    models: Path = Field(Path("models"), validate_default=True, description="Folder of the saved networks.")
    host: str = Field("127.0.0.1", description="Address to listen on, or a name for it; :: takes IPv4, too.")
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
        0.0, ge=0, le=86_400, description="Hot reload: seconds between looks at the folder; 0 is never."
    )

    api_keys: Keys = Field((), description="Keys, separated by commas or lines, for the service; none: anybody.")
    admin_keys: Keys = Field((), description="Keys that may also load and unload models; none: nobody.")
    secrets: DirectoryPath | None = Field(
        None,
        description="Folder of files that set what is not set otherwise, such as hessquik_api_keys. Keys are read "
        "again when their file changes, and at SIGHUP.",
    )

    max_body_bytes: Bytes = Field(16 << 20, description="Largest request body.")
    max_reply_bytes: Bytes = Field(256 << 20, description="Largest reply, counted as binary.")
    outside: Outside = Field(
        "allow", description="Treatment of points outside a model's bounds where a request does not say."
    )
    max_rows: Count = Field(1 << 16, description="Most points in one request.")
    max_header_bytes: int = Field(16 << 10, ge=256, le=1 << 20, description="Largest request head.")
    max_headers: int = Field(64, ge=8, le=4096, description="Most header fields.")
    receive_timeout_s: Seconds = Field(30.0, description="Time within which a request has to arrive whole.")
    send_timeout_s: Seconds = Field(30.0, description="Time that a client may take nothing of its reply.")
    keep_alive_s: Seconds = Field(75.0, description="Time that an idle connection is kept.")
    max_connections: int = Field(4096, ge=1, le=1 << 20, description="Most connections at once.")
    max_held_bytes: int = Field(
        1 << 30,
        ge=1 << 20,
        le=1 << 40,
        description="Most bytes of large requests and replies held at once; above it large requests get 503.",
    )

    deadline_ms: Milliseconds = Field(30_000, description="Time for a request that names no deadline.")
    max_deadline_ms: Milliseconds = Field(120_000, description="Longest deadline that a request may name.")
    max_queue_requests: Count = Field(1024, description="Most requests waiting.")
    max_queue_rows: Count = Field(1 << 17, description="Most rows waiting.")
    max_queue_bytes: Bytes = Field(256 << 20, description="Most bytes of points waiting.")

    start_timeout_s: Seconds = Field(120.0, description="Time for a worker to start.")
    load_timeout_s: Seconds = Field(120.0, description="Time for a worker to load one model.")
    batch_timeout_s: Seconds = Field(10.0, description="Time for one batch, after which its worker is replaced.")
    self_check: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of batches that are computed again in other company and compared bit by bit before they "
        "are answered; a worker that disagrees with itself is replaced.",
    )
    drain_s: float = Field(20.0, ge=0, le=86_400, description="Time to finish what was accepted when told to stop.")
    log_format: Literal["text", "json"] = Field("text", description="How log lines are written.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="What is logged; lines of the start and of the audit always are."
    )
    access_log: bool = Field(False, description="A JSON line on standard output for every request.")
    tracing: bool = Field(
        False, description="An OpenTelemetry span for every request, sent as the OTEL_ variables say; needs [otel]."
    )

    @field_validator("models")
    @classmethod
    def _complete(cls, folder: Path) -> Path:
        """Make a path absolute for other processes; refuse one that frames, which are JSON, cannot hold."""
        try:
            str(folder).encode()
            return folder.absolute()
        except UnicodeEncodeError:
            raise ValueError(f"expected a path in UTF-8, got {str(folder)!a}") from None
        except FileNotFoundError:
            raise ValueError(f"expected an absolute path, the working directory is gone, got {folder}") from None

    @field_validator("api_keys", "admin_keys", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        """Split a string of keys into a list; refuse one that holds something else, which was meant as keys."""
        if not isinstance(value, str):
            return value
        keys = tuple(filter(None, re.split(r"[,\s]+", value)))
        if value and not keys:
            raise ValueError("expected keys, separated by commas or white space, got none")
        return keys

    @field_validator("watch_s")
    @classmethod
    def _expect_pauses(cls, pause_s: float) -> float:
        """Refuse a pause so short that looking at the folder would take all the time."""
        if 0 < pause_s < 0.05:
            raise ValueError(f"expected 0 or at least 0.05, got {pause_s:g}")
        return pause_s

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
        files = _read_secrets(Path(folder)) if folder else {}
        return (init_settings, env_settings, InitSettingsSource(settings_cls, files))

    @classmethod
    def of(cls, flags: Mapping[str, Any]) -> Settings:
        """Return settings from flags, which :meth:`again` can read again.

        Raises:
            ValueError: a value or a file is not what was expected; :func:`explain` says what.
        """
        settings = cls(**flags)
        settings._flags = dict(flags)
        return settings

    def again(self) -> Settings:
        """Return the settings from the same flags, and from the environment and files as they are now."""
        return self.of({**self._flags, "models": self.models})  # the working directory may be gone

    def shown(self) -> dict[str, Any]:
        """Return all settings in a form that may be logged; of keys, only their number."""
        shown = self.model_dump(mode="json")
        return {name: f"{len(value)} keys" if name.endswith("_keys") else value for name, value in shown.items()}


def unknown_names(names: Iterable[str], others: frozenset[str] = OTHER_VARIABLES) -> list[str]:
    """Return an error message for every name ``HESSQUIK_…`` that is neither a setting's nor one of the others.

    Examples:
        >>> unknown_names(["HESSQUIK_MAX_ROW", "HESSQUIK_PORT", "HOME"])
        ['HESSQUIK_MAX_ROW is no setting; the nearest is HESSQUIK_MAX_ROWS']
    """
    settings = sorted(PREFIX + name.upper() for name in Settings.model_fields)
    known = others.union(settings)
    unknown = sorted(name for name in names if name.upper().startswith(PREFIX) and name.upper() not in known)
    return [
        f"{name} is no setting; the nearest is {get_close_matches(name.upper(), settings, 1, 0.0)[0]}"
        for name in unknown
    ]


def explain(error: ValueError) -> str:
    """Return the first fault that :meth:`Settings.of` found as one line, without the value, which may be a key."""
    if not isinstance(error, ValidationError):
        return str(error)
    fault = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"


def _read_secrets(folder: Path) -> dict[str, str]:
    """Return the settings in the files of a folder; other files, whose names begin otherwise, are not ours.

    What is no folder is left to the validation of the settings.

    Raises:
        ValueError: a file cannot be read, or its name is almost that of a setting.
    """
    path, found = folder, dict[str, str]()
    try:
        if not folder.is_dir():
            return {}
        ours = [path for path in folder.iterdir() if path.name.upper().startswith(PREFIX)]
        for sentence in unknown_names([path.name for path in ours], frozenset()):
            raise ValueError(f"{folder}: {sentence}")
        for path in ours:
            if not path.is_file():  # a pipe would be waited for
                raise OSError(0, "no regular file")
            found[path.name[len(PREFIX) :].lower()] = path.read_text("utf-8-sig").strip()
    except OSError as error:
        raise ValueError(f"expected a file that can be read at {path}, got: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"expected text in UTF-8 in {path}, got other bytes") from None
    return found
