"""
Who owns which streams of the Redis journal: groups, memberships, leases.

Who owns which partition is decided under the group's keys (`JOIN`); each stream then learns its
new owner's token (`TAKE`), and from that moment refuses the steps of the one before. Between the
two the old owner may still settle: what it settles is not handed out again.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from mesh.errors import BrokerUnavailableError, ClosedError, ConfigurationError
from mesh.journal import PARTITIONS
from mesh.journals.redis_consumers import Lane
from mesh.journals.redis_entries import START, spot_of
from mesh.journals.redis_group_scripts import (
    DECLARE,
    ENROLL,
    EVICT,
    HANDED,
    JOIN,
    PEEK,
    RENEW,
    TAKE,
)
from mesh.journals.redis_scripts import RELEASE, SETTLE
from mesh.journals.redis_steps import decode_decision
from mesh.journals.redis_store import log

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from mesh.journal import Delivery
    from mesh.journals.redis_consumers import Back, Consumer
    from mesh.journals.redis_keys import Keys
    from mesh.journals.redis_store import Store

_UNDECLARED, _SUPERSEDED = 1, 2

#: Topic, partition.
Place = tuple[str, int]


class Members:
    """
    The consumers of one journal in their groups.

    Args:
        store: Where groups are.
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

    def disown(self, group: str, topic: str | None) -> None:
        """Tell Redis no more of a group, or of a topic that it heard."""
        if topic is None:
            self.known.pop(group, None)
        else:
            self.known.get(group, set()).discard(topic)

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

    # -- owning --------------------------------------------------------------------------------

    async def join(self, me: Consumer) -> None:
        """Join the group, or look anew at what is the consumer's own."""
        plan = self.identity(me)
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
        version, names, owned, fair, given, decided = rest
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
        await self._settle_decided(
            {int(at): plan for at, plan in zip(decided[::2], decided[1::2], strict=True)},
            {partition for _, partition in missing},
        )
        await self._take(me, missing)
        me.version, me.surplus = version.decode(), frozenset(tokens) - frozenset(fair)
        me.begin_anew()
        me.stale = len(me.lanes) < len(topics) * len(tokens)

    async def _settle_decided(self, decided: dict[int, bytes], partitions: set[int]) -> None:
        """Settle what the owner before had decided, and perhaps not settled before it died."""
        plans = [decode_decision(decided[each]) for each in partitions & decided.keys()]
        await asyncio.gather(*(self._store.run(SETTLE, keys, plan) for keys, plan in plans))

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
                    if facts[4] or lane.spot < me.reached.pop(place, START):
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

    async def compare(self, me: Consumer) -> None:
        """
        Let go of everything when Redis knows less than it did: it came back older.

        Also of what it knows still: what is in hand was made with a state that is not kept.
        """
        async with me.comparing:
            while me.in_doubt:
                returns = me.returns
                await self._compare(me)
                me.compared = returns

    async def _compare(self, me: Consumer) -> None:
        # As it is now: steps go on while Redis is asked, and what it knows only grows
        known = {lane.key: (lane.topic, lane.spot, lane.settled_to) for lane in me.lanes.values()}
        noted, are_all_told = me.noted, not me.decided
        parts = self._keys.parts(known)
        replies = await asyncio.gather(
            *(self._store.run(HANDED, part, {"group": me.group}) for part in parts)
        )
        older = set()
        for part, found in zip(parts, replies, strict=True):
            for key, (handed, settled) in zip(part, found, strict=True):
                topic, spot, settled_to = known[key]
                # What is decided, on a cluster, the streams may not know yet
                is_undone = spot_of(settled) < settled_to and are_all_told
                if spot_of(handed) < spot or is_undone:
                    older.add(topic)
        if await self._has_older_state(me, noted):
            older.add("(its state)")
        if older:
            log.error(
                "DATA_LOSS_SUSPECTED: redis at %s came back older (a failover?): it has forgotten"
                " what group %r had done of %s, which is done again",
                self._store.place.address, me.group, ", ".join(sorted(older)),
            )  # fmt: skip
            me.drop(list(me.lanes.values()))
            me.losses += 1
            me.stale = True

    async def _has_older_state(self, me: Consumer, noted: int) -> bool:
        if not noted:
            return False
        steps = self._keys.steps(me.group)
        found = await self._store.call(steps, "HGET", steps, me.name)
        incarnation, _, number = (found or b" 0").decode().partition(" ")
        return incarnation in {"", me.incarnation} and int(number) < noted

    async def renew(self, me: Consumer) -> None:
        """Prolong a lease."""
        if not me.was_member:
            return
        names = [self._keys.members(me.group)]
        if not await self._store.run(RENEW, names, self.identity(me)):
            me.stale = True

    # -- giving back ---------------------------------------------------------------------------

    async def release(self, me: Consumer, deliveries: Iterable[Delivery]) -> None:
        """Give unhandled events back."""
        back = me.take_back(deliveries)
        if not back:
            return
        try:
            await self._write_back(me, back)
        except BaseException:
            # Whether Redis has taken them back is not known: that is found out by taking over anew
            me.drop({lane for lane, _, _ in back})
            me.stale = True
            raise
        me.gave_back(back)

    async def leave(self, me: Consumer) -> None:
        """
        End a consumer; what it holds is nobody's, and not suspect.

        Given back and let go in one script: of a commit that nobody has answered, a server that was
        stopped may hear before or after, but not in between.
        """
        if not me.was_member:
            return
        in_hand = {**me.held, **me.settling, **me.returning}
        back = [
            (me.lanes[name[:2]], name[2], delivery.deliveries - 1)
            for name, delivery in in_hand.items()
        ]
        lanes = list(me.lanes.values())
        me.drop(lanes)
        me.stale = True
        await self._write_back(me, back, lanes, unfence=True)
        plan = {"consumer": me.name, "incarnation": me.incarnation}
        await self._store.run(EVICT, self._keys.membership(me.group), plan)

    async def free(self, group: str, consumer: str, pid: int | None = None) -> None:
        """Take everything from a dead consumer; if it is another process than `pid`, it lives."""
        keys = self._keys
        incarnation = None
        if pid is not None:
            members = keys.members(group)
            member = await self._store.call(members, "HGET", members, consumer)
            incarnation = "" if member is None else member.decode().partition(" ")[0]
            if not incarnation.startswith(f"{pid}-"):
                return
        # Read first: when nobody knows whether it was evicted, its streams are known all the same
        owners = await self._store.call(keys.owners(group), "HGETALL", keys.owners(group))
        tokens = {}
        for partition, owner in zip(owners[::2], owners[1::2], strict=True):
            token, _, name = owner.decode().partition(" ")
            if name == consumer:
                tokens[int(partition)] = token
        topics, owned = await self._store.run(
            EVICT, keys.membership(group), {"consumer": consumer, "incarnation": incarnation}
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
        back: Iterable[Back],
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
                "verb": "SPUBLISH" if self._keys.cluster else "PUBLISH",
            }
            plans.append(self._store.run(RELEASE, part, plan))
        await asyncio.gather(*plans)

    async def has_changed(self, me: Consumer) -> bool:
        """Say whether a consumer should join anew; prolongs its lease."""
        names = [self._keys.numbers(me.group), self._keys.members(me.group)]
        return bool(await self._store.run(PEEK, names, self.identity(me)))

    def identity(self, me: Consumer) -> dict[str, Any]:
        """Give what scripts ask of a consumer."""
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
    lane = Lane(*place, key, token, spot_of(spot), read, waiting, done)
    lane.settled_to = lane.spot
    return lane
