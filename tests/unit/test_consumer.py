"""Consumers: gaps, time limits, retries, lanes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from mesh import (
    Agent,
    AgentContext,
    ConsumerConfig,
    Event,
    EventConsumer,
    EventHandlerRegistry,
    EventPublisher,
    HandlerPriority,
    InMemoryMessageBroker,
    PublisherConfig,
    codec,
    event_type,
    on,
)
from mesh.account import LinkAccount, account
from mesh.errors import BrokerUnavailableError
from mesh.ledger import IN_RECEIVED, Ledger
from mesh.ledger_views import Backlog, view_of
from mesh.testing import FakeClock
from tests.plumbing.processes import eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from mesh.deadletters import DeadLetter
    from mesh.journal import Journal


class Lossy(InMemoryMessageBroker):
    """Loses frames on demand."""

    losing = False

    def try_send(self, topic: str, frame: bytes) -> bool:
        return True if self.losing else super().try_send(topic, frame)


async def consume(
    broker: InMemoryMessageBroker, ledger: Ledger | None = None
) -> tuple[EventConsumer, list[int]]:
    registry = EventHandlerRegistry()
    heard: list[int] = []

    async def hear(event: Event) -> None:
        heard.append(event.data["n"])

    consumer = EventConsumer(
        ConsumerConfig(agent_name="ear", broker=broker, handler_registry=registry, ledger=ledger)
    )
    await registry.register("t.x", hear, "ear", "hear")
    await consumer.start()
    return consumer, heard


async def say(publisher: EventPublisher, *numbers: int) -> None:
    for number in numbers:
        await publisher.publish("t.x", {"n": number})
    await publisher.flush()


def claim(publisher: str, epoch: int, first: int) -> bytes:
    """Make a frame of one event with the numbers of one's choice."""
    event = Event("t.x", {"n": 1}, publisher)
    return codec.Batcher(publisher).encode(event.type, epoch, first, [event])


async def test_claimed_losses_add_up_to_what_a_counter_holds() -> None:
    """Whatever frames claim, counting goes on, and a beat can carry the sum."""
    broker = InMemoryMessageBroker()
    consumer, heard = await consume(broker)
    begin = 2**62

    for number in range(100):
        consumer.live.receive("t.x", claim("liar", begin + number, codec.MAX_SEQUENCE - 2))
    await consumer.drained()

    assert heard == [1] * 100
    assert consumer.ledger.lost() == codec.MAX_SEQUENCE
    await consumer.stop()


async def test_thousands_of_publishers_leave_room_for_the_agents_own_counts() -> None:
    broker = InMemoryMessageBroker()
    consumer, heard = await consume(broker)

    for number in range(5000):
        consumer.live.receive("t.x", claim(f"p{number}", 1, 1))
        await consumer.drained()
    consumer.ledger.count("a reason of its own")

    assert len(heard) == 5000
    assert consumer.unsettled() == 0
    assert sum(each.received for each in view_of("ear", consumer.ledger).in_.values()) == 5000
    assert consumer.ledger.counts() == {"a reason of its own": 1}
    await consumer.stop()


async def test_every_frame_and_event_is_accounted_for() -> None:
    broker = InMemoryMessageBroker()
    consumer, heard = await consume(broker)
    good = claim("p", 1, 1)

    for frame in (good, b"nonsense", b"{}", b"\x80", good[:-3]):
        consumer.live.receive("t.x", frame)
    await consumer.drained()

    view = view_of("ear", consumer.ledger)
    assert (view.frames, view.rejected_frames) == (5, 3)
    assert view.dropped == {"undecodable": 2, "invalid": 2}
    # The map without attributes was an event in a sound frame
    assert sum(each.received for each in view.in_.values()) == sum(
        each.settled for each in view.in_.values()
    )
    assert heard == [1]
    await consumer.stop()


