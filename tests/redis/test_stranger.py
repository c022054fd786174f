"""Who knows nothing of the mesh but docs/wire.md can read and say events."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import redis.asyncio

from mesh import (
    ConsumerConfig,
    Event,
    EventConsumer,
    EventHandlerRegistry,
    EventPublisher,
    PublisherConfig,
    RedisMessageBroker,
    event_type,
)
from mesh.journal import partition_of
from tests.plumbing.processes import eventually
from tests.redis.tools import listener

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.redis

KEPT = event_type("number.kept", durable=True)
CHANNEL = "legion:default:live:number.said"


@pytest.fixture
async def stranger(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    async with redis.asyncio.Redis.from_url(redis_url) as client:
        yield client


async def test_a_stranger_reads_us(redis_url: str, stranger: redis.asyncio.Redis) -> None:
    async with stranger.pubsub(ignore_subscribe_messages=True) as hearing:
        await hearing.subscribe(CHANNEL)
        await hearing.get_message(timeout=5.0)
        async with RedisMessageBroker(url=redis_url) as broker:
            publisher = EventPublisher(
                PublisherConfig(agent_name="speaker", broker=broker, wire_format="json")
            )
            await publisher.publish("number.said", {"number": 7}, correlation_id="why")
            await publisher.close()

        async def next_message() -> Any:
            return await hearing.get_message(timeout=1.0)

        message = await eventually(next_message)

    event = json.loads(message["data"])
    assert (event["specversion"], event["type"], event["source"]) == (
        "1.0", "number.said", "speaker"
    )  # fmt: skip
    assert (event["data"], event["correlationid"], event["sequence"]) == ({"number": 7}, "why", 1)


async def test_a_stranger_is_heard_and_nonsense_hurts_nobody(
    redis_url: str, stranger: redis.asyncio.Redis
) -> None:
    async with RedisMessageBroker(url=redis_url) as broker:
        ear = await listener(broker)
        for nonsense in (b"", b"hello", b"\xc1", b"{", b"\xff" * 1000):
            await stranger.publish(CHANNEL, nonsense)
        event = {
            "specversion": "1.0", "id": "1", "source": "stranger", "type": "number.said",
            "time": "2026-01-01T00:00:00Z", "data": {"number": 7},
        }  # fmt: skip
        await stranger.publish(CHANNEL, json.dumps(event))
        await eventually(lambda: ear.numbers)

        assert ear.numbers == [7]
        assert ear.ledger.lost() == 0
        await ear.stop()


async def test_an_event_added_to_a_stream_from_outside_is_handled(
    redis_url: str, stranger: redis.asyncio.Redis
) -> None:
    event = {
        "specversion": "1.0", "id": "from-outside", "source": "stranger", "type": KEPT,
        "data": {"number": 7}, "partitionkey": "k",
    }  # fmt: skip
    stream = f"legion:{{default:{partition_of('k')}}}:durable:{KEPT}"
    async with RedisMessageBroker(url=redis_url) as broker:
        numbers: list[int] = []

        async def hear(event: Event) -> None:
            numbers.append(event.data["number"])

        registry = EventHandlerRegistry()
        await registry.register(KEPT, hear, "ear", "hear")
        ear = EventConsumer(
            ConsumerConfig(agent_name="ear", broker=broker, handler_registry=registry)
        )
        await ear.start()
        await stranger.xadd(stream, {"event": "nonsense"})
        await stranger.xadd(stream, {"event": json.dumps(event)})
        await eventually(lambda: numbers == [7])
        await ear.drained()
        await ear.stop()
        journal = await broker.open_journal()

        assert [letter.reason for letter in await journal.dead()] == ["undecodable"]
        assert {view.pending for view in await journal.groups()} == {0}
