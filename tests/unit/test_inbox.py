"""What waits in an agent: overflow policies, order under concurrency, waking and cancelling."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import pytest

from mesh import (
    ConsumerConfig,
    Event,
    EventConsumer,
    EventHandlerRegistry,
    EventPublisher,
    InMemoryMessageBroker,
    PublisherConfig,
)
from mesh.ledger import Ledger
from mesh.ledger_views import view_of
from tests.plumbing.processes import eventually


class Ear:
    """A consumer whose handler waits for a word before it lets the first event through."""

    def __init__(self, broker: InMemoryMessageBroker, **options: object) -> None:
        self.ledger = Ledger.in_memory()
        self.registry = EventHandlerRegistry()
        self.go = asyncio.Event()
        self.heard: list[tuple[str | None, int]] = []
        self.running = 0
        self.most_running = 0
        self.consumer = EventConsumer(
            ConsumerConfig(
                agent_name="ear",
                broker=broker,
                handler_registry=self.registry,
                ledger=self.ledger,
                **options,  # type: ignore[arg-type]
            )
        )

    async def hear(self, event: Event) -> None:
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        await self.go.wait()
        await asyncio.sleep(0)
        self.running -= 1
        self.heard.append((event.key, event.data["n"]))

    async def start(self) -> None:
        await self.registry.register("t.x", self.hear, "ear", "hear")
        await self.consumer.start()


async def say(broker: InMemoryMessageBroker, count: int, keys: int = 1) -> EventPublisher:
    mouth = EventPublisher(PublisherConfig(agent_name="mouth", broker=broker))
    for number in range(count):
        await mouth.publish("t.x", {"n": number}, key=f"k{number % keys}")
        await mouth.flush()
    return mouth


async def test_drop_oldest_counts_what_it_drops() -> None:
    async with InMemoryMessageBroker() as broker:
        ear = Ear(broker, overflow="drop_oldest", buffer_size=10)
        await ear.start()
        await say(broker, 100)
        ear.go.set()
        await ear.consumer.drained()

        view = view_of("ear", ear.ledger)
        assert view.dropped["overflow"] == 100 - len(ear.heard)
        assert [number for _, number in ear.heard[-10:]] == list(range(90, 100))
        (link,) = view.in_.values()
        assert (link.received, link.settled, link.lost) == (100, 100, 0)
        await ear.consumer.stop()


async def test_latest_keeps_the_newest_of_each_key() -> None:
    async with InMemoryMessageBroker() as broker:
        ear = Ear(broker, overflow="latest", buffer_size=10)
        await ear.start()
        await say(broker, 100, keys=3)
        ear.go.set()
        await ear.consumer.drained()

        newest = dict(ear.heard)
        assert newest == {"k0": 99, "k1": 97, "k2": 98}
        assert len(ear.heard) <= 4, "the one that was running, and one a key"
        assert view_of("ear", ear.ledger).dropped["overflow"] == 100 - len(ear.heard)
        await ear.consumer.stop()


async def test_block_slows_the_publisher_and_loses_nothing() -> None:
    async with InMemoryMessageBroker() as broker:
        ear = Ear(broker, buffer_size=10)
        await ear.start()
        saying = asyncio.create_task(say(broker, 100))
        await eventually(lambda: ear.running == 1)
        assert not saying.done()
        assert ear.consumer.queued() <= 11

        ear.go.set()
        await saying
        await ear.consumer.drained()

        assert [number for _, number in ear.heard] == list(range(100))
        await ear.consumer.stop()


async def test_concurrency_keeps_the_order_of_each_key() -> None:
    async with InMemoryMessageBroker() as broker:
        ear = Ear(broker, concurrency=4, buffer_size=1000)
        await ear.start()
        await say(broker, 200, keys=8)
        await eventually(lambda: ear.running > 1)
        ear.go.set()
        await ear.consumer.drained()

        assert 1 < ear.most_running <= 4
        by_key: defaultdict[str | None, list[int]] = defaultdict(list)
        for key, number in ear.heard:
            by_key[key].append(number)
        assert len(ear.heard) == 200
        assert all(numbers == sorted(numbers) for numbers in by_key.values())
        await ear.consumer.stop()


async def test_after_stop_nothing_reaches_a_handler() -> None:
    async with InMemoryMessageBroker() as broker:
        ear = Ear(broker)
        ear.go.set()
        await ear.start()
        await say(broker, 3)
        await ear.consumer.drained()
        await ear.consumer.stop()

        await say(broker, 3)

        assert len(ear.heard) == 3


async def test_a_consumer_that_waits_can_be_stopped_at_any_moment() -> None:
    """The slot's wait is a future of our own making: cancelling must reach it."""
    async with InMemoryMessageBroker() as broker:
        for turns in range(4):
            ear = Ear(broker)
            await ear.start()
            for _ in range(turns):
                await asyncio.sleep(0)
            await asyncio.wait_for(ear.consumer.stop(), 5)


async def test_a_handler_woken_by_the_fabric_is_a_task_with_its_time_limits() -> None:
    """Woken from a callback of the loop the handler runs at once, and still in its own task."""
    async with InMemoryMessageBroker() as broker:
        ear = Ear(broker)
        seen: list[object] = []

        async def limited(event: Event) -> None:
            task = asyncio.current_task()
            seen.append(task.get_name() if task else None)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001):
                    await asyncio.Event().wait()
            seen.append(event.data["n"])

        await ear.registry.register("t.y", limited, "ear", "limited")
        await ear.start()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        frame = b'{"specversion":"1.0","id":"1","type":"t.y","source":"s","data":{"n":7}}'
        asyncio.get_running_loop().call_soon(broker.try_send, "t.y", frame)
        await eventually(lambda: len(seen) == 2)

        assert seen == ["ear-slot-0", 7]
        await ear.consumer.stop()


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="block, drop_oldest, latest, was 'newest'"):
        ConsumerConfig(
            agent_name="ear",
            broker=InMemoryMessageBroker(),
            handler_registry=EventHandlerRegistry(),
            overflow="newest",
        )
