"""
Tells an agent that reads no journal when dead letters of it are replayed: only then it needs one.

A wake-up that is lost while the agent is down leaves a mark on the fabric, which is looked for when
the bell is hung.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from mesh.errors import BrokerUnavailableError, MeshError
from mesh.retry import RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mesh.broker import MessageBroker
    from mesh.clock import Clock

_log = logging.getLogger(__name__)

#: Pauses while the journal does not answer.
_OUTAGE = RetryPolicy(first_delay_s=0.05, max_delay_s=2.0)


class ReplayBell:
    """
    Calls once, when the first replay comes.

    Args:
        broker: Connected.
        group: Whose replays.
        clock: Pauses between tries.
        begin: Begins to read the journal; tried again while that does not answer.
    """

    def __init__(
        self,
        broker: MessageBroker,
        group: str,
        clock: Clock,
        begin: Callable[[], Awaitable[None]],
    ) -> None:
        """Hear nothing yet."""
        self._broker = broker
        self._group = group
        self._clock = clock
        self._begin = begin
        self._answering: asyncio.Task[None] | None = None

    async def hang(self) -> None:
        """
        Listen, and look whether there was a replay already.

        Raises:
            NotConnectedError: The broker is not connected.
        """
        await self._broker.hear_replays(self._group, self)
        if await self._broker.awaits_replay(self._group):
            self.receive("", b"")

    async def take_down(self) -> None:
        """Listen no more; what is being begun is left."""
        await self._broker.detach(self)
        if self._answering is not None:
            self._answering.cancel()
            await asyncio.gather(self._answering, return_exceptions=True)

    def receive(self, topic: str, frame: bytes) -> None:
        """Ring."""
        if self._answering is None:
            self._answering = asyncio.get_running_loop().create_task(
                self._answer(), name=f"{self._group}-replays"
            )

    def has_room(self) -> bool:
        """Say yes: a bell that has rung takes no more."""
        return True

    async def _answer(self) -> None:
        tries = 0
        while True:
            try:
                await self._begin()
            except BrokerUnavailableError as error:
                tries += 1
                if tries == 1:
                    _log.warning("%s waits for the journal to replay: %s", self._group, error)
                await self._clock.sleep(_OUTAGE.delay_s(tries))
            except MeshError as error:
                _log.error("%s cannot hear replayed dead letters: %s", self._group, error)
                return
            else:
                return
