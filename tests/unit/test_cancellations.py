"""What an agent's code cancels is its own affair: nothing of the mesh takes it for its own end."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from mesh import (
    Agent,
    AgentContext,
    ConsumerConfig,
    Event,
    EventConsumer,
    EventHandlerRegistry,
    EventPublisher,
    InMemoryMessageBroker,
    PublisherConfig,
    event_type,
    every,
    on,
    source,
)
from mesh.testing import AgentHarness, FakeClock
from tests.plumbing.agents import running, speaking
from tests.plumbing.processes import eventually

SAID = event_type("cancel.said")
KEPT = event_type("cancel.kept", durable=True)


async def boom() -> None:
    raise ValueError("an ordinary mistake")


async def group() -> None:
    """On Python 3.11 and 3.12 this leaves its task counted as being cancelled."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(boom())


async def group_with_a_body() -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(boom())
        await asyncio.Event().wait()


async def group_whose_error_is_caught() -> None:
    with contextlib.suppress(ExceptionGroup):
        await group()


async def awaiting_what_was_cancelled() -> None:
    task = asyncio.create_task(asyncio.Event().wait())
    task.cancel()
    await task


async def cancelling_itself() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


async def cancelling_itself_in_passing() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()


async def nothing() -> None:
    pass


DEEDS: dict[str, Any] = {
    each.__name__: each
    for each in (
        group,
        group_with_a_body,
        group_whose_error_is_caught,
        awaiting_what_was_cancelled,
        cancelling_itself,
        cancelling_itself_in_passing,
        nothing,
    )
}
FAILING = {
    "group": "ValueError",
    "group_with_a_body": "ValueError",
    "awaiting_what_was_cancelled": "CancelledError",
    "cancelling_itself": "CancelledError",
}


@pytest.mark.parametrize("second", DEEDS)
@pytest.mark.parametrize("first", DEEDS)
@pytest.mark.parametrize("topic", [SAID, KEPT])
async def test_a_handler_may_cancel_and_only_its_own_event_fails(
    topic: str, first: str, second: str
) -> None:
    class Rash(Agent):
        async def setup(self) -> None:
            self.done: list[str] = []

        @on(topic, max_retries=0)
        async def act(self, event: Event) -> None:
            await DEEDS[event.data["deed"]]()
            self.done.append(event.data["deed"])

    async with InMemoryMessageBroker() as broker, running(broker, Rash) as agent:
        async with speaking(broker) as mouth:
            for deed in (first, second, "nothing"):
                await mouth.publish(topic, {"deed": deed})
                await mouth.flush()
                await agent.consumer.drained()
        letters = agent.consumer.dead_letters.newest
        assert not agent.consumer.is_stuck()

    failed = [deed for deed in (first, second) if deed in FAILING]
    assert agent.done == [deed for deed in (first, second, "nothing") if deed not in FAILING]
    assert len(letters) == len(failed)
    for letter, deed in zip(letters, failed, strict=True):
        assert letter.reason == "failed"
        assert FAILING[deed] in letter.error


def test_a_loop_that_ends_is_not_held_up_by_who_makes_an_error_of_his_cancellation() -> None:
    begun: list[int] = []

    async def hear(event: Event) -> None:
        begun.append(event.data["n"])
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ValueError("not now") from None

    async def main() -> None:
        broker, registry = InMemoryMessageBroker(), EventHandlerRegistry()
        await broker.connect()
        consumer = EventConsumer(
            ConsumerConfig(agent_name="ear", broker=broker, handler_registry=registry)
        )
        await registry.register(SAID, hear, "ear", "hear")
        await consumer.start()
        publisher = EventPublisher(PublisherConfig(agent_name="mouth", broker=broker))
        await publisher.publish(SAID, {"n": 1})
        await publisher.publish(SAID, {"n": 2})
        await eventually(lambda: begun == [1])

    asyncio.run(main())

    assert begun == [1]


async def test_a_timer_whose_task_group_failed_is_called_for_ever(fake_clock: FakeClock) -> None:
    deeds = [group, nothing, awaiting_what_was_cancelled, group_with_a_body, cancelling_itself]
    calls: list[str] = []

    class Clockwork(Agent):
        @every(1.0)
        async def tick(self) -> None:
            deed = deeds[len(calls) % len(deeds)]
            calls.append(deed.__name__)
            await deed()

    async with AgentHarness(Clockwork, clock=fake_clock) as harness:
        for _ in range(10):
            await fake_clock.advance(1.0)
        failed = harness.agent.context.ledger.counts()["timer_failed"]

    assert calls == [deed.__name__ for deed in deeds] * 2
    assert failed == 8


@pytest.mark.parametrize("turns", range(10))
async def test_a_timer_ends_with_its_agent_although_it_has_just_cancelled_itself(
    turns: int,
) -> None:
    """The wish that it end may come in the turn in which what it has cancelled is forgotten."""
    waits = asyncio.Event()
    calls: list[int] = []

    class Both(Agent):
        @every(0.01)
        async def tick(self) -> None:
            calls.append(1)
            await waits.wait()
            for _ in range(turns):
                await asyncio.sleep(0)
            with contextlib.suppress(asyncio.CancelledError):
                await cancelling_itself()

        @source
        async def feed(self) -> None:
            await eventually(lambda: bool(calls))
            waits.set()
            raise ValueError("an ordinary mistake")

    async with InMemoryMessageBroker() as broker:
        agent = Both(AgentContext(name="both", broker=broker))
        agent.context.gate.set()
        await agent.open()
        with pytest.raises(ExceptionGroup):
            await asyncio.create_task(agent.work())
        await agent.close()

    assert calls == [1]


@pytest.mark.parametrize("deed", DEEDS)
async def test_a_channel_goes_on_whatever_its_handler_cancels(
    deed: str, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[int] = []

    async def hear(message: dict[str, Any]) -> None:
        heard.append(message["i"])
        if message["i"] in {1, 3}:
            await group_whose_error_is_caught()
            await DEEDS[deed]()

    async with InMemoryMessageBroker() as broker:
        await broker.subscribe("a.b", hear)
        for number in range(5):
            await broker.publish("a.b", {"i": number})
            await eventually(lambda: len(heard) == number + 1)  # noqa: B023
            # It waits for the next one
            for _ in range(5):
                await asyncio.sleep(0)

    assert heard == [0, 1, 2, 3, 4]
    failed = caplog.text.count("the channel's handler failed; the channel goes on")
    assert failed == (2 if deed in FAILING else 0)


def test_a_loop_that_ends_is_not_held_up_by_a_channel() -> None:
    heard: list[int] = []

    async def hear(message: dict[str, Any]) -> None:
        heard.append(message["i"])
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ValueError("not now") from None

    async def main() -> None:
        broker = InMemoryMessageBroker()
        await broker.connect()
        await broker.subscribe("a.b", hear)
        for number in range(2):
            await broker.publish("a.b", {"i": number})
        await eventually(lambda: heard == [0])

    asyncio.run(main())

    assert heard == [0]
