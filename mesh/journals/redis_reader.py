"""How consumers of the Redis journal are handed what is in their streams."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from mesh.journals.redis_consumers import name_of
from mesh.journals.redis_entries import position_of, read_entries
from mesh.journals.redis_scripts import MARK

if TYPE_CHECKING:
    from mesh.journal import Delivery
    from mesh.journals.redis_consumers import Consumer, Fetched, Lane, Picks
    from mesh.journals.redis_entries import Spot
    from mesh.journals.redis_keys import Keys
    from mesh.journals.redis_members import Members
    from mesh.journals.redis_store import Store

#: So many changes under a read, and it gives nothing this time.
_MAX_TURNS = 8
_LOST, _CHANGED, _NO_GROUP = 1, 2, 3


class Reader:
    """
    Reads for all consumers of one journal.

    Args:
        store: Where from.
        keys: Names of keys.
        members: Who owns what.
    """

    def __init__(self, store: Store, keys: Keys, members: Members) -> None:
        """Read nothing yet."""
        self._store = store
        self._keys = keys
        self._members = members

    async def read(self, me: Consumer, limit: int) -> list[Delivery]:
        """Hand a consumer its next events, as far as it may hold more."""
        for _ in range(_MAX_TURNS):
            if me.in_doubt:
                await self._members.compare(me)
            if me.stale:
                await self._members.join(me)
            if limit <= 0 or me.must_wait():
                return []
            await self._fill(me, limit)
            picks = me.pick(limit)
            try:
                # On one server the marking looks at the group too, when there is something to mark
                ask = not picks or self._keys.cluster
                if ask and await self._members.has_changed(me):
                    me.stale = True
                if me.stale:
                    continue
                if not picks:
                    return []
                handed = await self._mark(me, picks)
            except BaseException:
                # What was picked is not ready any more. Redis may have noted it; it will be noted
                # the same way again
                me.begin_anew()
                raise
            if handed:
                return handed
        return []

    async def _fill(self, me: Consumer, limit: int) -> None:
        """Fetch until there is enough for a read, or no more."""
        fetched = False
        while len(me.ready) < me.wants(limit) and not me.stale:
            if (me.ready or fetched) and not any(lane.more for lane in me.open_lanes()):
                return
            lanes, page = me.to_fetch(), me.page
            found = await self._fetch_page(lanes, page, me.tenure)
            if not me.stale:
                me.take_in(found, page)
            fetched = True

    async def _fetch_page(
        self, lanes: list[Lane], page: int, tenure: str
    ) -> list[tuple[Lane, list[Fetched]]]:
        by_key = {lane.key: lane for lane in lanes}
        starts = {lane.key: position_of(max(lane.fetched_to, lane.spot)) for lane in lanes}
        replies = await asyncio.gather(
            *(
                self._store.call(
                    part[0],
                    "XREAD",
                    "COUNT",
                    page,
                    "STREAMS",
                    *part,
                    *(starts[key] for key in part),
                )
                for part in self._keys.parts(starts)
            )
        )
        found = {key: entries for reply in replies for key, entries in reply or ()}
        return [
            (
                lane,
                read_entries(found.get(key, ()), lane, lane.topic, lane.partition, tenure=tenure),
            )
            for key, lane in by_key.items()
        ]

    async def _mark(self, me: Consumer, picks: Picks) -> list[Delivery]:
        """Note in Redis what is handed out, then hand it out; nothing when the group changed."""
        last: dict[Lane, tuple[int, str]] = {}
        for _, lane, delivery in picks.fresh:
            last[lane] = last.get(lane, (0, ""))[0] + 1, delivery.position  # type: ignore[assignment]  # our positions are text
        again: dict[Lane, list[tuple[Spot, int]]] = {}
        for spot, lane, count in picks.again:
            again.setdefault(lane, []).append((spot, count))
        by_key = {lane.key: lane for lane in [*last, *again]}
        outcomes = await asyncio.gather(
            *(
                self._mark_part(me, [by_key[key] for key in part], last, again)
                for part in self._keys.parts(by_key)
            ),
            return_exceptions=True,
        )
        failure: BaseException | None = None
        marked: set[Lane] = set()
        claimed: list[Fetched] = []
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                failure, me.stale = outcome, True
            else:
                marked |= outcome[0]
                claimed += outcome[1]
        if failure is not None and not marked:
            raise failure
        if me.stale:
            me.begin_anew()
        return self._hand_out(me, picks, marked, claimed)

    def _hand_out(
        self, me: Consumer, picks: Picks, marked: set[Lane], claimed: list[Fetched]
    ) -> list[Delivery]:
        handed = []
        held = me.held
        for _, lane, delivery in sorted(claimed, key=lambda each: each[0]):
            if me.lanes.get((lane.topic, lane.partition)) is lane:
                held[name_of(delivery)] = delivery
                handed.append(delivery)
        if picks.alone and handed:
            me.alone = name_of(handed[0])
        living = {lane for lane in marked if me.lanes.get((lane.topic, lane.partition)) is lane}
        for spot, lane, delivery in picks.fresh:
            if lane in living:
                position: str = delivery.position  # type: ignore[assignment]  # our positions are text
                lane.spot = spot
                if lane.read >= 0:
                    lane.read += 1
                lane.plain[position] = spot, lane.read
                held[lane.topic, lane.partition, position] = delivery
                handed.append(delivery)
        return handed

    async def _mark_part(
        self,
        me: Consumer,
        lanes: list[Lane],
        last: dict[Lane, tuple[int, str]],
        again: dict[Lane, list[tuple[Spot, int]]],
    ) -> tuple[set[Lane], list[Fetched]]:
        """Mark what was picked of some streams; gives those where it succeeded, and what waited."""
        plan = self._members.identity(me)
        hands, claims = [], []
        for number, lane in enumerate(lanes, 1):
            if lane in last:
                count, position = last[lane]
                hands.append((number, position, lane.read + count if lane.read >= 0 else -1))
            claims += [
                (number, position_of(spot), count + 1) for spot, count in again.get(lane, ())
            ]
        plan["hands"], plan["claims"] = hands, claims
        plan["fences"] = [(number, lane.token) for number, lane in enumerate(lanes, 1)]
        keys = [lane.key for lane in lanes]
        if not self._keys.cluster:
            keys += [self._keys.numbers(me.group), self._keys.members(me.group)]
            plan["numbers"] = len(lanes) + 1
        status, *rest = await self._store.run(MARK, keys, plan)
        if status != 0:
            me.stale = True
            if status == _LOST:
                me.drop([lanes[number - 1] for number in rest[0]])
            elif status == _NO_GROUP:
                me.drop([lanes[rest[0] - 1]])
            return set(), []
        claimed: list[Fetched] = []
        for lane in lanes:
            for each in again.get(lane, ()):
                lane.waiting.remove(each)
        for (number, position, count), replied in zip(claims, rest[0], strict=True):
            lane = lanes[number - 1]
            done = frozenset(lane.done.get(position, ()))
            claimed += read_entries(
                replied, lane, lane.topic, lane.partition, count, done, me.tenure
            )
        return set(lanes), claimed
