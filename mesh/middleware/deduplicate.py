"""Handle each event once, by its id."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mesh.events import Event
    from mesh.handlers import Middleware, Run


def once_per_id(remembered: int = 10_000) -> Middleware:
    """
    Skip events that a handler has had before; an event whose handler raised may come again.

    Given to a whole agent or registry, it counts for each handler by itself.

    Args:
        remembered: How many ids are kept; the oldest are forgotten.
    """
    seen: OrderedDict[tuple[str, Run], None] = OrderedDict()

    async def deduplicate(event: Event, proceed: Run) -> Any:
        # What comes next is another one around each handler
        passed = event.id, proceed
        if passed in seen:
            return None
        seen[passed] = None
        try:
            result = await proceed(event)
        except BaseException:
            seen.pop(passed, None)
            raise
        while len(seen) > remembered:
            seen.popitem(last=False)
        return result

    return deduplicate
