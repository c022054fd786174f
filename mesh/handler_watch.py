"""The limits on handlers' time, kept by one task for all slots of a consumer."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mesh.consumer_config import ConsumerConfig
    from mesh.handlers import Handler
    from mesh.tries import Slot, Tries

_log = logging.getLogger(__name__)


class HandlerWatch:
    """
    Cancels handlers over their limit.

    One look at a counter a tick replaces a timer per event, which would cost more than the handler
    itself.

    Args:
        config: The consumer's.
        slots: Where its handlers run.
        tries: What follows when one is cancelled.
    """

    def __init__(self, config: ConsumerConfig, slots: Sequence[Slot], tries: Tries) -> None:
        """Look at nothing yet."""
        self._config = config
        self._agent_name = config.agent_name
        self._slots = slots
        self._tries = tries
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look, in a task of its own."""
        self.task = asyncio.create_task(self._run(), name=f"{self._agent_name}-watch")

    async def _run(self) -> None:
        clock = self._config.clock
        while True:
            tick_s = self._tick_s()
            before = clock.mono_s()
            await clock.sleep(tick_s)
            # While the whole process was stopped no handler ran
            elapsed_s = min(clock.mono_s() - before, 2 * tick_s)
            for slot in self._slots:
                self._look_at(slot, elapsed_s)

    def _tick_s(self) -> float:
        registry = self._config.handler_registry
        limits = [self._config.handler_timeout_s]
        for topic in registry.topics_of(self._agent_name):
            limits += [
                handler.timeout_s
                for handler in registry.handlers_of(topic, self._agent_name)
                if handler.timeout_s is not None
            ]
        return min(1.0, max(0.02, min(limits) / 5))

    def _look_at(self, slot: Slot, elapsed_s: float) -> None:
        event, handler, retries = slot.seen
        if (
            slot.event is None
            or slot.pausing
            or slot.event is not event
            or slot.handler is not handler
            or slot.retries != retries
        ):
            slot.seen = (slot.event, slot.handler, slot.retries)
            slot.age_s = 0.0
            if slot.timed_out is not None:
                self._say_swallowed(slot.timed_out[1])
                self._tries.take_back(slot)
            return
        slot.age_s += elapsed_s
        if slot.age_s > self._tries.limit_s(slot) and not slot.timed_out and slot.task is not None:
            slot.timed_out = (slot.event, slot.handler)
            slot.task.cancel()

    def _say_swallowed(self, handler: Handler | None) -> None:
        _log.warning(
            "handler %s of %s was cancelled at its time limit and went on to its end all the same",
            handler.id if handler else "?",
            self._agent_name,
        )
