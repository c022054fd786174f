"""
What waits to be handled in one agent: bounded, one lane a `HandlerPriority`.

An urgent event overtakes a backlog of less urgent ones; within a type the order stays, because all
events of a type use the lane of its most urgent handler.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from mesh.values import State

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from contextvars import Context

    from mesh.deadletters import Earlier
    from mesh.events import Event
    from mesh.handlers import Handler
    from mesh.journal import Delivery

OVERFLOWS = ("block", "drop_oldest", "latest")
_LANES = 4


class Arrival(State, eq=False):
    """Events of one frame on their way to the same handlers."""

    events: list[Event]
    handlers: tuple[Handler, ...]
    lane: int
    #: Where the ledger counts this link.
    link: int
    position: int = 0
    #: What the journal handed out, one for each event; None: they came live.
    deliveries: list[Delivery] | None = None
    #: Set when a dead letter is replayed.
    earlier: Earlier | None = None
    #: The class that all payloads are instances of; None: not known.
    schema: type[Any] | None = None
    #: What live events came in, where it is kept.
    frame: bytes = b""

    def left(self) -> int:
        """Count the events that have not been handled."""
        return len(self.events) - self.position


class Inbox(Protocol):
    """What the consumer's slots take from."""

    #: How many events wait.
    size: int
    #: The most urgent lane that holds something; 4: none.
    urgent: int

    def put(self, arrival: Arrival) -> list[tuple[int, int]]:
        """Add events; gives what was dropped for them: (link, how many)."""
        ...

    def take(self) -> Arrival | None:
        """Take the most urgent arrival."""
        ...

    def put_back(self, arrival: Arrival) -> None:
        """Return an arrival that something more urgent interrupts."""
        ...

    def has_room(self) -> bool:
        """Say whether more may come."""
        ...

    async def wait(self) -> None:
        """Return when there is something to take."""
        ...


