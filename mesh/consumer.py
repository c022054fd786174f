"""
How an agent listens: `EventConsumer` receives events, keeps the loss ledger, and hands them to its
slots.

Live events come as frames (`mesh.live_intake`), durable ones from the journal
(`mesh.durable_intake`); both wait in the inbox of a slot for its handlers, and are settled: live
ones in the ledger, durable ones by a committed step.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from mesh.consumer_config import ConsumerConfig
from mesh.context import HandlerContext
from mesh.deadletters import DeadLetters
from mesh.durable_intake import DurableIntake
from mesh.errors import ClosedError, ConfigurationError, DamagedJournalError, MeshError, is_outage
from mesh.events import is_durable
from mesh.inbox import Arrival
from mesh.journal import Step, cannot_keep
from mesh.ledger import JOURNAL, Ledger
from mesh.live_intake import LiveIntake
from mesh.logs import Sparing
from mesh.replay_bell import ReplayBell
from mesh.replicas import SLOTS, slot_of
from mesh.retry import OUTAGE
from mesh.routes import Routes
from mesh.slots import Slots
from mesh.topics import check_topic

if TYPE_CHECKING:
    from collections.abc import Callable

    from mesh.broker import MessageBroker
    from mesh.deadletters import DeadLetter
    from mesh.handlers import EventHandlerRegistry
    from mesh.kept import Kept
    from mesh.replicas import Roster

__all__ = ["ConsumerConfig", "EventConsumer"]

_log = logging.getLogger(__name__)


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
        self._routes = Routes(self.registry, config.agent_name)
        self._state: dict[str, bytes] = {}
        self._intake: DurableIntake | None = None
        #: Rings for an intake where nothing else needs one.
        self._bell: ReplayBell | None = None
        self._keeps_state = False
        self._slots = Slots(
            config, self.ledger, self.dead_letters, self._state, self._settle, self._resume
        )
        #: What the broker hands frames to.
        self.live = LiveIntake(config, self.ledger, self._routes, self._slots, self.dead_letters)
        #: How long the journal may take at the end.
        self._journal_limit_s = max(1.0, config.drain_timeout_s / 4)
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
            schema_of=lambda topic: self._routes.of(topic).schema,
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
            self.ledger.listen_to(self._topics())
            self._slots.start()
            # Durable ones as well: should a publisher take one for live, it is heard, and said
            await self.broker.attach(sorted(self._topics()), self.live)
        except BaseException:
            # Who tries again begins again
            self._started = False
            await self.broker.detach(self.live)
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
        await self.broker.detach(self.live)
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
            await self._intake.close(self._journal_limit_s)
        if self.config.dead_letters is None:
            await self.dead_letters.close()

    async def keep_rest(self) -> None:
        """Keep the state that was written since `stop`."""
        if self._intake is not None:
            await self._intake.commit_rest(self._journal_limit_s)

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
        before = self.live.slots_of_mine
        mine = self.live.slots_of_mine = None if alone else roster.slots_of(self.agent_name)
        self.ledger.set("shared", 1)
        # What left needs no word: some of it may still wait here, and be handled as before
        came = _all_if_none(mine) - _all_if_none(before)
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
        return self.live.unsettled() + (self._intake.unsettled() if self._intake is not None else 0)

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

    # -- durable events ------------------------------------------------------------------------

    def _take(self, kept: Kept) -> None:
        """Take durable events from the journal."""
        route = self._routes.of(kept.topic)
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
        self.broker.resume(self.live)

    def _topics(self) -> set[str]:
        topics = {check_topic(name) for name in self.config.subscribed_events}
        return topics | set(self.registry.topics_of(self.agent_name))

    def _durable_topics(self) -> set[str]:
        if self.config.live_only:
            return set()
        return {topic for topic in self._topics() if is_durable(topic)}
