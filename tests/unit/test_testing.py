"""The test tools themselves: harness, clock, fixtures."""

from __future__ import annotations

import asyncio
import os
import stat
from typing import TYPE_CHECKING

import pytest

from mesh import Agent, Event, EventType, every, on, source

if TYPE_CHECKING:
    from pathlib import Path

    from mesh.inprocess import InProcessMesh
    from mesh.testing import AgentHarness, FakeClock


class Echo(Agent):
    seen = 0

    @on(EventType.MARKET_DATA_RECEIVED)
    async def on_tick(self, event: Event) -> None:
        self.seen += 1
        if event.data["price"] < 0:
            raise ValueError("a negative price")
        await self.publish(EventType.SIGNAL_GENERATED, {"price": event.data["price"]})

    @on("echo.asked")
    async def on_asked(self, event: Event) -> None:
        await self.reply(event, {"seen": self.seen})


class Ticker(Agent):
    @every(5.0)
    async def tick(self) -> None:
        await self.publish(EventType.SYSTEM_ALERT, {"at": self.clock.mono_s()})


class Three(Agent):
    @source
    async def speak(self) -> None:
        for price in range(3):
            await self.publish(EventType.MARKET_DATA_RECEIVED, {"price": float(price)})


async def test_say_and_expect(agent_harness: type[AgentHarness[Echo]]) -> None:
    async with agent_harness(Echo) as h:
        for price in (1.0, 2.0, 3.0):
            await h.say(EventType.MARKET_DATA_RECEIVED, {"price": price})
        first = await h.expect(EventType.SIGNAL_GENERATED)
        third = await h.expect(
            EventType.SIGNAL_GENERATED, where=lambda event: bool(event.data["price"] > 2)
        )
        assert (first.data["price"], third.data["price"]) == (1.0, 3.0)
        await h.expect_nothing()
        assert [event.data["price"] for event in h.heard] == [1.0, 2.0, 3.0]
        assert await h.ask("echo.asked", {}) == {"seen": 3}
        assert h.agent.seen == 3


async def test_expect_tells_what_came_instead(agent_harness: type[AgentHarness[Echo]]) -> None:
    async with agent_harness(Echo) as h:
        await h.say(EventType.MARKET_DATA_RECEIVED, {"price": 1.0})
        with pytest.raises(AssertionError, match=r"did not say 'order.executed'.*signal.generated"):
            await h.expect(EventType.ORDER_EXECUTED, timeout_s=0.05)


async def test_expect_nothing_names_what_was_said(agent_harness: type[AgentHarness[Echo]]) -> None:
    async with agent_harness(Echo) as h:
        await h.say(EventType.MARKET_DATA_RECEIVED, {"price": 7.0})
        await h.expect_nothing(EventType.ORDER_EXECUTED)
        with pytest.raises(AssertionError, match=r"said 1 more: signal.generated .*7\.0"):
            await h.expect_nothing()


async def test_dead_letters_show_the_failure(
    agent_harness: type[AgentHarness[Echo]], fake_clock: FakeClock
) -> None:
    async with agent_harness(Echo, clock=fake_clock) as h:
        await h.say(EventType.MARKET_DATA_RECEIVED, {"price": -1.0})
        await fake_clock.advance(10)
        (letter,) = h.dead_letters
    assert (letter.reason, letter.attempts) == ("failed", 4)
    assert "a negative price" in letter.error


async def test_timers_follow_the_fake_clock(
    agent_harness: type[AgentHarness[Ticker]], fake_clock: FakeClock
) -> None:
    begun = fake_clock.mono_s()
    async with agent_harness(Ticker, clock=fake_clock) as h:
        await fake_clock.advance(4.9)
        await h.expect_nothing()
        await fake_clock.advance(10.2)
        assert [event.data["at"] - begun for event in h.heard] == [5.0, 10.0, 15.0]


async def test_a_mesh_in_memory(memory_mesh: type[InProcessMesh]) -> None:
    async with memory_mesh([Three, Echo]) as mesh:
        await mesh.sources_done()
        await mesh.quiet()
        assert mesh.account().lost == 0
        assert mesh.account().published["signal.generated"] == 3


async def test_sleepers_wake_in_order_and_at_their_moments(fake_clock: FakeClock) -> None:
    woken: list[tuple[str, float]] = []
    begun = fake_clock.mono_s()

    async def sleeper(name: str, *delays: float) -> None:
        for delay in delays:
            await fake_clock.sleep(delay)
            woken.append((name, fake_clock.mono_s() - begun))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(sleeper("late", 3.0))
        tasks.create_task(sleeper("twice", 1.0, 1.0))
        dropped = tasks.create_task(sleeper("dropped", 1.5))
        await fake_clock.until_sleepers(3)
        dropped.cancel()
        await fake_clock.advance(5)
    assert woken == [("twice", 1.0), ("twice", 2.0), ("late", 3.0)]
    assert fake_clock.sleepers == 0
    assert fake_clock.mono_s() == begun + 5


def test_the_run_directory_is_short_and_private(mesh_rundir: Path) -> None:
    assert stat.S_IMODE(mesh_rundir.stat().st_mode) == 0o700
    assert len(os.fsencode(mesh_rundir)) < 30
    assert os.environ["MESH_DIR"] == str(mesh_rundir)
