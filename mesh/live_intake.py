"""
What live events pass between the fabric and the slots of an agent: frame -> decode -> gap check ->
other replicas' keys left aside -> inbox.

Whatever a frame holds, nothing is raised; what cannot be handled is counted and put aside.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from mesh import codec
from mesh.errors import FrameError
from mesh.events import is_durable
from mesh.gaps import Gaps
from mesh.inbox import Arrival
from mesh.ledger import IN_DROPPED, IN_PASSED, IN_RECEIVED, IN_SETTLED, Ledger
from mesh.logs import say_once
from mesh.replicas import slot_of
from mesh.sharing import leave_to_others

if TYPE_CHECKING:
    from mesh.consumer_config import ConsumerConfig
    from mesh.deadletters import DeadLetters
    from mesh.routes import Routes
    from mesh.slots import Slots

_log = logging.getLogger(__name__)

_UNNUMBERED = "(unnumbered)"
_FRAMES, _REJECTED_FRAMES = Ledger.at("frames"), Ledger.at("rejected_frames")
#: Links whose place in the ledger is remembered; anybody can make up names of publishers.
_MAX_LINKS = 10_000


class LiveIntake:
    """
    A receiver of frames.

    Args:
        config: The consumer's.
        ledger: Where events are counted.
        routes: Where they go.
        slots: Who handles them.
        dead_letters: Where frames are put aside.
    """

    def __init__(
        self,
        config: ConsumerConfig,
        ledger: Ledger,
        routes: Routes,
        slots: Slots,
        dead_letters: DeadLetters,
    ) -> None:
        """Know nobody who sends."""
        self._agent_name = config.agent_name
        self._registry = config.handler_registry
        self._overflow = config.overflow
        self._ledger = ledger
        self._cells = ledger.cells
        self._routes = routes
        self._slots = slots
        self._dead_letters = dead_letters
        self._gaps = Gaps(config.agent_name, ledger)
        self._links: dict[tuple[str, str], int] = {}
        #: Only keys in these slots are handled here; None: all.
        self.slots_of_mine: frozenset[int] | None = None

    def has_room(self) -> bool:
        """Say whether the inbox takes more; the broker stops reading when not."""
        return self._slots.has_room()

    def unsettled(self) -> int:
        """Count the live events that wait or are being handled."""
        cells = self._cells
        places = set(self._links.values())
        return sum(cells[at + IN_RECEIVED] - cells[at + IN_SETTLED] for at in places)

    def receive(self, topic: str, frame: bytes) -> None:
        """Take a frame from the fabric."""
        self._cells[_FRAMES] += 1
        route = self._routes.of(topic)
        handlers = route.handlers
        try:
            batch = codec.decode_frame(topic, frame, route.schema)
        except FrameError as error:
            self._cells[_REJECTED_FRAMES] += 1
            if self.slots_of_mine is not None and slot_of(frame) not in self.slots_of_mine:
                return
            self._reject(topic, error.reason, str(error), frame)
            return
        at = self._links.get((batch.publisher, topic))
        if at is None:
            # Unnumbered are requests: they are live whatever their type
            if batch.epoch and is_durable(topic):
                self._say_disagreement(batch.publisher, topic)
            at = self._ledger.link(batch.publisher or _UNNUMBERED, topic)
            if len(self._links) < _MAX_LINKS:
                self._links[batch.publisher, topic] = at
        arrived = len(batch.events) + len(batch.rejected or ())
        if batch.epoch:
            arrived = self._gaps.check(at, batch, shared=self.slots_of_mine is not None)
            if not arrived:
                return
        cells = self._cells
        if self.slots_of_mine is not None:
            passed = leave_to_others(batch, self.slots_of_mine)
            cells[at + IN_PASSED] += passed
            arrived -= passed
        cells[at + IN_RECEIVED] += arrived
        if batch.rejected:
            for reason, words, raw in batch.rejected:
                self._reject(topic, reason, words, raw)
            cells[at + IN_SETTLED] += arrived - len(batch.events)
        if not handlers:
            self._registry.say_unheard(topic)
            cells[at + IN_SETTLED] += len(batch.events)
        elif batch.events:
            arrival = Arrival(batch.events, handlers, route.lane, at)
            arrival.schema, arrival.frame = batch.schema, frame
            if dropped := self._slots.put(arrival):
                self._count_dropped(dropped)

    def _say_disagreement(self, publisher: str, topic: str) -> None:
        self._ledger.count("live_where_durable")
        _log.warning(
            "%s sends %s live, which is durable here: it is handled, and can be lost. Do both sides"
            " import its declaration, and have the same LEGION_DURABLE_EVENTS?",
            publisher or "somebody",
            topic,
        )

    def _count_dropped(self, dropped: list[tuple[int, int]]) -> None:
        cells = self._cells
        for at, amount in dropped:
            cells[at + IN_DROPPED] += amount
            cells[at + IN_SETTLED] += amount
        self._ledger.count("overflow", sum(amount for _, amount in dropped))
        say_once(
            _log,
            f"overflow-{self._agent_name}",
            "%s is slower than its input: overflow=%s drops events, counted (said once)",
            self._agent_name,
            self._overflow,
        )

    def _reject(self, topic: str, reason: str, words: str, raw: bytes) -> None:
        self._ledger.count(reason)
        self._dead_letters.put_frame(topic, reason, words, raw)
        say_once(
            _log,
            f"reject-{self._agent_name}-{reason}",
            "%s put aside a frame on %s: %s (said once per reason, all counted)",
            self._agent_name,
            topic,
            words,
        )
