"""FastStream, which knows nothing of the mesh, reads its events from Redis by docs/wire.md."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from faststream.redis import RedisBroker, StreamSub

from mesh import EventPublisher, PublisherConfig, RedisMessageBroker, event_type
from mesh.journal import partition_of
from tests.plumbing.processes import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.redis

SAID = event_type("number.told")
KEPT = event_type("number.kept", durable=True)


@pytest.fixture
async def speaker(redis_url: str) -> AsyncIterator[EventPublisher]:
    """A publisher of ours that speaks JSON."""
    async with RedisMessageBroker(url=redis_url) as broker:
        config = PublisherConfig(agent_name="speaker", broker=broker, wire_format="json")
        publisher = EventPublisher(config)
        yield publisher
        await publisher.close()


async def test_faststream_hears_live_events(redis_url: str, speaker: EventPublisher) -> None:
    heard: list[dict[str, Any]] = []
    stranger = RedisBroker(redis_url)

    @stranger.subscriber(f"legion:default:live:{SAID}")
    async def hear(event: dict[str, Any]) -> None:
        heard.append(event)

    async with stranger:
        await stranger.start()
        await speaker.publish(SAID, {"number": 7})
        await speaker.flush()
        await eventually(lambda: heard)

    assert (heard[0]["type"], heard[0]["source"], heard[0]["data"]) == (
        SAID, "speaker", {"number": 7}
    )  # fmt: skip


async def test_faststream_reads_durable_events(redis_url: str, speaker: EventPublisher) -> None:
    heard: list[dict[str, Any]] = []
    stranger = RedisBroker(redis_url)
    stream = f"legion:{{default:{partition_of('k')}}}:durable:{KEPT}"

    @stranger.subscriber(stream=StreamSub(stream, last_id="0"))
    async def hear(fields: dict[str, Any]) -> None:
        heard.append(fields)

    await speaker.publish(KEPT, {"number": 8}, key="k")
    async with stranger:
        await stranger.start()
        await eventually(lambda: heard)

    event = json.loads(heard[0]["event"])
    assert (event["type"], event["partitionkey"], event["data"]) == (KEPT, "k", {"number": 8})