async def test_every_lost_event_is_counted() -> None:
    broker = Lossy()
    publisher = EventPublisher(PublisherConfig(agent_name="mouth", broker=broker))
    consumer, heard = await consume(broker)

    await say(publisher, 1, 2)
    broker.losing = True
    await say(publisher, 3, 4, 5)
    broker.losing = False
    await say(publisher, 6)
    await consumer.drained()

    assert heard == [1, 2, 6]
    assert consumer.ledger.lost() == 3
    await consumer.stop()
    await publisher.close()
    await broker.close()


async def test_losses_are_counted_over_the_death_of_both_ends(tmp_path: Path) -> None:
    """A successor goes on with its predecessor's file; the tail counts as well."""
    broker = Lossy()
    mouth, ear = tmp_path / "mouth", tmp_path / "ear"

    said = Ledger.open(mouth)
    publisher = EventPublisher(PublisherConfig(agent_name="mouth", broker=broker, ledger=said))
    first, _ = await consume(broker, Ledger.open(ear))
    await say(publisher, 1, 2)
    await first.drained()
    await first.stop()
    await say(publisher, 3, 4)
    said = Ledger.open(mouth)
    publisher = EventPublisher(PublisherConfig(agent_name="mouth", broker=broker, ledger=said))
    second, heard = await consume(broker, Ledger.open(ear))
    await say(publisher, 5)
    await second.drained()
    broker.losing = True
    await say(publisher, 6, 7, 8)

    views = {"mouth": view_of("mouth", said), "ear": view_of("ear", second.ledger)}
    link = account(views, settled=True).links["mouth>t.x>ear"]
    assert heard == [5]
    assert (link.published, link.lost) == (8, 2 + 3)
    await second.stop()
    await broker.close()


async def test_nothing_is_under_way_to_who_does_not_hear_a_type_any_more(tmp_path: Path) -> None:
    """Else a source that waits for headroom would wait for ever."""
    broker, registry = InMemoryMessageBroker(), EventHandlerRegistry()
    said = Ledger.open(tmp_path / "mouth")
    publisher = EventPublisher(PublisherConfig(agent_name="mouth", broker=broker, ledger=said))
    first, _ = await consume(broker, Ledger.open(tmp_path / "ear"))
    await say(publisher, 1, 2)
    await first.drained()
    await first.stop()
    successor = Ledger.open(tmp_path / "ear")
    second = EventConsumer(
        ConsumerConfig(agent_name="ear", broker=broker, handler_registry=registry, ledger=successor)
    )
    await second.start()
    await say(publisher, 3, 4)

    assert Backlog(tmp_path).under_way() == 0
    views = {"mouth": view_of("mouth", said), "ear": view_of("ear", successor)}
    link = account(views, settled=True).links["mouth>t.x>ear"]
    assert (link.received, link.lost, link.in_flight) == (2, 0, 0)
    await second.stop()
    await publisher.close()
    await broker.close()


async def test_a_publisher_without_a_ledger_is_in_the_account(tmp_path: Path) -> None:
    """`mesh publish` leaves none; whoever heard it knows what became of it."""
    broker, path = Lossy(), tmp_path / "ear"
    publisher = EventPublisher(PublisherConfig(agent_name="cli", broker=broker))
    first, _ = await consume(broker, Ledger.open(path))
    await say(publisher, 1)
    await first.drained()
    broker.losing = True
    await say(publisher, 2)
    broker.losing = False
    await say(publisher, 3)
    await first.drained()
    view = view_of("ear", first.ledger)
    await first.stop()
    await broker.close()

    joined = account({"ear": view})
    link = LinkAccount(published=3, received=2, lost=1, in_flight=0)
    assert joined.links == {"cli>t.x>ear": link}
    assert joined.lost == sum(each.lost for each in view.in_.values())


def test_what_a_retired_agent_did_not_finish_of_a_stranger_is_lost(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "ear")
    ledger.cells[ledger.link("cli", "t.x") + IN_RECEIVED] = 2
    unfinished = account({"ear": view_of("ear", ledger)})
    ledger.set("retired", 1)
    retired = account({"ear": view_of("ear", ledger)})
    ledger.close()

    assert (unfinished.lost, unfinished.in_flight) == (0, 2)
    assert (retired.lost, retired.in_flight) == (2, 0)


