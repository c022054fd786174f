"""The Redis journal when Redis is killed, emptied, full, read-only, or moves its slots."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest
import redis

from mesh.errors import BackpressureError, BrokerUnavailableError
from mesh.journal import PARTITIONS, Record, Step
from mesh.journals.redis import RedisJournal
from mesh.journals.redis_keys import Keys
from mesh.redis_link.resp import RespConnection
from tests.plumbing.journals import KEYS, drain, ids, numbered, records, settle
from tests.plumbing.processes import eventually
from tests.plumbing.redis_cluster import Cluster
from tests.plumbing.redis_server import RedisServer
from tests.redis.tools import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.redis, pytest.mark.fault]


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A server of this test's own, which keeps every write."""
    made = RedisServer(append_only=True).start()
    yield made
    made.close()


def client(server: RedisServer) -> Any:
    return redis.Redis.from_url(server.url, decode_responses=True)


async def append_until(
    stop: asyncio.Event, journal: RedisJournal, accepted: list[str], name: str
) -> None:
    """Append in small batches; note what was accepted."""
    number = 0
    while not stop.is_set():
        batch = [
            Record("order", f"{name}-{at}", b"%d" % at, f"key-{at % 5}")
            for at in range(number, number + 7)
        ]
        number += 7
        await journal.append(batch)
        accepted += [record.id for record in batch]


# -- one server ----------------------------------------------------------------------------------


