"""One suite for all brokers: what live delivery promises."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from mesh.brokers.memory import InMemoryMessageBroker
from mesh.brokers.redis import RedisMessageBroker
from mesh.brokers.zeromq import ZeroMQMessageBroker
from mesh.errors import ClosedError, HandlerSignatureError, NotConnectedError, TopicError
from tests.plumbing.processes import end_forwarder, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from mesh.broker import MessageBroker


class Ear:
    """Keeps what it hears; can be full."""

    def __init__(self, room: int = 10**9) -> None:
        self.frames: list[tuple[str, bytes]] = []
        self.room = room

    def receive(self, topic: str, frame: bytes) -> None:
        self.frames.append((topic, frame))

    def has_room(self) -> bool:
        return len(self.frames) < self.room


@pytest.fixture(params=["memory", "zmq", pytest.param("redis", marks=pytest.mark.redis)])
async def pair(
    request: pytest.FixtureRequest, own_mesh_dir: Path
) -> AsyncIterator[tuple[MessageBroker, MessageBroker]]:
    """A publisher's and a consumer's broker on one fabric."""
    if request.param == "memory":
        one = InMemoryMessageBroker()
        await one.connect()
        yield one, one
        await one.close()
        return
    if request.param == "redis":
        url = request.getfixturevalue("redis_url")
        async with RedisMessageBroker(url=url) as out, RedisMessageBroker(url=url) as into:
            yield out, into
        return
    brokers = ZeroMQMessageBroker(own_mesh_dir), ZeroMQMessageBroker(own_mesh_dir)
    for broker in brokers:
        await broker.connect()
    yield brokers
    for broker in brokers:
        await broker.close()
    end_forwarder(own_mesh_dir)


def frame(number: int) -> bytes:
    """What passes the forwarder's look at the envelope; brokers do not look inside."""
    return b"{%d" % number


def _has_heard(ear: Ear) -> bool:
    return bool(ear.frames)


def number_in(one: bytes) -> int:
    return int(one[1:])


Pair = tuple["MessageBroker", "MessageBroker"]


async def test_the_first_frame_after_attach_arrives(pair: Pair) -> None:
    """No slow joiner: two hundred subscriptions, two hundred first frames."""
    out, into = pair
    for number in range(200):
        ear = Ear()
        await into.attach([f"topic.{number}"], ear)
        await out.synchronize()

        await out.send(f"topic.{number}", frame(1))
        await eventually(partial(_has_heard, ear), what=f"first frame {number}")

        assert ear.frames == [(f"topic.{number}", frame(1))]


async def test_who_speaks_without_a_pause_still_learns_who_listens(pair: Pair) -> None:
    """What a busy loop sends must not take the news of a subscription with it."""
    out, _ = pair

    async def speak() -> None:
        while True:
            time.sleep(0.002)  # noqa: ASYNC251 - a handler that computes for a while
            out.try_send("t", frame(1))
            await asyncio.sleep(0)

    speaking = asyncio.create_task(speak())
    try:
        for _ in range(100):
            await out.synchronize()
    finally:
        speaking.cancel()
        await asyncio.gather(speaking, return_exceptions=True)


async def test_frames_keep_their_order(pair: Pair) -> None:
    """Below the high-water mark of 2,000 frames nothing is lost, however slowly it is read."""
    out, into = pair
    ear = Ear()
    await into.attach(["t"], ear)
    await out.synchronize()

    for number in range(1500):
        await out.send("t", frame(number))
    await eventually(lambda: len(ear.frames) == 1500)

    assert [number_in(one) for _, one in ear.frames] == list(range(1500))


async def test_a_topic_is_exact(pair: Pair) -> None:
    """ORDER never matches ORDER_CANCELLED."""
    out, into = pair
    ear = Ear()
    await into.attach(["ORDER"], ear)
    await out.synchronize()

    await out.send("ORDER_CANCELLED", frame(1))
    await out.send("ORDER.x", frame(1))
    await out.send("ORDER", frame(2))
    await eventually(lambda: ear.frames)

    assert ear.frames == [("ORDER", frame(2))]


async def test_every_receiver_gets_every_frame(pair: Pair) -> None:
    out, into = pair
    ears = [Ear() for _ in range(8)]
    for ear in ears:
        await into.attach(["t"], ear)
    await out.synchronize()

    await out.send("t", frame(1))
    await eventually(lambda: all(ear.frames for ear in ears))

    assert [ear.frames for ear in ears] == [[("t", frame(1))]] * 8


async def test_a_full_receiver_stops_the_reading_and_resumes(pair: Pair) -> None:
    out, into = pair
    ear, flag = Ear(room=10), Ear()
    await into.attach(["t"], ear)
    await out.synchronize()

    sent = 0
    for number in range(100):
        if out.try_send("t", frame(number)):
            sent += 1
    await eventually(lambda: len(ear.frames) >= 10)
    assert len(ear.frames) == 10

    ear.room = 10**9
    into.resume(ear)
    await eventually(lambda: len(ear.frames) == sent)

    assert [number_in(one) for _, one in ear.frames] == list(range(sent))
    assert flag.frames == []


async def test_a_detached_receiver_hears_nothing(pair: Pair) -> None:
    out, into = pair
    gone, still = Ear(), Ear()
    await into.attach(["t"], gone)
    await into.attach(["t"], still)
    await out.synchronize()

    await into.detach(gone)
    await out.send("t", frame(1))
    await eventually(lambda: still.frames)

    assert gone.frames == []


async def test_bad_topics_are_refused(pair: Pair) -> None:
    _, into = pair
    for name in ("", "a b", "a\0b", "a\nb", "x" * 129, "é"):
        with pytest.raises(TopicError):
            await into.attach([name], Ear())


async def test_a_handler_that_is_no_coroutine_function_is_refused_at_once(pair: Pair) -> None:
    def handler(message: dict[str, object]) -> None: ...

    with pytest.raises(HandlerSignatureError, match=r"'market_data'.*async def"):
        await pair[0].subscribe("market_data", handler)  # type: ignore[arg-type]


async def test_a_closed_broker_says_so(pair: Pair) -> None:
    out, _ = pair
    await out.close()
    await out.close()

    with pytest.raises(ClosedError):
        await out.publish("t", {})


@pytest.mark.parametrize("kind", [ZeroMQMessageBroker, RedisMessageBroker])
async def test_before_connect_it_says_what_to_call(kind: type[MessageBroker]) -> None:
    broker = kind()
    told = r"not connected; call `await broker.connect\(\)`"

    with pytest.raises(NotConnectedError, match=told):
        await broker.publish("t", {"x": 1})
    with pytest.raises(NotConnectedError, match=told):
        await broker.subscribe("t", _ignore)
    await broker.close()


async def _ignore(message: dict[str, Any]) -> None:
    """Take a message for nothing."""
