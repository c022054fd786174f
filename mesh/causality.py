"""Which event is being handled right now, so that what is published names its cause."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mesh.events import Event

#: The event whose handler is running in this task; None outside handlers.
current_event: ContextVar[Event | None] = ContextVar("current_event", default=None)
