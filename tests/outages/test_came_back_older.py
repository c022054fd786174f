"""Redis comes back without the last that was settled: what a failover does, made on purpose."""

from __future__ import annotations

import asyncio
import shutil
from typing import TYPE_CHECKING

import msgspec
import pytest

from mesh import Agent, Event, event_type, on
from mesh.brokers.redis import RedisMessageBroker
from tests.plumbing.agents import running, speaking
from tests.plumbing.processes import eventually
from tests.plumbing.redis_server import RedisServer

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.fault, pytest.mark.redis]

ORDER = event_type("older.order", durable=True)


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A server of this test's own, which keeps every write."""
    made = RedisServer(append_only=True).start()
    yield made
    made.close()


class Sums(Agent):
    """Counts each order, and all of them; stops before the order `stops_at`."""

    stops_at = 0
    handled = 0

    async def setup(self) -> None:
        self.may_go_on = asyncio.Event()

    @on(ORDER)
    async def on_order(self, event: Event) -> None:
        number = event.data["n"]
        if number == self.stops_at:
            await self.may_go_on.wait()
        self.handled += 1
        self.ctx.state["total"] = self.ctx.state.get("total", 0) + 1
        self.ctx.state[f"n{number}"] = self.ctx.state.get(f"n{number}", 0) + 1


@pytest.mark.parametrize("last", ["settled", "in hand"])
async def test_effects_are_once_in_what_is_left(server: RedisServer, last: str) -> None:
    """Nothing in memory survives that Redis has lost: it is handled again, from the state there."""
    folder = server.folder / "appendonlydir"
    older = server.folder / "older"
    async with RedisMessageBroker(url=server.url) as broker:
        journal = await broker.open_journal()

        async def state() -> dict[str, int]:
            found = await journal.load_state("shop")
            return {name: msgspec.msgpack.decode(raw) for name, raw in found.items()}

        class Slow(Sums):
            stops_at = 1

        async with running(broker, Slow) as agent, speaking(broker) as till:
            for number in range(1, 11):
                await till.publish(ORDER, {"n": number}, key="one")
            await eventually(lambda: agent.consumer.in_flight()[0] == 1)
            await asyncio.to_thread(server.kill)
            shutil.copytree(folder, older)
            await asyncio.to_thread(server.start)
            if last == "in hand":
                agent.stops_at = 10
            agent.may_go_on.set()
            settled = 10 if last == "settled" else 9
            if last == "in hand":
                agent.may_go_on.clear()

            async def are_settled() -> bool:
                return (await state()).get("total") == settled

            await eventually(are_settled)
            await asyncio.to_thread(server.kill)
            shutil.rmtree(folder)
            older.rename(folder)
            await asyncio.to_thread(server.start)
            agent.may_go_on.set()

            async def is_all_done() -> bool:
                return not any(view.pending for view in await journal.groups())

            await eventually(is_all_done)
            assert agent.handled >= settled + 10
            assert await state() == {"total": 10, **{f"n{at}": 1 for at in range(1, 11)}}
            assert agent.ctx.state["total"] == 10
