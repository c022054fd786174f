"""In one process: dispatch, the memory broker, and what other handlers cost."""

from __future__ import annotations

import asyncio
import time

from mesh import (
    Agent,
    AgentContext,
    Event,
    EventHandlerRegistry,
    EventType,
    InMemoryMessageBroker,
    on,
)

_COUNT = 100_000
_DATA = {"symbol": "BTCUSD", "bid": 1.5, "ask": 2.5, "number": 7}


async def _handler(event: Event) -> None:
    pass


def bare_await() -> float:
    """Await a handler with an event that is there already; calls/s."""
    return asyncio.run(_bare_await(make_event=False))


def bare_await_with_event() -> float:
    """Make an event and await a handler with it; calls/s."""
    return asyncio.run(_bare_await(make_event=True))


async def _bare_await(*, make_event: bool) -> float:
    event = Event(EventType.MARKET_DATA_RECEIVED, _DATA, "bench")
    begun = time.perf_counter()
    if make_event:
        for _ in range(_COUNT):
            await _handler(Event(EventType.MARKET_DATA_RECEIVED, _DATA, "bench"))
    else:
        for _ in range(_COUNT):
            await _handler(event)
    return _COUNT / (time.perf_counter() - begun)


def dispatch(others: int = 0) -> float:
    """Dispatch to one handler, with `others` handlers of other types registered; calls/s."""
    return asyncio.run(_dispatch(others))


async def _dispatch(others: int) -> float:
    registry = EventHandlerRegistry()
    await registry.register(EventType.MARKET_DATA_RECEIVED, _handler, "bench", "one")
    for number in range(others):
        await registry.register(f"other.{number}", _handler, "bench", "one")
    event = Event(EventType.MARKET_DATA_RECEIVED, _DATA, "bench")
    begun = time.perf_counter()
    for _ in range(_COUNT):
        await registry.dispatch(event)
    return _COUNT / (time.perf_counter() - begun)


def dispatch_to(handlers: int) -> float:
    """Dispatch to so many handlers of one type; handlers called/s."""
    return asyncio.run(_dispatch_to(handlers))


async def _dispatch_to(handlers: int) -> float:
    registry = EventHandlerRegistry()
    for number in range(handlers):
        await registry.register(EventType.MARKET_DATA_RECEIVED, _handler, "bench", str(number))
    event = Event(EventType.MARKET_DATA_RECEIVED, _DATA, "bench")
    times = _COUNT // handlers
    begun = time.perf_counter()
    for _ in range(times):
        await registry.dispatch(event)
    return times * handlers / (time.perf_counter() - begun)


class _Ear(Agent):
    seen = 0

    @on(EventType.MARKET_DATA_RECEIVED)
    async def hear(self, event: Event) -> None:
        self.seen += 1


class _Mouth(Agent):
    pass


def memory_broker() -> float:
    """Publish, encode, decode, handle, all in one process; events/s."""
    return asyncio.run(_memory_broker())


async def _memory_broker() -> float:
    async with InMemoryMessageBroker() as broker:
        mouth = _Mouth(AgentContext(name="mouth", broker=broker))
        ear = _Ear(AgentContext(name="ear", broker=broker))
        for agent in (mouth, ear):
            await agent.open()
        begun = time.perf_counter()
        for _ in range(_COUNT):
            await mouth.publish(EventType.MARKET_DATA_RECEIVED, _DATA)
        await mouth.publisher.flush()
        await ear.consumer.drained()
        took_s = time.perf_counter() - begun
        assert ear.seen == _COUNT
        for agent in (mouth, ear):
            await agent.close()
    return _COUNT / took_s
