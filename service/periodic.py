"""Work that is done again and again, whatever fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

__all__ = ["repeat"]

logger = logging.getLogger(__name__)


async def repeat(pause_s: float, *parts: Callable[[], object]) -> None:
    """Call functions in turn, after each pause, until cancelled; one that raises is logged and called again."""
    while True:
        await asyncio.sleep(pause_s)
        for part in parts:
            try:
                part()
            except Exception:
                logger.exception("%s failed; again in %g s", part.__qualname__, pause_s)
