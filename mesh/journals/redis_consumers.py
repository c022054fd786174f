"""What a Redis journal remembers of a consumer of its own process."""

from __future__ import annotations

import asyncio
import bisect
import os
import secrets
from collections import deque
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from mesh.journal import MAX_UNSETTLED, Delivery
from mesh.journals.redis_entries import START, Spot

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from mesh.journal import Step

#: What one read hands out at most, but for one event.
_MAX_READ_BYTES = 4 * 1024 * 1024
#: What is fetched ahead, over all streams.
_AHEAD_EVENTS = 512
_MIN_PAGE, _MAX_PAGE = 8, _AHEAD_EVENTS

_by_spot = itemgetter(0)

#: An event that nobody was handed yet.
Fetched = tuple[Spot, "Lane", Delivery]
#: Topic, partition, position.
Name = tuple[str, int, str]


def name_of(delivery: Delivery) -> Name:
    """Give what tells a delivery from all others of its group."""
    return delivery.topic, delivery.partition, delivery.position  # type: ignore[return-value]  # our positions are text


@dataclass(slots=True, eq=False)
class Lane:
    """One stream of one consumer: a partition of a topic that it owns."""

    topic: str
    partition: int
    key: bytes
    #: Who owns the stream has this there; a later owner's is greater.
    token: str
    #: All up to here was handed out.
    spot: Spot
    #: How many entries that were, as Redis counts; below zero when it has lost count.
    read: int
    #: On the pending list, to be handed out again: with the count of Redis, which is 0 for what was
    #: given back; the others are suspect.
    waiting: list[tuple[Spot, int]]
    done: dict[str, set[str]]
    #: Handed out and not on the pending list, in order; with the count of entries up to there.
    plain: dict[str, tuple[Spot, int]] = field(default_factory=dict)
    #: The same for those that were given back, and are on the pending list since.
    returned: dict[str, tuple[Spot, int]] = field(default_factory=dict)
    #: All up to here is settled, but for what is on the pending list.
    settled_to: Spot = START
    #: Fetched, but other streams may have something older.
    fetched: list[Fetched] = field(default_factory=list)
    fetched_to: Spot = START
    #: There may be more in Redis.
    more: bool = True

    def begin_anew(self) -> None:
        """Forget what was fetched and not handed out."""
        self.fetched, self.fetched_to, self.more = [], self.spot, True

    def wait(self, spot: Spot, count: int) -> None:
        """Note an event that is to be handed out again."""
        bisect.insort(self.waiting, (spot, count))


#: A stream, a position that is given back, with what count.
Back = tuple[Lane, str, int]


@dataclass(slots=True)
class Picks:
    """What is about to be handed out."""

    fresh: list[Fetched] = field(default_factory=list)
    again: list[tuple[Spot, Lane, int]] = field(default_factory=list)
    #: It is a suspect, or older than one of its partition.
    alone: bool = False

    def __bool__(self) -> bool:
        """Say whether there is anything."""
        return bool(self.fresh or self.again)


