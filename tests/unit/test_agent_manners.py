"""What agents do with the odd things that users write."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from mesh import (
    Agent,
    AgentContext,
    Event,
    EventHandlerRegistry,
    HandlerSignatureError,
    InMemoryMessageBroker,
    PayloadError,
    PublisherConfig,
    RetryPolicy,
    event_type,
    every,
    on,
    source,
)
from mesh.errors import ClosedError
from mesh.filters import where
from mesh.middleware.deduplicate import once_per_id
from mesh.middleware.filter import only
from mesh.testing import AgentHarness, FakeClock
from tests.plumbing.processes import eventually

if TYPE_CHECKING:
    import mesh  # noqa: TC004 - that is what a test is about

event_type("manners.kept", durable=True)


async def cancelled_from_within() -> None:
    raise asyncio.CancelledError


# -- sources and timers ----------------------------------------------------------------------------


async def test_a_source_that_awaits_what_was_cancelled_has_failed_and_not_ended() -> None:
    class Feed(Agent):
        @source
        async def feed(self) -> None:
            await cancelled_from_within()

    async with InMemoryMessageBroker() as broker:
        agent = Feed(AgentContext(name="feed", broker=broker))
        agent.context.gate.set()
        await agent.open()
        with pytest.raises(ExceptionGroup) as failed:
            await agent.work()
        await agent.close()

    assert failed.group_contains(RuntimeError, match="feed awaited what was cancelled")
    assert not agent.sources_done.is_set()


async def test_a_timer_that_awaits_what_was_cancelled_is_called_again(
    fake_clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[None] = []

    class Clockwork(Agent):
        @every(1.0)
        async def tick(self) -> None:
            calls.append(None)
            await cancelled_from_within()

    async with AgentHarness(Clockwork, clock=fake_clock):
        for _ in range(3):
            await fake_clock.advance(1.0)

    assert len(calls) == 3
    assert "timer tick failed; it is called again" in caplog.text


# -- handlers --------------------------------------------------------------------------------------


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize("topic", ["manners.said", "manners.kept"])
async def test_an_error_without_a_text_ends_nothing_but_its_event(topic: str) -> None:
    class Ear(Agent):
        heard: list[int]

        async def setup(self) -> None:
            self.heard = []

        @on(topic, max_retries=1, retry=None)
        async def hear(self, event: Event) -> None:
            if not event.data["n"]:
                raise Unspeakable
            self.heard.append(event.data["n"])

    async with AgentHarness(Ear) as harness:
        await harness.say(topic, {"n": 0})
        await harness.say(topic, {"n": 1})
        await eventually(lambda: harness.agent.heard == [1])


class Fruit(msgspec.Struct):
    kind: str


async def test_one_name_that_only_type_checkers_know_hides_no_other() -> None:
    """As linters want it: an import that only annotations use stands under TYPE_CHECKING."""
    heard: list[object] = []

    class Ear(Agent):
        @on("a.b")
        async def hear(self, fruit: Fruit, event: mesh.Event) -> NobodyKnows:  # type: ignore[name-defined]  # noqa: F821
            heard.append((fruit, event.data))

    async with AgentHarness(Ear) as harness:
        await harness.say("a.b", {"kind": "fig"})

    assert heard == [(Fruit("fig"), {"kind": "fig"})]


def test_a_class_that_its_module_does_not_know_is_refused_in_words() -> None:
    class Local(msgspec.Struct):
        kind: str

    with pytest.raises(HandlerSignatureError, match="'Local', which its module does not know: def"):

        class Ear(Agent):
            @on("a.b")
            async def hear(self, local: Local) -> None: ...


def test_a_type_that_one_method_hears_twice_is_refused() -> None:
    with pytest.raises(HandlerSignatureError, match=r"hear hears a\.b twice; one @on for each"):

        class Ear(Agent):
            @on("a.b", filter=lambda event: bool(event.data["x"]))
            @on("a.b", filter=lambda event: bool(event.data["y"]))
            async def hear(self, event: Event) -> None: ...


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timeout_s": "x"}, "timeout_s='x': must be seconds above 0"),
        ({"timeout_s": float("nan")}, "timeout_s=nan"),
        ({"max_retries": 1.5}, "max_retries=1.5: must be a whole number"),
        ({"retry": 5}, "retry=5: must be a RetryPolicy"),
        ({"filter": 5}, "filter=5: must be a function"),
        ({"middleware": [3]}, r"middleware=\[3\]: 3 is no middleware; one is `async def layer"),
        ({"middleware": once_per_id()}, "middleware=<function.*: must be a list of middleware"),
        ({"timeout_s": -1, "max_retries": "x"}, "timeout_s=-1.*; max_retries='x'"),
    ],
)
def test_limits_that_make_no_sense_are_refused_when_the_class_is_made(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):

        class Ear(Agent):
            @on("a.b", **options)
            async def hear(self, event: Event) -> None: ...


async def is_new(event: Event, since: int = 0) -> bool:
    return bool(event.data["at"] > since)


class Newer:
    async def __call__(self, event: Event) -> bool:
        return await is_new(event)


@pytest.mark.parametrize("ask", [is_new, partial(is_new, since=5), Newer()])
async def test_a_filter_that_would_have_to_be_awaited_is_refused(ask: Any) -> None:
    """A coroutine is true: everything would pass."""
    words = r"filter=.*: must answer at once: write `def`, not `async def`"

    with pytest.raises(ValueError, match=words):

        class Ear(Agent):
            @on("a.b", filter=ask)
            async def hear(self, event: Event) -> None: ...

    with pytest.raises(ValueError, match=words):
        only(ask)
    with pytest.raises(ValueError, match=words):
        where(ask)


async def test_what_is_no_middleware_is_refused_wherever_it_is_given() -> None:
    async def hear(event: Event) -> None: ...

    wrong: Any = [once_per_id(), 3]
    words = r"middleware=\[.*, 3\]: 3 is no middleware"
    broker = InMemoryMessageBroker()

    with pytest.raises(ValueError, match=words):
        EventHandlerRegistry(wrong)
    with pytest.raises(ValueError, match=words):
        await EventHandlerRegistry().register("a.b", hear, "ear", "h", middleware=wrong)
    with pytest.raises(ValueError, match=words):
        PublisherConfig(agent_name="mouth", broker=broker, middleware=wrong)
    with pytest.raises(ValueError, match=f"^{words}"):
        AgentContext(name="ear", broker=broker, middleware=wrong)
    with pytest.raises(ValueError, match=f"^publisher_{words}"):
        AgentContext(name="ear", broker=broker, publisher_middleware=wrong)


def test_no_pause_is_beyond_its_limit_however_many_tries() -> None:
    policy = RetryPolicy(factor=1e6, max_retries=10_000, max_delay_s=5.0, jitter=0)

    assert policy.delay_s(10_000) == 5.0


async def test_no_room_at_all_is_refused() -> None:
    class Ear(Agent):
        buffer_size = 0

    async with InMemoryMessageBroker() as broker:
        with pytest.raises(ValueError, match="buffer_size must be at least 1, was 0"):
            Ear(AgentContext(name="ear", broker=broker))


async def test_events_of_the_empty_key_keep_their_order() -> None:
    class Ear(Agent):
        concurrency = 8
        heard: list[int]

        async def setup(self) -> None:
            self.heard = []

        @on("manners.said")
        async def hear(self, event: Event) -> None:
            for _ in range(5 - event.data["n"] % 5):
                await asyncio.sleep(0)
            self.heard.append(event.data["n"])

    async with AgentHarness(Ear) as harness:
        for number in range(50):
            await harness.say("manners.said", {"n": number}, key="")
        await harness.agent.consumer.drained()
        assert harness.agent.heard == list(range(50))


async def test_deduplication_of_a_whole_agent_is_for_each_handler() -> None:
    heard: list[str] = []

    class Ear(Agent):
        @on("manners.said")
        async def one(self, event: Event) -> None:
            heard.append("one")

        @on("manners.said")
        async def two(self, event: Event) -> None:
            heard.append("two")

    async with InMemoryMessageBroker() as broker:
        context = AgentContext(name="ear", broker=broker, middleware=[once_per_id()])
        ear, mouth = Ear(context), Agent(AgentContext(name="mouth", broker=broker))
        await ear.open()
        event = mouth.publisher.make_event("manners.said", {})
        for _ in range(2):
            await mouth.publisher.publish_event(event)
        await mouth.close()
        await ear.consumer.drained()
        await ear.close()

    assert sorted(heard) == ["one", "two"]


# -- state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["\ud800", None, (1, 2), 5, "x" * 1000])
async def test_state_is_called_by_texts(name: Any) -> None:
    refused: list[Exception] = []

    class Keeper(Agent):
        @on("manners.kept")
        async def keep(self, event: Event) -> None:
            try:
                self.ctx.state[name] = 1
            except PayloadError as error:
                refused.append(error)

    async with AgentHarness(Keeper) as harness:
        await harness.say("manners.kept", {})
        await eventually(lambda: bool(refused))

    assert "the name of state" in str(refused[0])


async def test_what_a_task_writes_after_its_handlers_step_is_kept_or_refused() -> None:
    refused: list[Exception] = []

    class Keeper(Agent):
        left: asyncio.Task[None]
        go_on: asyncio.Event

        @on("manners.kept")
        async def keep(self, event: Event) -> None:
            self.go_on = asyncio.Event()
            self.ctx.state["within"] = 1
            self.left = asyncio.create_task(self.write_later(self.ctx))

        async def write_later(self, over: Any) -> None:
            await self.go_on.wait()
            self.ctx.state["later"] = 2
            try:
                over.state["lost"] = 3
            except ClosedError as error:
                refused.append(error)

    async with AgentHarness(Keeper) as harness:
        await harness.say("manners.kept", {})
        await eventually(lambda: hasattr(harness.agent, "go_on"))
        await harness.agent.consumer.drained()
        harness.agent.go_on.set()
        await harness.agent.left
        await harness.agent.consumer.drained()
        journal = await harness.agent.context.broker.open_journal()
        state = await journal.load_state(harness.agent.name)

    assert set(state) == {"within", "later"}
    assert "the step of this context is over" in str(refused[0])
