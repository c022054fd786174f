"""Agents that end while Redis is away: whatever was on its way, every event counts once."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from typing import TYPE_CHECKING, Any

import pytest

from mesh import Agent, Event, RedisMessageBroker, event_type, on
from mesh.errors import BrokerUnavailableError
from tests.plumbing.agents import running, speaking
from tests.plumbing.processes import eventually
from tests.plumbing.redis_cluster import Cluster
from tests.plumbing.redis_server import RedisServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from mesh.journal import Journal

pytestmark = [pytest.mark.fault, pytest.mark.redis, pytest.mark.timeout(180)]

ORDER = event_type("ends.order", durable=True)
CANCEL = event_type("ends.cancel", durable=True)
_ROUNDS = 4


class Counter(Agent):
    """Counts in its state: all events, and those of each key."""

    concurrency = 4

    @on(ORDER)
    async def on_order(self, event: Event) -> None:
        await self.count(event)

    @on(CANCEL)
    async def on_cancel(self, event: Event) -> None:
        await self.count(event)

    async def count(self, event: Event) -> None:
        if event.data["n"] % 50 == 0:
            await asyncio.sleep(0)  # others go on meanwhile
        for name in ("all", event.data["key"]):
            self.ctx.state[name] = self.ctx.state.get(name, 0) + 1


class Shop:
    """Redis, on one server or three, and agents on it."""

    def __init__(self, servers: list[RedisServer], **where: Any) -> None:
        self.servers = servers
        self._where = where

    def broker(self) -> RedisMessageBroker:
        return RedisMessageBroker(**self._where, silent_s=1.0)

    async def say(self, name: str, is_over: asyncio.Event) -> None:
        """Publish bursts; what is not confirmed may be kept all the same."""
        chance, number = random.Random(name), 0
        async with self.broker() as broker, speaking(broker, name) as till:
            while not is_over.is_set():
                count = chance.randint(50, 300)
                saying = [
                    till.publish(chance.choice((ORDER, CANCEL)), {"n": n, "key": key}, key=key)
                    for n in range(number, number + count)
                    for key in (f"k{n % 20}",)
                ]
                number += count
                try:
                    await asyncio.gather(*saying)
                except BrokerUnavailableError:
                    return
                await asyncio.sleep(0.1)

    async def harm(self, chance: random.Random) -> None:
        """Stop a server for a while, or kill it and bring it back."""
        server, pause_s = chance.choice(self.servers), chance.uniform(0.2, 3.0)
        if chance.random() < 0.6:
            os.kill(server.pid, signal.SIGSTOP)
            await asyncio.sleep(pause_s)
            os.kill(server.pid, signal.SIGCONT)
        else:
            await asyncio.to_thread(server.kill)
            await asyncio.sleep(pause_s / 2)
            await asyncio.to_thread(server.start)


@pytest.fixture(params=["redis", "redis cluster"])
async def shop(request: pytest.FixtureRequest) -> AsyncIterator[Shop]:
    if request.param == "redis":
        servers = [RedisServer(append_only=True).start()]
        made = Shop(servers, url=servers[0].url)
    else:
        cluster = Cluster(append_only=True)
        cluster.start()
        await cluster.join()
        servers, made = cluster.servers, Shop(cluster.servers, port=cluster.ports[0], cluster=True)
    yield made
    for server in servers:
        server.close()


async def kept(journal: Journal) -> int:
    """Count what the journal holds."""
    found, after = 0, None
    while page := await journal.scan([ORDER, CANCEL], after=after, limit=5000):
        found, after = found + len(page), page[-1].position
    return found


async def test_agents_that_end_while_it_is_away_count_every_event_once(shop: Shop) -> None:
    chance, is_over = random.Random(7), asyncio.Event()
    async with shop.broker() as broker, running(broker, Counter, "counter"):
        pass  # from now on the group hears
    async with asyncio.TaskGroup() as tasks:
        for number in range(3):
            tasks.create_task(shop.say(f"till-{number}", is_over))
        for _ in range(_ROUNDS):
            async with shop.broker() as broker:
                drain_s = chance.choice((0.2, 1.0, 4.0))
                async with running(broker, Counter, "counter", drain_timeout_s=drain_s) as agent:
                    await eventually(lambda: agent.consumer.unsettled() > 0, within_s=20)
                    harm = tasks.create_task(shop.harm(chance))
                    await asyncio.sleep(chance.uniform(0.0, 2.0))
                await harm
        is_over.set()

    async with shop.broker() as broker, running(broker, Counter, "counter") as agent:
        journal = await broker.open_journal()

        async def is_done() -> bool:
            return not any(view.pending for view in await journal.groups())

        await eventually(is_done, within_s=60)
        await agent.consumer.drained()
        by_key = [agent.ctx.state[f"k{number}"] for number in range(20)]
        assert agent.ctx.state["all"] == sum(by_key) == await kept(journal)
