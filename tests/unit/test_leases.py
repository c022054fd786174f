"""What an agent works on stays its own for as long as it lives."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from mesh import (
    Agent,
    AgentContext,
    Event,
    EventPublisher,
    InMemoryMessageBroker,
    PublisherConfig,
    event_type,
    on,
)
from mesh.journal import LEASE_S
from mesh.journals.memory import MemoryJournal
from mesh.journals.memory_store import MemoryStore
from mesh.testing import FakeClock
from tests.plumbing.processes import eventually

if TYPE_CHECKING:
    from mesh.journal import Journal

ORDER = event_type("lease.order", durable=True)


class Slow(Agent):
    async def setup(self) -> None:
        self.begun = 0
        self.finish = asyncio.Event()

    @on(ORDER, timeout_s=3600)
    async def on_order(self, event: Event) -> None:
        self.begun += 1
        await self.finish.wait()


async def test_a_handler_that_takes_minutes_is_not_run_twice_at_once() -> None:
    """Its lease is renewed while it waits; another replica looks in vain."""
    clock = FakeClock()
    store = MemoryStore(clock=clock)

    class Broker(InMemoryMessageBroker):
        def make_journal(self) -> Journal:
            return MemoryJournal(store)

    async with Broker() as one, Broker() as two, AsyncExitStack() as exits:

        async def begin(name: str, broker: InMemoryMessageBroker) -> Slow:
            agent = Slow(AgentContext(name=name, group="slow", broker=broker, clock=clock))
            await agent.open()
            exits.push_async_callback(agent.close)
            return agent

        first = await begin("slow", one)
        publisher = EventPublisher(PublisherConfig(agent_name="till", broker=one))
        await publisher.publish(ORDER, {})
        await eventually(lambda: first.begun == 1)
        second = await begin("slow@2", two)
        for _ in range(60):
            await clock.advance(LEASE_S / 10)
            (await two.open_journal()).wake()
            await asyncio.sleep(0)

        assert (first.begun, second.begun) == (1, 0)
        first.finish.set()
        await first.consumer.drained()
        assert {view.pending for view in await (await two.open_journal()).groups()} == {0}
        await publisher.close()