async def test_a_connection_that_ends_while_settings_are_asked_is_made_anew(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that starts while Redis is restarted must not end because of it."""
    call, asked = RespConnection.call, 0

    async def call_and_lose(me: RespConnection, *words: Any) -> Any:
        nonlocal asked
        if words[0] == "INFO" and not asked:
            asked += 1
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
        return await call(me, *words)

    monkeypatch.setattr(RespConnection, "call", call_and_lose)
    journal = RedisJournal(url=server.url)
    await journal.connect()
    assert asked
    await journal.append(records("a"))
    await journal.close()


async def test_killed_under_load_it_loses_nothing_accepted(server: RedisServer) -> None:
    accepted: list[str] = []
    fills: list[str] = []
    stop = asyncio.Event()
    async with RedisJournal(url=server.url) as out, RedisJournal(url=server.url) as into:
        await into.declare("risk", ["order"])
        await into.declare("audit", ["fill"])

        async def handle() -> None:
            while not stop.is_set() or len(fills) < len(accepted):
                for each in await into.read("risk", "risk", limit=50, wait_s=0.5):
                    made = Record("fill", f"{each.id}/fill", each.id.encode(), "fills")
                    step = Step(acks=[each], records=[made], state={"last": each.id.encode()})
                    if not await into.commit("risk", "risk", [step]):
                        fills.append(each.id)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(append_until(stop, out, accepted, "e"))
            tasks.create_task(handle())
            for _ in range(3):
                seen = len(accepted), len(fills)
                await eventually(
                    lambda seen=seen: len(accepted) > seen[0] + 100 and len(fills) > seen[1] + 30,  # type: ignore[misc]
                    within_s=30,
                )
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)
            stop.set()
        kept = [each.frame.decode() for each in await drain(into, "audit", "audit")]

    assert set(accepted) <= set(kept)
    assert len(kept) == len(set(kept))
    for key in range(5):
        order = [int(each.partition("-")[2]) for each in kept]
        mine = [number for number in order if number % 5 == key]
        assert mine == sorted(mine)


async def test_a_server_that_stays_away_is_a_typed_error(server: RedisServer) -> None:
    async with RedisJournal(url=server.url, retry_s=0.5) as journal:
        await journal.declare("risk", ["order"])
        await journal.append(records("a"))
        await asyncio.to_thread(server.kill)
        with pytest.raises(BrokerUnavailableError, match=r"redis.*tried for 0\.5 s"):
            await journal.append(records("b"))
        with pytest.raises(BrokerUnavailableError):
            await journal.read("risk", "risk")
        await asyncio.to_thread(server.start)

        async def reads() -> bool:
            try:
                return ids(await journal.read("risk", "risk")) == ["a"]
            except BrokerUnavailableError:
                return False

        await eventually(reads)


@pytest.mark.parametrize("harm", ["flush", "group", "settled", "stream", "owners"])
async def test_what_was_destroyed_heals_and_is_told(
    server: RedisServer, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    """At least once: what was settled before may come again, what is unsettled must."""
    stream = "legion:{default:0}:durable:order"
    async with RedisJournal(url=server.url) as journal:
        await journal.declare("risk", ["order"])
        await journal.append([Record("order", name, b"{}", KEYS[0]) for name in "abc"])
        held = await journal.read("risk", "risk")
        await settle(journal, "risk", "risk", held[:1])
        with client(server) as stranger:
            if harm == "flush":
                stranger.flushall()
            elif harm in {"group", "settled"}:
                stranger.xgroup_destroy(stream, "risk" if harm == "group" else "risk:settled")
            else:
                stranger.delete(stream if harm == "stream" else f"{stream}:owners")
        await journal.append([Record("order", name, b"{}", KEYS[0]) for name in "de"])
        seen: set[str] = set()

        async def heard() -> bool:
            batch = await journal.read("risk", "risk")
            refused = await settle(journal, "risk", "risk", batch)
            seen.update(each.id for each in batch)
            return not refused and seen >= {"d", "e"}

        await settle(journal, "risk", "risk", held[1:])
        await eventually(heard)
        await drain(journal, "risk", "risk")
        assert [view.pending for view in await journal.groups()] == [0]

    lost_nothing = harm == "owners"
    assert ("DATA_LOSS_SUSPECTED" in caplog.text) is not lost_nothing


async def test_a_server_that_came_back_older_is_noticed(
    server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    stream = "legion:{default:0}:durable:order"
    async with RedisJournal(url=server.url) as journal:
        await journal.declare("risk", ["order"])
        await journal.append([Record("order", "a", b"{}", KEYS[0])])
        await drain(journal, "risk", "risk")
        with redis.Redis.from_url(server.url) as stranger:
            older = stranger.dump(stream)
            await journal.append([Record("order", "b", b"{}", KEYS[0])])
            (lost,) = await journal.read("risk", "risk")
            stranger.restore(stream, 0, older, replace=True)
            stranger.client_kill_filter(_type="normal", skipme=True)
        await journal.append([Record("order", "c", b"{}", KEYS[0])])
        seen: list[str] = []

        async def heard() -> bool:
            seen.extend(ids(await drain(journal, "risk", "risk")))
            return "c" in seen

        await eventually(heard)

    assert lost.id not in seen
    assert "DATA_LOSS_SUSPECTED" in caplog.text


async def test_a_full_server_is_backpressure_and_lets_itself_be_emptied(
    server: RedisServer,
) -> None:
    accepted: list[str] = []

    async def fill(journal: RedisJournal) -> None:
        while len(accepted) < 100_000:
            batch = [f"e{len(accepted) + at}" for at in range(20)]
            await journal.append([Record("order", each, bytes(2000), "k") for each in batch])
            accepted.extend(batch)

    async with RedisJournal(url=server.url, retry_s=0.3) as journal:
        await journal.declare("risk", ["order"])
        with client(server) as stranger:
            stranger.config_set("maxmemory", stranger.info("memory")["used_memory"] + 3_000_000)
        with pytest.raises(BackpressureError, match=r"out of memory.*raise its `maxmemory`"):
            await fill(journal)
        assert accepted
        # What is there is handed out and settled, and then there is room again
        assert ids(await drain(journal, "risk", "risk"))[: len(accepted)] == accepted
        await journal.trim(max_age_s=-1)
        assert await journal.append(records("after")) == 1
        assert ids(await drain(journal, "risk", "risk"))[-1] == "after"


async def test_a_server_that_became_a_replica_is_told(server: RedisServer) -> None:
    (nobody,) = free_ports(1)
    async with RedisJournal(url=server.url, retry_s=0.3) as journal:
        await journal.append(records("a"))
        with client(server) as stranger:
            stranger.replicaof("127.0.0.1", nobody)
            with pytest.raises(BrokerUnavailableError, match="read-only replica"):
                await journal.append(records("b"))
            stranger.replicaof("NO", "ONE")
        assert await journal.append(records("b")) == 1


# -- a cluster -----------------------------------------------------------------------------------


@pytest.fixture
def servers() -> Iterator[Cluster]:
    """Three servers of this test's own, to be harmed."""
    made = Cluster(append_only=True)
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
async def cluster(servers: Cluster) -> Cluster:
    await servers.join()
    return servers


def member(cluster: Cluster, **options: Any) -> RedisJournal:
    return RedisJournal("127.0.0.1", cluster.ports[0], cluster=True, **options)


@pytest.mark.redis_cluster
async def test_one_hot_type_uses_all_nodes(redis_cluster: Cluster) -> None:
    async with member(redis_cluster) as journal:
        await journal.append(numbered(PARTITIONS * 4))

        for server in redis_cluster.servers:
            with client(server) as stranger:
                assert stranger.keys("legion:*:durable:order")


async def test_a_node_that_is_killed_comes_back_with_all_it_accepted(
    cluster: Cluster,
) -> None:
    accepted: list[str] = []
    stop = asyncio.Event()
    async with member(cluster, retry_s=20.0) as out, member(cluster) as into:
        await into.declare("risk", ["order"])
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(append_until(stop, out, accepted, "e"))
            await eventually(lambda: len(accepted) > 100, within_s=20)
            victim = cluster.servers[2]
            await asyncio.to_thread(victim.kill)
            await asyncio.to_thread(victim.start)
            seen = len(accepted)
            await eventually(lambda: len(accepted) > seen + 100, within_s=20)
            stop.set()
        kept = ids(await drain(into, "risk", "risk"))

    assert len(kept) == len(set(kept))
    assert set(accepted) <= set(kept)


async def test_what_was_fetched_is_not_passed_over_when_the_groups_node_goes_away(
    cluster: Cluster,
) -> None:
    """The streams are elsewhere and answer; it is the group that cannot be asked any more."""
    from redis.crc import key_slot

    keys = Keys("default", cluster=True)
    group = next(
        name
        for name in (f"risk-{number}" for number in range(1000))
        if key_slot(keys.numbers(name)) * 3 // 16384 == 2
    )
    partition = next(
        each for each in range(PARTITIONS) if key_slot(keys.stream("order", each)) * 3 // 16384 == 0
    )
    async with member(cluster, retry_s=0.2) as journal:
        await journal.declare(group, ["order"])
        sent = [Record("order", f"e{number}", b"", KEYS[partition]) for number in range(20)]
        await journal.append(sent)
        first = await journal.read(group, "a", limit=1)
        await settle(journal, group, "a", first)
        await asyncio.to_thread(cluster.servers[2].kill)
        with pytest.raises(BrokerUnavailableError):
            await journal.read(group, "a", limit=5)
        await asyncio.to_thread(cluster.servers[2].start)

        async def can_be_read() -> bool:
            with contextlib.suppress(BrokerUnavailableError):
                first.extend(await journal.read(group, "a", limit=5))
            return len(first) > 1

        await eventually(can_be_read)
        rest = await journal.read(group, "a")

    assert ids([*first, *rest]) == [record.id for record in sent]


async def test_a_slot_that_moves_is_followed(cluster: Cluster) -> None:
    from redis.crc import key_slot

    slot = key_slot(b"legion:{default:0}:durable:order")
    begin = slot * 3 // 16384
    async with member(cluster) as journal:
        await journal.append([Record("order", "x", b"", KEYS[1])])
        await cluster.move(slot, (begin + 1) % 3)
        await journal.declare("risk", ["order"])
        await journal.append([Record("order", "a", b"", KEYS[0])])

        assert ids(await drain(journal, "risk", "risk")) == ["a"]
