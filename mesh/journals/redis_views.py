"""What is read of the Redis journal by people and programs: groups, history, dead letters."""

from __future__ import annotations

import asyncio
import heapq
from typing import TYPE_CHECKING, Any

from mesh.deadletters import decode_letter
from mesh.journal import PARTITIONS, GroupView, Size, Stored
from mesh.journals.local import count_letters
from mesh.journals.redis_entries import START, position_of, read_entries, spot_of
from mesh.journals.redis_scripts import COUNT, EXHUME, TRIM

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable

    from mesh.deadletters import DeadLetter
    from mesh.journal import DeadCount, DeadQuery, Delivery
    from mesh.journals.redis_entries import Spot
    from mesh.journals.redis_keys import Keys
    from mesh.journals.redis_store import Store

_LETTERS = 500
_TRIM_EVENTS = 200
_MIN_PAGE = 8

#: Topic, partition.
Place = tuple[str, int]


class Views:
    """
    Reads what belongs to no consumer.

    Args:
        store: Where from.
        keys: Names of keys.
    """

    def __init__(self, store: Store, keys: Keys) -> None:
        """Read nothing yet."""
        self._store = store
        self._keys = keys

    # -- groups --------------------------------------------------------------------------------

    async def groups(self) -> list[GroupView]:
        """Tell how far every group is."""
        views = []
        for group in await self._members(self._keys.groups):
            for topic in await self._members(self._keys.topics_of(group)):
                views.append(await self._view(group, topic))  # noqa: PERF401 - one after another
        return views

    async def _view(self, group: str, topic: str) -> GroupView:
        streams = [self._keys.stream(topic, partition) for partition in range(PARTITIONS)]
        replies = await asyncio.gather(
            *(self._store.run(COUNT, part, {"group": group}) for part in self._keys.parts(streams))
        )
        counts = [found for _, counted in replies for found in counted]
        now_ms = max(int(now) for now, _ in replies)
        oldest = [spot_of(position)[0] for _, position in counts if position]
        age_ms = max(0, now_ms - min(oldest)) if oldest else 0
        return GroupView(group, topic, sum(count for count, _ in counts), age_ms / 1000)

    async def state(self, group: str) -> dict[str, bytes]:
        """Give the state of a group."""
        key = self._keys.state(group)
        flat = await self._store.call(key, "HGETALL", key)
        return {name.decode(): value for name, value in zip(flat[::2], flat[1::2], strict=True)}

    # -- history -------------------------------------------------------------------------------

    async def scan(
        self, topics: Collection[str] | None, after: str | None, limit: int
    ) -> list[Stored]:
        """Give kept events, the oldest first; those of one moment by the names of their streams."""
        if topics is None:
            topics = await self._members(self._keys.topics)
        places = sorted((topic, partition) for topic in topics for partition in range(PARTITIONS))
        position, _, stream = (after or "0-0").partition("/")
        spot, of = spot_of(position), _place_of(stream)
        starts = {}
        for place in places:
            # Of the same moment, those of later streams were not given yet
            mark = "(" if not stream or place <= of else ""
            starts[place] = mark + position_of(spot)
        page = max(_MIN_PAGE, min(limit, 1000) // max(1, len(places)))
        walks = [self._walk(place, starts[place], page) for place in places]
        firsts = await asyncio.gather(*(anext(walk, None) for walk in walks))
        heads = [
            (first[:2], first[2], walk)
            for walk, first in zip(walks, firsts, strict=True)
            if first is not None
        ]
        heapq.heapify(heads)
        found: list[Stored] = []
        while heads and len(found) < limit:
            (at, place), entry, walk = heads[0]
            found.append(
                Stored(_where(at, place), entry.topic, entry.id, entry.frame, at[0] / 1000)
            )
            following = await anext(walk, None)
            if following is None:
                heapq.heappop(heads)
            else:
                heapq.heapreplace(heads, (following[:2], following[2], walk))
        for walk in walks:
            await walk.aclose()
        return found

    async def newest(self) -> str | None:
        """Give the place of the last event of all streams."""
        places = await self._places()
        last = max(await asyncio.gather(*map(self._last, places)), default=None)
        return None if last is None or last[0] == START else _where(*last)

    async def _last(self, place: Place) -> tuple[Spot, Place]:
        key = self._keys.stream(*place)
        found = await self._store.call(key, "XREVRANGE", key, "+", "-", "COUNT", 1)
        return (spot_of(found[0][0]) if found else START), place

    async def _walk(
        self, place: Place, start: str, page: int
    ) -> AsyncGenerator[tuple[Spot, Place, Delivery], None]:
        key = self._keys.stream(*place)
        while True:
            replied = await self._store.call(key, "XRANGE", key, start, "+", "COUNT", page)
            for entry in read_entries(replied, place, *place):
                yield entry
                start = f"({entry[2].position}"
            if len(replied) < page:
                return

    async def size(self) -> Size:
        """Tell how much is kept."""
        places = await self._places()
        counts = await asyncio.gather(*map(self._length, places))
        return Size(sum(counts), sum(await asyncio.gather(*map(self._size, places))))

    async def _places(self) -> list[Place]:
        topics = await self._members(self._keys.topics)
        return [(topic, partition) for topic in topics for partition in range(PARTITIONS)]

    async def _length(self, place: Place) -> int:
        key = self._keys.stream(*place)
        return int(await self._store.call(key, "XLEN", key))

    async def trim(self, max_age_s: float | None, max_bytes: int | None) -> int:
        """Forget old events that every group has settled."""
        places = await self._places()
        gone = 0
        if max_age_s is not None:
            seconds, micros = await self._store.call(self._keys.topics, "TIME")
            before_ms = int(seconds) * 1000 + int(micros) // 1000 - int(max_age_s * 1000)
            gone += sum(
                await asyncio.gather(*(self._trim_old(place, before_ms) for place in places))
            )
        if max_bytes is not None:
            gone += await self._trim_large(places, max_bytes)
        return gone

    async def _trim_old(self, place: Place, before_ms: int) -> int:
        gone: int = 0
        while True:
            some, _, _ = await self._trim_some(place, before=f"{max(0, before_ms)}-0")
            gone += some
            if some < _TRIM_EVENTS:
                return gone

    async def _trim_large(self, places: list[Place], max_bytes: int) -> int:
        """Forget the oldest of all streams, some at a time."""
        excess = sum(await asyncio.gather(*map(self._size, places))) - max_bytes
        heads: list[tuple[Any, Place]] = []
        if excess > 0:
            firsts = await asyncio.gather(*map(self._head, places))
            heads = [
                (spot_of(first), place)
                for first, place in zip(firsts, places, strict=True)
                if first
            ]
        heapq.heapify(heads)
        gone = 0
        while excess > 0 and heads:
            _, place = heapq.heappop(heads)
            before = position_of(heads[0][0]) if heads else None
            some, size, head = await self._trim_some(place, before=before, size=excess)
            if not some and before is not None:
                # Of the very moment of the next stream's head
                some, size, head = await self._trim_some(place, size=1)
            gone += some
            excess -= size + 40 * some
            if some and head:
                heapq.heappush(heads, (spot_of(head), place))
        return gone

    async def _trim_some(
        self, place: Place, *, before: str | None = None, size: int | None = None
    ) -> Any:
        plan = {"count": _TRIM_EVENTS, "before": before, "bytes": size}
        return await self._store.run(TRIM, [self._keys.stream(*place)], plan)

    async def _size(self, place: Place) -> int:
        key = self._keys.stream(*place)
        return int(await self._store.call(key, "MEMORY", "USAGE", key) or 0)

    async def _head(self, place: Place) -> bytes | None:
        key = self._keys.stream(*place)
        first = await self._store.call(key, "XRANGE", key, "-", "+", "COUNT", 1)
        return first[0][0] if first else None

    async def _members(self, key: bytes) -> list[str]:
        return sorted(name.decode() for name in await self._store.call(key, "SMEMBERS", key))

    # -- dead letters --------------------------------------------------------------------------

    async def dead(self, query: DeadQuery, limit: int) -> list[DeadLetter]:
        """Give dead letters, the newest first."""
        found: list[DeadLetter] = []
        async for letter in self._letters():
            if len(found) >= limit:
                break
            if query.chooses(letter):
                found.append(letter)
        return found

    async def count_dead(self, query: DeadQuery) -> dict[tuple[str, str, str, str], DeadCount]:
        """Count dead letters."""
        return count_letters([each async for each in self._letters() if query.chooses(each)])

    async def exhume(self, letters: Iterable[DeadLetter]) -> int:
        """Remove dead letters."""
        chosen = [(each.id, repr(each.at_s)) for each in letters]
        if not chosen:
            return 0
        kept, times, _ = self._keys.dead
        return int(await self._store.run(EXHUME, [kept, times], {"letters": chosen}))

    async def _letters(self) -> AsyncIterator[DeadLetter]:
        letters, times, _ = self._keys.dead
        first = 0
        while True:
            ids = await self._store.call(times, "ZRANGE", times, first, first + _LETTERS - 1, "REV")
            if not ids:
                return
            page = []
            for kept in await self._store.call(letters, "HMGET", letters, *ids):
                if kept is not None:
                    number, _, stored = kept.partition(b" ")
                    page.append((int(number), decode_letter(stored)))
            # Of one moment, the one that was kept last comes first
            for _, letter in sorted(page, key=lambda each: (-each[1].at_s, -each[0])):
                yield letter
            first += _LETTERS


def _where(spot: Spot, place: Place) -> str:
    """Name a place of the history over all streams."""
    return f"{position_of(spot)}/{place[0]}:{place[1]}"


def _place_of(stream: str) -> Place:
    topic, _, partition = stream.rpartition(":")
    return topic, int(partition or 0)
