"""Runs agents and publishers on a broker of the test's own, as their processes would."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from mesh import Agent, AgentContext, EventPublisher, MessageBusConfig, PublisherConfig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from mesh.broker import MessageBroker


@asynccontextmanager
async def running(
    broker: MessageBroker, kind: type[Agent], name: str = "shop", **settings: Any
) -> AsyncIterator[Any]:
    """Run an agent of this broker."""
    settings = {"consumer_retry_delay_ms": 1.0, "consumer_max_retries": 0, **settings}
    config = MessageBusConfig(broker_type="memory", **settings)
    agent = kind(AgentContext(name=name, broker=broker, config=config))
    await agent.open()
    agent.context.gate.set()
    try:
        # A source that fails ends the test instead of being waited for
        async with asyncio.TaskGroup() as tasks:
            working = tasks.create_task(agent.work())
            yield agent
            working.cancel()
    finally:
        await agent.close()


@asynccontextmanager
async def speaking(broker: MessageBroker, name: str = "till") -> AsyncIterator[EventPublisher]:
    """Give a publisher."""
    publisher = EventPublisher(PublisherConfig(agent_name=name, broker=broker))
    yield publisher
    await publisher.close()