async def letter_of_the_first_of_two(
    fail: Callable[[], Awaitable[object]], **options: Any
) -> DeadLetter:
    """Let a handler fail at the first event, see that it handles the second, give the letter."""
    broker, registry = InMemoryMessageBroker(), EventHandlerRegistry()
    done: list[int] = []

    async def handle(event: Event) -> None:
        if event.data["n"] == 1:
            await fail()
        done.append(event.data["n"])

    consumer = EventConsumer(
        ConsumerConfig(agent_name="ear", broker=broker, handler_registry=registry)
    )
    await registry.register("t.x", handle, "ear", "handle", **options)
    await consumer.start()
    publisher = EventPublisher(PublisherConfig(agent_name="mouth", broker=broker))

    await say(publisher, 1, 2)
    await eventually(lambda: done == [2])

    (letter,) = consumer.dead_letters.newest
    await consumer.stop()
    await publisher.close()
    await broker.close()
    return letter


async def test_a_handler_over_its_limit_is_cancelled_and_the_next_event_is_handled() -> None:
    letter = await letter_of_the_first_of_two(asyncio.Event().wait, timeout_s=0.1)

    assert (letter.reason, letter.handler) == ("timeout", "handle")


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()]
)
async def test_whatever_a_handler_raises_the_next_event_is_handled(error: BaseException) -> None:
    async def rude() -> None:
        raise error

    letter = await letter_of_the_first_of_two(rude, max_retries=0)

    assert type(error).__name__ in letter.error


async def test_the_error_of_the_last_try_comes_without_those_before_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """But with what it came from itself."""
    tries: list[int] = []

    async def fail() -> None:
        tries.append(len(tries) + 1)
        try:
            raise KeyError(f"cause {len(tries)}")
        except KeyError:
            raise ValueError(f"try {len(tries)}")  # noqa: B904 - as users do

    await letter_of_the_first_of_two(fail, max_retries=2)

    assert tries == [1, 2, 3]
    text = caplog.text
    assert "cause 3" in text
    assert "try 3" in text
    assert not any(f"{word} {number}" in text for word in ("cause", "try") for number in (1, 2))


async def test_errors_that_come_from_each_other_in_a_ring_are_put_aside_like_others() -> None:
    async def fail() -> None:
        try:
            raise KeyError("one")
        except KeyError as one:
            other = ValueError("other")
            one.__context__, other.__context__ = other, one
            raise ValueError("last")  # noqa: B904 - as users do

    letter = await letter_of_the_first_of_two(fail, max_retries=1)

    assert "last" in letter.error


async def test_each_handler_of_an_event_has_its_own_limit() -> None:
    clock, registry, done = FakeClock(), EventHandlerRegistry(), []

    def slow(name: str) -> Callable[[Event], Awaitable[None]]:
        async def handle(event: Event) -> None:
            await clock.sleep(0.7)
            done.append(name)

        return handle

    for name in ("first", "second"):
        await registry.register("t.x", slow(name), "ear", name, timeout_s=1.0)
    async with InMemoryMessageBroker() as broker:
        consumer = EventConsumer(
            ConsumerConfig(agent_name="ear", broker=broker, handler_registry=registry, clock=clock)
        )
        await consumer.start()
        publisher = EventPublisher(PublisherConfig(agent_name="mouth", broker=broker))
        await say(publisher, 1)
        for _ in range(20):
            await clock.advance(0.1)
        await consumer.drained()
        await consumer.stop()
        await publisher.close()

    assert done == ["first", "second"]
    assert not consumer.dead_letters.newest


