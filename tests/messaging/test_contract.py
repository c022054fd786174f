"""What is promised of events, registry, consumer, publisher: on each fabric, live and durable."""

from __future__ import annotations

import importlib
import inspect
import logging
from datetime import UTC, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING

import pytest

import mesh
from mesh import ClosedError, PayloadError, event_type
from mesh.broker import InMemoryMessageBroker, MessageBroker
from mesh.consumer import ConsumerConfig, EventConsumer
from mesh.events import Event, EventType, is_durable
from mesh.factory import MessageBusFactory
from mesh.handlers import EventHandlerRegistry, HandlerPriority
from mesh.publisher import EventPublisher, PublisherConfig
from tests.plumbing.processes import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

Bus = tuple[MessageBroker, EventHandlerRegistry]

NAMES = {
    "mesh.events": ("Event", "EventType"),
    "mesh.broker": (
        "MessageBroker",
        "InMemoryMessageBroker",
        "RedisMessageBroker",
        "ZeroMQMessageBroker",
    ),
    "mesh.handlers": ("EventHandlerRegistry", "HandlerPriority"),
    "mesh.consumer": ("EventConsumer", "ConsumerConfig"),
    "mesh.publisher": ("EventPublisher", "PublisherConfig"),
    "mesh.factory": ("MessageBusFactory",),
    "mesh.config": ("MessageBusConfig",),
}


