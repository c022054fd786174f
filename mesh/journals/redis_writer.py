"""How the Redis journal keeps events and applies steps: one script on one server, else parts."""

from __future__ import annotations

import asyncio
from itertools import repeat
from typing import TYPE_CHECKING, Any

from mesh.deadletters import encode_letter
from mesh.journal import PARTITIONS
from mesh.journals.redis_clock import ClusterClock
from mesh.journals.redis_consumers import name_of
from mesh.journals.redis_entries import spot_of
from mesh.journals.redis_scripts import COMMIT

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mesh.deadletters import DeadLetter
    from mesh.journal import Record, Step
    from mesh.journals.redis_consumers import Consumer, Lane, Name
    from mesh.journals.redis_keys import Keys
    from mesh.journals.redis_store import Store

# What an event weighs on its way, beside its frame
_RECORD_BYTES = 200


class _Changes:
    """What one call changes in Redis, with the keys it needs."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.plan: dict[str, Any] = {}
        self.blobs: list[bytes] = []
        self._numbers: dict[bytes, int] = {}

    def number(self, *keys: bytes) -> int:
        """Give the number of a key; several keys get numbers in a row."""
        known = self._numbers.get(keys[0])
        if known is None:
            known = self._numbers[keys[0]] = len(self.keys) + 1
            self.keys += keys
        return known

    def blob(self, value: bytes) -> int:
        """Give the number of some bytes; the plan itself is the first."""
        self.blobs.append(value)
        return len(self.blobs) + 1


class _Settlement:
    """The steps of one commit that are not refused, put together."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.names: list[Name] = []
        self.acks: dict[Lane, list[str]] = {}
        self.marks: list[tuple[Lane, str]] = []
        self.unmarks: list[tuple[Lane, str]] = []
        self.records: list[Record] = []
        self.letters: list[DeadLetter] = []
        self.state: dict[str, bytes | None] = {}
        #: The streams that must still be the consumer's.
        self.lanes: set[Lane] = set()

    def add(self, me: Consumer | None, step: Step) -> bool:
        """Take a step in; False when it settles what the consumer does not hold."""
        if me is not None and (step.acks or step.done):
            names = [name_of(each) for each in step.acks]
            marks = [(name_of(each), handler) for each, handler in step.done]
            held = me.held
            if any(name not in held for name in names) or len(set(names)) < len(names):
                return False
            if any(name not in held for name, _ in marks):
                return False
            for (topic, partition, position), handler in marks:
                lane = me.lanes[topic, partition]
                lane.done.setdefault(position, set()).add(handler)
                self.marks.append((lane, f"{position} {handler}"))
                self.lanes.add(lane)
            for name in names:
                self._ack(me, name)
        elif step.acks or step.done:
            return False
        self.steps.append(step)
        self.records += step.records
        self.letters += step.dead
        self.state |= step.state
        return True

    def _ack(self, me: Consumer, name: Name) -> None:
        me.settling[name] = me.held.pop(name)
        self.names.append(name)
        topic, partition, position = name
        lane = me.lanes[topic, partition]
        self.lanes.add(lane)
        acks = self.acks.get(lane)
        if acks is None:
            acks = self.acks[lane] = []
        acks.append(position)
        if position in lane.done:
            self.unmarks += [(lane, f"{position} {each}") for each in lane.done.pop(position)]