class Consumer:
    """
    One consumer.

    Args:
        group: Its group's name.
        name: Its own.
    """

    def __init__(self, group: str, name: str) -> None:
        """Own nothing."""
        self.group = group
        self.name = name
        #: One read at a time.
        self.reading = asyncio.Lock()
        #: Tells it from others of its name, before and after.
        self.incarnation = f"{os.getpid()}-{secrets.token_hex(8)}"
        self.was_member = False
        self.has_left = False
        #: Of its group, when it looked last.
        self.version = ""
        self.topics: frozenset[str] = frozenset()
        #: It must look anew at what it owns before the next read.
        self.stale = True
        #: How often Redis was away and came back, perhaps older, and how often of that it was
        #: compared with what is known here.
        self.returns = self.compared = 0
        #: One comparison at a time.
        self.comparing = asyncio.Lock()
        #: How often it had come back older.
        self.losses = 0
        self.lanes: dict[tuple[str, int], Lane] = {}
        #: Another's by right: nothing more is read of them, and they go when they are empty.
        self.surplus: frozenset[int] = frozenset()
        #: What was handed out. A step is of what is held now, not of the same event handed out
        #: before: what its handler saw then may not be true any more.
        self.held: dict[Name, Delivery] = {}
        #: What a commit on its way settles.
        self.settling: dict[Name, Delivery] = {}
        #: Given back, and Redis does not know it yet. Until it does, what is settled beside them
        #: must not pass over them, and nobody is handed them again.
        self.returning: dict[Name, Delivery] = {}
        self.alone: Name | None = None
        #: In the order of all streams, as far as it is known.
        self.ready: deque[Fetched] = deque()
        #: A read waits for something to be settled.
        self.blocked = False
        #: How far each stream had been, to notice that Redis has forgotten something.
        self.reached: dict[tuple[str, int], Spot] = {}
        self.page = _MIN_PAGE
        #: Steps that wait until those before them are applied, and who waits for them.
        self.commits: list[tuple[Sequence[Step], asyncio.Future[set[int]]]] = []
        self.committing = False
        #: Calls that tell streams what is settled by decision.
        self.decided: list[Any] = []
        #: How many of its steps, or tries of them, have changed the state.
        self.number = 0
        #: The number of the last one that is kept.
        self.noted = 0

    # -- owning --------------------------------------------------------------------------------

    @property
    def in_doubt(self) -> bool:
        """Say whether Redis may have come back older, and nobody has looked since."""
        return self.returns != self.compared

    @property
    def tenure(self) -> str:
        """Give what changes when others, or a Redis that came back older, changed the state."""
        return f"{self.version}/{self.losses}"

    def drop(self, lanes: Iterable[Lane]) -> None:
        """Forget what another owns by now."""
        for lane in list(lanes):
            place = lane.topic, lane.partition
            self.reached[place] = max(lane.spot, self.reached.get(place, START))
            if self.lanes.get(place) is not lane:
                continue
            del self.lanes[place]
            for names in (self.held, self.settling, self.returning):
                for name in [name for name in names if name[:2] == place]:
                    del names[name]
        if not any(self.alone in names for names in (self.held, self.settling, self.returning)):
            self.alone = None
        self.begin_anew()

    def begin_anew(self) -> None:
        """Fetch again all that was not handed out."""
        self.ready.clear()
        for lane in self.lanes.values():
            lane.begin_anew()

    def busy(self) -> set[int]:
        """Give the partitions of which it holds something."""
        groups = (self.held, self.settling, self.returning)
        return {name[1] for names in groups for name in names}

    def look_for_drained(self) -> None:
        """Become stale when a surplus partition can go."""
        if self.surplus and not self.surplus <= self.busy():
            self.stale = True

    def open_lanes(self) -> list[Lane]:
        """Give the streams that may be read."""
        return [lane for lane in self.lanes.values() if lane.partition not in self.surplus]

    # -- handing out ---------------------------------------------------------------------------

    def room(self, limit: int) -> int:
        """Give how many more it may hold, up to a limit."""
        if self.alone is not None:
            return 0
        in_hand = len(self.held) + len(self.settling) + len(self.returning)
        return min(limit, MAX_UNSETTLED - in_hand)

    def must_wait(self) -> bool:
        """Say whether nothing can be read before something is settled; `settle` will tell then."""
        self.blocked = self.room(1) <= 0
        return self.blocked

    def wants(self, limit: int) -> int:
        """Give how many events a read takes from the streams, beside those that wait."""
        waiting = 0
        for lane in self.open_lanes():
            waiting += len(lane.waiting)
            if any(count for _, count in lane.waiting):
                return 0  # suspects come first, one by one
        return self.room(limit) - waiting

    def pick(self, limit: int) -> Picks:
        """Choose what is handed out next; takes it from what is ready, not from what waits."""
        waiting = [lane for lane in self.open_lanes() if lane.waiting]
        suspect = {lane.partition for lane in waiting if any(count for _, count in lane.waiting)}
        if suspect:
            spot, count, lane = min(
                ((*lane.waiting[0], lane) for lane in waiting if lane.partition in suspect),
                key=_by_spot,
            )
            return Picks(again=[(spot, lane, count)], alone=True)
        room = self.room(limit)
        again = sorted(
            ((spot, lane, count) for lane in waiting for spot, count in lane.waiting[:room]),
            key=_by_spot,
        )[:room]
        picks = Picks(again=again)
        size = 0
        ready, fresh = self.ready, picks.fresh
        for _ in range(min(room - len(again), len(ready))):
            fresh.append(ready.popleft())
            size += len(fresh[-1][2].frame)
            if size >= _MAX_READ_BYTES:
                break
        return picks

    def holds(self, delivery: Delivery) -> bool:
        """Say whether it is held, as it was handed out then."""
        return self.held.get(name_of(delivery)) is delivery

    def take_back(self, deliveries: Iterable[Delivery]) -> list[Back]:
        """Hold them no more; gives what is to be written. `gave_back` comes then."""
        back = []
        for delivery in deliveries:
            name = name_of(delivery)
            lane = self.lanes.get(name[:2])
            if self.holds(delivery) and lane is not None:
                self.returning[name] = self.held.pop(name)
                # A suspect stays one; others are as if they had never been handed out
                back.append((lane, name[2], delivery.deliveries - 1))
        return back

    def gave_back(self, back: Iterable[Back]) -> None:
        """Let those that Redis has taken back be handed out again."""
        for lane, position, count in back:
            name = lane.topic, lane.partition, position
            if self.lanes.get(name[:2]) is not lane or self.returning.pop(name, None) is None:
                continue
            if (plain := lane.plain.pop(position, None)) is not None:
                lane.returned[position] = plain
            ms, _, seq = position.partition("-")
            lane.wait((int(ms), int(seq)), count)
            if name == self.alone:
                self.alone = None
        self.look_for_drained()

    # -- fetching ------------------------------------------------------------------------------

    def to_fetch(self) -> list[Lane]:
        """Give the streams of which too little lies here."""
        return [lane for lane in self.open_lanes() if len(lane.fetched) < self.page]

    def take_in(self, fetched: Collection[tuple[Lane, list[Fetched]]], page: int) -> None:
        """Keep what was fetched of each stream, asked for a page of each, and put it in order."""
        count = size = 0
        for lane in self.lanes.values():
            lane.more = True
        for lane, entries in fetched:
            lane.more = len(entries) >= page
            if entries:
                lane.fetched += entries
                lane.fetched_to = entries[-1][0]
                count += len(entries)
                size += sum([len(delivery.frame) for _, _, delivery in entries])
        full = [lane.fetched_to for lane in self.open_lanes() if lane.more]
        # Of a stream that was not emptied nothing is known beyond its last
        self._merge(min(full) if full else None)
        self._choose_page(len(full), count, size)

    def _merge(self, horizon: Spot | None) -> None:
        merged: list[Fetched] = []
        for lane in self.open_lanes():
            if not lane.fetched:
                continue
            cut = len(lane.fetched)
            if horizon is not None:
                cut = bisect.bisect_right(lane.fetched, horizon, key=_by_spot)
            merged += lane.fetched[:cut]
            del lane.fetched[:cut]
        merged.sort(key=_by_spot)
        self.ready.extend(merged)

    def _choose_page(self, full: int, count: int, size: int) -> None:
        """Fetch as much ahead as may be held, in few bytes, from one stream or from many."""
        lanes = max(1, full or len(self.lanes))
        page = _AHEAD_EVENTS // lanes
        if count:
            page = min(page, _MAX_READ_BYTES * count // max(1, size) // lanes)
        self.page = max(1 if size > _MAX_READ_BYTES // 2 else _MIN_PAGE, min(page, _MAX_PAGE))

    # -- settling ------------------------------------------------------------------------------

    def settled(self, names: Iterable[Name]) -> None:
        """Let go of what was settled."""
        for name in names:
            self.settling.pop(name, None)
            if name == self.alone:
                self.alone = None
        self.look_for_drained()
