"""What users are promised of brokers: dicts on channels, and words to whoever did not connect."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest

from mesh import (
    ClosedError,
    ConsumerConfig,
    Event,
    EventConsumer,
    EventHandlerRegistry,
    EventPublisher,
    EventType,
    NotConnectedError,
    PublisherConfig,
)
from mesh.broker import InMemoryMessageBroker, RedisMessageBroker, ZeroMQMessageBroker
from tests.plumbing.processes import end_forwarder, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from mesh.broker import MessageBroker

Bus = tuple["MessageBroker", EventHandlerRegistry]

TELLS_WHAT_TO_CALL = r"not connected; call `await broker.connect\(\)` first"


async def test_each_subscriber_gets_every_dict_past_a_handler_that_fails(bus: Bus) -> None:
    broker, _ = bus
    heard: dict[str, list[dict[str, Any]]] = {"fails": [], "goes on": []}

    async def fails(message: dict[str, Any]) -> None:
        heard["fails"].append(message)
        raise RuntimeError("no luck")

    async def goes_on(message: dict[str, Any]) -> None:
        heard["goes on"].append(message)

    event_dict = Event(EventType.MARKET_DATA_RECEIVED, {"price": 5.0}, "feed").to_dict()
    await broker.subscribe("market_data", fails)
    await broker.subscribe("market_data", goes_on)
    await broker.publish("market_data", event_dict)
    await broker.publish("market_data", {"price": 6.0})
    await eventually(lambda: all(len(each) == 2 for each in heard.values()))

    assert heard["fails"] == heard["goes on"] == [event_dict, {"price": 6.0}]


async def test_a_closed_broker_takes_and_gives_nothing(bus: Bus) -> None:
    broker, _ = bus
    await broker.close()
    await broker.close()

    with pytest.raises(ClosedError):
        await broker.publish("market_data", {})
    with pytest.raises(ClosedError):
        await broker.subscribe("market_data", _ignore)


async def test_memory_is_ready_at_once() -> None:
    broker = InMemoryMessageBroker()
    heard: list[dict[str, Any]] = []

    async def handler(message: dict[str, Any]) -> None:
        heard.append(message)

    await broker.subscribe("market_data", handler)
    await broker.publish("market_data", {"price": 1.0})
    await eventually(lambda: heard)
    await broker.close()


def test_redis_is_looked_for_where_it_usually_is() -> None:
    host, port, *_ = inspect.signature(RedisMessageBroker).parameters.values()

    assert (host.name, host.default) == ("host", "localhost")
    assert (port.name, port.default) == ("port", 6379)
    assert RedisMessageBroker("localhost", 6379).is_connected is False


@pytest.fixture(params=["zmq", pytest.param("redis", marks=pytest.mark.redis)])
async def unconnected(
    request: pytest.FixtureRequest, own_mesh_dir: Path
) -> AsyncIterator[MessageBroker]:
    """Give a broker on which nobody has called `connect`; closed afterwards."""
    broker: MessageBroker
    if request.param == "redis":
        broker = RedisMessageBroker(url=request.getfixturevalue("redis_url"))
    else:
        broker = ZeroMQMessageBroker(own_mesh_dir)
    yield broker
    was_connected = broker.is_connected
    await broker.close()
    if request.param == "zmq" and was_connected:
        end_forwarder(own_mesh_dir)


async def test_whoever_did_not_connect_is_told_what_to_call(
    unconnected: MessageBroker, caplog: pytest.LogCaptureFixture
) -> None:
    """What was refused is not kept: after `connect` the first event is the first."""
    registry = EventHandlerRegistry()
    heard: list[Event] = []

    async def hear(event: Event) -> None:
        heard.append(event)

    kind = EventType.SIGNAL_GENERATED
    await registry.register(kind, hear, "ear", "hear")
    ear = EventConsumer(
        ConsumerConfig(agent_name="ear", broker=unconnected, handler_registry=registry)
    )
    publisher = EventPublisher(PublisherConfig(agent_name="mouth", broker=unconnected))
    for call in (
        lambda: unconnected.publish("market_data", {"n": 0}),
        lambda: unconnected.subscribe("market_data", _ignore),
        lambda: publisher.publish(kind, {"n": 0}),
        lambda: publisher.publish_batch([(kind, {"n": 0})]),
        lambda: publisher.publish_with_retry(kind, {"n": 0}),
        ear.start,
    ):
        with pytest.raises(NotConnectedError, match=TELLS_WHAT_TO_CALL):
            await call()

    await unconnected.connect()
    await ear.start()
    await unconnected.synchronize()
    await publisher.publish(kind, {"n": 1})
    await eventually(lambda: heard)

    assert [event.data["n"] for event in heard] == [1]
    assert ear.ledger.lost() == 0
    assert not [each for each in caplog.records if each.name == "asyncio"], caplog.text
    await publisher.close()
    await ear.stop()


async def test_a_publisher_that_never_connected_closes_without_a_word(
    unconnected: MessageBroker,
) -> None:
    publisher = EventPublisher(PublisherConfig(agent_name="mouth", broker=unconnected))
    with pytest.raises(NotConnectedError):
        await publisher.publish(EventType.SIGNAL_GENERATED, {})

    await publisher.close()


async def _ignore(message: dict[str, Any]) -> None:
    """Take a message for nothing."""
