"""One suite for all fabrics: what durable types promise to whoever writes agents."""

from __future__ import annotations

import asyncio
import logging
import secrets
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import pytest

from mesh import (
    Agent,
    Event,
    HandlerPriority,
    Reject,
    Retry,
    RetryPolicy,
    Skip,
    event_type,
    every,
    on,
    source,
)
from mesh.errors import ClosedError, ConfigurationError
from mesh.events import set_delivery
from mesh.journal import Record
from tests.plumbing import agents
from tests.plumbing.agents import speaking
from tests.plumbing.processes import eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from mesh.broker import MessageBroker
    from mesh.journal import Delivery, Journal, Step

ORDER = event_type("shop.order", durable=True)
BILL = event_type("shop.bill", durable=True)
LOOK = event_type("shop.look")


class Typed(msgspec.Struct):
    n: int


TYPED = event_type("shop.typed", durable=True, schema=Typed)


# As many tries as an agent has by default; elsewhere a failure is wanted at once
running = partial(agents.running, consumer_max_retries=3)


async def _is(look: Callable[[], Awaitable[object]], wanted: object) -> bool:
    return await look() == wanted


async def bills(journal: Journal) -> list[str]:
    return [stored.id for stored in await journal.scan([BILL])]


class Seen(Agent):
    """Remembers what it hears."""

    async def setup(self) -> None:
        self.seen: list[int] = []

    @on(ORDER)
    async def on_order(self, event: Event) -> None:
        self.seen.append(event.data["n"])


async def test_what_was_said_while_an_agent_was_down_is_heard(broker: MessageBroker) -> None:
    async with running(broker, Seen):
        pass
    async with speaking(broker) as till:
        for number in range(5):
            await till.publish(ORDER, {"n": number})
    async with running(broker, Seen) as agent:
        await eventually(lambda: agent.seen == [0, 1, 2, 3, 4])


@pytest.mark.parametrize("event_type", [ORDER, LOOK])
async def test_no_handler_sees_what_its_neighbour_did_to_the_payload(
    broker: MessageBroker, event_type: str
) -> None:
    class Rude(Agent):
        async def setup(self) -> None:
            self.seen: list[dict[str, Any]] = []

        @on(event_type, priority=HandlerPriority.HIGH)
        async def change(self, event: Event) -> None:
            event.data["lines"].append("changed")
            event.data["n"] = 99

        @on(event_type)
        async def look(self, event: Event) -> None:
            self.seen.append(event.data)

    async with running(broker, Rude) as agent, speaking(broker) as till:
        await till.publish(event_type, {"n": 1, "lines": []})
        await eventually(lambda: agent.seen == [{"n": 1, "lines": []}])


@pytest.mark.parametrize("event_type", [ORDER, LOOK])
async def test_each_try_and_the_dead_letter_have_the_payload_as_it_came(
    broker: MessageBroker, event_type: str
) -> None:
    class Careless(Agent):
        async def setup(self) -> None:
            self.seen: list[dict[str, Any]] = []

        @on(event_type, retry=RetryPolicy(max_retries=2, first_delay_s=0.01))
        async def take_apart(self, event: Event) -> None:
            self.seen.append(dict(event.data))
            raise ValueError(event.data.pop("n"))

    async with running(broker, Careless) as agent, speaking(broker) as till:
        await till.publish(event_type, {"n": 1})
        await eventually(lambda: bool(agent.consumer.dead_letters.newest))
        assert agent.seen == [{"n": 1}] * 3
        (letter,) = agent.consumer.dead_letters.newest
        assert letter.event is not None
        assert letter.event["data"] == {"n": 1}


