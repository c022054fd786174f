"""The Redis fabric on a Cluster of three nodes, and under Sentinel."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from mesh import (
    AccessDeniedError,
    Agent,
    BrokerUnavailableError,
    Event,
    EventPublisher,
    PublisherConfig,
    RedisMessageBroker,
    event_type,
    on,
)
from mesh.journals.redis_clock import ClusterClock
from tests.plumbing import agents
from tests.plumbing.processes import eventually
from tests.plumbing.redis_cluster import Cluster
from tests.plumbing.redis_server import RedisServer
from tests.redis.tools import Ear, command, free_ports, listener

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.redis, pytest.mark.fault]

ORDER = event_type("cluster.order", durable=True)
TOPICS = [f"topic.{number}" for number in range(40)]


@pytest.fixture
def servers() -> Iterator[Cluster]:
    made = Cluster()
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.fixture
async def cluster(servers: Cluster) -> Cluster:
    await servers.join()
    return servers


def client(cluster: Cluster, **options: Any) -> RedisMessageBroker:
    return RedisMessageBroker("127.0.0.1", cluster.ports[0], cluster=True, **options)


async def test_topics_spread_over_the_nodes(cluster: Cluster) -> None:
    async with client(cluster) as out, client(cluster) as into:
        ear = Ear()
        await into.attach(TOPICS, ear)
        await out.synchronize()
        for topic in TOPICS:
            await out.send(topic, topic.encode())
        await eventually(lambda: len(ear.frames) == len(TOPICS))

        assert sorted(ear.frames) == sorted(topic.encode() for topic in TOPICS)
        for server in cluster.servers:
            assert await command(server.url, "PUBSUB", "SHARDCHANNELS", "legion:*")

        await into.detach(ear)

        async def nobody_listens() -> bool:
            left = [await command(each.url, "PUBSUB", "SHARDCHANNELS") for each in cluster.servers]
            return not any(left)

        await eventually(nobody_listens)


async def test_a_slot_that_moves_under_load_loses_nothing_that_is_sent(cluster: Cluster) -> None:
    """What comes back with MOVED is sent anew, in order; what is lost meanwhile is counted."""
    from redis.crc import key_slot

    slot = key_slot(b"legion:default:live:number.said")
    async with client(cluster) as out, client(cluster) as into:
        ear = await listener(into)
        publisher = EventPublisher(PublisherConfig(agent_name="speaker", broker=out))
        stop = asyncio.Event()
        said = 0

        async def speak() -> None:
            nonlocal said
            while not stop.is_set():
                await publisher.publish("number.said", {"number": said})
                said += 1
                if said % 20 == 0:
                    await asyncio.sleep(0.001)

        speaking = asyncio.create_task(speak())
        begin = slot * 3 // 16384
        for target in ((begin + step) % 3 for step in (1, 2, 3)):
            heard = len(ear.numbers)
            await eventually(lambda heard=heard: len(ear.numbers) > heard + 300)  # type: ignore[misc]
            await cluster.move(slot, target)
        heard = len(ear.numbers)
        await eventually(lambda: len(ear.numbers) > heard + 300)
        stop.set()
        await speaking
        await publisher.flush()
        await eventually(lambda: ear.numbers[-1] == said - 1)

        assert ear.numbers == sorted(set(ear.numbers))
        assert ear.ledger.lost() == said - len(ear.numbers)
        assert ear.ledger.lost() < said / 2
        await publisher.close()
        await ear.stop()


async def test_a_node_that_is_killed_comes_back_with_its_topics(cluster: Cluster) -> None:
    async with client(cluster) as broker:
        ear = Ear()
        await broker.attach(TOPICS, ear)
        victim = cluster.servers[2]
        await asyncio.to_thread(victim.kill)
        await eventually(lambda: not all(broker.try_send(topic, b"{}") for topic in TOPICS))
        assert any(broker.try_send(topic, b"{}") for topic in TOPICS), "the others go on"

        await asyncio.to_thread(victim.start)

        async def all_arrive() -> bool:
            ear.frames.clear()
            sent = [topic for topic in TOPICS if broker.try_send(topic, b"{2}")]
            await asyncio.sleep(0.02)
            return len(sent) == len(TOPICS) == len(ear.frames)

        await eventually(all_arrive, within_s=15.0)


async def test_events_of_two_partitions_at_the_same_position_are_two(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Partitions count for themselves where Redis's clock is ahead of who appends."""

    class Slow(Agent):
        async def setup(self) -> None:
            self.is_let_go = asyncio.Event()

        @on(ORDER)
        async def take(self, event: Event) -> None:
            await self.is_let_go.wait()
            self.ctx.state[event.data["by"]] = True

    monkeypatch.setattr(ClusterClock, "take", lambda _, count: (9 * 10**12, count))
    brokers = [client(cluster, allow_volatile=True) for _ in range(2)]
    async with brokers[0] as broker, brokers[1] as other:
        async with agents.running(broker, Slow) as agent:
            for name, each in (("one", broker), ("two", other)):
                journal = await each.open_journal()
                async with agents.speaking(each) as till:
                    await till.publish(ORDER, {"by": name}, key=name)
            await eventually(lambda: agent.consumer.unsettled() == 2)
            stored = await journal.scan([ORDER])
            assert len({str(each.position).partition("/")[0] for each in stored}) == 1

            agent.is_let_go.set()
            await agent.consumer.drained()
            assert agent.consumer.unsettled() == 0
            assert set(await journal.load_state("shop")) == {"one", "two"}