class _Waker:
    """
    Wakes the one task that waits for an inbox.

    From a callback of the loop (a socket became readable) the task is resumed on the spot; a
    future would resume it a turn of the loop later, after another look at all sockets, which is a
    tenth of the way from process to process. It behaves as a future towards its task, which is
    what `asyncio.Future` documents for "future-like objects".
    """

    __slots__ = (
        "_asyncio_future_blocking",
        "_callback",
        "_cancelled",
        "_context",
        "_loop",
        "_woken",
    )

    def __init__(self) -> None:
        self._asyncio_future_blocking = False
        self._callback: Callable[[Any], object] | None = None
        self._context: Context | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken = False
        self._cancelled = False

    def wake(self) -> None:
        """Resume the task: at once from outside of tasks, soon from within one."""
        callback, context = self._callback, self._context
        if callback is None or self._loop is None or self._woken:
            return
        self._woken = True
        if asyncio.current_task(self._loop) is None and context is not None:
            self._callback = None
            context.run(callback, self)
        else:
            self._loop.call_soon(self._resume, context=context)

    def _resume(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            callback(self)

    async def wait(self) -> None:
        """Wait for `wake`."""
        self._loop = asyncio.get_running_loop()
        self._woken = self._cancelled = False
        try:
            await self
        finally:
            self._callback = None

    # -- what a task asks of a future ----------------------------------------------------------

    def __await__(self) -> Generator[Any, None, None]:
        self._asyncio_future_blocking = True
        yield self

    def get_loop(self) -> asyncio.AbstractEventLoop:
        assert self._loop is not None
        return self._loop

    def add_done_callback(
        self, callback: Callable[[Any], object], *, context: Context | None = None
    ) -> None:
        self._callback, self._context = callback, context

    def result(self) -> None:
        if self._cancelled:
            raise asyncio.CancelledError

    def cancel(self, msg: Any = None) -> bool:
        if self._callback is None:
            return False
        self._cancelled = True
        if not self._woken:
            self._woken = True
            self.get_loop().call_soon(self._resume, context=self._context)
        return True


class LanedInbox:
    """
    Lanes of arrivals in order.

    Args:
        limit: How many events may wait before `has_room` says no (one frame more can come).
        drop_oldest: Drop from the least urgent lane instead of refusing more.
    """

    def __init__(self, limit: int, *, drop_oldest: bool = False) -> None:
        """Begin empty."""
        self.size = 0
        self.urgent = _LANES
        self._limit = limit
        self._drop_oldest = drop_oldest
        self._lanes: tuple[deque[Arrival], ...] = tuple(deque() for _ in range(_LANES))
        self._waker = _Waker()

    def put(self, arrival: Arrival) -> list[tuple[int, int]]:
        """Add events at the end of their lane."""
        self._lanes[arrival.lane].append(arrival)
        self.size += arrival.left()
        if arrival.lane < self.urgent:
            self.urgent = arrival.lane
        self._waker.wake()
        if self._drop_oldest and self.size > self._limit:
            return self._shrink()
        return []

    def take(self) -> Arrival | None:
        """Take the oldest arrival of the most urgent lane."""
        if self.urgent == _LANES:
            return None
        arrival = self._lanes[self.urgent].popleft()
        self.size -= arrival.left()
        self._find_urgent()
        return arrival

    def put_back(self, arrival: Arrival) -> None:
        """Return an arrival to the head of its lane."""
        self._lanes[arrival.lane].appendleft(arrival)
        self.size += arrival.left()
        self._find_urgent()

    def has_room(self) -> bool:
        """Say whether more may come."""
        return self._drop_oldest or self.size < self._limit

    async def wait(self) -> None:
        """Return when there is something to take."""
        if self.urgent == _LANES:
            await self._waker.wait()

    def _find_urgent(self) -> None:
        for number, lane in enumerate(self._lanes):
            if lane:
                self.urgent = number
                return
        self.urgent = _LANES

    def _shrink(self) -> list[tuple[int, int]]:
        dropped: list[tuple[int, int]] = []
        for lane in reversed(self._lanes):
            if self.size <= self._limit:
                break
            for oldest in list(lane):
                if oldest.deliveries is not None:
                    continue  # durable: bounded by the journal, and never dropped
                amount = min(oldest.left(), self.size - self._limit)
                if amount <= 0:
                    break
                oldest.position += amount
                self.size -= amount
                dropped.append((oldest.link, amount))
                if not oldest.left():
                    lane.remove(oldest)
        self._find_urgent()
        return dropped


class LatestInbox:
    """
    Only the newest live event of each type and key: for consumers that want *now*, not history.

    Bounded by the number of keys; the oldest keys go when there are more than `limit`. Durable
    events are never replaced.
    """

    def __init__(self, limit: int) -> None:
        """Begin empty."""
        self.size = 0
        self._durable: tuple[deque[Arrival], ...] = tuple(deque() for _ in range(_LANES))
        #: How many of `size` are durable.
        self._durable_size = 0
        self.urgent = _LANES
        self._limit = limit
        self._lanes: tuple[dict[Any, Arrival], ...] = tuple({} for _ in range(_LANES))
        self._waker = _Waker()

    def put(self, arrival: Arrival) -> list[tuple[int, int]]:
        """Replace what waits under the same keys."""
        if arrival.deliveries is not None:
            self._durable[arrival.lane].append(arrival)
            self._add_durable(arrival.left())
            return []
        lane = self._lanes[arrival.lane]
        dropped: list[tuple[int, int]] = []
        for event in arrival.events[arrival.position :]:
            name = (event.type, event.key)
            older = lane.get(name)
            if older is not None:
                dropped.append((older.link, 1))
                self.size -= 1
            # Assigning to a known key keeps its place in the row: nobody starves
            # Without the frame: each key would hold one, with all the other events in it
            lane[name] = Arrival(
                [event], arrival.handlers, arrival.lane, arrival.link, schema=arrival.schema
            )
            self.size += 1
        while self.size - self._durable_size > self._limit:
            dropped.append(self._drop_one())
        self._find_urgent()
        self._waker.wake()
        return dropped

    def take(self) -> Arrival | None:
        """Take the key that waited longest in the most urgent lane."""
        if self.urgent == _LANES:
            return None
        if self._durable[self.urgent]:
            arrival = self._durable[self.urgent].popleft()
            self._add_durable(-arrival.left())
            return arrival
        lane = self._lanes[self.urgent]
        arrival = lane.pop(next(iter(lane)))
        self.size -= 1
        self._find_urgent()
        return arrival

    def put_back(self, arrival: Arrival) -> None:
        """Return events; a live one (arrivals hold one here) unless a newer one came meanwhile."""
        if arrival.deliveries is not None:
            self._durable[arrival.lane].appendleft(arrival)
            self._add_durable(arrival.left())
            return
        self.put(arrival)

    def has_room(self) -> bool:
        """Say yes: new events replace old ones."""
        return True

    async def wait(self) -> None:
        """Return when there is something to take."""
        if self.urgent == _LANES:
            await self._waker.wait()

    def _add_durable(self, amount: int) -> None:
        self._durable_size += amount
        self.size += amount
        self._find_urgent()
        if amount > 0:
            self._waker.wake()

    def _drop_one(self) -> tuple[int, int]:
        for lane in reversed(self._lanes):
            if lane:
                self.size -= 1
                return lane.pop(next(iter(lane))).link, 1
        raise AssertionError("an empty inbox cannot be over its limit")

    def _find_urgent(self) -> None:
        for number, lane in enumerate(self._lanes):
            if lane or self._durable[number]:
                self.urgent = number
                return
        self.urgent = _LANES


def make_inbox(limit: int, overflow: str) -> Inbox:
    """
    Make the inbox for an overflow policy.

    Raises:
        ValueError: The policy is none of ``block``, ``drop_oldest``, ``latest``.
    """
    if overflow == "latest":
        return LatestInbox(limit)
    if overflow not in OVERFLOWS:
        raise ValueError(f"overflow must be one of {', '.join(OVERFLOWS)}, was {overflow!r}")
    return LanedInbox(limit, drop_oldest=overflow == "drop_oldest")
