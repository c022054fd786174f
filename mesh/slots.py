"""
Where handlers run: one event, one handler at a time in each slot.

A slot is a task that runs handlers one after the other; there is no task per event.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from typing import TYPE_CHECKING

import msgspec

from mesh.cancelling import shed
from mesh.causality import current_event
from mesh.context import HandlerContext, current_context
from mesh.deadletters import go_on
from mesh.events import key_of
from mesh.handler_watch import HandlerWatch
from mesh.handlers import own_copy
from mesh.inbox import Arrival, make_inbox
from mesh.ledger import IN_SETTLED, Ledger
from mesh.tries import Slot, Tries, too_late

if TYPE_CHECKING:
    from collections.abc import Callable

    from mesh.consumer_config import ConsumerConfig
    from mesh.deadletters import DeadLetters
    from mesh.events import Event
    from mesh.handlers import Handler
    from mesh.journal import Delivery, Step

_log = logging.getLogger(__name__)

#: Handlers that never wait give the loop a turn after so many events.
_EVENTS_A_TURN = 256
#: A cancelled handler that is still there after this long holds the agent up for good.
CANCEL_GRACE_S = 5.0


class Slots:
    """
    The slots of one consumer.

    Args:
        config: The consumer's.
        ledger: Where events are counted.
        dead_letters: Where live events are put aside.
        state: The agent's durable state, encoded.
        settle: Takes the steps of durable events.
        on_room: Called when a full inbox has room again.
    """

    def __init__(
        self,
        config: ConsumerConfig,
        ledger: Ledger,
        dead_letters: DeadLetters,
        state: dict[str, bytes],
        settle: Callable[[Step], None],
        on_room: Callable[[], None],
    ) -> None:
        """Prepare; nothing runs yet."""
        self._config = config
        self._agent_name = config.agent_name
        self._group = config.group or config.agent_name
        self._ledger = ledger
        self._cells = ledger.cells
        self._dead_letters = dead_letters
        self._state = state
        self._settle = settle
        self._on_room = on_room
        self._tries = Tries(config, ledger, dead_letters, self._is_ending)
        self._slots = [
            Slot(make_inbox(config.buffer_size, config.overflow)) for _ in range(config.concurrency)
        ]
        self._watch = HandlerWatch(config, self._slots, self._tries)
        self._blocked = False
        self._stopping = False
        self._idle: asyncio.Event | None = None

    def start(self) -> None:
        """Begin to handle."""
        for number, slot in enumerate(self._slots):
            slot.task = asyncio.create_task(
                self._work(slot), name=f"{self._agent_name}-slot-{number}"
            )
            slot.task.add_done_callback(self._tell_end)
        self._watch.start()

    async def stop(self) -> None:
        """End at once; what waits or runs stays unsettled."""
        self._stopping = True
        for slot in self._slots:
            # Whoever swallows its cancellation is the last to be called
            slot.inbox.urgent = -1
        tasks = [slot.task for slot in self._slots if slot.task is not None]
        if self._watch.task is not None:
            tasks.append(self._watch.task)
        for task in tasks:
            task.cancel()
        if not tasks:
            return
        _, running = await asyncio.wait(tasks, timeout=CANCEL_GRACE_S)
        if running:
            _log.error(
                "%s: %s did not end when it was cancelled, and is left alone",
                self._agent_name,
                ", ".join(slot.handler.id for slot in self._slots if slot.handler),
            )

    async def drained(self) -> None:
        """Return when no event waits and no handler runs."""
        while self.is_busy():
            self._idle = asyncio.Event()
            await self._idle.wait()

    # -- what others ask -----------------------------------------------------------------------

    def is_busy(self) -> bool:
        """Say whether an event waits or a handler runs."""
        return any(slot.inbox.size or slot.event is not None for slot in self._slots)

    def queued(self) -> int:
        """Count the events that wait."""
        return sum(slot.inbox.size for slot in self._slots)

    def in_flight(self) -> tuple[int, float, str | None]:
        """Tell how many handlers run, the age of the oldest in seconds, and its id."""
        busy = [slot for slot in self._slots if slot.event is not None]
        if not busy:
            return 0, 0.0, None
        oldest = max(busy, key=lambda slot: slot.age_s)
        return len(busy), oldest.age_s, oldest.handler.id if oldest.handler else None

    def is_stuck(self) -> bool:
        """Say whether only a restart helps: a cancelled handler is still there, or a slot died."""
        return any(
            (slot.timed_out and slot.age_s > self._tries.limit_s(slot) + CANCEL_GRACE_S)
            or (slot.task is not None and slot.task.done() and not self._stopping)
            for slot in self._slots
        )

    def _tell_end(self, task: asyncio.Task[None]) -> None:
        """Nobody awaits a slot: what ends one for a reason that nobody thought of is said here."""
        if self._stopping:
            return
        if task.cancelled():
            # The end of the loop, or somebody who must not
            _log.error("%s was cancelled and hears nothing any more", task.get_name())
        else:
            _log.critical(
                "%s has failed and hears nothing", task.get_name(), exc_info=task.exception()
            )

    def _is_ending(self) -> bool:
        """Say whether the slots are to end: the end of the loop cancels the watch as well."""
        watch = self._watch.task
        return self._stopping or (watch is not None and (watch.done() or watch.cancelling() > 0))

    def has_room(self) -> bool:
        """Say whether the inboxes take more; `on_room` is called later when not."""
        for slot in self._slots:
            if not slot.inbox.has_room():
                self._blocked = True
                return False
        return True

    def put(self, arrival: Arrival) -> list[tuple[int, int]]:
        """Take in events; gives what was dropped for them: (link, how many)."""
        if len(self._slots) == 1:
            return self._slots[0].inbox.put(arrival)
        return self._spread(arrival)

    def _spread(self, arrival: Arrival) -> list[tuple[int, int]]:
        """Give each key to one slot, so that its order is kept."""
        places: dict[int, list[int]] = {}
        for position, event in enumerate(arrival.events):
            # crc32, not hash(): the same key goes to the same slot in every process and run
            number = zlib.crc32(key_of(event).encode()) % len(self._slots)
            places.setdefault(number, []).append(position)
        dropped: list[tuple[int, int]] = []
        for number, positions in places.items():
            kept = arrival.deliveries
            part = msgspec.structs.replace(
                arrival,
                events=[arrival.events[at] for at in positions],
                deliveries=None if kept is None else [kept[at] for at in positions],
            )
            dropped += self._slots[number].inbox.put(part)
        return dropped

    # -- handling ------------------------------------------------------------------------------

    async def _work(self, slot: Slot) -> None:
        inbox = slot.inbox
        since_turn = 0
        while not self._stopping:
            arrival = inbox.take()
            if arrival is None:
                self._tell_idle()
                await inbox.wait()
                since_turn = 0
                continue
            since_turn += arrival.left()
            if arrival.deliveries is None:
                await self._run(slot, arrival)
            else:
                await self._run_durable(slot, arrival, arrival.deliveries)
            if slot.task is not None and slot.task.cancelling() and not self._is_ending():
                # A handler has left it behind; the next one is not to be taken for cancelled
                await shed(slot.task)
                if self._is_ending():
                    return
            if self._blocked and inbox.size <= self._config.buffer_size // 2:
                self._blocked = False
                self._on_room()
            if since_turn >= _EVENTS_A_TURN:
                since_turn = 0
                await asyncio.sleep(0)

    async def _run(self, slot: Slot, arrival: Arrival) -> None:
        """Handle the live events of an arrival, until something more urgent comes."""
        handlers, begun = arrival.handlers, arrival.position
        events = arrival.events[begun:] if begun else arrival.events
        max_hops = self._config.max_hops
        odd = [e for e in events if e.expires_at is not None or e.hops > max_hops]
        if odd or len(handlers) > 1:
            done = await self._run_checked(slot, arrival, events)
        else:
            done = await self._run_plainly(slot, arrival, handlers[0], events)
        if done < len(events):
            arrival.position = begun + done
            slot.inbox.put_back(arrival)
        slot.event = None
        current_event.set(None)
        self._note_latency(events[done - 1])

    async def _run_plainly(
        self, slot: Slot, arrival: Arrival, handler: Handler, events: list[Event]
    ) -> int:
        """Handle events which nothing speaks against by one handler; gives how many."""
        cells, settled_at = self._cells, arrival.link + IN_SETTLED
        inbox, lane = slot.inbox, arrival.lane
        begin_next = handler.starter(events, arrival.schema)
        slot.handler = handler
        done = failed = 0
        # `map` makes each event the current one in its turn, without a call from Python
        for event, _ in zip(events, map(current_event.set, events), strict=True):
            slot.event = event
            done += 1
            try:
                await begin_next()
            except BaseException as error:  # noqa: BLE001 - sorted out in `Tries`
                failed += 1
                await self._tries.after(error, slot, handler, event, arrival)
            cells[settled_at] += 1
            if inbox.urgent < lane:
                break
        handler.calls += done - failed
        return done

    async def _run_checked(self, slot: Slot, arrival: Arrival, events: list[Event]) -> int:
        """Handle events of which some may be parked, or by several handlers; gives how many."""
        cells, settled_at = self._cells, arrival.link + IN_SETTLED
        inbox, lane = slot.inbox, arrival.lane
        slot.handler = None
        done = 0
        for event in events:
            slot.event = event
            done += 1
            current_event.set(event)
            if not self._is_parked(event):
                await self._run_each(slot, arrival, event)
            cells[settled_at] += 1
            if inbox.urgent < lane:
                break
        return done

    async def _run_each(self, slot: Slot, arrival: Arrival, event: Event) -> None:
        for handler in arrival.handlers:
            if event.expires_at is not None and self._is_parked(event, handler.id):
                continue
            slot.handler = handler
            mine = event if handler is arrival.handlers[-1] else own_copy(event)
            current_event.set(mine)
            try:
                await handler.run(mine)
                handler.calls += 1
            except BaseException as error:  # noqa: BLE001 - sorted out in `Tries`
                await self._tries.after(error, slot, handler, mine, arrival)

    async def _run_durable(self, slot: Slot, arrival: Arrival, deliveries: list[Delivery]) -> None:
        """Handle the durable events of an arrival; each becomes a step."""
        inbox, events, handlers = slot.inbox, arrival.events, arrival.handlers
        only = None if arrival.earlier is None else arrival.earlier.handler
        try:
            for position in range(arrival.position, len(events)):
                event, delivery = events[position], deliveries[position]
                slot.event = event
                context = HandlerContext(self._group, self._state, event, delivery)
                current_context.set(context)
                if not self._is_parked_in_step(event, context, only, handlers):
                    for handler in handlers:
                        if handler.id in delivery.done or only not in (None, handler.id):
                            continue
                        if event.expires_at is not None and self._is_parked_in_step(
                            event, context, handler.id, handlers
                        ):
                            continue
                        slot.handler = handler
                        mine = event if handler is handlers[-1] else own_copy(event)
                        current_event.set(mine)
                        context.begin(handler.id)
                        try:
                            await handler.run(mine)
                            handler.calls += 1
                        except BaseException as error:  # noqa: BLE001 - sorted out in `Tries`
                            again = await self._tries.after(
                                error, slot, handler, mine, arrival, context
                            )
                            context = again or context
                if arrival.earlier is not None:
                    context.dead[:] = [go_on(each, arrival.earlier) for each in context.dead]
                self._settle(context.step())
                arrival.position = position + 1
                if inbox.urgent < arrival.lane:
                    break
        finally:
            slot.event = None
            current_event.set(None)
            current_context.set(None)
        if arrival.earlier is None:
            # A replay's age is that of its letter, and says nothing about the mesh
            self._note_latency(event)
        if arrival.left():
            inbox.put_back(arrival)

    def _is_parked_in_step(
        self,
        event: Event,
        context: HandlerContext,
        only: str | None,
        handlers: tuple[Handler, ...],
    ) -> bool:
        """Put a durable event aside that must reach no handler."""
        why = self._why_parked(event, context, only, handlers)
        if why is None:
            return False
        reason, words = why
        self._ledger.count(reason)
        context.dead.append(self._dead_letters.letter(event, reason, words, handler=only))
        return True

    def _why_parked(
        self,
        event: Event,
        context: HandlerContext,
        only: str | None,
        handlers: tuple[Handler, ...],
    ) -> tuple[str, str] | None:
        """Say why a durable event must reach no handler, or can reach none."""
        if not handlers or (only is not None and all(each.id != only for each in handlers)):
            return "unheard", (
                f"{self._agent_name} has no handler {f'{only!r} ' if only else ''}of {event.type}"
            )
        if context.deliveries > self._config.max_deliveries:
            return "poison", (
                f"its handling ended the process {context.deliveries - 1} times;"
                f" the limit is {self._config.max_deliveries}"
            )
        return self._why_too_late(event)

    def _why_too_late(self, event: Event) -> tuple[str, str] | None:
        # Most never expire, and asking for the time costs
        if event.expires_at is not None and (words := too_late(event, self._config.clock.now())):
            return "expired", words
        if event.hops > self._config.max_hops:
            return "hops", (
                f"{event.hops} handlers lie behind it, the limit is {self._config.max_hops}:"
                " do agents answer each other in circles?"
            )
        return None

    def _is_parked(self, event: Event, handler: str | None = None) -> bool:
        why = self._why_too_late(event)
        if why is None:
            return False
        reason, words = why
        self._ledger.count(reason)
        self._dead_letters.put(self._dead_letters.letter(event, reason, words, handler=handler))
        return True

    def _note_latency(self, event: Event) -> None:
        late_s = self._config.clock.time_s() - event.timestamp.timestamp()
        self._ledger.record_latency(late_s * 1e6)
        if self._config.log_events:
            _log.debug("%s handled %s %s", self._agent_name, event.type, event.id)

    def _tell_idle(self) -> None:
        if self._idle is not None:
            self._idle.set()
            self._idle = None
