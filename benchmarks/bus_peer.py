"""
One event to one handler on other people's buses: ``python benchmarks/bus_peer.py NAME COUNT``.

Runs in the peers' own environment (`benchmarks/peers.py` makes it) and knows nothing of the mesh.
Each peer is used as its documentation shows; an event carries four values, and the clock stops when
the handler has seen the last one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from autogen_core import MessageContext

#: So many events may be under way where publishing does not wait for the handler.
_WINDOW = 100


@dataclass
class Quote:
    """What is said."""

    symbol: str = "BTCUSD"
    bid: float = 1.5
    ask: float = 2.5
    number: int = 7


class Seen:
    """Counts to a figure, and says when it is reached."""

    def __init__(self, goal: int) -> None:
        self.left = goal
        self.done = asyncio.Event()

    def one(self) -> None:
        self.left -= 1
        if not self.left:
            self.done.set()


async def blinker(count: int) -> float:
    """Call plain functions through a signal; synchronous."""
    from blinker import Signal

    seen, signal, quote = Seen(count), Signal(), Quote()

    def handle(sender: object, **data: object) -> None:
        seen.one()

    signal.connect(handle)
    begun = time.perf_counter()
    for _ in range(count):
        signal.send(None, quote=quote)
    return count / (time.perf_counter() - begun)


async def pyee(count: int) -> float:
    """Start a task for every handler of every event."""
    from pyee.asyncio import AsyncIOEventEmitter

    seen, emitter, quote = Seen(count), AsyncIOEventEmitter(), Quote()

    @emitter.on("quote")
    async def handle(quote: Quote) -> None:
        seen.one()

    begun = time.perf_counter()
    for number in range(count):
        emitter.emit("quote", quote)
        if number % _WINDOW == 0:
            await asyncio.sleep(0)
    await seen.done.wait()
    return count / (time.perf_counter() - begun)


async def lahja(count: int) -> float:
    """Broadcast inside one endpoint."""
    from lahja import AsyncioEndpoint, BaseEvent, ConnectionConfig

    class Said(BaseEvent):
        def __init__(self, quote: Quote) -> None:
            self.quote = quote

    seen, quote = Seen(count), Quote()
    with tempfile.TemporaryDirectory() as folder:
        config = ConnectionConfig.from_name("bench", base_path=Path(folder))
        async with AsyncioEndpoint.serve(config) as endpoint:
            endpoint.subscribe(Said, lambda _: seen.one())
            begun = time.perf_counter()
            for _ in range(count):
                await endpoint.broadcast(Said(quote))
            await seen.done.wait()
            return count / (time.perf_counter() - begun)


async def faststream(count: int) -> float:
    """Publish on the test broker, which awaits the handler."""
    from faststream.redis import RedisBroker, TestRedisBroker

    seen, broker = Seen(count), RedisBroker()

    @broker.subscriber("quote")
    async def handle(quote: dict[str, Any]) -> None:
        seen.one()

    async with TestRedisBroker(broker):
        begun = time.perf_counter()
        for _ in range(count):
            await broker.publish(asdict(Quote()), "quote")
        await seen.done.wait()
        return count / (time.perf_counter() - begun)


async def autogen_core(count: int) -> float:
    """Publish to an agent in the single-threaded runtime."""
    global MessageContext  # the runtime looks the handler's annotations up here
    from autogen_core import (
        DefaultTopicId,
        MessageContext,
        RoutedAgent,
        SingleThreadedAgentRuntime,
        event,
        type_subscription,
    )

    logging.disable()
    seen = Seen(count)

    @type_subscription("quote")
    class Listener(RoutedAgent):
        @event
        async def handle(self, message: Quote, ctx: MessageContext) -> None:
            seen.one()

    runtime = SingleThreadedAgentRuntime()
    await Listener.register(runtime, "listener", lambda: Listener("hears quotes"))
    runtime.start()
    begun = time.perf_counter()
    for number in range(count):
        await runtime.publish_message(Quote(), DefaultTopicId(type="quote"))
        if number % _WINDOW == 0:
            await asyncio.sleep(0)
    await seen.done.wait()
    took_s = time.perf_counter() - begun
    await runtime.stop()
    return count / took_s


async def nautilus_trader(count: int) -> float:
    """Publish on the message bus of the trading engine; synchronous, compiled."""
    from nautilus_trader.common.component import LiveClock, MessageBus
    from nautilus_trader.model.identifiers import TraderId

    seen, quote = Seen(count), Quote()
    bus = MessageBus(trader_id=TraderId("BENCH-001"), clock=LiveClock())
    bus.subscribe("quote", lambda _: seen.one())
    begun = time.perf_counter()
    for _ in range(count):
        bus.publish("quote", quote)
    return count / (time.perf_counter() - begun)


async def bubus(count: int) -> float:
    """Dispatch pydantic events; the handlers run one after the other."""
    from bubus import BaseEvent, EventBus

    logging.disable()

    class Said(BaseEvent[None]):
        symbol: str
        bid: float
        ask: float
        number: int

    async def handle(said: Said) -> None:
        seen.one()

    seen, bus = Seen(count), EventBus(name="bench")
    bus.on(Said, handle)
    begun = time.perf_counter()
    for _ in range(count):
        await bus.dispatch(Said(**asdict(Quote())))
    took_s = time.perf_counter() - begun
    await bus.stop(clear=True)
    return count / took_s


PEERS: dict[str, Callable[[int], Coroutine[Any, Any, float]]] = {
    "blinker": blinker,
    "pyee": pyee,
    "lahja": lahja,
    "faststream": faststream,
    "autogen-core": autogen_core,
    "nautilus-trader": nautilus_trader,
    "bubus": bubus,
}


def main(name: str, count: int) -> None:
    """Measure one peer and print the figure as JSON."""
    print(json.dumps({"events_per_s": asyncio.run(PEERS[name](count))}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
