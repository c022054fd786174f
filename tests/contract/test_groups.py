"""One suite for all fabrics: what replicas of one agent share, and in what order."""

from __future__ import annotations

from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from mesh import (
    Agent,
    AgentContext,
    Event,
    EventPublisher,
    MessageBusConfig,
    PublisherConfig,
    event_type,
    on,
)
from mesh.brokers.memory import InMemoryMessageBroker
from mesh.brokers.redis import RedisMessageBroker
from mesh.brokers.zeromq import ZeroMQMessageBroker
from mesh.replicas import replica_name
from tests.plumbing.processes import end_forwarder, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from mesh.broker import MessageBroker

ORDER = event_type("stall.order", durable=True)
BILL = event_type("stall.bill", durable=True)
KEYS = [f"customer-{number}" for number in range(24)]


class Fabric:
    """Gives each replica a broker, as its process would have one, where several can be joined."""

    def __init__(
        self, kind: str, directory: Path, exits: AsyncExitStack, redis_url: str | None = None
    ) -> None:
        self._kind = kind
        self._redis_url = redis_url
        self._directory = directory
        self._exits = exits
        self._made: MessageBroker | None = None

    async def join(self) -> MessageBroker:
        if self._kind == "memory":
            if self._made is None:
                self._made = await self._exits.enter_async_context(InMemoryMessageBroker())
            return self._made
        if self._redis_url is not None:
            return await self._exits.enter_async_context(RedisMessageBroker(url=self._redis_url))
        return await self._exits.enter_async_context(ZeroMQMessageBroker(self._directory))


@pytest.fixture(params=["memory", "zmq", pytest.param("redis", marks=pytest.mark.redis)])
async def fabric(request: pytest.FixtureRequest, own_mesh_dir: Path) -> AsyncIterator[Fabric]:
    async with AsyncExitStack() as exits:
        url = request.getfixturevalue("redis_url") if request.param == "redis" else None
        yield Fabric(request.param, own_mesh_dir, exits, url)
    if request.param == "zmq":
        end_forwarder(own_mesh_dir)


@asynccontextmanager
async def replica(
    fabric: Fabric, kind: type[Agent], number: int, **settings: Any
) -> AsyncIterator[Any]:
    config = MessageBusConfig(broker_type="memory", consumer_retry_delay_ms=1.0, **settings)
    name = replica_name("stall", number)
    broker = await fabric.join()
    agent = kind(AgentContext(name=name, group="stall", broker=broker, config=config))
    await agent.open()
    try:
        yield agent
    finally:
        await agent.close()


@asynccontextmanager
async def till(fabric: Fabric) -> AsyncIterator[EventPublisher]:
    publisher = EventPublisher(PublisherConfig(agent_name="till", broker=await fabric.join()))
    yield publisher
    await publisher.close()


async def sell(publisher: EventPublisher, *numbers: int) -> None:
    for number in numbers:
        await publisher.publish(ORDER, {"n": number}, key=KEYS[number % len(KEYS)])


class Counting(Agent):
    """Counts each customer's orders in the group's state."""

    async def setup(self) -> None:
        self.seen: list[int] = []
        self.restored = 0

    async def restore(self) -> None:
        self.restored += 1

    @on(ORDER)
    async def on_order(self, event: Event) -> None:
        assert event.key is not None
        self.ctx.state[event.key] = self.ctx.state.get(event.key, 0) + 1
        self.seen.append(event.data["n"])


async def counted(fabric: Fabric) -> dict[str, int]:
    journal = await (await fabric.join()).open_journal()
    state = await journal.load_state("stall")
    return {key: msgspec.msgpack.decode(value) for key, value in state.items()}


async def test_replicas_share_and_each_key_stays_with_one(fabric: Fabric) -> None:
    async with (
        replica(fabric, Counting, 1) as one,
        replica(fabric, Counting, 2) as two,
        till(fabric) as publisher,
    ):
        # Until both have looked once, the first has all
        await sell(publisher, *range(24))
        await eventually(lambda: len(one.seen) + len(two.seen) == 24)
        del one.seen[:], two.seen[:]
        await sell(publisher, *range(240))
        await eventually(lambda: len(one.seen) + len(two.seen) == 240)

        keys = [{number % 24 for number in agent.seen} for agent in (one, two)]
        assert keys[0]
        assert keys[1]
        assert not keys[0] & keys[1]
        for agent in (one, two):
            for key in range(24):
                order = [number for number in agent.seen if number % 24 == key]
                assert order == sorted(order)


async def test_what_a_replica_counted_its_heir_goes_on_with(fabric: Fabric) -> None:
    """Replicas come, leave and are given up for dead; every order counts once."""
    sold = 0
    async with till(fabric) as publisher, replica(fabric, Counting, 1) as one:

        async def day() -> None:
            nonlocal sold
            await sell(publisher, *range(sold, sold + 240))
            sold += 240

        async def all_counted() -> bool:
            return sum((await counted(fabric)).values()) == sold

        await day()
        async with replica(fabric, Counting, 2) as two:
            await day()
            await eventually(all_counted)
            async with replica(fabric, Counting, 3):
                await day()
                journal = await (await fabric.join()).open_journal()
                # Somebody takes the second for dead although it is not
                await journal.free("stall", "stall@2")
                await day()
                await eventually(all_counted)
            await day()
            await eventually(all_counted)
            assert two.restored
        await day()
        await eventually(all_counted)
        assert one.restored

    assert await counted(fabric) == dict.fromkeys(KEYS, sold // 24)


class Biller(Agent):
    async def setup(self) -> None:
        self.keys: list[str] = []

    @on(ORDER)
    async def on_order(self, event: Event) -> None:
        self.keys.append(self.ctx.idempotency_key)
        await self.publish(BILL, {"n": event.data["n"]})
        if self.ctx.attempt == 1:
            raise OSError("again")


async def test_a_dead_replicas_event_is_done_by_another_as_it_would_have_done_it(
    fabric: Fabric,
) -> None:
    """Keys for effects outside, and ids of what is said, do not depend on who does it."""
    async with replica(fabric, Biller, 3):
        pass
    async with till(fabric) as publisher:
        journal = await (await fabric.join()).open_journal()
        order = await publisher.publish(ORDER, {"n": 7})
        assert await journal.read("stall", "stall", wait_s=5)
        await journal.free("stall", "stall")
        async with replica(fabric, Biller, 2) as two:
            await eventually(lambda: len(two.keys) == 2)
            await two.consumer.drained()

        assert set(two.keys) == {f"{order.id}/stall/on_order"}
        assert len(await journal.scan([BILL])) == 1


class Failing(Agent):
    @on(ORDER)
    async def on_order(self, event: Event) -> None:
        raise ValueError("no change")


async def test_dead_letters_are_the_groups(fabric: Fabric) -> None:
    """Whoever replays them finds the handler, however many replicas there are by then."""
    async with till(fabric) as publisher, replica(fabric, Failing, 2, consumer_max_retries=0):
        await sell(publisher, 1)
        journal = await (await fabric.join()).open_journal()

        async def letters() -> Any:
            return Counter(letter.agent for letter in await journal.dead())

        assert await eventually(letters) == {"stall": 1}
