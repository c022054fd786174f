"""
How an agent listens: `EventConsumer` receives events, keeps the loss ledger, and hands them to its
slots.

One event, one path: frame -> decode -> gap check -> inbox lane -> slot -> handler -> settled.
Durable events come from the journal instead of a frame, and are settled by a committed step.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

from mesh import codec
from mesh.consumer_config import ConsumerConfig
from mesh.context import HandlerContext
from mesh.deadletters import DeadLetters
from mesh.errors import (
    ClosedError,
    ConfigurationError,
    DamagedJournalError,
    FrameError,
    MeshError,
    is_outage,
)
from mesh.events import is_durable
from mesh.gaps import Gaps
from mesh.handlers import Handler, HandlerPriority
from mesh.inbox import Arrival
from mesh.intake import DurableIntake, Kept
from mesh.journal import Step, cannot_keep
from mesh.ledger import (
    IN_DROPPED,
    IN_PASSED,
    IN_RECEIVED,
    IN_SETTLED,
    JOURNAL,
    Ledger,
)
from mesh.logs import Sparing, say_once
from mesh.replay_bell import ReplayBell
from mesh.replicas import SLOTS, slot_of
from mesh.retry import OUTAGE
from mesh.sharing import leave_to_others
from mesh.slots import Slots
from mesh.topics import check_topic

if TYPE_CHECKING:
    from collections.abc import Callable

    from mesh.broker import MessageBroker
    from mesh.deadletters import DeadLetter
    from mesh.handlers import EventHandlerRegistry
    from mesh.replicas import Roster

__all__ = ["ConsumerConfig", "EventConsumer"]

_log = logging.getLogger(__name__)

_LANE_OF = {priority: lane for lane, priority in enumerate(HandlerPriority)}
_UNNUMBERED = "(unnumbered)"
_FRAMES, _REJECTED_FRAMES = Ledger.at("frames"), Ledger.at("rejected_frames")
#: Links whose place in the ledger is remembered; anybody can make up names of publishers.
_MAX_LINKS = 10_000


class _Route(NamedTuple):
    """Where the events of a topic go in this agent."""

    handlers: tuple[Handler, ...]
    lane: int
    #: The class that all handlers want the payload in, when they agree.
    schema: type[Any] | None


def _route(handlers: tuple[Handler, ...]) -> _Route:
    if not handlers:
        return _Route(handlers, 0, None)
    schemas = {handler.schema for handler in handlers}
    schema = handlers[0].schema if len(schemas) == 1 else None
    return _Route(handlers, _LANE_OF[handlers[0].priority], schema)


def _all_if_none(slots: frozenset[int] | None) -> frozenset[int]:
    return frozenset(range(SLOTS)) if slots is None else slots


class EventConsumer:
    """
    Base class of agents that consume: register handlers in `initialize`, then `start` and `stop`.

    Args:
        config: Name, broker, registry and options.
    """

    def __init__(self, config: ConsumerConfig) -> None:
        """Prepare; nothing is heard yet."""
        self.config = config
        self.agent_name = config.agent_name
        self.registry: EventHandlerRegistry = config.handler_registry
        self.broker: MessageBroker = config.broker
        self.ledger = config.ledger or Ledger.in_memory()
        self.group = config.group or config.agent_name
        self.dead_letters = config.dead_letters or DeadLetters(self.group, config.broker.bury)
        self._cells = self.ledger.cells
        self._gaps = Gaps(config.agent_name, self.ledger)
        self._links: dict[tuple[str, str], int] = {}
        self._routes: dict[str, _Route] = {}
        self._state: dict[str, bytes] = {}
        self._intake: DurableIntake | None = None
        #: Rings for an intake where nothing else needs one.
        self._bell: ReplayBell | None = None
        self._keeps_state = False
        self._slots = Slots(
            config, self.ledger, self.dead_letters, self._state, self._settle, self._resume
        )
        #: Of live events, only keys in these slots are handled here; None: all.
        self._slots_of_mine: frozenset[int] | None = None
        self._started = False
        self._stopped = False

    async def initialize(self) -> None:
        """Override: register handlers on `self.registry` under `self.agent_name`."""

    async def restore(self) -> None:
        """Override, or replace: the state was loaded anew, for other replicas have changed it."""

    def rebalanced(self, came: Callable[[str], bool]) -> None:
        """Override, or replace: live events are shared anew, and these keys come from others."""

    async def prepare(self, *, keep_state: bool = False) -> None:
        """
        Open the journal, where it is needed, and load the durable state; `start` does it too.

        Args:
            keep_state: It is needed, even if nothing durable is heard.

        Raises:
            ConfigurationError: The journal cannot keep what durable types promise.
            BrokerUnavailableError: It does not answer.
        """
        if self._durable_topics() or keep_state:
            self._keeps_state = True
            await self._open_intake()

    async def _open_intake(self) -> None:
        sparing, tries = Sparing(_log), 0
        while self._intake is None:
            try:
                self._intake = await self._opened_intake()
            except MeshError as error:
                if not self.config.patient or not is_outage(error):
                    raise
                tries += 1
                words = f"{self.agent_name} waits for the journal before it begins: {error}"
                sparing.say("away", logging.WARNING, words)
                await self.config.clock.sleep(OUTAGE.delay_s(tries))

    async def _opened_intake(self) -> DurableIntake:
        try:
            return await self._try_intake()
        except (ConfigurationError, DamagedJournalError) as error:
            raise cannot_keep(self._durable_topics(), self.broker.fabric, error) from None

    async def _try_intake(self) -> DurableIntake:
        journal = await self.broker.open_journal()
        intake = DurableIntake(
            journal=journal,
            broker=self.broker,
            group=self.group,
            consumer=self.agent_name,
            ledger=self.ledger,
            clock=self.config.clock,
            state=self._state,
            restore=lambda: self.restore(),
            take=self._take,
            schema_of=lambda topic: self._route_of(topic).schema,
            bury=self._bury,
        )
        await intake.open(self._durable_topics(), self.config.start)
        return intake

    async def start(self) -> None:
        """
        Begin to hear `subscribed_events` and every type a handler is registered for.

        Raises:
            NotConnectedError: The broker is not connected.
            ClosedError: The consumer was stopped; make a new one.
            ConfigurationError: The journal cannot keep what durable types promise.
        """
        if self._stopped:
            raise ClosedError(f"consumer {self.agent_name!r} was stopped; make a new one")
        if self._started:
            return
        self.broker.require_connected()
        self._started = True
        try:
            await self.prepare()
            self._slots.start()
            # Durable ones as well: should a publisher take one for live, it is heard, and said
            await self.broker.attach(sorted(self._topics()), self)
        except BaseException:
            # Who tries again begins again
            self._started = False
            await self.broker.detach(self)
            await self._slots.stop()
            raise
        if self._intake is not None:
            self._intake.start()
        else:
            self._bell = ReplayBell(
                self.broker,
                self.config.group or self.agent_name,
                self.config.clock,
                self._begin_to_replay,
            )
            await self._bell.hang()
        if not self.ledger.get("ready_at_us"):
            # The first incarnation's moment stays: what a successor misses meanwhile is a loss
            self.ledger.set("ready_at_us", int(self.config.clock.time_s() * 1e6))

    async def _begin_to_replay(self) -> None:
        await self._open_intake()
        if self._intake is not None:
            self._intake.start()

    async def stop(self) -> None:
        """Hear nothing more, let running and waiting handlers finish, end; can be called twice."""
        if self._stopped:
            return
        self._stopped = True
        await self.broker.detach(self)
        if self._bell is not None:
            await self._bell.take_down()
        if self._intake is not None:
            await self._intake.stop_reading()
        try:
            async with asyncio.timeout(self.config.drain_timeout_s):
                await self._slots.drained()
        except TimeoutError:
            _log.warning(
                "%s: %d events were not finished within %g s; live ones are counted as lost,"
                " durable ones come again",
                self.agent_name,
                self.unsettled(),
                self.config.drain_timeout_s,
            )
        await self._slots.stop()
        if self._intake is not None:
            await self._intake.close(max(1.0, self.config.drain_timeout_s / 4))
        if self.config.dead_letters is None:
            await self.dead_letters.close()

    async def drained(self) -> None:
        """Return when no event waits, no handler runs, and all that is done is committed."""
        while True:
            await self._slots.drained()
            if self._intake is None:
                return
            await self._intake.committed()
            if not self._slots.is_busy() and not self._intake.unsettled():
                return
            await asyncio.sleep(0)

    def share(self, roster: Roster) -> None:
        """Handle from now on only those live events that a roster gives to this agent."""
        alone = roster.before == roster.after == (self.agent_name,)
        before = self._slots_of_mine
        self._slots_of_mine = None if alone else roster.slots_of(self.agent_name)
        self.ledger.set("shared", 1)
        # What left needs no word: some of it may still wait here, and be handled as before
        came = _all_if_none(self._slots_of_mine) - _all_if_none(before)
        if not came:
            return
        try:
            self.rebalanced(lambda key: slot_of(key) in came)
        except Exception:  # noqa: BLE001 - the agent's own code
            _log.exception("%s could not forget the keys that come", self.agent_name)

    def look(self) -> None:
        """Look into the journal again: another replica has left something there."""
        if self._intake is not None:
            self._intake.journal.wake()

    # -- what others ask -----------------------------------------------------------------------

    def queued(self) -> int:
        """Count the events that wait."""
        return self._slots.queued()

    def unsettled(self) -> int:
        """Count the events that wait or are being handled."""
        cells = self._cells
        places = set(self._links.values())
        live = sum(cells[at + IN_RECEIVED] - cells[at + IN_SETTLED] for at in places)
        return live + (self._intake.unsettled() if self._intake is not None else 0)

    def in_flight(self) -> tuple[int, float, str | None]:
        """Tell how many handlers run, the age of the oldest in seconds, and its id."""
        return self._slots.in_flight()

    def is_stuck(self) -> bool:
        """Say whether only a restart helps: a cancelled handler is still there, or we are deaf."""
        return self._slots.is_stuck() or (self._intake is not None and self._intake.is_dead())

    @property
    def has_state(self) -> bool:
        """Say whether state outlives this process."""
        return self._keeps_state and self._intake is not None

    def loose_context(self) -> HandlerContext:
        """
        Give a context outside of steps: state that is written through it is committed soon.

        Raises:
            ConfigurationError: This agent keeps no state.
        """
        intake = self._intake
        if intake is None or not self._keeps_state:
            raise ConfigurationError(
                f"{self.agent_name} keeps no durable state, for it hears no durable type;"
                " `await self.keep_state()` in its setup"
            )
        return HandlerContext(
            self.group,
            self._state,
            write_through=lambda name, raw: intake.settle(Step(state={name: raw})),
        )

    async def commit(self, context: HandlerContext) -> None:
        """
        Commit a step that no event began: what a source published and wrote belongs together.

        Raises:
            BrokerUnavailableError: The journal does not answer.
        """
        intake = self._intake
        assert intake is not None, "a context comes from `loose_context`"
        await intake.commit(context.step())

    # -- receiving -----------------------------------------------------------------------------

    def has_room(self) -> bool:
        """Say whether the inbox takes more; the broker stops reading when not."""
        return self._slots.has_room()

    def receive(self, topic: str, frame: bytes) -> None:
        """Take a frame from the fabric. Whatever is in it, nothing is raised."""
        self._cells[_FRAMES] += 1
        route = self._route_of(topic)
        handlers = route.handlers
        try:
            batch = codec.decode_frame(topic, frame, route.schema)
        except FrameError as error:
            self._cells[_REJECTED_FRAMES] += 1
            if self._slots_of_mine is not None and slot_of(frame) not in self._slots_of_mine:
                return
            self._reject(topic, error.reason, str(error), frame)
            return
        at = self._links.get((batch.publisher, topic))
        if at is None:
            # Unnumbered are requests: they are live whatever their type
            if batch.epoch and is_durable(topic):
                self._say_disagreement(batch.publisher, topic)
            at = self.ledger.link(batch.publisher or _UNNUMBERED, topic)
            if len(self._links) < _MAX_LINKS:
                self._links[batch.publisher, topic] = at
        arrived = len(batch.events) + len(batch.rejected or ())
        if batch.epoch:
            arrived = self._gaps.check(at, batch, shared=self._slots_of_mine is not None)
            if not arrived:
                return
        cells = self._cells
        if self._slots_of_mine is not None:
            passed = leave_to_others(batch, self._slots_of_mine)
            cells[at + IN_PASSED] += passed
            arrived -= passed
        cells[at + IN_RECEIVED] += arrived
        if batch.rejected:
            for reason, words, raw in batch.rejected:
                self._reject(topic, reason, words, raw)
            cells[at + IN_SETTLED] += arrived - len(batch.events)
        if not handlers:
            self.registry.say_unheard(topic)
            cells[at + IN_SETTLED] += len(batch.events)
        elif batch.events:
            arrival = Arrival(batch.events, handlers, route.lane, at)
            arrival.schema, arrival.frame = batch.schema, frame
            self._put(arrival)

    def _say_disagreement(self, publisher: str, topic: str) -> None:
        self.ledger.count("live_where_durable")
        _log.warning(
            "%s sends %s live, which is durable here: it is handled, and can be lost. Do both sides"
            " import its declaration, and have the same LEGION_DURABLE_EVENTS?",
            publisher or "somebody",
            topic,
        )

    def _take(self, kept: Kept) -> None:
        """Take durable events from the journal."""
        route = self._route_of(kept.topic)
        link = self.ledger.link(JOURNAL, kept.topic)
        # A replay that nobody handles becomes a dead letter again, instead of being settled
        if route.handlers or kept.earlier is not None:
            self._slots.put(
                Arrival(
                    kept.events, route.handlers, route.lane, link, 0, kept.deliveries, kept.earlier
                )
            )
            return
        self.registry.say_unheard(kept.topic)
        self._settle(Step(acks=kept.deliveries))

    def _put(self, arrival: Arrival) -> None:
        dropped = self._slots.put(arrival)
        if dropped:
            self._count_dropped(dropped)

    def _route_of(self, topic: str) -> _Route:
        route = self._routes.get(topic)
        handlers = self.registry.handlers_of(topic, self.agent_name)
        if route is None or route.handlers is not handlers:
            route = self._routes[topic] = _route(handlers)
        return route

    def _settle(self, step: Step) -> None:
        assert self._intake is not None
        for letter in step.dead:
            self.dead_letters.note(letter)
        self._intake.settle(step)

    def _bury(self, topic: str, reason: str, words: str, raw: bytes) -> DeadLetter:
        letter = self.dead_letters.frame_letter(topic, reason, words, raw)
        self.dead_letters.note(letter)
        return letter

    def _resume(self) -> None:
        self.broker.resume(self)

    def _topics(self) -> set[str]:
        topics = {check_topic(name) for name in self.config.subscribed_events}
        return topics | set(self.registry.topics_of(self.agent_name))

    def _durable_topics(self) -> set[str]:
        if self.config.live_only:
            return set()
        return {topic for topic in self._topics() if is_durable(topic)}

    def _count_dropped(self, dropped: list[tuple[int, int]]) -> None:
        cells = self._cells
        for at, amount in dropped:
            cells[at + IN_DROPPED] += amount
            cells[at + IN_SETTLED] += amount
        self.ledger.count("overflow", sum(amount for _, amount in dropped))
        say_once(
            _log,
            f"overflow-{self.agent_name}",
            "%s is slower than its input: overflow=%s drops events, counted (said once)",
            self.agent_name,
            self.config.overflow,
        )

    def _reject(self, topic: str, reason: str, words: str, raw: bytes) -> None:
        self.ledger.count(reason)
        self.dead_letters.put_frame(topic, reason, words, raw)
        say_once(
            _log,
            f"reject-{self.agent_name}-{reason}",
            "%s put aside a frame on %s: %s (said once per reason, all counted)",
            self.agent_name,
            topic,
            words,
        )
