"""
What becomes of the durable events in an agent's hands: their steps wait here and are committed,
many in one transaction, or go back to be handled anew.

A step that is under way holds nobody up: handlers run ahead of the commits, on a state that is not
committed yet. When the journal refuses a step, what it has changed in memory is not true, and what
was handled since may rest on it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from operator import attrgetter
from typing import TYPE_CHECKING

from mesh.context import merge_state
from mesh.errors import BrokerUnavailableError
from mesh.journal import MAX_UNSETTLED, Delivery, Journal, Step
from mesh.ledger import IN_RECEIVED, IN_SETTLED, JOURNAL
from mesh.logs import Sparing
from mesh.retry import OUTAGE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence
    from typing import TypeVar

    from mesh.clock import Clock
    from mesh.ledger import Ledger

    Value = TypeVar("Value")

_log = logging.getLogger(__name__)

_topic_of = attrgetter("topic")


class Outage:
    """
    Waits while the journal is away, and says so once.

    Args:
        group: Who waits.
        clock: Pauses between tries.
    """

    def __init__(self, group: str, clock: Clock) -> None:
        """Know of none."""
        self._group = group
        self._clock = clock
        self._away = False
        self._sparing = Sparing(_log)

    async def outlast(self, call: Callable[[], Awaitable[Value]]) -> Value:
        """Call again and again until the journal answers."""
        tries = 0
        while True:
            try:
                return await call()
            except BrokerUnavailableError as error:
                tries += 1
                await self.wait(error, tries)

    async def wait(self, error: BrokerUnavailableError, tries: int) -> None:
        """Pause after so many tries in a row have failed."""
        if not self._away:
            self._away = True
            words = f"{self._group} waits for the journal (said once an outage): {error}"
            self._sparing.say("away", logging.WARNING, words)
        await self._clock.sleep(OUTAGE.delay_s(tries))

    def note_back(self) -> None:
        """Note that the journal has answered."""
        if self._away:
            self._away = False
            self._sparing.say("back", logging.WARNING, f"{self._group}: the journal is back")


class Committer:
    """
    Settles for one consumer of a group.

    Args:
        journal: Connected.
        group: The agent's name.
        consumer: This replica's name.
        ledger: Where events are counted.
        clock: Tells when something was said.
        outage: Waits while the journal is away.
        state: The group's state as this process knows it: committed, or about to be.
        on_refused: Called when steps were refused; loads the state anew.
    """

    def __init__(
        self,
        *,
        journal: Journal,
        group: str,
        consumer: str,
        ledger: Ledger,
        clock: Clock,
        outage: Outage,
        state: dict[str, bytes],
        on_refused: Callable[[Sequence[Step]], Awaitable[None]],
    ) -> None:
        """Hold nothing."""
        self._journal = journal
        self._group = group
        self._consumer = consumer
        self._ledger = ledger
        self._clock = clock
        self._outage = outage
        self._state = state
        self._on_refused = on_refused
        self._task: asyncio.Task[None] | None = None
        #: Steps whose makers wait, by their identity.
        self._kept: dict[int, asyncio.Future[None]] = {}
        self._steps: list[Step] = []
        #: Taken from `_steps`, and not committed yet.
        self._committing: list[Step] = []
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        self._emptied.set()
        #: Handed to the slots and not settled, by identity: on a cluster two partitions may have
        #: the same position.
        self._out: dict[int, Delivery] = {}
        #: Of those, what was handed out before a refusal took state back: what is made of it may
        #: rest on what is not true. It is given back, and handled anew.
        self._astray: set[int] = set()
        #: Set when nothing is out.
        self._back = asyncio.Event()

    def start(self) -> asyncio.Task[None]:
        """Begin to commit."""
        name = f"{self._group}-journal-committer"
        self._task = asyncio.create_task(self._commit_all(), name=name)
        self._task.add_done_callback(self._tell_makers)
        return self._task

    # -- what is in hand -----------------------------------------------------------------------

    def hand_out(self, topic: str, deliveries: Sequence[Delivery]) -> None:
        """Note what goes to the slots."""
        self._ledger.cells[self._ledger.link(JOURNAL, topic) + IN_RECEIVED] += len(deliveries)
        for each in deliveries:
            self._out[id(each)] = each

    def unsettled(self) -> int:
        """Count what was handed out and is not settled."""
        return len(self._out)

    async def settled(self) -> None:
        """Return when nothing is in hand and nothing waits to be committed."""
        while self._out or not self._emptied.is_set():
            if self._out:
                self._back.clear()
                await self._back.wait()
            await self._emptied.wait()

    def forget_hand(self) -> None:
        """Have all that is in hand handled anew, whatever is made of it."""
        self._astray.update(self._out)

    # -- steps ---------------------------------------------------------------------------------

    def settle(self, step: Step) -> None:
        """Commit a step soon, after all that came before it."""
        if step.state and not self._is_astray(step):
            merge_state(self._state, step.state)
        if not step.acks and self._is_taken_in(step):
            return
        self._steps.append(step)
        if not self._filled.is_set():
            self._emptied.clear()
            self._filled.set()

    async def commit(self, step: Step) -> None:
        """
        Commit a step after all that came before it; returns when it is kept.

        Raises:
            BrokerUnavailableError: It does not answer; only before `start` and after its end.
        """
        if not self._is_running():
            # State that was written before; what handlers left undone comes again
            steps = [*self.loose(), step]
            await self._journal.commit(self._group, self._consumer, steps)
            self._count_said(steps)
            self._steps = [each for each in self._steps if each not in steps]
            merge_state(self._state, step.state)
            return
        kept = self._kept[id(step)] = asyncio.get_running_loop().create_future()
        self.settle(step)
        try:
            await kept
        finally:
            self._kept.pop(id(step), None)

    async def committed(self) -> None:
        """Return when all steps given so far are committed."""
        await self._emptied.wait()

    def waiting(self) -> list[Step]:
        """Give the steps that are to be committed, in their order."""
        steps = [*self._committing, *self._steps]
        return [step for step in steps if not self._is_astray(step)] if self._astray else steps

    def loose(self) -> list[Step]:
        """Give those of them that settle no event, and wait for their turn."""
        return [step for step in self._steps if not step.acks]

    def _is_running(self) -> bool:
        return self._task is not None and not self._task.done()

    def _is_taken_in(self, step: Step) -> bool:
        """
        Let a step of nothing but state, which nobody waits for, become part of one like it.

        Timers write on while the journal is away, and what they write must not pile up.
        """
        if not self._is_running() or not self._steps:
            return False
        last = self._steps[-1]
        if not (self._is_plain(step) and self._is_plain(last)):
            return False
        last.state.update(step.state)
        return True

    def _is_plain(self, step: Step) -> bool:
        has_more = step.settles or step.records or step.dead
        return not has_more and id(step) not in self._kept

    def _is_astray(self, step: Step) -> bool:
        return bool(self._astray) and any(id(each) in self._astray for each in step.acks)

    # -- committing ----------------------------------------------------------------------------

    async def _commit_all(self) -> None:
        while True:
            await self._filled.wait()
            self._filled.clear()
            self._committing, self._steps = self._steps, []
            while self._committing:
                refused = await self._commit_part(self._committing[:MAX_UNSETTLED])
                del self._committing[:MAX_UNSETTLED]
                if refused:
                    await self._on_refused(refused)
                    await self._give_back(refused)
            if not self._steps:
                self._emptied.set()

    async def _commit_part(self, steps: Sequence[Step]) -> list[Step]:
        if self._astray:
            astray = [step for step in steps if self._is_astray(step)]
            steps = [step for step in steps if not self._is_astray(step)]
            await self._give_back(astray)
            if not steps:
                return []
        refused = await self._outage.outlast(
            lambda: self._journal.commit(self._group, self._consumer, steps)
        )
        self._outage.note_back()
        self._count_settled(steps, IN_SETTLED)
        if refused:
            # Received and settled by somebody else
            self._count_settled(refused, IN_RECEIVED, -1)
            self._count_settled(refused, IN_SETTLED, -1)
            refused_ids = set(map(id, refused))
            steps = [step for step in steps if id(step) not in refused_ids]
        self._count_said(steps)
        if self._kept:
            self._tell_kept(steps)
        if not self._out:
            self._back.set()
        return refused

    async def _give_back(self, steps: Iterable[Step]) -> None:
        """Have events handed out anew, as far as they are still this replica's."""
        deliveries = [each for step in steps for each in step.acks]
        await self._outage.outlast(
            lambda: self._journal.release(self._group, self._consumer, deliveries)
        )
        mine = [each for each in deliveries if self._out.pop(id(each), None) is not None]
        self._astray.difference_update(map(id, mine))
        self._count(mine, IN_RECEIVED, -1)
        if not self._out:
            self._back.set()

    def _count_settled(self, steps: Sequence[Step], cell: int, sign: int = 1) -> None:
        acks = [delivery for step in steps for delivery in step.acks]
        out = self._out
        for delivery in acks:
            out.pop(id(delivery), None)
        self._count(acks, cell, sign)

    def _count(self, deliveries: Sequence[Delivery], cell: int, sign: int) -> None:
        for topic, amount in Counter(map(_topic_of, deliveries)).items():
            self._ledger.cells[self._ledger.link(JOURNAL, topic) + cell] += sign * amount

    def _count_said(self, steps: Sequence[Step]) -> None:
        said = Counter(record.topic for step in steps for record in step.records)
        for topic, amount in said.items():
            self._ledger.count_said(topic, amount, self._clock.time_s())

    def _tell_kept(self, steps: Sequence[Step]) -> None:
        for step in steps:
            if (kept := self._kept.get(id(step))) is not None and not kept.done():
                kept.set_result(None)

    def _tell_makers(self, _: asyncio.Task[None]) -> None:
        for kept in [each for each in self._kept.values() if not each.done()]:
            kept.set_exception(BrokerUnavailableError(f"{self._group} has ended"))
