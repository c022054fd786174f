"""Log what passes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mesh.events import Event
    from mesh.handlers import Middleware, Run


def log_events(logger: logging.Logger | None = None, level: int = logging.INFO) -> Middleware:
    """
    Log type, id, source and correlation of every event; never its payload.

    Args:
        logger: Default: ``mesh.events``.
        level: A logging level.
    """
    target = logger or logging.getLogger("mesh.events")

    async def log(event: Event, proceed: Run) -> Any:
        target.log(
            level,
            "%s id=%s source=%s correlation=%s",
            event.type,
            event.id,
            event.source_agent,
            event.correlation_id,
        )
        return await proceed(event)

    return log