async def test_who_swallows_his_cancellation_does_not_end_the_limit_of_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, registry, done = FakeClock(), EventHandlerRegistry(), []

    async def handle(event: Event) -> None:
        try:
            await clock.sleep(60)
        except asyncio.CancelledError:
            if event.data["n"] != 1:
                raise
        done.append(event.data["n"])

    await registry.register("t.x", handle, "ear", "handle", timeout_s=1.0)
    async with InMemoryMessageBroker() as broker:
        consumer = EventConsumer(
            ConsumerConfig(agent_name="ear", broker=broker, handler_registry=registry, clock=clock)
        )
        await consumer.start()
        publisher = EventPublisher(PublisherConfig(agent_name="mouth", broker=broker))
        await say(publisher, 1, 2)
        for _ in range(40):
            await clock.advance(0.1)
        await consumer.drained()
        await consumer.stop()
        await publisher.close()

    assert done == [1]
    (letter,) = consumer.dead_letters.newest
    assert letter.reason == "timeout"
    assert "went on to its end all the same" in caplog.text


@pytest.mark.parametrize("swallows", ["returns", "raises"])
async def test_who_swallows_his_cancellation_is_the_last_to_be_called(swallows: str) -> None:
    begun: list[int] = []

    async def hear(event: Event) -> None:
        begun.append(event.data["n"])
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if swallows == "raises":
                raise ValueError("not now") from None

    async with InMemoryMessageBroker() as broker:
        registry = EventHandlerRegistry()
        consumer = EventConsumer(
            ConsumerConfig(
                agent_name="ear", broker=broker, handler_registry=registry, drain_timeout_s=0.05
            )
        )
        await registry.register("t.x", hear, "ear", "hear")
        await consumer.start()
        publisher = EventPublisher(PublisherConfig(agent_name="mouth", broker=broker))
        await say(publisher, 0, 1, 2)
        await eventually(lambda: begun == [0])

        await asyncio.wait_for(consumer.stop(), 5)

        assert begun == [0]
        await publisher.close()


@pytest.mark.parametrize("count", [1, 2, 3, 20])
@pytest.mark.parametrize("batch", [False, True], ids=["one by one", "in batches"])
async def test_an_agent_that_hears_what_it_says_hears_all_of_it(count: int, *, batch: bool) -> None:
    async with InMemoryMessageBroker() as broker:
        consumer, heard = await consume(broker)
        publisher = EventPublisher(PublisherConfig(agent_name="ear", broker=broker))

        async def say_again(event: Event) -> None:
            left = event.data["n"] - 1
            if left and batch:
                await publisher.publish_batch([("t.x", {"n": left})])
            elif left:
                await publisher.publish("t.x", {"n": left})

        await consumer.registry.register("t.x", say_again, "ear", "say_again")
        await say(publisher, count)
        await eventually(lambda: heard[-1:] == [1])
        await consumer.stop()
        await publisher.close()

    assert heard == list(range(count, 0, -1))
    assert consumer.ledger.lost() == 0


class StoppedClock(FakeClock):
    """Of a process that can be stopped as a whole."""

    async def pass_while_stopped(self, seconds: float) -> None:
        self._elapsed_s += seconds
        await self.advance(0)


async def test_a_handler_is_not_blamed_for_the_time_its_process_was_stopped() -> None:
    broker, clock = InMemoryMessageBroker(), StoppedClock()
    registry = EventHandlerRegistry()
    answered, done = asyncio.Event(), []

    async def ask(event: Event) -> None:
        await answered.wait()
        done.append(event.data["n"])

    consumer = EventConsumer(
        ConsumerConfig(agent_name="ear", broker=broker, handler_registry=registry, clock=clock)
    )
    await registry.register("t.x", ask, "ear", "ask", timeout_s=10)
    await consumer.start()
    publisher = EventPublisher(PublisherConfig(agent_name="mouth", broker=broker))
    await say(publisher, 1)
    await eventually(lambda: consumer.in_flight()[0] == 1)

    await clock.advance(3)
    await clock.pass_while_stopped(300)
    answered.set()
    await eventually(lambda: done == [1])

    assert not consumer.dead_letters.newest
    await consumer.stop()
    await publisher.close()
    await broker.close()


