"""
Durable delivery inside one process: the same promises as on disk, for as long as the process lives.

Consumers of one process share one journal; several journals on one `MemoryStore` stand for several
processes on one mesh.
"""

from __future__ import annotations

import heapq
import os
from typing import TYPE_CHECKING, ClassVar

from mesh.errors import BackpressureError, ClosedError, ConfigurationError
from mesh.journal import (
    ALL_DEAD,
    MAX_UNSETTLED,
    DeadCount,
    DeadQuery,
    Delivery,
    Feature,
    GroupView,
    Size,
    Stored,
)
from mesh.journals.local import LocalJournal, count_letters, share_of, still_lives
from mesh.journals.memory_store import Group, Kept, Lane, Member, MemoryStore

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence, Set

    from mesh.deadletters import DeadLetter
    from mesh.journal import Record, Step


class MemoryJournal(LocalJournal):
    """
    Durable delivery without a disk.

    It keeps what is settled until `trim`, or until `MemoryStore.max_bytes` are reached.

    Args:
        store: What other journals of this process share with it; None: nobody does.
    """

    fabric: ClassVar[str] = "memory"
    features = frozenset({Feature.ATOMIC})

    def __init__(self, store: MemoryStore | None = None) -> None:
        """Begin unconnected."""
        self.store = store or MemoryStore()
        super().__init__(self.store.bells)
        self._mine: dict[tuple[str, str], Member] = {}

    async def connect(self) -> None:
        """Open: memory is always there."""
        if self._closed:
            self._require_open()
        self._connected = True

    async def close(self) -> None:
        """Let the consumers of this journal leave."""
        if self._connected and not self._closed:
            for group, consumer in list(self._mine):
                await self.leave(group, consumer)
        self._closed = True
        self._bells.ring()

    async def erase(self) -> None:
        """Forget everything."""
        self._require_open()
        self.store.clear()

    async def declare(self, group: str, topics: Collection[str], *, start: str = "now") -> None:
        """Make a group hear topics."""
        self._require_open()
        found = self.store.groups.setdefault(group, Group(group))
        new = set(topics) - found.topics
        found.topics |= new
        if start == "earliest":
            for kept in self.store.log.values():
                if kept.record.topic in new:
                    self.store.owe(found, kept)
        elif start != "now":
            raise ConfigurationError(f"start={start!r} of group {group!r}: use 'now' or 'earliest'")

    async def append(self, records: Sequence[Record]) -> int:
        """Keep events while there is room."""
        self._require_open()
        self._make_room(records)
        new = sum(map(self.store.add, records))
        self._tell({record.topic for record in records})
        return new

    async def commit(self, group: str, consumer: str, steps: Sequence[Step]) -> list[Step]:
        """Apply steps; each one that is refused changes nothing."""
        self._require_open()
        found = self.store.groups.setdefault(group, Group(group))
        me = self._member(found, consumer)
        self._make_room([record for step in steps for record in step.records])
        refused: list[Step] = []
        is_untrue = False
        for step in steps:
            if (is_untrue and step.settles) or not self._apply(found, me, step):
                refused.append(step)
                is_untrue = is_untrue or bool(step.state)
        self._settle_shares(found)
        self._bells.ring(found.topics)  # there may be room, or a suspect is out of the way
        self._tell({record.topic for step in steps for record in step.records})
        return refused

    async def release(self, group: str, consumer: str, deliveries: Iterable[Delivery]) -> None:
        """Give unhandled events back."""
        self._require_open()
        found = self.store.groups.get(group)
        if found is None or (me := self._member(found, consumer)) is None:
            return
        for delivery in deliveries:
            if kept := me.take(delivery):
                self._give_back(found, me, kept)
        self._settle_shares(found)
        self._tell(found.topics)

    async def renew(self, group: str, consumer: str) -> None:
        """Prolong the lease of a consumer of this journal."""
        self._require_open()
        if me := self._mine.get((group, consumer)):
            me.lease_until_s = self.store.clock.mono_s() + self.store.lease_s

    async def leave(self, group: str, consumer: str) -> None:
        """End a consumer of this journal in good order."""
        self._require_open()
        found = self.store.groups.get(group)
        me = None if found is None else self._member(found, consumer)
        self._mine.pop((group, consumer), None)
        if found is not None and me is not None:
            for kept, _ in me.held.values():
                self._give_back(found, me, kept)
            self._remove(found, me)

    async def free(self, group: str, consumer: str) -> None:
        """Take everything from a dead consumer."""
        self._require_open()
        found = self.store.groups.get(group)
        if found is not None and (dead := found.consumers.get(consumer)):
            self._bury(found, dead)

    async def free_process(self, group: str, consumer: str, pid: int) -> None:
        """Do the same, for this process: nobody else is here."""
        if pid == os.getpid():
            await self.free(group, consumer)

    async def forget(self, group: str, topic: str | None = None) -> bool:
        """Forget a group without consumers, or a topic of it."""
        self._require_open()
        found = self.store.groups.get(group)
        if found is None:
            return False
        now_s = self.store.clock.mono_s()
        living = [each.name for each in found.consumers.values() if each.lease_until_s >= now_s]
        if living:
            raise still_lives(group, living)
        known = bool(found.topics or found.state) if topic is None else topic in found.topics
        for kept in _owed_to(found):
            kept.owed -= topic in (None, kept.record.topic)
        if topic is None:
            del self.store.groups[group]
        else:
            found.drop(topic)
        return known

    async def load_state(self, group: str) -> dict[str, bytes]:
        """Give the state of a group."""
        self._require_open()
        found = self.store.groups.get(group)
        return {} if found is None else dict(found.state)

    async def bury(self, letters: Sequence[DeadLetter]) -> None:
        """Keep dead letters."""
        self._require_open()
        self._keep_letters(letters)

    async def dead(self, query: DeadQuery = ALL_DEAD, limit: int = 1000) -> list[DeadLetter]:
        """Give dead letters, the newest first."""
        self._require_open()
        chosen = [letter for letter in self.store.letters.values() if query.chooses(letter)]
        # Of one moment, the one that was kept last comes first
        chosen.reverse()
        return sorted(chosen, key=lambda letter: -letter.at_s)[:limit]

    async def count_dead(
        self, query: DeadQuery = ALL_DEAD
    ) -> Mapping[tuple[str, str, str, str], DeadCount]:
        """Count dead letters."""
        self._require_open()
        return count_letters(
            letter for letter in self.store.letters.values() if query.chooses(letter)
        )

    async def exhume(self, letters: Iterable[DeadLetter]) -> int:
        """Remove dead letters."""
        self._require_open()
        known, gone = self.store.letters, 0
        for letter in letters:
            if letter.id in known and known[letter.id].at_s == letter.at_s:
                del known[letter.id]
                gone += 1
        return gone

    async def groups(self) -> list[GroupView]:
        """Count what is not settled."""
        self._require_open()
        now_s = self.store.clock.time_s()
        views = []
        for group in self.store.groups.values():
            pending = dict.fromkeys(sorted(group.topics), 0)
            oldest_s = dict.fromkeys(group.topics, now_s)
            for kept in _owed_to(group):
                pending[kept.record.topic] += 1
                oldest_s[kept.record.topic] = min(oldest_s[kept.record.topic], kept.at_s)
            views += [
                GroupView(group.name, topic, count, max(0.0, now_s - oldest_s[topic]))
                for topic, count in pending.items()
            ]
        return views

    async def scan(
        self,
        topics: Collection[str] | None = None,
        *,
        after: int | str | None = None,
        limit: int = 1000,
    ) -> list[Stored]:
        """Give kept events."""
        self._require_open()
        floor = int(after or 0)
        found: list[Stored] = []
        for kept in self.store.log.values():
            record = kept.record
            if len(found) >= limit:
                break
            if kept.seq > floor and (topics is None or record.topic in topics):
                found.append(Stored(kept.seq, record.topic, record.id, record.frame, kept.at_s))
        return found

    async def newest(self) -> int | str | None:
        """Give the number of the newest event."""
        self._require_open()
        return max(self.store.log, default=None)

    async def size(self) -> Size:
        """Tell how much is kept."""
        self._require_open()
        return Size(len(self.store.log), self.store.bytes)

    async def trim(self, *, max_age_s: float | None = None, max_bytes: int | None = None) -> int:
        """Forget settled events."""
        self._require_open()
        before_s = None if max_age_s is None else self.store.clock.time_s() - max_age_s
        return self.store.forget(before_s=before_s, max_bytes=max_bytes)

    # -- reading -------------------------------------------------------------------------------

    async def _look(self, group: str, consumer: str, limit: int) -> list[Delivery]:
        found = self._group(group)
        me = self._join(found, consumer)
        now_s = self.store.clock.mono_s()
        for other in [each for each in found.consumers.values() if each.lease_until_s < now_s]:
            if other is not me:
                self._bury(found, other)
        if me.alone is not None:
            return []
        lanes = [lane for lane in found.lanes if lane.owner is me and lane.waiting]
        if found.unsettled_shares:
            mine = share_of(consumer, found.consumers)
            lanes = [lane for lane in lanes if found.lanes.index(lane) in mine]
        if suspect := [lane for lane in lanes if lane.suspects]:
            return [self._hand_out_alone(found, me, min(suspect, key=lambda lane: lane.waiting[0]))]
        heads = [(lane.waiting[0][0], number) for number, lane in enumerate(lanes)]
        heapq.heapify(heads)
        room = min(limit, MAX_UNSETTLED - len(me.held))
        handed: list[Delivery] = []
        while heads and len(handed) < room:
            lane = lanes[heads[0][1]]
            handed.append(self._hand_out(found, me, lane))
            if lane.waiting:
                heapq.heapreplace(heads, (lane.waiting[0][0], heads[0][1]))
            else:
                heapq.heappop(heads)
        return handed

    def _heard(self, group: str) -> Set[str] | None:
        return self._group(group).topics

    def _hand_out_alone(self, group: Group, me: Member, lane: Lane) -> Delivery:
        seq = lane.waiting[0][0]
        me.alone = seq
        if seq in lane.suspects:
            group.counts[seq] = group.counts.get(seq, 1) + 1
        return self._hand_out(group, me, lane)

    def _hand_out(self, group: Group, me: Member, lane: Lane) -> Delivery:
        seq, kept = heapq.heappop(lane.waiting)
        record = kept.record
        delivery = Delivery(
            seq,
            record.topic,
            kept.partition,
            record.id,
            record.frame,
            group.counts.get(seq, 1),
            frozenset(group.done.get(seq, ())),
            me.tenure,
        )
        me.held[seq] = kept, delivery
        return delivery

    # -- settling ------------------------------------------------------------------------------

    def _apply(self, group: Group, me: Member | None, step: Step) -> bool:
        owed = [*step.acks, *(delivery for delivery, _ in step.done)]
        if owed and (me is None or not all(map(me.holds, owed))):
            return False
        for delivery, handler in step.done:
            group.done.setdefault(_seq(delivery), set()).add(handler)
        for delivery in step.acks:
            if me is not None and (kept := me.take(delivery)):
                self._settle(group, me, kept)
        for record in step.records:
            self.store.add(record)
        self._keep_letters(step.dead)
        for name, value in step.state.items():
            if value is None:
                group.state.pop(name, None)
            else:
                group.state[name] = value
        return True

    def _settle(self, group: Group, me: Member, kept: Kept) -> None:
        kept.owed -= 1
        group.counts.pop(kept.seq, None)
        group.done.pop(kept.seq, None)
        group.lanes[kept.partition].suspects.discard(kept.seq)
        if me.alone == kept.seq:
            me.alone = None

    def _give_back(self, group: Group, me: Member, kept: Kept) -> None:
        heapq.heappush(group.lanes[kept.partition].waiting, (kept.seq, kept))
        if me.alone == kept.seq:
            me.alone = None
            if kept.seq in group.counts:
                group.counts[kept.seq] -= 1

    def _keep_letters(self, letters: Iterable[DeadLetter]) -> None:
        for letter in letters:
            self.store.letters.pop(letter.id, None)
            self.store.letters[letter.id] = letter

    def _make_room(self, records: Sequence[Record]) -> None:
        size = sum(len(record.frame) for record in records)
        if self.store.bytes + size <= self.store.max_bytes:
            return
        self.store.forget(before_s=None, max_bytes=self.store.max_bytes - size)
        if self.store.bytes + size > self.store.max_bytes:
            slowest = max(
                self.store.groups.values(), key=lambda group: len(_owed_to(group)), default=None
            )
            raise BackpressureError(
                f"the journal in memory is full ({self.store.bytes} of {self.store.max_bytes}"
                f" bytes); furthest behind is the group {slowest.name if slowest else None!r}"
            )

    # -- owning --------------------------------------------------------------------------------

    def _group(self, name: str) -> Group:
        if name not in self.store.groups:
            raise ConfigurationError(
                f"group {name!r} was never declared; call `await journal.declare(group, topics)`"
            )
        return self.store.groups[name]

    def _member(self, group: Group, name: str) -> Member | None:
        """Give a consumer of this journal that still owns something in the group."""
        me = self._mine.get((group.name, name))
        return me if me is not None and group.consumers.get(name) is me else None

    def _join(self, group: Group, name: str) -> Member:
        me, there = self._mine.get((group.name, name)), group.consumers.get(name)
        if me is not None and there is me:
            return me
        if me is not None and there is not None:
            raise ClosedError(
                f"consumer {name!r} of group {group.name!r}: a successor of this name has taken"
                " over; this one must stop"
            )
        if there is not None:
            self._bury(group, there, heir=True)
        me = Member(name, self.store.clock.mono_s() + self.store.lease_s)
        self._mine[group.name, name] = me
        group.consumers[name] = me
        self._share_out(group)
        return me

    def _bury(self, group: Group, dead: Member, *, heir: bool = False) -> None:
        for seq, (kept, _) in dead.held.items():
            lane = group.lanes[kept.partition]
            heapq.heappush(lane.waiting, (seq, kept))
            lane.suspects.add(seq)
        if heir:  # its successor joins at once; the others are not asked
            del group.consumers[dead.name]
            for lane in group.lanes:
                lane.owner = None if lane.owner is dead else lane.owner
        else:
            self._remove(group, dead)

    def _remove(self, group: Group, gone: Member) -> None:
        gone.held.clear()
        del group.consumers[gone.name]
        for lane in group.lanes:
            lane.owner = None if lane.owner is gone else lane.owner
        self._share_out(group)
        self._tell(group.topics)

    def _share_out(self, group: Group) -> None:
        """Give every partition to whom it belongs, unless its owner holds some of its events."""
        group.unsettled_shares = False
        group.tenures += 1
        names = sorted(group.consumers)
        for number, lane in enumerate(group.lanes):
            rightful = group.consumers[names[number % len(names)]] if names else None
            if lane.owner is not None and lane.owner is not rightful:
                if any(kept.partition == number for kept, _ in lane.owner.held.values()):
                    group.unsettled_shares = True
                    continue
            if rightful is not None and lane.owner is not rightful:
                rightful.tenure = group.tenures
            lane.owner = rightful

    def _settle_shares(self, group: Group) -> None:
        if group.unsettled_shares:
            self._share_out(group)


def _owed_to(group: Group) -> list[Kept]:
    waiting = [kept for lane in group.lanes for _, kept in lane.waiting]
    return waiting + [kept for each in group.consumers.values() for kept, _ in each.held.values()]


def _seq(delivery: Delivery) -> int:
    return int(delivery.position)
