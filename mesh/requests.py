"""Ask and be answered: a request is an event that names a private topic for its reply."""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import TYPE_CHECKING, Any

from mesh import codec
from mesh.errors import FrameError, RequestTimeoutError
from mesh.topics import PRIVATE_PREFIX

if TYPE_CHECKING:
    from mesh.broker import MessageBroker
    from mesh.events import Event
    from mesh.publisher import EventPublisher

_log = logging.getLogger(__name__)


class Requester:
    """
    Sends requests and waits for their replies on a topic of its own.

    Args:
        broker: Where replies arrive.
        publisher: What requests are sent with.
    """

    def __init__(self, broker: MessageBroker, publisher: EventPublisher) -> None:
        """Subscribe to nothing before the first request."""
        self._broker = broker
        self._publisher = publisher
        self._topic = f"{PRIVATE_PREFIX}reply.{secrets.token_hex(8)}"
        self._waiting: dict[str, asyncio.Future[Event]] = {}
        self._attached: asyncio.Task[None] | None = None

    async def request(
        self, event_type: str, data: Any, *, timeout_s: float = 5.0, key: str | None = None
    ) -> Event:
        """
        Publish a request and return the first reply.

        Args:
            event_type: What is asked.
            data: The payload.
            timeout_s: How long to wait.
            key: As for `publish`.

        Raises:
            RequestTimeoutError: Nobody replied in time.
            BrokerUnavailableError: The fabric does not answer.
            PayloadError: The payload does not fit.
            ValueError: `timeout_s` is no time.
        """
        if not timeout_s >= 0:
            raise ValueError(f"timeout_s={timeout_s!r}: must be 0 or more seconds")
        reply: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        request = self._publisher.make_event(event_type, data, key=key, reply_to=self._topic)
        # Before it leaves: publishing may wait, and the reply may be here first
        self._waiting[request.id] = reply
        try:
            async with asyncio.timeout(timeout_s):
                await self._attach()
                await self._publisher.publish_event(request)
                return await reply
        except TimeoutError:
            why = self._broker.trouble() or "does an agent that hears it run?"
            raise RequestTimeoutError(
                f"nobody replied to {str(event_type)!r} within {timeout_s:g} s; {why}"
            ) from None
        finally:
            self._waiting.pop(request.id, None)

    def receive(self, topic: str, frame: bytes) -> None:
        """Take a reply."""
        try:
            batch = codec.decode_frame(topic, frame)
        except FrameError as error:
            _log.warning("ignored a reply that cannot be read: %s", error)
            return
        for event in batch.events:
            waiter = self._waiting.get(event.causation_id or "")
            if waiter is not None and not waiter.done():
                waiter.set_result(event)

    def has_room(self) -> bool:
        """Say yes: there are no more replies than requests."""
        return True

    async def close(self) -> None:
        """Give up all requests."""
        if self._attached is not None:
            self._attached.cancel()
            await asyncio.gather(self._attached, return_exceptions=True)
        await self._broker.detach(self)
        for waiter in self._waiting.values():
            waiter.cancel()

    async def _attach(self) -> None:
        # One subscription for all, even when the first two requests start together
        if self._attached is None or _has_failed(self._attached):
            self._attached = asyncio.create_task(
                self._broker.attach([self._topic], self), name="reply-topic"
            )
            # Where nobody waits for it any more, its failure is told to who asks next
            self._attached.add_done_callback(_has_failed)
        await asyncio.shield(self._attached)


def _has_failed(task: asyncio.Task[None]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
