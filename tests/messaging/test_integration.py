"""The message bus as a whole, on every fabric."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from mesh import (
    ConsumerConfig,
    Event,
    EventConsumer,
    EventHandlerRegistry,
    EventPublisher,
    EventType,
    HandlerPriority,
    PublisherConfig,
)
from tests.plumbing.processes import eventually

if TYPE_CHECKING:
    from mesh import MessageBroker


class Analyst(EventConsumer):
    """Hears prices, says signals."""

    publisher: EventPublisher

    async def initialize(self) -> None:
        self.prices: list[float] = []
        self.publisher = EventPublisher(
            PublisherConfig(agent_name=self.agent_name, broker=self.broker)
        )
        await self.registry.register(
            event_type=EventType.MARKET_DATA_RECEIVED,
            handler_func=self.on_price,
            agent_name=self.agent_name,
            handler_id="analyst-price",
            priority=HandlerPriority.HIGH,
        )

    async def on_price(self, event: Event) -> None:
        self.prices.append(event.data["price"])
        await self.publisher.publish(
            event_type=EventType.SIGNAL_GENERATED, data={"side": "buy", "at": event.data["price"]}
        )


class Trader(EventConsumer):
    """Hears signals; one handler of its two fails."""

    async def initialize(self) -> None:
        self.signals: list[Event] = []
        for number, handler in enumerate((self.fails, self.on_signal)):
            await self.registry.register(
                EventType.SIGNAL_GENERATED,
                handler,
                self.agent_name,
                f"trader-{number}",
                HandlerPriority.NORMAL,
                max_retries=0,
            )

    async def fails(self, event: Event) -> None:
        raise RuntimeError("no luck")

    async def on_signal(self, event: Event) -> None:
        self.signals.append(event)


async def test_full_message_bus_flow(bus: tuple[MessageBroker, EventHandlerRegistry]) -> None:
    """Publish, hear, publish on, hear: correlated, in order, and past a failing neighbour."""
    broker, registry = bus
    analyst = Analyst(
        ConsumerConfig(
            agent_name="analyst",
            broker=broker,
            handler_registry=registry,
            subscribed_events=[EventType.MARKET_DATA_RECEIVED],
        )
    )
    trader = Trader(
        ConsumerConfig(
            agent_name="trader",
            broker=broker,
            handler_registry=registry,
            subscribed_events=[EventType.SIGNAL_GENERATED],
        )
    )
    for agent in (analyst, trader):
        await agent.initialize()
        await agent.start()
    publisher = EventPublisher(PublisherConfig(agent_name="feed", broker=broker))

    count = await publisher.publish_batch(
        [(EventType.MARKET_DATA_RECEIVED, {"price": float(number)}) for number in range(500)]
    )
    last = await publisher.publish(
        event_type=EventType.MARKET_DATA_RECEIVED, data={"price": 500.0}, correlation_id="trade-1"
    )
    success = await publisher.publish_with_retry(
        event_type=EventType.MARKET_DATA_RECEIVED,
        data={"price": 501.0},
        max_retries=3,
        retry_delay_ms=100,
    )
    await eventually(lambda: len(trader.signals) == 502)

    assert (count, success) == (500, True)
    assert analyst.prices == [float(number) for number in range(502)]
    assert [event.data["at"] for event in trader.signals] == analyst.prices
    traded = trader.signals[500]
    assert traded.type is EventType.SIGNAL_GENERATED
    assert traded.source_agent == "analyst"
    assert traded.correlation_id == "trade-1"
    assert traded.causation_id == last.id
    assert traded.timestamp.tzinfo is not None
    stats = await registry.get_stats()
    assert stats["total_handlers"] == 3
    assert stats["total_calls"] == 502 * 3
    assert stats["error_rate"] == pytest.approx(1 / 3)
    assert analyst.ledger.lost() == trader.ledger.lost() == 0
    assert trader.dead_letters.total == 502

    for agent in (analyst, trader):
        await agent.stop()
    await publisher.publish(EventType.MARKET_DATA_RECEIVED, {"price": 0.0})
    await publisher.flush()
    await asyncio.sleep(0)
    assert len(analyst.prices) == 502, "after stop() no event reaches a handler"
    await analyst.publisher.close()
    await publisher.close()


async def test_dicts_travel_on_channels(bus: tuple[MessageBroker, EventHandlerRegistry]) -> None:
    broker, _ = bus
    heard: list[dict[str, object]] = []

    async def handler(message: dict[str, object]) -> None:
        heard.append(message)

    await broker.subscribe("market_data", handler)
    await broker.publish("market_data", {"symbol": "BTC", "price": 50_000.0})
    await broker.publish("market_data.other", {"symbol": "not this"})
    await broker.publish("market_data", {"symbol": "ETH", "price": 3_000.0})
    await eventually(lambda: len(heard) == 2)

    assert heard == [{"symbol": "BTC", "price": 50_000.0}, {"symbol": "ETH", "price": 3_000.0}]


async def test_dispatch_says_how_many_ran(caplog: pytest.LogCaptureFixture) -> None:
    registry = EventHandlerRegistry()
    order: list[str] = []

    async def low(event: Event) -> None:
        order.append("low")

    async def critical(event: Event) -> None:
        order.append("critical")

    async def broken(event: Event) -> None:
        raise ValueError("no")

    await registry.register(EventType.TRADE_APPROVED, low, "a", "1", HandlerPriority.LOW)
    await registry.register(EventType.TRADE_APPROVED, broken, "a", "2")
    await registry.register(EventType.TRADE_APPROVED, critical, "b", "3", HandlerPriority.CRITICAL)

    executed = await registry.dispatch(Event(EventType.TRADE_APPROVED, {}, "test"))
    nobody = await registry.dispatch(Event(EventType.MODEL_UPDATED, {}, "test"))
    await registry.dispatch(Event(EventType.MODEL_UPDATED, {}, "test"))

    assert (executed, nobody) == (2, 0)
    assert order == ["critical", "low"]
    assert caplog.text.count("No handlers registered for event") == 1