@pytest.fixture(params=["live", "durable"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Deliver all types live, or all types durably: a promise holds either way."""
    if request.param == "durable":
        monkeypatch.setenv("LEGION_DURABLE_EVENTS", "*")
    return str(request.param)


@pytest.fixture
def bus(either_way: str, bus: Bus) -> Bus:
    assert is_durable(EventType.SIGNAL_GENERATED) == (either_way == "durable")
    return bus


@pytest.mark.parametrize("module", NAMES)
def test_every_name_is_in_its_module_and_in_the_shop_window(module: str) -> None:
    for name in NAMES[module]:
        assert getattr(importlib.import_module(module), name) is getattr(mesh, name)
        assert name in mesh.__all__


# -- Event ----------------------------------------------------------------------------------------


def test_an_event_needs_type_data_and_source() -> None:
    event = Event(type=EventType.MARKET_DATA_RECEIVED, data={"price": 5.0}, source_agent="feed")
    another = Event(EventType.MARKET_DATA_RECEIVED, {"price": 5.0}, "feed")

    assert event.type is EventType.MARKET_DATA_RECEIVED
    assert (event.data["price"], event.data.get("price"), event.data.get("size")) == (
        5.0,
        5.0,
        None,
    )
    assert event.source_agent == "feed"
    assert event.timestamp.utcoffset() == timedelta(0)
    assert event.timestamp.tzinfo is UTC
    assert isinstance(event.correlation_id, str)
    assert event.correlation_id != another.correlation_id


def test_event_types_cover_every_part_of_the_work() -> None:
    named = {
        "MARKET_DATA_RECEIVED", "FEATURES_COMPUTED", "SIGNAL_GENERATED", "TRADE_APPROVED",
        "ORDER_EXECUTED", "AGENT_HEARTBEAT",
    }  # fmt: skip
    parts = {"MARKET", "FEATURES", "MODEL", "SIGNAL", "RISK", "ORDER", "POSITION", "PORTFOLIO"}

    assert named <= set(EventType.__members__)
    assert len(EventType) >= 26
    assert parts | {"AGENT", "SYSTEM"} <= {name.partition("_")[0] for name in EventType.__members__}


class Weather(StrEnum):
    RAIN_STARTED = "weather.rain.started"


event_type(Weather.RAIN_STARTED)


async def test_a_user_brings_types_of_their_own(bus: Bus) -> None:
    ear = await listening(bus, Weather.RAIN_STARTED)
    publisher = publisher_on(bus)

    await publisher.publish(Weather.RAIN_STARTED, {"mm": 3})
    await eventually(lambda: ear.events)

    assert ear.events[0].type is Weather.RAIN_STARTED
    await publisher.close()
    await ear.stop()


# -- EventHandlerRegistry -------------------------------------------------------------------------


def test_priorities_have_the_values_of_the_contract() -> None:
    assert {each.name: each.value for each in HandlerPriority} == {
        "CRITICAL": 0, "HIGH": 1, "NORMAL": 5, "LOW": 10,
    }  # fmt: skip


def test_register_takes_its_arguments_in_this_order() -> None:
    taken = list(inspect.signature(EventHandlerRegistry().register).parameters.values())[:5]

    assert [each.name for each in taken] == [
        "event_type", "handler_func", "agent_name", "handler_id", "priority",
    ]  # fmt: skip
    assert taken[4].default is HandlerPriority.NORMAL


async def test_handlers_run_most_urgent_first_and_past_one_that_fails(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry = EventHandlerRegistry()
    ran: list[str] = []

    def handler(name: str) -> Callable[[Event], object]:
        async def run(event: Event) -> None:
            ran.append(name)
            if name == "broken":
                raise RuntimeError("no luck")

        return run

    kind = EventType.SIGNAL_GENERATED
    await registry.register(kind, handler("low"), "a", "1", HandlerPriority.LOW)  # type: ignore[arg-type]
    await registry.register(
        event_type=kind,
        handler_func=handler("critical"),  # type: ignore[arg-type]
        agent_name="b",
        handler_id="2",
        priority=HandlerPriority.CRITICAL,
    )
    await registry.register(kind, handler("normal"), "b", "3")  # type: ignore[arg-type]
    await registry.register(kind, handler("broken"), "a", "4", HandlerPriority.HIGH)  # type: ignore[arg-type]

    executed = await registry.dispatch(Event(kind, {}, "feed"))
    stats = await registry.get_stats()

    assert executed == 3
    assert ran == ["critical", "broken", "normal", "low"]
    assert (stats["total_handlers"], stats["error_rate"]) == (4, 0.25)
    failed = [row["handler_id"] for row in stats["handlers"] if row["errors"]]
    assert failed == ["4"]
    assert "handler 4 of a failed" in caplog.text
    assert "no luck" in caplog.text


async def test_a_fresh_registry_has_no_errors() -> None:
    stats = await EventHandlerRegistry().get_stats()

    assert (stats["total_handlers"], stats["error_rate"]) == (0, 0.0)


async def test_an_event_that_nobody_handles_is_said_once_a_type(
    bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where a consumer subscribed to it and registered no handler."""
    broker, registry = bus
    deaf = EventConsumer(
        ConsumerConfig(
            agent_name="deaf",
            broker=broker,
            handler_registry=registry,
            subscribed_events=[EventType.MODEL_UPDATED, EventType.SIGNAL_EXPIRED],
        )
    )
    await deaf.initialize()
    await deaf.start()
    publisher = publisher_on(bus)

    for kind in (EventType.MODEL_UPDATED, EventType.SIGNAL_EXPIRED) * 3:
        await publisher.publish(kind, {})
    await eventually(lambda: deaf.ledger.handled() == 6)

    said = [each for each in caplog.records if "No handlers registered for event" in each.message]
    assert sorted(each.args for each in said) == [("model.updated",), ("signal.expired",)]  # type: ignore[type-var]
    assert all(each.levelno >= logging.WARNING for each in said)
    await publisher.close()
    await deaf.stop()


# -- EventConsumer --------------------------------------------------------------------------------


class Ear(EventConsumer):
    """Keeps the events it hears."""

    async def initialize(self) -> None:
        self.events: list[Event] = []
        for number, kind in enumerate(self.config.subscribed_events):
            await self.registry.register(kind, self.on_event, self.agent_name, f"ear-{number}")

    async def on_event(self, event: Event) -> None:
        self.events.append(event)


async def listening(bus: Bus, *kinds: str, name: str = "ear") -> Ear:
    broker, registry = bus
    ear = Ear(
        ConsumerConfig(
            agent_name=name, broker=broker, handler_registry=registry, subscribed_events=kinds
        )
    )
    await ear.initialize()
    await ear.start()
    return ear


def publisher_on(bus: Bus, name: str = "mouth") -> EventPublisher:
    return EventPublisher(PublisherConfig(agent_name=name, broker=bus[0]))


async def test_after_stop_no_event_reaches_a_handler(bus: Bus) -> None:
    gone = await listening(bus, EventType.SIGNAL_GENERATED, name="gone")
    here = await listening(bus, EventType.SIGNAL_GENERATED, name="here")
    publisher = publisher_on(bus)

    await publisher.publish(EventType.SIGNAL_GENERATED, {"n": 1})
    await eventually(lambda: gone.events and here.events)
    await gone.stop()
    await gone.stop()
    for number in range(2, 300):
        await publisher.publish(EventType.SIGNAL_GENERATED, {"n": number})
    await eventually(lambda: len(here.events) == 299)

    assert [event.data["n"] for event in gone.events] == [1]
    with pytest.raises(ClosedError):
        await gone.start()
    await publisher.close()
    await here.stop()


async def test_what_was_received_before_stop_is_handled_by_its_end(bus: Bus) -> None:
    ear = await listening(bus, EventType.SIGNAL_GENERATED)
    publisher = publisher_on(bus)

    await publisher.publish_batch([(EventType.SIGNAL_GENERATED, {"n": n}) for n in range(100)])
    await eventually(lambda: ear.events)
    received = ear.unsettled() + ear.ledger.handled()
    await ear.stop()

    assert len(ear.events) == received
    await publisher.close()


class Unlucky(Ear):
    """Fails on what is marked so, however often it is tried."""

    async def on_event(self, event: Event) -> None:
        await super().on_event(event)
        if event.data["fails"]:
            raise RuntimeError("no luck")


async def test_a_failing_handler_is_tried_again_as_often_as_is_said(bus: Bus) -> None:
    broker, registry = bus
    ear = Unlucky(
        ConsumerConfig(
            agent_name="ear",
            broker=broker,
            handler_registry=registry,
            subscribed_events=[EventType.SIGNAL_GENERATED],
            buffer_size=10,
            max_retries=2,
            retry_delay_ms=1,
        )
    )
    await ear.initialize()
    await ear.start()
    publisher = publisher_on(bus)

    await publisher.publish(EventType.SIGNAL_GENERATED, {"fails": True})
    await publisher.publish(EventType.SIGNAL_GENERATED, {"fails": False})
    await eventually(lambda: len(ear.events) == 4)

    assert [event.data["fails"] for event in ear.events] == [True, True, True, False]
    (letter,) = ear.dead_letters.newest
    assert (letter.reason, letter.handler, letter.attempts) == ("failed", "ear-0", 3)
    assert "no luck" in letter.error
    await publisher.close()
    await ear.stop()


def test_a_consumer_has_the_options_and_defaults_of_the_contract() -> None:
    config = ConsumerConfig(
        agent_name="ear", broker=InMemoryMessageBroker(), handler_registry=EventHandlerRegistry()
    )

    assert (config.buffer_size, config.max_retries, config.retry_delay_ms) == (1000, 3, 100)


# -- EventPublisher -------------------------------------------------------------------------------


async def test_publishing_takes_names_or_positions_and_keeps_correlation(bus: Bus) -> None:
    ear = await listening(bus, EventType.MARKET_DATA_RECEIVED)
    publisher = publisher_on(bus)

    await publisher.publish(
        event_type=EventType.MARKET_DATA_RECEIVED, data={"n": 0}, correlation_id="trade-1"
    )
    await publisher.publish(EventType.MARKET_DATA_RECEIVED, {"n": 1})
    count = await publisher.publish_batch(
        [(EventType.MARKET_DATA_RECEIVED, {"n": n}) for n in range(2, 5)]
    )
    success = await publisher.publish_with_retry(
        event_type=EventType.MARKET_DATA_RECEIVED, data={"n": 5}, max_retries=3, retry_delay_ms=100
    )
    await eventually(lambda: len(ear.events) == 6)

    assert (count, success) == (3, True)
    assert [event.data["n"] for event in ear.events] == list(range(6))
    assert {event.source_agent for event in ear.events} == {"mouth"}
    assert ear.events[0].correlation_id == "trade-1"
    assert len({event.correlation_id for event in ear.events}) == 6
    await publisher.close()
    await ear.stop()


def test_retrying_has_the_defaults_of_the_contract() -> None:
    taken = inspect.signature(EventPublisher.publish_with_retry).parameters

    assert list(taken)[1:5] == ["event_type", "data", "max_retries", "retry_delay_ms"]
    assert (taken["max_retries"].default, taken["retry_delay_ms"].default) == (3, 100)


async def test_a_correlation_goes_from_parent_to_child_by_itself(bus: Bus) -> None:
    broker, registry = bus
    ear = await listening(bus, EventType.SIGNAL_GENERATED)
    publisher = publisher_on(bus)

    async def answer(event: Event) -> None:
        await publisher.publish(EventType.SIGNAL_GENERATED, {})

    await registry.register(EventType.MARKET_DATA_RECEIVED, answer, "middle", "answer")
    middle = EventConsumer(
        ConsumerConfig(agent_name="middle", broker=broker, handler_registry=registry)
    )
    await middle.start()

    asked = await publisher.publish(EventType.MARKET_DATA_RECEIVED, {}, "trade-7")
    await eventually(lambda: ear.events)

    assert ear.events[0].correlation_id == "trade-7"
    assert ear.events[0].causation_id == asked.id
    await publisher.close()
    await middle.stop()
    await ear.stop()


async def test_a_mistake_of_the_callers_raises_at_once(bus: Bus) -> None:
    publisher = publisher_on(bus)

    with pytest.raises(PayloadError):
        await publisher.publish_with_retry(EventType.SIGNAL_GENERATED, {"bad": object()})
    await bus[0].close()
    with pytest.raises(ClosedError):
        await publisher.publish_with_retry(EventType.SIGNAL_GENERATED, {})

    assert publisher.dead_letters.total == 0
    await publisher.close()


# -- MessageBusFactory ----------------------------------------------------------------------------


async def test_a_bus_is_chosen_by_name_and_connected() -> None:
    broker, registry = await MessageBusFactory.create_message_bus(broker_type="memory")

    assert isinstance(broker, InMemoryMessageBroker)
    assert isinstance(registry, EventHandlerRegistry)
    await broker.publish("market_data", {"price": 1.0})
    await broker.close()
