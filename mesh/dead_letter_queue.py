"""
What people do with dead letters: look at them, send them back to the handler that failed, correct
them, throw them away.

::

    queue = DeadLetterQueue(await broker.open_journal())
    for group in await queue.groups():
        print(group.agent, group.handler, group.error, group.count)
    await queue.replay(DeadQuery(agent="risk", handler="on_order"))

`mesh dlq` is the same on the command line.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec

from mesh import codec
from mesh.clock import SYSTEM_CLOCK
from mesh.deadletters import Attempt
from mesh.errors import DeadLetterError, EventTooLargeError, FrameError, TopicError
from mesh.events import Event, is_durable
from mesh.journal import ALL_DEAD, DeadQuery, Record
from mesh.payloads import payload_encoder
from mesh.replay import REPLAYER, event_of, replay_record
from mesh.topics import PRIVATE_PREFIX, replay_topic
from mesh.values import State, Value, field

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from datetime import datetime

    from mesh.clock import Clock
    from mesh.deadletters import DeadLetter
    from mesh.journal import Journal
    from mesh.publisher import EventPublisher

#: So many letters are replayed or removed in one go.
_BATCH = 100
#: At a limited rate, so often in a second.
_BATCHES_A_SECOND = 10
#: The reason of what `publish_with_retry` gave up.
UNPUBLISHED = "unpublished"
_TOLD_CHARACTERS = 200


class DeadGroup(Value, frozen=True, kw_only=True):
    """Dead letters that failed alike."""

    agent: str
    handler: str | None
    reason: str
    #: The first line.
    error: str
    count: int
    #: When the first and the last of them failed last, in seconds since 1970.
    oldest_s: float
    newest_s: float


class Refusal(Value, frozen=True):
    """A letter that cannot be replayed, and why."""

    id: str
    why: str


class ReplayReport(State):
    """What a replay did, or would do."""

    dry_run: bool
    #: How many letters were meant.
    matched: int = 0
    #: How many of them went back, by agent and handler; None: to all handlers of the agent.
    sent: dict[tuple[str, str | None], int] = field(default_factory=dict)
    #: How many were published again, by type.
    published: dict[str, int] = field(default_factory=dict)
    refused: list[Refusal] = field(default_factory=list)

    @property
    def replayed(self) -> int:
        """Count the letters that left."""
        return sum(self.sent.values()) + sum(self.published.values())


class _Leaving(Value, frozen=True):
    """One letter on its way out."""

    letter: DeadLetter
    #: What goes into the journal; None: `event` is published live.
    record: Record | None
    event: Event


class DeadLetterQueue:
    """
    The dead letters of a mesh.

    Args:
        journal: Where they are: what a broker's `open_journal` gives, so that agents that read no
            journal hear of a replay.
        publisher: Publishes live events whose publishing failed; None: they are refused.
        clock: Time.

    All calls raise BrokerUnavailableError when the journal does not answer.
    """

    def __init__(
        self,
        journal: Journal,
        publisher: EventPublisher | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """Look at nothing yet."""
        self._journal = journal
        self._publisher = publisher
        self._clock = clock

    async def groups(self, query: DeadQuery = ALL_DEAD) -> list[DeadGroup]:
        """Put letters together that failed alike, the largest group first."""
        counts = await self._journal.count_dead(query)
        found = [
            DeadGroup(
                agent=agent,
                handler=handler or None,
                reason=reason,
                error=error,
                count=each.count,
                oldest_s=each.oldest_s,
                newest_s=each.newest_s,
            )
            for (agent, handler, reason, error), each in counts.items()
        ]
        return sorted(found, key=lambda group: (-group.count, group.agent, group.handler or ""))

    async def count(self, query: DeadQuery = ALL_DEAD) -> int:
        """Count letters."""
        return sum(each.count for each in (await self._journal.count_dead(query)).values())

    async def ls(self, query: DeadQuery = ALL_DEAD, limit: int = 1000) -> list[DeadLetter]:
        """Give letters, the newest first."""
        return await self._journal.dead(query, limit)

    async def show(self, letter_id: str) -> DeadLetter:
        """
        Give one letter.

        Raises:
            DeadLetterError: There is none of this id.
        """
        found = await self._journal.dead(DeadQuery(ids=frozenset({letter_id})), 1)
        if not found:
            raise DeadLetterError(f"there is no dead letter {letter_id!r}")
        return found[0]

    async def of_event(self, event_id: str) -> list[DeadLetter]:
        """Give the letters of one event, the newest first: one a handler that failed with it."""
        counts = await self._journal.count_dead(ALL_DEAD)
        ids = frozenset(f"{event_id}/{agent}/{handler}" for agent, handler, _, _ in counts)
        return await self._journal.dead(DeadQuery(ids=ids), len(ids)) if ids else []

    async def replay(
        self,
        query: DeadQuery,
        *,
        rate_per_s: float = 100.0,
        limit: int | None = None,
        ignore_expiry: bool = False,
        dry_run: bool = False,
        agents: Collection[str] | None = None,
    ) -> ReplayReport:
        """
        Send letters back to the one handler that failed, of the one agent; the oldest first.

        A letter that no handler failed with (expired, in circles, an end of its process) goes to
        all handlers of its agent; one whose publishing failed is published again. The letter goes
        when the journal has the event; should the handler fail again, it comes back with its
        history. Replaying a letter a second time changes nothing.

        Args:
            query: Which letters.
            rate_per_s: At most so many a second; `math.inf`: as fast as it goes.
            limit: At most so many, the oldest.
            ignore_expiry: Also what has expired: its expiry is taken off.
            dry_run: Only say what would happen.
            agents: Letters of others, which have no group in the journal either, are refused: they
                would wait for ever. None: whoever it is may still come.

        Returns:
            What went where, and which letters were refused.

        Raises:
            ValueError: `rate_per_s` is not above 0.
        """
        if not rate_per_s > 0:
            raise ValueError(f"rate_per_s must be above 0, was {rate_per_s!r}")
        chosen = await self._oldest(query, limit)
        report = ReplayReport(dry_run, len(chosen))
        kept_topics: set[str] = set()
        if any(letter.reason == UNPUBLISHED for letter in chosen):
            kept_topics = {view.topic for view in await self._journal.groups()}
        vanished = await self._vanished(chosen, agents)
        declared: set[str] = set()
        begun_s = self._clock.mono_s()
        for begun, batch in _batches(chosen, rate_per_s):
            leaving = self._prepare(
                batch, report, kept_topics, vanished, ignore_expiry=ignore_expiry
            )
            if dry_run:
                continue
            ahead_s = begun_s + begun / rate_per_s - self._clock.mono_s()
            if ahead_s > 0:
                await self._clock.sleep(ahead_s)
            await self._send(leaving, declared)
        return report

    async def edit(self, letter_id: str, data: Any) -> DeadLetter:
        """
        Give a letter's event another payload; bytes that were no event become one.

        Its expiry is taken off: who edits it means it to be handled. The history tells of the edit,
        and `original` keeps what stood there first.

        Args:
            letter_id: The letter.
            data: A dict, or an instance of the type's schema.

        Returns:
            The letter as it is now.

        Raises:
            DeadLetterError: There is none of this id, or nothing that can be edited.
            PayloadError: The payload does not fit the type's schema, or cannot travel.
        """
        letter = await self.show(letter_id)
        if letter.topic.startswith(PRIVATE_PREFIX):
            raise DeadLetterError(
                f"{letter_id!r} came on {letter.topic!r}, a topic of the mesh's own:"
                " it cannot be made an event"
            )
        now = self._clock.now()
        payload = payload_encoder(letter.topic)(data)
        known = event_of(letter)
        if known is None:
            event = Event(type=letter.topic, data=payload, source_agent=REPLAYER, timestamp=now)
        else:
            event = msgspec.structs.replace(known, data=payload, expires_at=None)
        note = Attempt(at_s=now.timestamp(), error=f"edited; it was {_told(letter)}")
        edited = msgspec.structs.replace(
            letter,
            event=event.to_dict(),
            frame=codec.encode_single(event),
            original=letter.frame if letter.original is None else letter.original,
            history=(*letter.history, note),
        )
        await self._journal.bury([edited])
        return edited

    async def purge(self, query: DeadQuery, *, limit: int | None = None) -> int:
        """
        Throw letters away for good; those that fail again meanwhile stay.

        Args:
            query: Which letters.
            limit: At most so many, the oldest.

        Returns:
            How many went.
        """
        chosen = await self._oldest(query, limit)
        return sum([await self._journal.exhume(part) for _, part in _batches(chosen, math.inf)])

    # -- what a replay is made of --------------------------------------------------------------

    async def _oldest(self, query: DeadQuery, limit: int | None) -> list[DeadLetter]:
        """Read all letters that are meant now: what fails again meanwhile is no part of them."""
        found = await self._journal.dead(query, max(1, await self.count(query)))
        found.reverse()
        return found if limit is None else found[:limit]

    async def _vanished(
        self, letters: Sequence[DeadLetter], agents: Collection[str] | None
    ) -> set[str]:
        """Give whose letters would wait for ever."""
        if agents is None:
            return set()
        asked = {letter.agent for letter in letters if letter.reason != UNPUBLISHED} - set(agents)
        if not asked:
            return asked
        views = await self._journal.groups()
        # A replay makes a group of whoever it is for
        return asked - {view.group for view in views if view.topic != replay_topic(view.group)}

    def _prepare(
        self,
        letters: Sequence[DeadLetter],
        report: ReplayReport,
        kept_topics: set[str],
        vanished: set[str],
        *,
        ignore_expiry: bool,
    ) -> list[_Leaving]:
        leaving = []
        now = self._clock.now()
        for letter in letters:
            try:
                _require_agent(letter, vanished)
                event = _ready_event(letter, now, ignore_expiry=ignore_expiry)
                made = self._made(letter, event, kept_topics, now)
            except (DeadLetterError, EventTooLargeError, TopicError) as error:
                report.refused.append(Refusal(letter.id, str(error)))
                continue
            leaving.append(made)
            if letter.reason == UNPUBLISHED:
                report.published[letter.topic] = report.published.get(letter.topic, 0) + 1
            else:
                place = letter.agent, letter.handler
                report.sent[place] = report.sent.get(place, 0) + 1
        return leaving

    def _made(
        self, letter: DeadLetter, event: Event, kept_topics: set[str], now: datetime
    ) -> _Leaving:
        if letter.reason != UNPUBLISHED:
            return _Leaving(letter, replay_record(letter, event, now), event)
        # Who replays may not know all declarations; a topic that a group reads is durable
        if is_durable(letter.topic) or letter.topic in kept_topics:
            frame = codec.encode_single(event)
            return _Leaving(letter, Record(letter.topic, event.id, frame, event.key), event)
        if self._publisher is None:
            raise DeadLetterError(
                "its type is live and there is no publisher: start the mesh first"
                " (in Python: DeadLetterQueue(journal, publisher))"
            )
        return _Leaving(letter, None, event)

    async def _send(self, leaving: Sequence[_Leaving], declared: set[str]) -> None:
        """First the journal has the events, then the letters go: a crash between harms nothing."""
        records = [each.record for each in leaving if each.record is not None]
        for each in leaving:
            if each.letter.reason != UNPUBLISHED and each.letter.agent not in declared:
                # An agent that has never read the journal would begin behind what comes now
                agent = each.letter.agent
                await self._journal.declare(agent, [replay_topic(agent)])
                declared.add(agent)
            if each.record is None and self._publisher is not None:
                await self._publisher.publish_event(each.event)
        if self._publisher is not None and len(records) < len(leaving):
            await self._publisher.flush()
        if records:
            await self._journal.append(records)
        if leaving:
            await self._journal.exhume([each.letter for each in leaving])


def plain(letter: DeadLetter) -> dict[str, Any]:
    """Give a letter as what JSON can hold; bytes in base64."""
    built: dict[str, Any] = msgspec.to_builtins(letter)
    return built


def _require_agent(letter: DeadLetter, vanished: set[str]) -> None:
    if letter.reason != UNPUBLISHED and letter.agent in vanished:
        raise DeadLetterError(
            f"no agent and no group is called {letter.agent!r}: it would wait for ever; purge it,"
            " or insist if one will come (mesh dlq replay --force)"
        )


def _ready_event(letter: DeadLetter, now: datetime, *, ignore_expiry: bool) -> Event:
    """
    Give the event of a letter as it is replayed.

    Raises:
        DeadLetterError: It cannot be, and why.
    """
    try:
        event = event_of(letter)
    except (TypeError, ValueError) as error:
        raise DeadLetterError(f"its event cannot be read: {error}") from error
    if event is None:
        raise DeadLetterError(
            f"what came is no event ({letter.reason}); edit it into one, then replay it"
        )
    if event.expires_at is not None and ignore_expiry:
        event = msgspec.structs.replace(event, expires_at=None)
    if event.expires_at is not None and event.expires_at <= now:
        raise DeadLetterError(
            f"it expired at {event.expires_at}; ignore the expiry, or edit it, if it is still to"
            " be handled"
        )
    if letter.reason == "hops":
        event = msgspec.structs.replace(event, hops=0)
    return event


def _batches(
    letters: Sequence[DeadLetter], rate_per_s: float
) -> Iterator[tuple[int, Sequence[DeadLetter]]]:
    """Give letters in parts, each with the number of its first one."""
    size = int(max(1.0, min(_BATCH, rate_per_s / _BATCHES_A_SECOND)))
    for begun in range(0, len(letters), size):
        yield begun, letters[begun : begun + size]


def _told(letter: DeadLetter) -> str:
    """Give the payload of a letter in short words."""
    event = None
    with suppress(FrameError, TypeError, ValueError):
        event = event_of(letter)
    if event is None:
        return f"{len(letter.frame or b'')} bytes that were no event"
    return json.dumps(event.data, default=str)[:_TOLD_CHARACTERS]