class Writer:
    """
    Writes for all callers of one journal.

    Args:
        store: Where to.
        keys: Names of keys.
        remembered_ids: How many ids are remembered at least.
    """

    def __init__(self, store: Store, keys: Keys, remembered_ids: int) -> None:
        """Write nothing yet."""
        self._store = store
        self._keys = keys
        self._remembered_ids = remembered_ids
        self.clock = ClusterClock()

    async def append(self, records: Sequence[Record]) -> int:
        """Keep events; gives how many were new."""
        weight = sum(len(record.frame) for record in records) + _RECORD_BYTES * len(records)
        async with self._store.room(weight):
            return await self._keep(records)

    async def bury(self, letters: Sequence[DeadLetter]) -> None:
        """Keep dead letters."""
        changes = _Changes()
        self._plan_letters(changes, letters)
        await self._run(changes)

    async def commit(self, group: str, me: Consumer | None, steps: Sequence[Step]) -> list[Step]:
        """Apply steps; gives the refused."""
        refused: list[int] = []
        todo = list(enumerate(steps))
        while todo:
            settlement = _Settlement()
            taken = []
            for number, step in todo:
                if settlement.add(me, step):
                    taken.append((number, step))
                else:
                    refused.append(number)
            try:
                lost = await self._settle(group, settlement)
            except BaseException:
                if me is not None:
                    me.not_settled(settlement.names)
                raise
            if not lost or me is None:
                if me is not None:
                    me.settled(settlement.names)
                break
            # Others' by now: what touches them is refused, the rest is tried again
            me.not_settled(settlement.names)
            me.drop(lost)
            me.stale = True
            todo = taken
        return [steps[number] for number in sorted(refused)]

    # -- on one server: one script -------------------------------------------------------------

    async def _settle(self, group: str, settlement: _Settlement) -> list[Lane]:
        weight = sum(len(record.frame) + _RECORD_BYTES for record in settlement.records)
        async with self._store.room(weight):
            if self._keys.cluster:
                return await self._settle_in_parts(group, settlement)
            changes = _Changes()
            self._plan_fences(changes, group, settlement.lanes)
            self._plan_records(changes, settlement.records)
            self._plan_letters(changes, settlement.letters)
            self._plan_state(changes, group, settlement.state)
            self._plan_acks(changes, settlement, settlement.lanes)
            if not changes.keys:
                return []
            status, found = await self._run(changes)
            if status == 0:
                return []
            by_key = {lane.key: lane for lane in settlement.lanes}
            return [by_key[changes.keys[number - 1]] for number in found]

    async def _keep(self, records: Sequence[Record]) -> int:
        """Keep events; on a cluster those of each partition in a call of their own."""
        if not self._keys.cluster:
            changes = _Changes()
            self._plan_records(changes, records)
            return len(records) - len((await self._run(changes))[1])
        parts: dict[int, list[tuple[int, Record]]] = {}
        ms, first = self.clock.take(len(records))
        for seq, record in enumerate(records, first):
            parts.setdefault(record.partition, []).append((seq, record))
        topics = self._keys.topics
        calls = [self._store.call(topics, "SADD", topics, *{record.topic for record in records})]
        for part in parts.values():
            changes = _Changes()
            self._plan_records(changes, [record for _, record in part], [seq for seq, _ in part])
            changes.plan["ms"] = ms
            calls.append(self._run(changes))
        known = 0
        for _, found, now_ms, last in (await asyncio.gather(*calls))[1:]:
            known += len(found)
            self.clock.tell(int(now_ms))
            self.clock.observe(spot_of(last))
        return len(records) - known

    # -- on a cluster: outputs first, acks last ------------------------------------------------

    async def _settle_in_parts(self, group: str, settlement: _Settlement) -> list[Lane]:
        lost = await self._on_lanes(group, settlement, fences_only=True)
        if lost:
            return lost
        if settlement.records:
            await self._keep(settlement.records)
        changes = _Changes()
        self._plan_letters(changes, settlement.letters)
        await self._run(changes)
        changes = _Changes()
        self._plan_state(changes, group, settlement.state)
        await self._run(changes)
        return await self._on_lanes(group, settlement, fences_only=False)

    async def _on_lanes(
        self, group: str, settlement: _Settlement, *, fences_only: bool
    ) -> list[Lane]:
        by_key = {lane.key: lane for lane in settlement.lanes}
        calls, all_changes = [], []
        for part in self._keys.parts(by_key):
            lanes = [by_key[key] for key in part]
            changes = _Changes()
            self._plan_fences(changes, group, lanes)
            if not fences_only:
                self._plan_acks(changes, settlement, lanes)
            calls.append(self._run(changes))
            all_changes.append(changes)
        lost = []
        for changes, (status, found) in zip(all_changes, await asyncio.gather(*calls), strict=True):
            if status != 0:
                lost += [by_key[changes.keys[number - 1]] for number in found]
        return lost

    # -- plans ---------------------------------------------------------------------------------

    async def _run(self, changes: _Changes) -> Any:
        if not changes.keys:
            return [0, []]
        return await self._store.run(COMMIT, changes.keys, changes.plan, changes.blobs)

    def _plan_records(
        self, changes: _Changes, records: Sequence[Record], seqs: Iterable[int] = repeat(0)
    ) -> None:
        if not records:
            return
        stream, number, blob = self._keys.stream, changes.number, changes.blob
        wakes = set()
        places: dict[tuple[str, int], int] = {}
        planned = []
        for record, seq in zip(records, seqs, strict=False):
            place = record.topic, record.partition
            at = places.get(place)
            if at is None:
                at = places[place] = number(stream(*place))
                wakes.add(self._keys.channel(*place).decode())
            planned.append((at, record.id, blob(record.frame), seq))
        plan = changes.plan
        plan["records"], plan["wakes"] = planned, sorted(wakes)
        plan["verb"] = "SPUBLISH" if self._keys.cluster else "PUBLISH"
        partition = records[0].partition
        plan["ids"] = number(*self._keys.ids(partition))
        plan["clock"] = number(self._keys.clock(partition))
        plan["remember"] = self._remembered_ids // (PARTITIONS if self._keys.cluster else 1)
        if not self._keys.cluster:
            plan["topics"] = number(self._keys.topics)
            plan["names"] = sorted({topic for topic, _ in places})

    def _plan_letters(self, changes: _Changes, letters: Iterable[DeadLetter]) -> None:
        planned = [
            (each.id, repr(each.at_s), changes.blob(encode_letter(each))) for each in letters
        ]
        if planned:
            changes.plan["letters"] = planned
            changes.plan["dead"] = changes.number(*self._keys.dead)

    def _plan_state(self, changes: _Changes, group: str, state: dict[str, bytes | None]) -> None:
        sets = [(name, changes.blob(value)) for name, value in state.items() if value is not None]
        unsets = [name for name, value in state.items() if value is None]
        if sets:
            changes.plan["sets"] = sets
        if unsets:
            changes.plan["unsets"] = unsets
        if state:
            changes.plan["state"] = changes.number(self._keys.state(group))

    def _plan_fences(self, changes: _Changes, group: str, lanes: Iterable[Lane]) -> None:
        changes.plan["group"] = group
        fences = [(changes.number(lane.key), lane.token) for lane in lanes]
        if fences:
            changes.plan["fences"] = fences

    def _plan_acks(self, changes: _Changes, settlement: _Settlement, lanes: Iterable[Lane]) -> None:
        mine = set(lanes)
        number, plan = changes.number, changes.plan
        acks = [(number(lane.key), ids) for lane, ids in settlement.acks.items() if lane in mine]
        marks = [(number(lane.key), mark) for lane, mark in settlement.marks if lane in mine]
        unmarks = [(number(lane.key), mark) for lane, mark in settlement.unmarks if lane in mine]
        for name, planned in (("acks", acks), ("marks", marks), ("unmarks", unmarks)):
            if planned:
                plan[name] = planned
