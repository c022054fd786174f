"""What the memory journal keeps: events, groups and how far they are, dead letters."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mesh.clock import SYSTEM_CLOCK
from mesh.journal import LEASE_S, PARTITIONS
from mesh.journals.local import Bells

if TYPE_CHECKING:
    from mesh.clock import Clock
    from mesh.deadletters import DeadLetter
    from mesh.journal import Delivery, Record

MAX_BYTES = 1024**3


@dataclass(slots=True, eq=False)
class Kept:
    """One event of the log."""

    seq: int
    record: Record
    partition: int
    at_s: float
    #: Groups that have not settled it.
    owed: int = 0


@dataclass(slots=True, eq=False)
class Member:
    """A consumer that has joined its group, and what it holds."""

    name: str
    lease_until_s: float
    #: What it was handed. A step is of what is held now, not of the same event handed out before.
    held: dict[int, tuple[Kept, Delivery]] = field(default_factory=dict)
    #: A suspect it was handed; nothing else goes out beside it.
    alone: int | None = None
    #: Changes when it gets partitions.
    tenure: int = 0

    def take(self, delivery: Delivery) -> Kept | None:
        """Take out what is held, as it was handed out then; None when it is not any more."""
        if not self.holds(delivery):
            return None
        kept, _ = self.held.pop(int(delivery.position))
        return kept

    def holds(self, delivery: Delivery) -> bool:
        """Say whether it is held, as it was handed out then."""
        found = self.held.get(int(delivery.position))
        return found is not None and found[1] is delivery


@dataclass(slots=True, eq=False)
class Lane:
    """One partition of one group: what nobody holds, the oldest on top."""

    owner: Member | None = None
    waiting: list[tuple[int, Kept]] = field(default_factory=list)
    #: What a lost consumer was handed.
    suspects: set[int] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Group:
    """A group: what it hears, how far it is, its state."""

    name: str
    topics: set[str] = field(default_factory=set)
    lanes: list[Lane] = field(default_factory=lambda: [Lane() for _ in range(PARTITIONS)])
    consumers: dict[str, Member] = field(default_factory=dict)
    #: How often a suspect was handed out.
    counts: dict[int, int] = field(default_factory=dict)
    done: dict[int, set[str]] = field(default_factory=dict)
    state: dict[str, bytes] = field(default_factory=dict)
    #: Somebody holds partitions that are another's by right.
    unsettled_shares: bool = False
    #: How often partitions were given to somebody.
    tenures: int = 0

    def drop(self, topic: str) -> None:
        """Hear a topic no more, and owe nothing of it."""
        self.topics.discard(topic)
        gone: set[int] = set()
        for lane in self.lanes:
            gone |= {seq for seq, kept in lane.waiting if kept.record.topic == topic}
            lane.waiting = [each for each in lane.waiting if each[0] not in gone]
            heapq.heapify(lane.waiting)
        for consumer in self.consumers.values():
            mine = {seq for seq, (kept, _) in consumer.held.items() if kept.record.topic == topic}
            for seq in mine:
                del consumer.held[seq]
            if consumer.alone in mine:
                consumer.alone = None
            gone |= mine
        for lane in self.lanes:
            lane.suspects -= gone
        for seq in gone:
            self.counts.pop(seq, None)
            self.done.pop(seq, None)


class MemoryStore:
    """
    What journals of one process share.

    Args:
        max_bytes: Frames kept at most; settled ones are forgotten first, then `append` refuses.
        lease_s: How long a silent consumer keeps what it owns.
        clock: Where time comes from.
    """

    def __init__(
        self, *, max_bytes: int = MAX_BYTES, lease_s: float = LEASE_S, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        """Begin empty."""
        self.max_bytes = max_bytes
        self.lease_s = lease_s
        self.clock = clock
        self.bells = Bells()
        self.groups: dict[str, Group] = {}
        self.log: dict[int, Kept] = {}
        self.ids: dict[str, int] = {}
        self.letters: dict[str, DeadLetter] = {}
        self.bytes = 0
        self._seq = 0

    def clear(self) -> None:
        """Forget everything."""
        self.log.clear()
        self.ids.clear()
        self.groups.clear()
        self.letters.clear()
        self.bytes = 0

    def add(self, record: Record) -> bool:
        """Keep an event for every group that hears it, unless its id is known."""
        if record.id in self.ids:
            return False
        self._seq += 1
        kept = Kept(self._seq, record, record.partition, self.clock.time_s())
        self.log[kept.seq] = kept
        self.ids[record.id] = kept.seq
        self.bytes += len(record.frame)
        for group in self.groups.values():
            if record.topic in group.topics:
                self.owe(group, kept)
        return True

    def owe(self, group: Group, kept: Kept) -> None:
        """Put an event on a group's list."""
        kept.owed += 1
        heapq.heappush(group.lanes[kept.partition].waiting, (kept.seq, kept))

    def forget(self, *, before_s: float | None, max_bytes: int | None) -> int:
        """Remove settled events that are older, and the oldest until the rest is smaller."""
        gone = []
        left = self.bytes
        for kept in self.log.values():
            old = before_s is not None and kept.at_s < before_s
            if not old and (max_bytes is None or left <= max_bytes):
                break
            if not kept.owed:
                gone.append(kept)
                left -= len(kept.record.frame)
        for kept in gone:
            del self.log[kept.seq], self.ids[kept.record.id]
        self.bytes = left
        return len(gone)
