"""Handle each event once, by its id."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mesh.events import Event
    from mesh.handlers import Middleware, Run


def once_per_id(remembered: int = 10_000) -> Middleware:
    """
    Skip events whose id passed before; an event whose handler raised may come again.

    Args:
        remembered: How many ids are kept; the oldest are forgotten.
    """
    seen: OrderedDict[str, None] = OrderedDict()

    async def deduplicate(event: Event, proceed: Run) -> Any:
        if event.id in seen:
            return None
        seen[event.id] = None
        try:
            result = await proceed(event)
        except BaseException:
            seen.pop(event.id, None)
            raise
        while len(seen) > remembered:
            seen.popitem(last=False)
        return result

    return deduplicate
