"""API keys: checks of the keys in requests, and reloading of key files while the service runs."""

from __future__ import annotations

import hmac
import logging
import os
from collections.abc import Callable, Sequence

from .settings import PREFIX, Settings, explain

__all__ = ["Keys"]

logger = logging.getLogger(__name__)

NAMES = ("api_keys", "admin_keys")


class Keys:
    """The API keys in effect.

    Args:
        settings: Settings with the keys, or with the folder of their files.

    Attributes:
        are_needed: Whether every request needs a key.
        on_change: Called when the keys have changed.
    """

    def __init__(self, settings: Settings) -> None:
        """Start with the keys of the settings."""
        self._settings = settings
        self.on_change: list[Callable[[], None]] = []
        self._known, self._is_asked = self._fingerprints(), False
        self.replace(**_plain(settings))

    def replace(self, api_keys: Sequence[str], admin_keys: Sequence[str]) -> None:
        """Replace all keys."""
        self.api_keys, self.admin_keys = list(api_keys), list(admin_keys)
        self._admins = [key.encode() for key in admin_keys]
        self._all = [key.encode() for key in api_keys] + self._admins
        self.are_needed = bool(api_keys)
        for call in self.on_change:
            call()

    def shown(self) -> dict[str, list[str]]:
        """Return the keys by the names of their settings, to start a front end with them."""
        return {"api_keys": self.api_keys, "admin_keys": self.admin_keys}

    def is_known(self, given: bytes) -> bool:
        """Return whether a key may use the service."""
        return _is_among(given, self._all)

    def is_admin(self, given: bytes) -> bool:
        """Return whether a key may also load and unload models."""
        return _is_among(given, self._admins)

    def ask(self, *_: object) -> None:
        """Have the next :meth:`follow` read the keys again: a handler of SIGHUP."""
        self._is_asked = True

    def follow(self) -> None:
        """Read the keys again if their files have changed, or this was asked for; called periodically."""
        if self._is_asked or self._fingerprints() != self._known:
            self._is_asked = False
            self.reload()

    def reload(self) -> None:
        """Read the keys again; keep the present ones if the files cannot be read or hold no key."""
        self._known = self._fingerprints()
        if self._settings.secrets is None:
            logger.info("there is no folder of secrets to read keys from")
            return
        try:
            now = _plain(self._settings.again())
        except ValueError as error:
            logger.error("the keys stay as they are, they cannot be read: %s", explain(error))
            return
        if self.are_needed and not now["api_keys"]:
            logger.error("the keys stay as they are: without any the service would be open to everybody")
            return
        self.replace(**now)
        logger.info("keys read again: %d that may use the service, %d of admins", *map(len, now.values()))

    def _fingerprints(self) -> list[tuple[int, int, int] | None]:
        """Return the fingerprints of the key files, which change when the files do."""
        folder, stamps = self._settings.secrets, list[tuple[int, int, int] | None]()
        for name in NAMES if folder is not None else ():
            try:
                status = os.stat(f"{folder}/{PREFIX.lower()}{name}")
                stamps.append((status.st_mtime_ns, status.st_size, status.st_ino))
            except OSError:
                stamps.append(None)
        return stamps


def _plain(settings: Settings) -> dict[str, list[str]]:
    return {name: [key.get_secret_value() for key in getattr(settings, name)] for name in NAMES}


def _is_among(given: bytes, keys: list[bytes]) -> bool:
    """Return whether a key is in a list; the time does not depend on the keys (constant-time comparison)."""
    return any([hmac.compare_digest(given, key) for key in keys])
