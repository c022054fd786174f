"""The Redis fabric when Redis is killed, silent, busy, refusing, or too slow a listener's end."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import pytest

from mesh import BackpressureError, EventPublisher, PublisherConfig, RedisMessageBroker
from tests.plumbing.processes import eventually
from tests.plumbing.redis_server import RedisServer
from tests.redis.tools import Ear, Proxy, command, listener

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.redis, pytest.mark.fault]


@pytest.fixture
def server() -> Iterator[RedisServer]:
    made = RedisServer().start()
    yield made
    made.close()


async def test_killed_under_load_it_resubscribes_and_counts_each_loss(server: RedisServer) -> None:
    async with (
        RedisMessageBroker(url=server.url) as out,
        RedisMessageBroker(url=server.url) as into,
    ):
        ear = await listener(into)
        publisher = EventPublisher(PublisherConfig(agent_name="speaker", broker=out))
        said = 0
        stop = asyncio.Event()

        async def speak() -> None:
            nonlocal said
            while not stop.is_set():
                await publisher.publish("number.said", {"number": said})
                said += 1
                if said % 50 == 0:
                    await asyncio.sleep(0.001)

        speaking = asyncio.create_task(speak())
        for _ in range(3):
            heard = len(ear.numbers)
            await eventually(lambda heard=heard: len(ear.numbers) > heard + 500)  # type: ignore[misc]
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
        heard = len(ear.numbers)
        await eventually(lambda: len(ear.numbers) > heard + 500)
        stop.set()
        await speaking
        await publisher.flush()
        await eventually(lambda: ear.numbers[-1] == said - 1)

        assert ear.numbers == sorted(set(ear.numbers))
        assert ear.ledger.lost() == said - len(ear.numbers)
        await publisher.close()
        await ear.stop()


async def test_a_connection_that_is_killed_comes_back(server: RedisServer) -> None:
    async with RedisMessageBroker(url=server.url) as broker:
        ear = Ear()
        await broker.attach(["t"], ear)

        await command(server.url, "CLIENT", "KILL", "TYPE", "pubsub")

        async def arrives() -> bool:
            await broker.send("t", b"{}")
            return bool(ear.frames)

        await eventually(arrives)


async def test_while_it_is_away_nothing_is_accepted(server: RedisServer) -> None:
    """Whoever waits is woken by the return of the server; who does not gets a typed error."""
    async with RedisMessageBroker(url=server.url) as broker:
        publisher = EventPublisher(PublisherConfig(agent_name="speaker", broker=broker))
        await asyncio.to_thread(server.kill)
        await eventually(lambda: not broker.try_send("t", b"{}"))

        with pytest.raises(BackpressureError, match=r"on 't' for 0.1 s; redis at unix:.*"):
            await broker.send("t", b"{}", timeout_s=0.1)
        success = await publisher.publish_with_retry(
            "number.said", {"number": 1}, max_retries=1, retry_delay_ms=10
        )
        assert success is False
        assert publisher.dead_letters.total == 1

        waiting = asyncio.create_task(broker.send("t", b"{}"))
        await asyncio.to_thread(server.start)
        await waiting
        assert await publisher.publish_with_retry("number.said", {"number": 2}) is True
        await publisher.close()


async def test_it_is_said_sparingly(server: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mesh.redis")
    async with RedisMessageBroker(url=server.url) as broker:
        for _ in range(3):
            await asyncio.to_thread(server.kill)
            await eventually(lambda: not broker.try_send("t", b"{}"))
            await asyncio.to_thread(server.start)
            await broker.send("t", b"{}")

    lines = [each.getMessage() for each in caplog.records if each.name == "mesh.redis"]
    assert len(lines) == 2, lines
    assert "connecting anew" in lines[0]
    assert "is back after" in lines[1]


async def test_a_line_that_has_gone_silent_is_given_up(server: RedisServer) -> None:
    """Half open: both sides believe in the connection, and nothing passes."""
    async with Proxy(server.socket) as proxy:
        broker = RedisMessageBroker("127.0.0.1", proxy.port, silent_s=0.2)
        async with broker:
            ear = Ear()
            await broker.attach(["t"], ear)
            proxy.freeze()
            await eventually(lambda: not broker.try_send("t", b"{}"))
            assert "no sign of life" in broker.trouble() or "no answer" in broker.trouble()

            proxy.thaw()
            ear.frames.clear()

            async def arrives() -> bool:
                await broker.send("t", b"{1}")
                return b"{1}" in ear.frames

            await eventually(arrives)


async def test_a_listener_that_does_not_read_is_cut_off_and_counts_what_it_missed() -> None:
    """Redis' own limit: the server drops who lets too much pile up; nobody else is held up."""
    server = RedisServer(settings={"client-output-buffer-limit": "pubsub 1mb 1mb 1"}).start()
    try:
        async with (
            RedisMessageBroker(url=server.url) as out,
            RedisMessageBroker(url=server.url) as slow,
            RedisMessageBroker(url=server.url) as quick,
        ):
            lazy, busy = Ear(room=1), await listener(quick)
            await slow.attach(["number.said"], lazy)
            publisher = EventPublisher(PublisherConfig(agent_name="speaker", broker=out))
            for number in range(20_000):
                await publisher.publish("number.said", {"number": number, "text": "x" * 500})
                if number % 500 == 499:
                    await publisher.flush()
                    await eventually(lambda so_far=number + 1: len(busy.numbers) == so_far)  # type: ignore[misc]
            assert busy.ledger.lost() == 0

            before = len(lazy.frames)
            lazy.room = 10**9
            slow.resume(lazy)

            async def hears_again() -> bool:
                await out.send("number.said", b"{last}")
                return lazy.frames[-1] == b"{last}"

            await eventually(hears_again)
            assert before == 1
            await publisher.close()
            await busy.stop()
    finally:
        server.close()


async def test_busy_with_a_script_it_is_waited_for() -> None:
    server = RedisServer(settings={"busy-reply-threshold": "50"}).start()
    try:
        async with RedisMessageBroker(url=server.url) as broker:
            script = asyncio.create_task(
                command(server.url, "EVAL", "while true do end", "0"), name="script"
            )
            refused = "busy with a script"

            async def is_told() -> bool:
                broker.try_send("t", b"{}")
                return refused in broker.trouble()

            await eventually(is_told)
            with pytest.raises(BackpressureError, match=refused):
                await broker.send("t", b"{}", timeout_s=0.05)

            await command(server.url, "SCRIPT", "KILL")
            await asyncio.gather(script, return_exceptions=True)
            ear = Ear()
            await broker.attach(["t"], ear)

            async def arrives() -> bool:
                await broker.send("t", b"{}")
                return bool(ear.frames)

            await eventually(arrives)
    finally:
        server.close()


async def test_a_right_that_is_taken_away_is_told(server: RedisServer) -> None:
    await command(server.url, "ACL", "SETUSER", "ann", "on", ">pw", "&*", "+@all")
    async with RedisMessageBroker(url=server.url, username="ann", password="pw") as broker:
        await command(server.url, "ACL", "SETUSER", "ann", "-publish")

        def is_told() -> bool:
            broker.try_send("t", b"{}")
            return "lacks a right" in broker.trouble()

        await eventually(is_told)
        await command(server.url, "ACL", "SETUSER", "ann", "+publish")
        ear = Ear()
        await broker.attach(["t"], ear)

        async def arrives() -> bool:
            await broker.send("t", b"{}")
            return bool(ear.frames)

        await eventually(arrives)
