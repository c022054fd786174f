"""How the Redis journal keeps events and applies steps: one script on one server, else parts."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from mesh.deadletters import encode_letter
from mesh.errors import BrokerUnavailableError
from mesh.journal import PARTITIONS
from mesh.journals.redis_clock import ClusterClock
from mesh.journals.redis_entries import spot_of
from mesh.journals.redis_scripts import COMMIT, DECIDE, SETTLE
from mesh.journals.redis_steps import Settlement, encode_decision
from mesh.journals.redis_store import RenewedError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Sequence

    from mesh.deadletters import DeadLetter
    from mesh.journal import Record, Step
    from mesh.journals.redis_consumers import Consumer, Lane
    from mesh.journals.redis_keys import Keys
    from mesh.journals.redis_store import Store

# What an event weighs on its way, beside its frame
_RECORD_BYTES = 200


class _Changes:
    """What one call changes in Redis, with the keys and bytes it needs."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.plan: dict[str, Any] = {}
        #: The first of them are all frames in a row.
        self.blobs: list[bytes] = [b""]
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


class Writer:
    """
    Writes for all callers of one journal.

    Args:
        store: Where to.
        keys: Names of keys.
        remembered_ids: How many ids are remembered at least.
        spawn: Starts what goes on when its caller is cancelled.
        compare: Sees whether Redis knows less than a consumer does.
    """

    def __init__(
        self,
        store: Store,
        keys: Keys,
        remembered_ids: int,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        compare: Callable[[Consumer], Awaitable[None]],
    ) -> None:
        """Write nothing yet."""
        self._store = store
        self._keys = keys
        self._remembered_ids = remembered_ids
        self._spawn = spawn
        self._compare = compare
        self.clock = ClusterClock()

    async def append(self, records: Sequence[Record]) -> int:
        """Keep events; gives how many were new."""
        async with self._store.room(_weight(records)):
            return await self._keep(records)

    async def bury(self, letters: Sequence[DeadLetter]) -> None:
        """Keep dead letters."""
        changes = _Changes()
        self._plan_letters(changes, letters)
        await self._run(changes)

    async def commit(self, group: str, me: Consumer | None, steps: Sequence[Step]) -> list[Step]:
        """Apply steps; gives the refused. What comes while a commit is on its way goes together."""
        async with self._store.room(sum([_weight(step.records) for step in steps if step.records])):
            if me is None:
                refused = await self._apply(group, None, steps)
            else:
                outcome: asyncio.Future[set[int]] = asyncio.get_running_loop().create_future()
                me.commits.append((steps, outcome))
                if not me.committing:
                    me.committing = True
                    self._spawn(self._commit_all(me))
                refused = await asyncio.shield(outcome)
        return [steps[number] for number in sorted(refused)]

    async def _commit_all(self, me: Consumer) -> None:
        """Apply what callers bring, one transaction after another, so that none overtakes."""
        try:
            while me.commits:
                batch, me.commits = me.commits, []
                await self._commit_together(me, batch)
        finally:
            me.committing = False
            for _, outcome in me.commits:
                outcome.cancel()

    async def _commit_together(
        self, me: Consumer, batch: list[tuple[Sequence[Step], asyncio.Future[set[int]]]]
    ) -> None:
        try:
            refused = await self._apply(
                me.group, me, [step for steps, _ in batch for step in steps]
            )
        except Exception as error:  # noqa: BLE001 - carried to whoever awaits the commit
            if len(batch) > 1 and not isinstance(error, BrokerUnavailableError):
                # A mistake of one caller does not harm the others
                for one in batch:
                    await self._commit_together(me, [one])
                return
            for _, outcome in batch:
                if not outcome.done():
                    outcome.set_exception(error)
                    outcome.exception()  # whoever awaited it may have been cancelled
            return
        first = 0
        for steps, outcome in batch:
            mine = {at - first for at in refused if first <= at < first + len(steps)}
            first += len(steps)
            if not outcome.done():
                outcome.set_result(mine)

    async def _apply(self, group: str, me: Consumer | None, steps: Sequence[Step]) -> set[int]:
        """Apply steps; gives the numbers of the refused."""
        refused: set[int] = set()
        while True:
            if me is not None:
                await self._compare(me)
            settlement = Settlement(me)
            is_untrue = False
            for number, step in enumerate(steps):
                if number in refused or (is_untrue and step.settles) or not settlement.add(step):
                    refused.add(number)
                    is_untrue = is_untrue or bool(step.state)
            try:
                lost = await self._settle(group, settlement)
            except RenewedError:
                settlement.undo()
                continue
            except BaseException:
                settlement.undo()
                raise
            if not lost or me is None:
                settlement.settle()
                return refused
            # Others' by now: what touches them is refused, the rest is tried again
            settlement.undo()
            me.drop(lost)
            me.stale = True

    # -- on one server: one script -------------------------------------------------------------

    async def _settle(self, group: str, settlement: Settlement) -> list[Lane]:
        if self._keys.cluster:
            return await self._settle_in_parts(group, settlement)
        changes = _Changes()
        self._plan_lanes(changes, group, settlement, settlement.lanes)
        self._plan_records(changes, settlement.records)
        self._plan_letters(changes, settlement.letters)
        self._plan_state(changes, group, settlement)
        lost = _lost(changes, await self._run(changes, settlement), settlement.lanes)
        if not lost:
            settlement.note_number()
        return lost

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
            self._plan_records(changes, [record for _, record in part])
            changes.plan |= {"ms": ms, "seqs": [seq for seq, _ in part]}
            calls.append(self._run(changes))
        known = 0
        for _, found, now_ms, last in (await asyncio.gather(*calls))[1:]:
            known += len(found)
            self.clock.tell(int(now_ms))
            self.clock.observe(spot_of(last))
        return len(records) - known

    # -- on a cluster: outputs first, acks last ------------------------------------------------

    async def _settle_in_parts(self, group: str, settlement: Settlement) -> list[Lane]:
        if settlement.me is not None:
            await self.settle_decided(settlement.me)
        lost = await self._on_lanes(group, settlement, fences_only=True)
        if lost:
            return lost
        if settlement.records:
            await self._keep(settlement.records)
        changes = _Changes()
        self._plan_letters(changes, settlement.letters)
        await self._run(changes)
        if settlement.state and settlement.me is not None:
            return await self._decide(group, settlement, settlement.me)
        changes = _Changes()
        self._plan_state(changes, group, settlement)
        await self._run(changes)
        return await self._on_lanes(group, settlement)

    async def _decide(self, group: str, settlement: Settlement, me: Consumer) -> list[Lane]:
        """
        Change the state and decide, in one script, what is settled; then settle it.

        A consumer that dies between the two has settled all the same: its heir finds the decision,
        and settles before it reads.
        """
        parts = self._plan_parts(group, settlement, decided=True)
        changes = _Changes()
        self._plan_state(changes, group, settlement)
        owners, decisions = self._keys.owners(group), self._keys.decisions(group)
        changes.plan |= {
            "consumer": settlement.consumer,
            "owners": changes.number(owners),
            "decisions": changes.number(decisions),
        }
        decided = []
        for lanes, part in parts:
            step = f"{changes.plan['incarnation']} {changes.plan['number']}"
            part.plan["step"] = step
            decision = changes.blob(encode_decision(part.keys, part.plan))
            decided.append((str(lanes[0].partition), lanes[0].token, decision))
        changes.plan["decided"] = decided
        status, gone = await self._store.run(
            DECIDE, changes.keys, changes.plan, changes.blobs, is_renewed=settlement.is_outdated
        )
        if status:
            lost = {int(partition) for partition in gone}
            return [lane for lane in settlement.lanes if lane.partition in lost]
        settlement.note_number()
        settlement.settle()
        me.decided = [part for _, part in parts]
        with contextlib.suppress(BrokerUnavailableError):
            await self.settle_decided(me)
        return []

    async def settle_decided(self, me: Consumer) -> None:
        """
        Let the streams know what was decided and could not be told them yet.

        Raises:
            BrokerUnavailableError: They do not answer; nothing is lost.
        """
        if me.decided:
            await asyncio.gather(*map(self._run, me.decided))
            me.decided = []

    async def _on_lanes(
        self, group: str, settlement: Settlement, *, fences_only: bool = False
    ) -> list[Lane]:
        parts = self._plan_parts(group, settlement, fences_only=fences_only)
        replies = await asyncio.gather(*(self._run(changes, settlement) for _, changes in parts))
        lost: list[Lane] = []
        for (_, changes), reply in zip(parts, replies, strict=True):
            lost += _lost(changes, reply, settlement.lanes)
        return lost

    def _plan_parts(
        self,
        group: str,
        settlement: Settlement,
        *,
        fences_only: bool = False,
        decided: bool = False,
    ) -> list[tuple[list[Lane], _Changes]]:
        """Plan what is settled of each partition."""
        by_key = {lane.key: lane for lane in settlement.lanes}
        parts = []
        for keys in self._keys.parts(by_key):
            changes, lanes = _Changes(), [by_key[key] for key in keys]
            self._plan_lanes(changes, group, settlement, lanes, fences_only=fences_only)
            if decided:
                # Its owner may have given back, before it died, what was decided
                positions = settlement.positions()
                changes.plan["acks"] = [
                    (changes.number(lane.key), found)
                    for lane in lanes
                    if (found := positions.get((lane.topic, lane.partition)))
                ]
            parts.append((lanes, changes))
        return parts

    # -- plans ---------------------------------------------------------------------------------

    async def _run(self, changes: _Changes, settlement: Settlement | None = None) -> Any:
        if not changes.keys:
            return [0, []]
        script = SETTLE if "fences" in changes.plan else COMMIT
        is_renewed = None if settlement is None else settlement.is_outdated
        return await self._store.run(
            script, changes.keys, changes.plan, changes.blobs, is_renewed=is_renewed
        )

    def _plan_records(self, changes: _Changes, records: Sequence[Record]) -> None:
        if not records:
            return
        stream, partition_of = self._keys.stream, self._keys.partition_of
        places: dict[tuple[str, int], int] = {}
        streams = []
        for record in records:
            place = record.topic, partition_of(record)
            at = places.get(place)
            if at is None:
                at = places[place] = changes.number(stream(*place))
            streams.append(at)
        frames = [record.frame for record in records]
        changes.blobs[0] = b"".join(frames)
        partition = next(iter(places))[1]
        changes.plan |= {
            "ids": [record.id for record in records],
            "streams": streams,
            "lengths": list(map(len, frames)),
            "memory": changes.number(*self._keys.memory(partition)),
            "remember": self._remembered_ids // (PARTITIONS if self._keys.cluster else 1),
            "clock": changes.number(self._keys.clock(partition)),
            "verb": "SPUBLISH" if self._keys.cluster else "PUBLISH",
            "wakes": sorted({self._keys.channel(*place).decode() for place in places}),
        }
        if not self._keys.cluster:
            changes.plan["topics"] = changes.number(self._keys.topics)
            changes.plan["names"] = sorted({topic for topic, _ in places})

    def _plan_letters(self, changes: _Changes, letters: Iterable[DeadLetter]) -> None:
        planned = [
            (each.id, repr(each.at_s), changes.blob(encode_letter(each))) for each in letters
        ]
        if planned:
            changes.plan["letters"] = planned
            changes.plan["dead"] = changes.number(*self._keys.dead)

    def _plan_state(self, changes: _Changes, group: str, settlement: Settlement) -> None:
        state = settlement.state
        sets = [(name, changes.blob(value)) for name, value in state.items() if value is not None]
        unsets = [name for name, value in state.items() if value is None]
        if sets:
            changes.plan["sets"] = sets
        if unsets:
            changes.plan["unsets"] = unsets
        if state:
            changes.plan["state"] = changes.number(self._keys.state(group))
            changes.plan["steps"] = changes.number(self._keys.steps(group))
            changes.plan |= settlement.number()
            changes.plan["consumer"] = settlement.consumer

    def _plan_lanes(
        self,
        changes: _Changes,
        group: str,
        settlement: Settlement,
        lanes: Collection[Lane],
        *,
        fences_only: bool = False,
    ) -> None:
        if not lanes:
            return
        plan: dict[str, list[tuple[Any, ...]]] = {
            name: [] for name in ("fences", "pins", "acks", "settled", "marks", "unmarks")
        }
        for lane in lanes:
            steps, at = settlement.lanes[lane], changes.number(lane.key)
            plan["fences"].append((at, lane.token))
            if fences_only:
                continue
            if pins := settlement.pins(lane):
                plan["pins"].append((at, pins))
            if steps.acks:
                plan["acks"].append((at, steps.acks))
            if steps.reached is not None:
                plan["settled"].append((at, steps.reached[2], steps.reached[1]))
            plan["marks"] += [(at, mark) for mark in steps.marks]
            plan["unmarks"] += [(at, mark) for mark in steps.unmarks]
        changes.plan |= {name: planned for name, planned in plan.items() if planned}
        changes.plan["group"] = group
        changes.plan["consumer"] = settlement.consumer


def _lost(changes: _Changes, reply: Any, lanes: Iterable[Lane]) -> list[Lane]:
    """Give the streams that are another's, as a script has found."""
    status, found, *_ = reply
    if status == 0:
        return []
    by_key = {lane.key: lane for lane in lanes}
    return [by_key[changes.keys[number - 1]] for number in found]


def _weight(records: Sequence[Record]) -> int:
    return sum([len(record.frame) for record in records]) + _RECORD_BYTES * len(records)