async def test_a_server_that_is_no_cluster_is_told(redis_url: str) -> None:
    (port,) = free_ports(1)
    server = RedisServer(settings={"port": str(port), "bind": "127.0.0.1"}).start()
    try:
        with pytest.raises(AccessDeniedError, match="is no cluster; unset LEGION_REDIS_CLUSTER"):
            await RedisMessageBroker("127.0.0.1", port, cluster=True).connect()
    finally:
        server.close()


async def test_a_failover_by_sentinel_is_followed() -> None:
    first, second, guard = free_ports(3)
    loopback = {"bind": "127.0.0.1"}
    master = RedisServer(settings={"port": str(first), **loopback})
    replica = RedisServer(
        settings={"port": str(second), "replicaof": f"127.0.0.1 {first}", **loopback}
    )
    sentinel = RedisServer(
        settings={
            "port": str(guard),
            "sentinel monitor": f"legion 127.0.0.1 {first} 1",
            "sentinel down-after-milliseconds": "legion 500",
            "sentinel failover-timeout": "legion 2000",
            **loopback,
        },
        sentinel=True,
    )
    started: list[RedisServer] = []
    try:
        for each in (master, replica, sentinel):
            each.start()
            started.append(each)

        async def knows_the_replica() -> bool:
            known = await command(f"redis://127.0.0.1:{guard}", "SENTINEL", "REPLICAS", "legion")
            return bool(known)

        await eventually(knows_the_replica, within_s=20.0)
        broker = RedisMessageBroker(
            sentinels=[("127.0.0.1", guard)], sentinel_service="legion", silent_s=1.0
        )
        async with broker:
            ear = Ear()
            await broker.attach(["t"], ear)
            await asyncio.to_thread(master.kill)

            async def arrives() -> bool:
                return broker.try_send("t", b"{new}") and b"{new}" in ear.frames

            await eventually(arrives, within_s=30.0)
            assert str(second) in str(await command(
                f"redis://127.0.0.1:{guard}", "SENTINEL", "GET-MASTER-ADDR-BY-NAME", "legion"
            ))  # fmt: skip

        with pytest.raises(BrokerUnavailableError, match="name no master for 'other'"):
            await RedisMessageBroker(
                sentinels=[("127.0.0.1", guard)], sentinel_service="other", connect_timeout_s=1.0
            ).connect()
    finally:
        for each in started:
            each.close()