async def test_a_failing_handler_is_tried_again_with_pauses() -> None:
    broker, clock = InMemoryMessageBroker(), FakeClock()
    registry = EventHandlerRegistry()
    tries: list[float] = []

    async def third_time_lucky(event: Event) -> None:
        tries.append(clock.mono_s())
        if len(tries) < 3:
            raise ValueError("not yet")

    consumer = EventConsumer(
        ConsumerConfig(agent_name="ear", broker=broker, handler_registry=registry, clock=clock)
    )
    await registry.register("t.x", third_time_lucky, "ear", "lucky")
    await consumer.start()
    publisher = EventPublisher(PublisherConfig(agent_name="mouth", broker=broker))

    await say(publisher, 1)
    for _ in range(20):
        await clock.advance(0.05)
    await consumer.drained()

    assert len(tries) == 3
    assert tries[2] - tries[1] > tries[1] - tries[0] > 0
    assert consumer.dead_letters.total == 0
    await consumer.stop()
    await publisher.close()
    await broker.close()


async def test_an_urgent_event_overtakes_a_backlog() -> None:
    order: list[str] = []
    go = asyncio.Event()

    class Busy(Agent):
        @on("slow.x", priority=HandlerPriority.LOW)
        async def on_slow(self, event: Event) -> None:
            order.append(f"slow {event.data['n']}")
            await go.wait()

        @on("urgent.x", priority=HandlerPriority.CRITICAL)
        async def on_urgent(self, event: Event) -> None:
            order.append("urgent")

    broker = InMemoryMessageBroker()
    agent = Busy(AgentContext(name="busy", broker=broker))
    await agent.open()
    publisher = EventPublisher(PublisherConfig(agent_name="mouth", broker=broker))
    for number in range(3):
        await publisher.publish("slow.x", {"n": number})
    await publisher.flush()
    await eventually(lambda: order)

    await publisher.publish("urgent.x", {})
    await publisher.flush()
    go.set()
    await agent.consumer.drained()

    assert order == ["slow 0", "urgent", "slow 1", "slow 2"]
    await agent.close()
    await publisher.close()
    await broker.close()


class Deaf(InMemoryMessageBroker):
    """Its journal does not answer for a while."""

    refusals = 0

    async def open_journal(self) -> Journal:
        if self.refusals:
            self.refusals -= 1
            raise BrokerUnavailableError("the store does not answer")
        return await super().open_journal()


async def test_a_journal_that_is_away_at_the_start_is_waited_for_by_who_is_patient() -> None:
    """A process that is started anew whenever it ends gains nothing by ending."""
    event_type("t.kept", durable=True)
    clock = FakeClock()

    def consumer(*, patient: bool) -> EventConsumer:
        return EventConsumer(
            ConsumerConfig(
                agent_name="ear",
                broker=broker,
                handler_registry=EventHandlerRegistry(),
                subscribed_events=["t.kept"],
                patient=patient,
                clock=clock,
            )
        )

    async with Deaf() as broker:
        broker.refusals = 5
        with pytest.raises(BrokerUnavailableError, match="does not answer"):
            await consumer(patient=False).start()
        ear = consumer(patient=True)
        starting = asyncio.create_task(ear.start())
        while not starting.done():
            await clock.advance(1.0)
        await starting
        assert broker.refusals == 0
        await ear.stop()


async def test_what_younger_events_have_overtaken_is_not_heard_out_of_order() -> None:
    """They were counted as lost when the younger ones came, and are: the account stays exact."""
    consumer, heard = await consume(InMemoryMessageBroker())
    for first in (1, 4, 2, 3, 5):
        consumer.live.receive("t.x", claim("mouth", 1, first))
    await consumer.drained()

    view = view_of("ear", consumer.ledger)
    (link,) = view.in_.values()
    assert len(heard) == link.received == link.settled == 3
    assert consumer.ledger.lost() == 2
    assert view.dropped == {"late": 2}
    await consumer.stop()


async def test_a_lie_about_numbers_deafens_nobody() -> None:
    consumer, heard = await consume(InMemoryMessageBroker())
    for first in (1, 2**40, 2, 3):
        consumer.live.receive("t.x", claim("mouth", 1, first))
    await consumer.drained()

    assert len(heard) == 4
    await consumer.stop()
