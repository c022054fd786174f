"""Let only matching events pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mesh.filters import check_question

if TYPE_CHECKING:
    from collections.abc import Callable

    from mesh.events import Event
    from mesh.handlers import Middleware, Run


def only(predicate: Callable[[Event], bool]) -> Middleware:
    """
    Pass on the events for which a predicate holds; skip the others.

    Args:
        predicate: A `mesh.filters.Filter` or any function of an event.

    Raises:
        ValueError: It is no function, or a coroutine function.
    """
    check_question(predicate)

    async def keep(event: Event, proceed: Run) -> Any:
        return await proceed(event) if predicate(event) else None

    return keep
