"""A transport that goes away: whoever publishes is told, and nothing is lost without a word."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

import pytest

from mesh import (
    EventPublisher,
    EventType,
    InMemoryMessageBroker,
    PublisherConfig,
    RedisMessageBroker,
    ZeroMQMessageBroker,
)
from mesh.rundir import RunDir
from tests.plumbing.processes import end_forwarder, eventually
from tests.plumbing.redis_server import RedisServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from mesh import MessageBroker

pytestmark = pytest.mark.fault


class Full:
    """A consumer that takes nothing: what holds up memory."""

    def receive(self, topic: str, frame: bytes) -> None:
        raise AssertionError("it has no room")

    def has_room(self) -> bool:
        return False


@pytest.fixture
def server() -> Iterator[RedisServer]:
    made = RedisServer().start()
    yield made
    made.close()


@pytest.fixture(params=["memory", "zmq", pytest.param("redis", marks=pytest.mark.redis)])
async def down(request: pytest.FixtureRequest, own_mesh_dir: Path) -> AsyncIterator[MessageBroker]:
    """Give a broker that was connected, and whose transport is gone for good."""
    if request.param == "memory":
        async with InMemoryMessageBroker() as memory:
            await memory.attach([EventType.SIGNAL_GENERATED], Full())
            yield memory
    elif request.param == "redis":
        server: RedisServer = request.getfixturevalue("server")
        async with RedisMessageBroker(url=server.url) as redis:
            await asyncio.to_thread(server.kill)
            await eventually(lambda: not redis.try_send("t", b"{}"))
            yield redis
    else:
        async with ZeroMQMessageBroker(own_mesh_dir) as zmq:
            _signal_forwarder(own_mesh_dir, signal.SIGKILL)
            await eventually(lambda: zmq.is_away)
            yield zmq


def _signal_forwarder(directory: Path, number: signal.Signals) -> None:
    rundir = RunDir(directory)
    pid = rundir.holder(rundir.lock("forwarder"))
    assert pid is not None
    os.kill(pid, number)


async def test_giving_up_keeps_the_event_as_a_dead_letter_and_logs_why(
    down: MessageBroker, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = EventPublisher(PublisherConfig(agent_name="mouth", broker=down))

    success = await publisher.publish_with_retry(
        event_type=EventType.SIGNAL_GENERATED,
        data={"side": "buy"},
        max_retries=1,
        retry_delay_ms=10,
        correlation_id="trade-1",
    )

    assert success is False
    (letter,) = publisher.dead_letters.newest
    assert (letter.reason, letter.topic, letter.attempts) == ("unpublished", "signal.generated", 2)
    assert letter.event is not None
    assert letter.event["data"] == {"side": "buy"}
    assert letter.event["correlation_id"] == "trade-1"
    assert letter.error.startswith("BackpressureError: ")
    assert f"keeps it as a dead letter: {letter.error.partition(': ')[2]}" in caplog.text
    await publisher.close()


async def test_who_tries_again_goes_on_when_the_forwarder_is_back(own_mesh_dir: Path) -> None:
    async with ZeroMQMessageBroker(own_mesh_dir) as broker:
        publisher = EventPublisher(PublisherConfig(agent_name="mouth", broker=broker))
        _signal_forwarder(own_mesh_dir, signal.SIGKILL)
        await eventually(lambda: broker.is_away)
        assert broker.trouble() == f"the forwarder in {own_mesh_dir} is away"
        trying = asyncio.create_task(
            publisher.publish_with_retry(EventType.SIGNAL_GENERATED, {}, max_retries=100)
        )

        async with ZeroMQMessageBroker(own_mesh_dir):
            assert await trying is True

        assert broker.trouble() == ""
        await publisher.close()
    end_forwarder(own_mesh_dir)


async def test_a_forwarder_that_stands_still_counts_as_away(own_mesh_dir: Path) -> None:
    """Its sockets take connections all the same: the kernel does that."""
    async with ZeroMQMessageBroker(own_mesh_dir) as broker:
        _signal_forwarder(own_mesh_dir, signal.SIGSTOP)
        try:
            await eventually(lambda: broker.is_away)
        finally:
            _signal_forwarder(own_mesh_dir, signal.SIGCONT)

        await eventually(lambda: not broker.is_away)
    end_forwarder(own_mesh_dir)
