"""Dead letters on their way back: at which pace, what travels, what is never lost."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from mesh import codec
from mesh.brokers.memory import InMemoryMessageBroker
from mesh.dead_letter_queue import DeadLetterQueue
from mesh.deadletters import Attempt, DeadLetters, Earlier, go_on
from mesh.errors import BrokerUnavailableError, ConfigurationError, FrameError
from mesh.events import Event
from mesh.journal import ALL_DEAD, DeadQuery, Record
from mesh.journals.memory import MemoryJournal
from mesh.replay import event_of, read_replay, replay_record
from mesh.replay_bell import ReplayBell
from mesh.testing import FakeClock
from mesh.topics import replay_topic
from tests.plumbing.journals import letter
from tests.plumbing.processes import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from mesh.deadletters import DeadLetter


@pytest.fixture
async def journal() -> AsyncIterator[MemoryJournal]:
    async with MemoryJournal() as made:
        yield made


def failed(name: str, payload: dict[str, Any] | None = None, **changes: Any) -> DeadLetter:
    event = Event("order", payload or {"n": name}, "feed", id=name)
    made = DeadLetters("risk").letter(
        event, "failed", ValueError("no"), handler="check", attempts=4
    )
    return msgspec.structs.replace(made, **changes)


def event_in(letter: DeadLetter) -> Event:
    event = event_of(letter)
    assert event is not None
    return event


async def came(journal: MemoryJournal) -> list[Event]:
    """Give what came back to the group `risk`, in order."""
    stored = await journal.scan([replay_topic("risk")])
    wrapped = [codec.decode_frame(each.topic, each.frame).events[0] for each in stored]
    return [read_replay(each)[0] for each in wrapped]


async def test_letters_leave_at_the_pace_that_is_asked_for(journal: MemoryJournal) -> None:
    clock = FakeClock()
    await journal.bury([failed(f"e{number}", at_s=float(number)) for number in range(6)])
    queue = DeadLetterQueue(journal, clock=clock)

    replaying = asyncio.create_task(queue.replay(ALL_DEAD, rate_per_s=2))
    for sent in range(1, 6):
        await clock.until_sleepers(1)
        assert len(await came(journal)) == sent
        await clock.advance(0.5)
    report = await replaying

    assert report.replayed == 6
    assert [event.id for event in await came(journal)] == [f"e{number}" for number in range(6)]


async def test_a_pace_of_nothing_is_refused(journal: MemoryJournal) -> None:
    for rate in (0, -1, math.nan):
        with pytest.raises(ValueError, match="rate_per_s must be above 0"):
            await DeadLetterQueue(journal).replay(ALL_DEAD, rate_per_s=rate)


async def test_letters_of_agents_that_are_gone_are_refused_by_name(journal: MemoryJournal) -> None:
    """They would wait for ever; who has a group, or is named, is there. A replay makes none."""
    await journal.declare("audit", ["order"])
    await journal.bury([failed(name, agent=name) for name in ("risk", "audit", "fills")])
    queue = DeadLetterQueue(journal)

    report = await queue.replay(ALL_DEAD, agents=["fills"], rate_per_s=math.inf)

    assert sorted(agent for agent, _ in report.sent) == ["audit", "fills"]
    (refused,) = report.refused
    assert refused.id == (await queue.ls())[0].id
    assert refused.why.startswith("no agent and no group is called 'risk': it would wait for ever")
    assert (await queue.replay(ALL_DEAD)).replayed == 1
    await journal.bury([failed("again", agent="risk")])
    assert (await queue.replay(ALL_DEAD, agents=[])).replayed == 0


async def test_a_letter_that_fails_before_it_is_removed_stays() -> None:
    """A handler that fails at once writes the letter anew while the replay is on its way."""

    class Hasty(MemoryJournal):
        async def append(self, records: Sequence[Record]) -> int:
            new = await super().append(records)
            await self.bury([failed("e1", at_s=99.0, attempts=8)])
            return new

    async with Hasty() as journal:
        await journal.bury([failed("e1")])
        await DeadLetterQueue(journal).replay(ALL_DEAD)

        (left,) = await journal.dead()
        assert left.attempts == 8


async def test_nothing_is_removed_when_the_journal_refuses_the_replay() -> None:
    class Full(MemoryJournal):
        async def append(self, records: Sequence[Record]) -> int:
            raise BrokerUnavailableError("full")

    async with Full() as journal:
        await journal.bury([failed("e1")])
        with pytest.raises(BrokerUnavailableError):
            await DeadLetterQueue(journal).replay(ALL_DEAD)

        assert len(await journal.dead()) == 1


async def test_what_fails_again_is_no_part_of_the_same_replay() -> None:
    """Else a handler that is still broken would be called for ever."""

    class Broken(MemoryJournal):
        async def exhume(self, letters: Any) -> int:
            gone = await super().exhume(letters)
            await self.bury([msgspec.structs.replace(each, at_s=each.at_s + 1) for each in letters])
            return gone

    async with Broken() as journal:
        await journal.bury([failed(f"e{number}") for number in range(3)])
        report = await DeadLetterQueue(journal).replay(ALL_DEAD, rate_per_s=math.inf)

        assert report.replayed == 3
        assert len(await journal.dead()) == 3


async def test_ten_thousand_mixed_letters_only_one_group_goes(journal: MemoryJournal) -> None:
    await journal.bury(
        [
            failed(f"e{number}", handler=f"handler{number % 10}", at_s=float(number))
            for number in range(10_000)
        ]
    )
    queue = DeadLetterQueue(journal)

    report = await queue.replay(DeadQuery(handler="handler3"), rate_per_s=math.inf)

    assert report.sent == {("risk", "handler3"): 1000}
    assert await queue.count() == 9000
    assert [event.id for event in await came(journal)] == [f"e{n}" for n in range(3, 10_000, 10)]


async def test_the_oldest_travels_with_its_history(journal: MemoryJournal) -> None:
    before = tuple(Attempt(at_s=float(at), error=f"try {at} {'x' * 999}") for at in range(30))
    told = failed("e1", history=before, at_s=100.0, first_at_s=0.0)

    record = replay_record(told, event_in(told), FakeClock().now())
    event, earlier = read_replay(codec.decode_frame(record.topic, record.frame).events[0])

    assert event == event_of(told)
    assert (earlier.letter, earlier.handler, earlier.attempts) == (told.id, "check", 4)
    assert [each.at_s for each in earlier.history] == [*map(float, range(11, 30)), 100.0]
    assert all(len(each.error) <= 300 for each in earlier.history)


async def test_a_large_event_leaves_its_history_behind_and_is_replayed() -> None:
    before = tuple(Attempt(at_s=float(at), error="x" * 300) for at in range(20))
    told = failed("e1", {"blob": "x" * (252 * 1024 - 20)}, history=before)

    record = replay_record(told, event_in(told), FakeClock().now())
    event, earlier = read_replay(codec.decode_frame(record.topic, record.frame).events[0])

    assert len(event.data["blob"]) == 252 * 1024 - 20
    assert len(earlier.history) < 20


def test_a_letter_without_a_frame_has_its_event_all_the_same() -> None:
    told = failed("e1")

    assert event_of(msgspec.structs.replace(told, frame=None)) == event_of(told)
    assert event_of(msgspec.structs.replace(told, event=None)) is None


def test_the_record_of_a_letter_is_known_again_until_it_fails_anew() -> None:
    told = failed("e1")
    event, now = event_in(told), FakeClock().now()
    again = msgspec.structs.replace(told, attempts=5)

    assert replay_record(told, event, now).id == replay_record(told, event, now).id
    assert replay_record(told, event, now).id != replay_record(again, event, now).id


@pytest.mark.parametrize("data", [{}, {"topic": 1}, {"frame": b"x", "topic": "order"}])
def test_what_is_no_replay_is_no_event(data: dict[str, Any]) -> None:
    with pytest.raises(FrameError):
        read_replay(Event("_replay.risk", data, "anybody"))


def test_a_failure_goes_on_where_the_letter_was() -> None:
    earlier = Earlier(
        letter="x",
        handler="check",
        attempts=4,
        first_at_s=1.0,
        history=(Attempt(at_s=1.0, error="a"),),
    )
    next_page = go_on(letter("y", attempts=2), earlier)

    assert (next_page.id, next_page.attempts, next_page.first_at_s) == ("x", 6, 1.0)
    assert next_page.history == earlier.history
    assert go_on(letter("y", handler="other"), earlier) == letter("y", handler="other")


async def test_a_name_that_can_have_no_topic_is_refused(journal: MemoryJournal) -> None:
    await journal.bury([failed("e1", agent="not a topic")])

    report = await DeadLetterQueue(journal).replay(ALL_DEAD)

    assert "is not a topic" in report.refused[0].why


async def test_a_bell_rings_once_and_waits_for_a_journal_that_is_away() -> None:
    clock = FakeClock()
    tries: list[int] = []

    async def begin() -> None:
        tries.append(1)
        if len(tries) < 3:
            raise BrokerUnavailableError("away")

    async with InMemoryMessageBroker() as broker:
        bell = ReplayBell(broker, "risk", clock, begin)
        await bell.hang()
        assert tries == []
        journal = await broker.open_journal()
        for _ in range(2):
            await journal.append([Record(replay_topic("risk"), "r1", b"frame")])
        await clock.until_sleepers(1)
        await clock.advance(5.0)
        await eventually(lambda: len(tries) == 3)
        await bell.take_down()

    assert len(tries) == 3


async def test_a_bell_gives_up_where_there_can_be_no_journal(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def begin() -> None:
        raise ConfigurationError("a journal of another version")

    async with InMemoryMessageBroker() as broker:
        bell = ReplayBell(broker, "risk", FakeClock(), begin)
        bell.receive("", b"")
        await eventually(lambda: "another version" in caplog.text)
        await bell.take_down()