@pytest.mark.parametrize("event_type", [ORDER, LOOK])
async def test_an_error_whose_text_cannot_be_written_is_put_aside_like_others(
    broker: MessageBroker, event_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Between pytest's own processes such a text cannot travel either
    caplog.set_level(logging.CRITICAL, "mesh")

    class Opener(Seen):
        @on(event_type, max_retries=0)
        async def open_file(self, event: Event) -> None:
            raise ValueError(f"cannot open \udcff{event.data['n']}.csv")

    async with running(broker, Opener) as agent, speaking(broker) as till:
        for number in range(3):
            await till.publish(event_type, {"n": number})
        journal = await broker.open_journal()

        async def kept() -> list[str]:
            return sorted(letter.error for letter in await journal.dead())

        wanted = [f"ValueError: cannot open \\udcff{number}.csv" for number in range(3)]
        await eventually(lambda: _is(kept, wanted))
        assert not agent.consumer.is_stuck()


async def test_state_that_teardown_writes_is_kept(broker: MessageBroker) -> None:
    class Tidy(Seen):
        async def teardown(self) -> None:
            self.ctx.state["closed"] = True

    async with running(broker, Tidy):
        pass
    async with running(broker, Tidy) as again:
        assert again.ctx.state["closed"] is True


async def test_what_a_failed_try_left_running_changes_nothing(broker: MessageBroker) -> None:
    class Clerk(Seen):
        left: asyncio.Task[None]
        refused = 0

        @on(LOOK)
        async def look(self, event: Event) -> None:
            """Has other handlers than ORDER."""

        @on(TYPED, retry=RetryPolicy(max_retries=1, first_delay_s=0.01))
        async def bill(self, event: Event) -> None:
            if self.ctx.attempt == 1:
                self.go = asyncio.Event()
                self.left = asyncio.create_task(self.late(event))
                raise OSError("till busy")
            self.go.set()
            await self.left
            self.ctx.state["n"] = self.ctx.state.get("n", 0) + 1
            await self.publish(BILL, {"n": event.data["n"]})

        async def late(self, event: Event) -> None:
            await self.go.wait()
            for forbidden in (self._late_publish, self._late_state):
                with pytest.raises(ClosedError, match="a task that it left running"):
                    await forbidden(event)
                self.refused += 1

        async def _late_publish(self, event: Event) -> None:
            await self.publish(BILL, {"n": event.data["n"]})

        async def _late_state(self, event: Event) -> None:
            self.ctx.state["n"] = 100

    async with running(broker, Clerk) as agent, speaking(broker) as till:
        await till.publish(TYPED, {"n": 1})
        journal = await broker.open_journal()
        await eventually(lambda: agent.refused == 2)
        await agent.consumer.drained()
        assert len(await bills(journal)) == 1
        assert agent.ctx.state["n"] == 1


@pytest.mark.parametrize("event_type", [ORDER, LOOK])
async def test_what_expires_between_two_tries_is_put_aside(
    broker: MessageBroker, event_type: str
) -> None:
    class Busy(Agent):
        tries = 0

        @on(event_type)
        async def try_it(self, event: Event) -> None:
            self.tries += 1
            raise Retry(after_s=1.7, reason="busy")

    async with running(broker, Busy) as agent, speaking(broker) as till:
        await till.publish(event_type, {"n": 1}, expires_in_s=1.5)
        await eventually(lambda: bool(agent.consumer.dead_letters.newest))
        (letter,) = agent.consumer.dead_letters.newest

    assert agent.tries == 1
    assert (letter.reason, letter.attempts) == ("expired", 1)
    assert letter.handler == "try_it"
    assert "after 1 try: Retry: busy" in letter.error


@pytest.mark.parametrize("event_type", [ORDER, LOOK])
async def test_an_event_that_expires_in_one_handler_does_not_reach_the_next(
    broker: MessageBroker, event_type: str
) -> None:
    class Slow(Agent):
        async def setup(self) -> None:
            self.late = 0

        @on(event_type, priority=HandlerPriority.HIGH)
        async def first(self, event: Event) -> None:
            expires_at = event.expires_at or datetime.now(UTC)
            await eventually(lambda: expires_at < datetime.now(UTC))

        @on(event_type)
        async def second(self, event: Event) -> None:
            self.late += 1

    async with running(broker, Slow) as agent, speaking(broker) as till:
        await till.publish(event_type, {"n": 1}, expires_in_s=1.0)
        await eventually(lambda: bool(agent.consumer.dead_letters.newest))
        (letter,) = agent.consumer.dead_letters.newest

    assert agent.late == 0
    assert (letter.reason, letter.handler) == ("expired", "second")


async def test_a_new_agent_begins_now_unless_it_says_earliest(broker: MessageBroker) -> None:
    class Historian(Seen):
        start = "earliest"

    async with speaking(broker) as till:
        await till.publish(ORDER, {"n": 1})
        async with (
            running(broker, Seen, "fresh") as fresh,
            running(broker, Historian, "old") as old,
        ):
            await till.publish(ORDER, {"n": 2})
            await eventually(lambda: (fresh.seen, old.seen) == ([2], [1, 2]))


async def test_every_group_hears_every_event(broker: MessageBroker) -> None:
    async with running(broker, Seen, "one") as one, running(broker, Seen, "two") as two:
        async with speaking(broker) as till:
            count = await till.publish_batch([(ORDER, {"n": number}) for number in range(700)])
        assert count == 700
        await eventually(lambda: one.seen == two.seen == list(range(700)))


async def test_published_means_kept(broker: MessageBroker) -> None:
    """It returned: it is in the journal, whoever hears it."""
    async with speaking(broker) as till:
        event = await till.publish(ORDER, {"n": 1}, key="k")
    journal = await broker.open_journal()

    (stored,) = await journal.scan([ORDER])
    assert stored.id == event.id


async def test_what_a_handler_says_is_kept_with_its_event_or_not_at_all(
    broker: MessageBroker,
) -> None:
    """A try that fails leaves nothing, and the next publishes the same event, not another."""

    class Clerk(Agent):
        tries = 0

        @on(ORDER)
        async def on_order(self, event: Event) -> None:
            await self.publish(BILL, {"n": event.data["n"]})
            self.ctx.state["bills"] = self.ctx.state.get("bills", 0) + 1
            self.tries += 1
            if self.tries < 3:
                raise OSError("the printer is out of paper")

    async with running(broker, Clerk) as clerk, speaking(broker) as till:
        await till.publish(ORDER, {"n": 1})
        await eventually(lambda: clerk.tries == 3)
        await clerk.consumer.drained()
        journal = await broker.open_journal()

        assert len(await bills(journal)) == 1
        assert clerk.ctx.state["bills"] == 1


async def test_handling_an_event_again_publishes_the_same_events_again(
    broker: MessageBroker,
) -> None:
    """Ids of what a handler says are derived from what it heard: the journal knows them."""

    class Clerk(Agent):
        async def setup(self) -> None:
            self.ids: list[str] = []

        @on(ORDER)
        async def on_order(self, event: Event) -> None:
            for number in range(2):
                self.ids.append((await self.publish(BILL, {"n": number})).id)
            if self.ctx.attempt == 1:
                raise OSError("again")

    async with running(broker, Clerk) as clerk, speaking(broker) as till:
        event = await till.publish(ORDER, {"n": 1})
        await eventually(lambda: len(clerk.ids) == 4)
        await clerk.consumer.drained()

        assert clerk.ids[:2] == clerk.ids[2:]
        assert len(set(clerk.ids)) == 2
        assert event.id not in clerk.ids


async def test_state_goes_on_where_it_was(broker: MessageBroker) -> None:
    class Counter(Agent):
        async def setup(self) -> None:
            self.began_with = self.ctx.state.get("total", 0)

        @on(ORDER)
        async def on_order(self, event: Event) -> None:
            self.ctx.state["total"] = self.ctx.state.get("total", 0) + event.data["n"]

    async with speaking(broker) as till:
        for expected in (0, 5, 10):
            async with running(broker, Counter) as counter:
                assert counter.began_with == expected
                await till.publish(ORDER, {"n": 5})
                await eventually(partial(_has_counted_to, counter, expected + 5))


def _has_counted_to(counter: Agent, total: int) -> bool:
    return bool(counter.ctx.state.get("total") == total)


async def test_state_can_be_removed_and_listed(broker: MessageBroker) -> None:
    class Notes(Agent):
        async def setup(self) -> None:
            await self.keep_state()

    async with running(broker, Notes) as notes:
        state = notes.ctx.state
        state["a"], state["b"] = [1, {"x": None}], b"raw"
        del state["a"]
        assert dict(state) == {"b": b"raw"}
        with pytest.raises(KeyError):
            state["a"]
    async with running(broker, Notes) as notes:
        assert dict(notes.ctx.state) == {"b": b"raw"}


async def test_an_agent_without_durable_types_is_told_that_it_has_no_state(
    broker: MessageBroker,
) -> None:
    class Live(Agent):
        @on(LOOK)
        async def on_look(self, event: Event) -> None:
            """Do nothing."""

    async with running(broker, Live) as live:
        assert not live.has_state
        with pytest.raises(ConfigurationError, match="keep_state"):
            live.ctx.state["x"] = 1


async def test_an_event_that_cannot_be_handled_is_a_dead_letter_and_its_neighbours_go_on(
    broker: MessageBroker,
) -> None:
    class Picky(Seen):
        @on(ORDER)
        async def checks(self, event: Event) -> None:
            if event.data["n"] == 1:
                await self.publish(BILL, {"n": 1})
                raise ValueError("an unlucky number")

    async with running(broker, Picky, consumer_max_retries=1) as picky, speaking(broker) as till:
        for number in range(3):
            await till.publish(ORDER, {"n": number})
        await eventually(lambda: picky.seen == [0, 1, 2])
        await picky.consumer.drained()
        journal = await broker.open_journal()
        (letter,) = await journal.dead()

        assert (letter.handler, letter.reason, letter.attempts) == ("checks", "failed", 2)
        assert "an unlucky number" in letter.error
        assert await bills(journal) == []
        assert {view.pending for view in await journal.groups()} == {0}


async def test_a_handler_says_how_its_event_shall_end(broker: MessageBroker) -> None:
    class Frank(Seen):
        @on(ORDER)
        async def on_order(self, event: Event) -> None:
            number = event.data["n"]
            await self.publish(BILL, {"n": number})
            if number == 1:
                raise Skip("none of mine")
            if number == 2:
                raise Reject("no such account")
            if number == 3 and self.ctx.attempt < 3:
                raise Retry(after_s=0.001, reason="busy")
            self.seen.append(number)

    async with running(broker, Frank) as frank, speaking(broker) as till:
        for number in range(4):
            await till.publish(ORDER, {"n": number})
        await eventually(lambda: frank.seen == [0, 3])
        await frank.consumer.drained()
        journal = await broker.open_journal()
        (letter,) = await journal.dead()

        assert (letter.reason, letter.attempts) == ("rejected", 1)
        assert "no such account" in letter.error
        assert len(await bills(journal)) == 2


async def test_only_the_errors_that_a_policy_names_are_tried_again(broker: MessageBroker) -> None:
    class Careful(Agent):
        tries = 0

        @on(ORDER, retry=RetryPolicy(max_retries=5, first_delay_s=0.001, on=(OSError,)))
        async def on_order(self, event: Event) -> None:
            self.tries += 1
            raise OSError("busy") if self.tries < 3 else ValueError("wrong")

    async with running(broker, Careful) as careful, speaking(broker) as till:
        await till.publish(ORDER, {"n": 1})
        await eventually(lambda: bool(careful.consumer.dead_letters.newest))

        assert careful.tries == 3


async def test_what_came_too_late_or_goes_in_circles_reaches_no_handler(
    broker: MessageBroker,
) -> None:
    class Echo(Seen):
        @on(ORDER)
        async def again(self, event: Event) -> None:
            await self.publish(ORDER, {"n": event.data["n"] + 1})

    async with running(broker, Echo, max_hops=3) as echo, speaking(broker) as till:
        await till.publish(ORDER, {"n": 100}, expires_in_s=-1)
        await till.publish(ORDER, {"n": 0})
        journal = await broker.open_journal()
        await eventually(lambda: len(echo.consumer.dead_letters.newest) == 2)
        await echo.consumer.drained()

        assert echo.seen == [0, 1, 2, 3]
        assert sorted(letter.reason for letter in await journal.dead()) == ["expired", "hops"]


async def test_an_event_that_ends_its_process_is_put_aside_after_five_deliveries(
    broker: MessageBroker,
) -> None:
    """The count is kept outside the process; here the process is a journal consumer that dies."""
    journal = await broker.open_journal()
    async with running(broker, Seen):
        pass
    async with speaking(broker) as till:
        await till.publish(ORDER, {"n": 1})
        for _ in range(5):
            # Another name each time: this journal knows that its own consumers are not dead
            name = secrets.token_hex(4)
            assert await journal.read("shop", name, wait_s=5)
            await journal.free("shop", name)
        async with running(broker, Seen) as agent:
            await till.publish(ORDER, {"n": 2})
            await eventually(lambda: agent.seen == [2])
            await agent.consumer.drained()

    (letter,) = await journal.dead()
    assert letter.reason == "poison"


@pytest.mark.parametrize("frame", [b"", b"junk", b"\x81", b'{"specversion": "1.0"}', b"[]"])
async def test_bytes_that_are_no_event_are_put_aside_and_block_nobody(
    broker: MessageBroker, frame: bytes
) -> None:
    async with running(broker, Seen) as agent, speaking(broker) as till:
        journal = await broker.open_journal()
        await journal.append([Record(ORDER, "stranger", frame)])
        await till.publish(ORDER, {"n": 1})
        await eventually(lambda: agent.seen == [1])
        await agent.consumer.drained()

        (letter,) = await journal.dead()
        assert letter.frame == frame
        assert {view.pending for view in await journal.groups()} == {0}


async def test_typed_payloads_arrive_typed(broker: MessageBroker) -> None:
    class Reader(Agent):
        async def setup(self) -> None:
            self.seen: list[Typed] = []

        @on(TYPED)
        async def on_typed(self, typed: Typed, event: Event) -> None:
            self.seen.append(typed)

    async with running(broker, Reader) as reader, speaking(broker) as till:
        await till.publish(TYPED, Typed(7))
        await eventually(lambda: reader.seen == [Typed(7)])


async def test_each_key_keeps_its_order_under_concurrency(broker: MessageBroker) -> None:
    class Wide(Agent):
        concurrency = 4

        async def setup(self) -> None:
            self.seen: dict[str, list[int]] = {"a": [], "b": [], "c": []}

        @on(ORDER)
        async def on_order(self, event: Event) -> None:
            await asyncio.sleep(0)
            assert event.key is not None
            self.seen[event.key].append(event.data["n"])

    async with running(broker, Wide) as wide, speaking(broker) as till:
        for number in range(60):
            await till.publish(ORDER, {"n": number}, key="abc"[number % 3])
        await eventually(lambda: sum(map(len, wide.seen.values())) == 60)

        assert all(numbers == sorted(numbers) for numbers in wide.seen.values())


async def test_what_rests_on_a_refused_step_is_handled_anew(broker: MessageBroker) -> None:
    """Handlers run ahead of commits, and read what the refused step has changed."""

    class Count(Agent):
        @on(ORDER)
        async def add(self, event: Event) -> None:
            self.ctx.state["n"] = self.ctx.state.get("n", 0) + 1

    async with running(broker, Count) as agent, speaking(broker) as till:
        journal = await broker.open_journal()
        commit, is_refused = journal.commit, False

        async def without_the_first(group: str, consumer: str, steps: Sequence[Step]) -> list[Step]:
            nonlocal is_refused
            if not is_refused and len(steps) > 1:
                await journal.release(group, consumer, steps[0].acks)
                is_refused = True
            return await commit(group, consumer, steps)

        journal.commit = without_the_first  # type: ignore[method-assign]
        await till.publish_batch([(ORDER, {"n": number}) for number in range(300)])
        # Not what the agent believes: at first that rests on the step that is refused
        right = {"n": msgspec.msgpack.encode(300)}
        await eventually(partial(_is, partial(journal.load_state, "shop"), right))
        await agent.consumer.drained()

        assert is_refused
        assert agent.ctx.state["n"] == 300
        assert await journal.load_state("shop") == right
        assert not any(view.pending for view in await journal.groups() if view.topic == ORDER)
        assert agent.consumer.unsettled() == 0


@pytest.mark.parametrize("overflow", ["drop_oldest", "latest"])
async def test_no_overflow_policy_drops_a_durable_event(
    broker: MessageBroker, overflow: str
) -> None:
    class Slow(Seen):
        buffer_size = 2

        @on(ORDER)
        async def on_order(self, event: Event) -> None:
            await asyncio.sleep(0)
            self.seen.append(event.data["n"])

    Slow.overflow = overflow
    async with running(broker, Slow) as slow, speaking(broker) as till:
        await till.publish_batch([(ORDER, {"n": number}) for number in range(300)])
        await eventually(lambda: slow.seen == list(range(300)))


@pytest.mark.parametrize("error", [ClosedError("a successor"), RuntimeError("a bug of ours")])
async def test_who_hears_no_durable_events_any_more_asks_for_a_restart(
    broker: MessageBroker, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks healthy otherwise: the loop turns, and live events are handled."""

    async def fail(*_arguments: object, **_options: object) -> list[Delivery]:
        raise error

    async with running(broker, Seen) as agent:
        assert not agent.consumer.is_stuck()
        monkeypatch.setattr(await broker.open_journal(), "read", fail)
        async with speaking(broker) as till:
            # Ends the read that waits
            await till.publish(ORDER, {"n": 1})
        await eventually(agent.consumer.is_stuck)


async def test_a_source_can_make_a_step_of_its_own(broker: MessageBroker) -> None:
    """What it published and how far it got is kept together."""

    class Reader(Agent):
        async def setup(self) -> None:
            await self.keep_state()

        @source
        async def read(self) -> None:
            for row in range(self.ctx.state.get("row", 0), 3):
                async with self.step() as ctx:
                    await self.publish(ORDER, {"n": row})
                    ctx.state["row"] = row + 1
            with pytest.raises(ValueError, match="torn"):
                await self.tear()

        async def tear(self) -> None:
            async with self.step() as ctx:
                await self.publish(ORDER, {"n": 99})
                ctx.state["row"] = 99
                raise ValueError("torn")

    async with running(broker, Seen) as seen:
        for _ in range(2):
            async with running(broker, Reader, "reader") as reader:
                await reader.sources_done.wait()
                assert reader.ctx.state["row"] == 3
        await eventually(lambda: seen.seen == [0, 1, 2])


async def test_what_was_written_last_is_kept_whether_in_a_step_or_outside(
    broker: MessageBroker,
) -> None:
    """Else a successor would find a state that this agent had left behind."""

    class Scribe(Agent):
        found: ClassVar[list[dict[str, Any]]] = []

        async def setup(self) -> None:
            await self.keep_state()
            self.found.append(dict(self.ctx.state))
            await self.write("early")

        @source
        async def scribble(self) -> None:
            await self.write("late")

        async def write(self, name: str) -> None:
            self.ctx.state[name] = 1
            async with self.step() as ctx:
                ctx.state[name] = 2
            self.ctx.state[f"{name} too"] = 3

    for _ in range(2):
        async with running(broker, Scribe, "scribe") as scribe:
            await scribe.sources_done.wait()

    kept = {"early": 2, "early too": 3, "late": 2, "late too": 3}
    assert Scribe.found == [{}, kept]


async def test_a_timer_publishes_durably_too(broker: MessageBroker) -> None:
    class Clockwork(Agent):
        @every(0.01)
        async def tick(self) -> None:
            await self.publish(ORDER, {"n": 1})

    async with running(broker, Seen) as seen, running(broker, Clockwork, "clock"):
        await eventually(lambda: len(seen.seen) >= 2)


@pytest.mark.parametrize(
    ("durable", "live", "kept"),
    [(("*",), (), True), (("shop.*",), (), True), (("shop.look",), (), True), ((), (), False)],
)
async def test_settings_can_make_types_durable(
    broker: MessageBroker, durable: tuple[str, ...], live: tuple[str, ...], kept: bool
) -> None:
    set_delivery(durable, live)
    async with speaking(broker) as till:
        await till.publish(LOOK, {"n": 1})
        await till.publish("agent.heartbeat", {})
    journal = await broker.open_journal()

    assert [stored.topic for stored in await journal.scan()] == ([LOOK] if kept else [])


async def test_a_durable_type_can_be_made_live_on_purpose_only(broker: MessageBroker) -> None:
    set_delivery((), (ORDER,))
    async with running(broker, Seen) as seen, speaking(broker) as till:
        await till.publish(ORDER, {"n": 1})
        await till.flush()
        await eventually(lambda: seen.seen == [1])
    journal = await broker.open_journal()

    assert await journal.scan() == []


async def test_events_name_their_cause_through_the_journal(broker: MessageBroker) -> None:
    class Clerk(Agent):
        @on(ORDER)
        async def on_order(self, event: Event) -> None:
            await self.publish(BILL, {"n": 1})

    class Payer(Agent):
        async def setup(self) -> None:
            self.seen: list[Event] = []

        @on(BILL)
        async def on_bill(self, event: Event) -> None:
            self.seen.append(event)

    async with (
        running(broker, Clerk, "clerk"),
        running(broker, Payer, "payer") as payer,
        speaking(broker) as till,
    ):
        order = await till.publish(ORDER, {"n": 1}, key="k")
        await eventually(lambda: bool(payer.seen))

        (bill,) = payer.seen
        assert (bill.causation_id, bill.correlation_id) == (order.id, order.correlation_id)
        assert (bill.hops, bill.source_agent) == (1, "clerk")


async def test_a_handler_has_a_key_for_effects_outside(broker: MessageBroker) -> None:
    class Payer(Agent):
        async def setup(self) -> None:
            self.keys: list[str] = []

        @on(ORDER)
        async def pay(self, event: Event) -> None:
            self.keys.append(self.ctx.idempotency_key)
            if len(self.keys) == 1:
                raise OSError("again")

    async with running(broker, Payer) as payer, speaking(broker) as till:
        event = await till.publish(ORDER, {"n": 1})
        await eventually(lambda: len(payer.keys) == 2)

        assert set(payer.keys) == {f"{event.id}/shop/pay"}
