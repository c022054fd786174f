"""
How consumers of the Redis journal own streams and are handed what is in them.

Who owns which partition is decided under the group's keys (`JOIN`); each stream then learns its
new owner's token (`TAKE`), and from that moment refuses the steps of the one before. Between the
two the old owner may still settle: what it settles is not handed out again.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from mesh.errors import BrokerUnavailableError, ClosedError, ConfigurationError
from mesh.journal import PARTITIONS
from mesh.journals.redis_consumers import Lane, name_of
from mesh.journals.redis_entries import START, position_of, read_entries, spot_of
from mesh.journals.redis_scripts import (
    DECLARE,
    ENROLL,
    EVICT,
    JOIN,
    MARK,
    PEEK,
    RELEASE,
    RENEW,
    TAKE,
)
from mesh.journals.redis_store import log

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from mesh.journal import Delivery
    from mesh.journals.redis_consumers import Consumer, Picks
    from mesh.journals.redis_entries import Entry
    from mesh.journals.redis_keys import Keys
    from mesh.journals.redis_store import Store

#: So many changes under a read, and it gives nothing this time.
_MAX_TURNS = 8
_UNDECLARED, _SUPERSEDED = 1, 2
_LOST, _CHANGED, _NO_GROUP = 1, 2, 3

Place = tuple[str, int]


class Reader:
    """
    Reads for all consumers of one journal.

    Args:
        store: Where to.
        keys: Names of keys.
        lease_ms: How long a silent consumer keeps what it owns.
    """

    def __init__(self, store: Store, keys: Keys, lease_ms: int) -> None:
        """Know no group."""
        self._store = store
        self._keys = keys
        self._lease_ms = lease_ms
        #: What groups of this process hear, to tell it again to a Redis that was emptied.
        self.known: dict[str, set[str]] = {}

    # -- groups --------------------------------------------------------------------------------

    async def declare(self, group: str, topics: Collection[str], start: str) -> None:
        """Make a group hear topics that it does not hear yet."""
        keys = self._keys
        heard = {
            name.decode()
            for name in await self._store.call(
                keys.topics_of(group), "SMEMBERS", keys.topics_of(group)
            )
        }
        # What it heard already and the streams know no more is found when they are taken
        new = [topic for topic in dict.fromkeys(topics) if topic not in heard]
        self.known.setdefault(group, set()).update(heard, new)
        if new:
            await self._declare(group, new, start)

    async def _declare(self, group: str, topics: list[str], start: str) -> None:
        store, keys = self._store, self._keys
        streams = [
            keys.stream(topic, partition) for topic in topics for partition in range(PARTITIONS)
        ]
        await asyncio.gather(
            *(
                store.run(DECLARE, part, {"group": group, "start": start})
                for part in self._keys.parts(streams)
            )
        )
        # The groups of the streams come first: who finds none there knows that it was lost
        await store.call(keys.topics, "SADD", keys.topics, *topics)
        await store.call(keys.groups, "SADD", keys.groups, group)
        names = [keys.numbers(group), keys.topics_of(group)]
        await store.run(ENROLL, names, {"topics": topics})

    async def _declare_again(self, group: str) -> None:
        topics = sorted(self.known.get(group, ()))
        if not topics:
            raise ConfigurationError(
                f"group {group!r} was never declared; call `await journal.declare(group, topics)`"
            )
        log.error(
            "DATA_LOSS_SUSPECTED: redis at %s knows group %r no more (was it flushed?);"
            " declared again, to hear all that is there of %s",
            self._store.place.address, group, ", ".join(topics),
        )  # fmt: skip
        await self._declare(group, topics, "earliest")

    # -- reading -------------------------------------------------------------------------------

    async def read(self, me: Consumer, limit: int) -> list[Delivery]:
        """Hand a consumer its next events, as far as it may hold more."""
        for _ in range(_MAX_TURNS):
            if me.stale:
                await self._join(me)
            if limit <= 0 or me.must_wait():
                return []
            if await self._fill(me, limit):
                continue
            picks = me.pick(limit)
            if not picks:
                return []
            try:
                handed = await self._mark(me, picks)
            except BaseException:
                # Redis may have noted it; it will be noted the same way again
                me.begin_anew()
                raise
            if handed:
                return handed
        return []

    async def _fill(self, me: Consumer, limit: int) -> bool:
        """Fetch until there is enough for a read, or no more; True: the group has changed."""
        looked = False
        while len(me.ready) < me.wants(limit):
            if (me.ready or looked) and not any(lane.more for lane in me.open_lanes()):
                break
            if await self._fetch(me):
                return True
            looked = True
        if not looked and self._keys.cluster and await self._peek(me):
            # On one server it is the marking that looks at the group
            me.stale = True
        return me.stale

    async def _fetch(self, me: Consumer) -> bool:
        """Fetch what comes next in every stream; True when the group has changed instead."""
        lanes, page = me.to_fetch(), me.page
        peeking = asyncio.ensure_future(self._peek(me))
        try:
            fetched = await self._fetch_page(lanes, page)
        finally:
            changed = await peeking
        if changed:
            me.stale = True
            return True
        if not me.stale:
            me.take_in(fetched, page)
        return me.stale

    async def _fetch_page(self, lanes: list[Lane], page: int) -> list[tuple[Lane, list[Entry]]]:
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
        return [(by_key[key], read_entries(found.get(key, ()))) for key in starts]

    async def _peek(self, me: Consumer) -> bool:
        names = [self._keys.numbers(me.group), self._keys.members(me.group)]
        return bool(await self._store.run(PEEK, names, self._identity(me)))

    async def _mark(self, me: Consumer, picks: Picks) -> list[Delivery]:
        """Note in Redis what is handed out, then hand it out; nothing when the group changed."""
        lanes: dict[Lane, tuple[list[Entry], list[tuple[Any, int]]]] = {}
        for _, lane, entry in picks.fresh:
            lanes.setdefault(lane, ([], []))[0].append(entry)
        for spot, lane, count in picks.again:
            lanes.setdefault(lane, ([], []))[1].append((spot, count))
        by_key = {lane.key: lane for lane in lanes}
        parts = self._keys.parts(by_key)
        outcomes = await asyncio.gather(
            *(self._mark_part(me, [by_key[key] for key in part], lanes) for part in parts),
            return_exceptions=True,
        )
        failure: BaseException | None = None
        entries: list[tuple[Any, Lane, Entry, int]] = []
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                failure = outcome
                me.stale = True
            else:
                entries += outcome
        if failure is not None and not entries:
            raise failure
        if me.stale:
            me.begin_anew()
        entries.sort(key=_place_of)
        handed = [
            me.hand_out(lane, entry, count) for _, lane, entry, count in entries
            if me.lanes.get((lane.topic, lane.partition)) is lane
        ]  # fmt: skip
        if picks.alone and handed:
            (only,) = handed
            me.alone = name_of(only)
        return handed

    async def _mark_part(
        self,
        me: Consumer,
        lanes: list[Lane],
        picked: dict[Lane, tuple[list[Entry], list[tuple[Any, int]]]],
    ) -> list[tuple[Any, Lane, Entry, int]]:
        plan = self._identity(me)
        hands, claims = [], []
        for number, lane in enumerate(lanes, 1):
            fresh, again = picked[lane]
            if fresh:
                read = lane.read + len(fresh) if lane.read >= 0 else -1
                hands.append((number, fresh[-1].position, read))
            claims += [(number, position_of(spot), count + 1) for spot, count in again]
        plan |= {"hands": hands, "claims": claims}
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
            return []
        marked: list[tuple[Any, Lane, Entry, int]] = []
        for lane in lanes:
            fresh, again = picked[lane]
            counted, read = lane.read >= 0, lane.read
            for entry in fresh:
                read += counted
                lane.plain[entry.position] = entry.spot, read
                marked.append((entry.spot, lane, entry, 1))
            if fresh:
                lane.spot, lane.read = fresh[-1].spot, read
            for each in again:
                lane.waiting.remove(each)
        for (number, _, count), found in zip(claims, rest[0], strict=True):
            marked += [
                (entry.spot, lanes[number - 1], entry, count) for entry in read_entries(found)
            ]
        return marked

    # -- owning --------------------------------------------------------------------------------

    async def _join(self, me: Consumer) -> None:
        """Join the group, or look anew at what is the consumer's own."""
        plan = self._identity(me)
        plan |= {"was_member": me.was_member, "busy": sorted(me.busy()), "partitions": PARTITIONS}
        status, *rest = await self._store.run(JOIN, self._keys.membership(me.group), plan)
        if status == _UNDECLARED:
            await self._declare_again(me.group)
            status, *rest = await self._store.run(JOIN, self._keys.membership(me.group), plan)
        if status == _SUPERSEDED:
            raise ClosedError(
                f"consumer {me.name!r} of group {me.group!r}: a successor of this name has taken"
                " over; this one must stop"
            )
        if status != 0:
            raise BrokerUnavailableError(f"group {me.group!r} vanished while it was joined")
        version, names, owned, fair, given = rest
        topics = frozenset(name.decode() for name in names)
        tokens = {partition: token.decode() for partition, token in owned}
        self.known.setdefault(me.group, set()).update(topics)
        me.drop(
            lane
            for lane in me.lanes.values()
            if tokens.get(lane.partition) != lane.token or lane.topic not in topics
        )
        me.was_member, me.topics = True, topics
        await self._let_go(me, {partition: token.decode() for partition, token in given})
        await self._hear(topics)
        missing = {
            (topic, partition): token
            for topic in sorted(topics)
            for partition, token in tokens.items()
            if (topic, partition) not in me.lanes
        }
        await self._take(me, missing)
        me.version, me.surplus = version.decode(), frozenset(tokens) - frozenset(fair)
        me.begin_anew()
        me.stale = len(me.lanes) < len(topics) * len(tokens)

    async def _take(self, me: Consumer, places: dict[Place, str]) -> None:
        by_key = {self._keys.stream(*place): place for place in places}
        parts = self._keys.parts(by_key)
        replies = await asyncio.gather(
            *(
                self._store.run(
                    TAKE,
                    part,
                    {
                        "group": me.group,
                        "consumer": me.name,
                        "tokens": [places[by_key[key]] for key in part],
                    },
                )
                for part in parts
            )
        )
        healed = set()
        for part, taken in zip(parts, replies, strict=True):
            for key, (status, *facts) in zip(part, taken, strict=True):
                if status == 0:
                    place = by_key[key]
                    lane = _lane(place, key, places[place], facts)
                    me.lanes[place] = lane
                    if facts[4] or spot_of(facts[5]) < me.reached.pop(place, START):
                        healed.add(place[0])
        if healed:
            log.error(
                "DATA_LOSS_SUSPECTED: redis at %s has lost what group %r knew of %s (a flush, or a"
                " restart from an older file?); it hears all that is there",
                self._store.place.address, me.group, ", ".join(sorted(healed)),
            )  # fmt: skip

    async def _hear(self, topics: Iterable[str]) -> None:
        channels = {
            self._keys.channel(topic, partition)
            for topic in topics
            for partition in range(PARTITIONS)
        }
        await self._store.hear(channels)

    async def renew(self, me: Consumer) -> None:
        """Prolong a lease."""
        if not me.was_member:
            return
        names = [self._keys.members(me.group)]
        if not await self._store.run(RENEW, names, self._identity(me)):
            me.stale = True

    # -- giving back ---------------------------------------------------------------------------

    async def release(self, me: Consumer, deliveries: Iterable[Delivery]) -> None:
        """Give unhandled events back."""
        back = me.give_back(map(name_of, deliveries))
        if back:
            await self._write_back(me, back)

    async def leave(self, me: Consumer) -> None:
        """End a consumer; what it holds is nobody's, and not suspect."""
        if not me.was_member:
            return
        back = me.give_back(list(me.held))
        lanes = list(me.lanes.values())
        me.drop(lanes)
        me.stale = True
        await self._write_back(me, back, lanes, unfence=True)
        plan = {"consumer": me.name, "incarnation": me.incarnation}
        await self._store.run(EVICT, self._keys.membership(me.group), plan)

    async def free(self, group: str, consumer: str) -> None:
        """Take everything from a dead consumer, of whichever process."""
        keys = self._keys
        # Read first: when nobody knows whether it was evicted, its streams are known all the same
        owners = await self._store.call(keys.owners(group), "HGETALL", keys.owners(group))
        tokens = {}
        for partition, owner in zip(owners[::2], owners[1::2], strict=True):
            token, _, name = owner.decode().partition(" ")
            if name == consumer:
                tokens[int(partition)] = token
        topics, owned = await self._store.run(
            EVICT, keys.membership(group), {"consumer": consumer, "incarnation": None}
        )
        tokens |= {partition: token.decode() for partition, token in owned}
        if topics:
            names = [name.decode() for name in topics]
            await self._unfence(group, consumer, names, tokens)

    async def _let_go(self, me: Consumer, given: dict[int, str]) -> None:
        await self._unfence(me.group, me.name, sorted(me.topics), given)

    async def _unfence(
        self, group: str, consumer: str, topics: list[str], tokens: dict[int, str]
    ) -> None:
        streams: dict[bytes, tuple[Place, str, list[tuple[str, int]]]] = {
            self._keys.stream(topic, partition): ((topic, partition), token, [])
            for topic in topics
            for partition, token in tokens.items()
        }
        await self._release(group, consumer, streams, unfence=True)

    async def _write_back(
        self,
        me: Consumer,
        back: Iterable[tuple[Lane, str, int]],
        lanes: Iterable[Lane] = (),
        *,
        unfence: bool = False,
    ) -> None:
        streams: dict[bytes, tuple[Place, str, list[tuple[str, int]]]] = {
            lane.key: ((lane.topic, lane.partition), lane.token, []) for lane in lanes
        }
        for lane, position, count in back:
            place = lane.topic, lane.partition
            streams.setdefault(lane.key, (place, lane.token, []))[2].append((position, count))
        await self._release(me.group, me.name, streams, unfence=unfence)

    async def _release(
        self,
        group: str,
        consumer: str,
        streams: dict[bytes, tuple[Place, str, list[tuple[str, int]]]],
        *,
        unfence: bool,
    ) -> None:
        plans = []
        for part in self._keys.parts(streams):
            wakes = (
                {self._keys.channel(*streams[key][0]).decode() for key in part} if unfence else ()
            )
            plan = {
                "group": group,
                "consumer": consumer,
                "unfence": unfence,
                "streams": [(number, *streams[key][1:]) for number, key in enumerate(part, 1)],
                "wakes": sorted(wakes),
                "verb": self.verb,
            }
            plans.append(self._store.run(RELEASE, part, plan))
        await asyncio.gather(*plans)

    # -- inside --------------------------------------------------------------------------------

    @property
    def verb(self) -> str:
        """Give the command that wakes."""
        return "SPUBLISH" if self._keys.cluster else "PUBLISH"

    def _identity(self, me: Consumer) -> dict[str, Any]:
        return {
            "group": me.group,
            "consumer": me.name,
            "incarnation": me.incarnation,
            "version": me.version,
            "lease": self._lease_ms,
        }


def _lane(place: Place, key: bytes, token: str, facts: list[Any]) -> Lane:
    """Make a lane of what `TAKE` tells."""
    spot, read, pending, marks, *_ = facts
    done: dict[str, set[str]] = {}
    for mark in marks:
        position, _, handler = mark.decode().partition(" ")
        done.setdefault(position, set()).add(handler)
    waiting = sorted((spot_of(position), count) for position, count in pending)
    return Lane(*place, key, token, spot_of(spot), read, waiting, done)


def _place_of(marked: tuple[Any, Lane, Entry, int]) -> Any:
    return marked[0]
