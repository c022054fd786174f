"""One suite for all fabrics: dead letters go back to the handler that failed, and only there."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from mesh import (
    Agent,
    DeadLetterError,
    DeadLetterQueue,
    DeadQuery,
    Event,
    PayloadError,
    event_type,
    on,
)
from mesh.journal import ALL_DEAD, Record
from tests.plumbing.agents import running, speaking
from tests.plumbing.processes import eventually

if TYPE_CHECKING:
    from mesh.broker import MessageBroker
    from mesh.deadletters import DeadLetter
    from mesh.journal import Journal

ORDER = event_type("stall.order", durable=True)
BILL = event_type("stall.bill", durable=True)
LOOK = event_type("stall.look")


class Priced(msgspec.Struct):
    price: float


PRICED = event_type("stall.priced", durable=True, schema=Priced)


class Shop(Agent):
    """Two handlers of one type; the second fails while the class is broken."""

    broken = True
    topic = ORDER

    async def setup(self) -> None:
        self.seen: list[Any] = []
        self.billed: list[Any] = []

    @on(ORDER, LOOK)
    async def sees(self, event: Event) -> None:
        self.seen.append(event.data["n"])

    @on(ORDER, LOOK)
    async def bills(self, event: Event) -> None:
        if type(self).broken:
            raise ValueError("no printer")
        self.billed.append(event.data["n"])
        await self.publish(BILL, {"n": event.data["n"]})


@pytest.fixture
def shop() -> type[Shop]:
    """Give a class of this test's own, broken."""
    return type("Shop", (Shop,), {})


async def dead(broker: MessageBroker, count: int) -> list[DeadLetter]:
    """Wait until there are so many letters."""
    journal = await broker.open_journal()

    async def there_are() -> bool:
        return len(await journal.dead()) == count

    await eventually(there_are)
    return await journal.dead()


async def queue_of(broker: MessageBroker) -> DeadLetterQueue:
    return DeadLetterQueue(await broker.open_journal())


async def said(journal: Journal, topic: str) -> list[str]:
    return [stored.id for stored in await journal.scan([topic])]


@pytest.mark.parametrize("topic", [ORDER, LOOK])
async def test_a_replay_repairs_the_work_of_the_handler_that_failed_and_of_no_other(
    broker: MessageBroker, shop: type[Shop], topic: str
) -> None:
    """Live events come back as well as durable ones; other agents hear nothing."""
    other = type("Other", (Shop,), {"broken": False})
    async with (
        running(broker, shop) as stall,
        running(broker, other, "other") as neighbour,
        speaking(broker) as till,
    ):
        for number in range(3):
            await till.publish(topic, {"n": number}, key="k")
        await till.flush()
        await dead(broker, 3)
        await eventually(lambda: neighbour.billed == [0, 1, 2])
        shop.broken = False

        report = await (await queue_of(broker)).replay(DeadQuery(handler="bills"))
        await eventually(lambda: stall.billed == [0, 1, 2])

        assert (report.matched, report.replayed, report.refused) == (3, 3, [])
        assert report.sent == {("shop", "bills"): 3}
        assert stall.seen == neighbour.seen == [0, 1, 2]
        assert neighbour.billed == [0, 1, 2]
        await dead(broker, 0)


@pytest.mark.parametrize("topic", [ORDER, LOOK])
async def test_an_agent_that_is_down_hears_a_replay_when_it_is_back(
    broker: MessageBroker, shop: type[Shop], topic: str
) -> None:
    async with running(broker, shop), speaking(broker) as till:
        await till.publish(topic, {"n": 1})
        await till.flush()
        await dead(broker, 1)
    shop.broken = False

    await (await queue_of(broker)).replay(ALL_DEAD)

    async with running(broker, shop) as stall:
        await eventually(lambda: stall.billed == [1])
        assert stall.seen == []


class Viewer(Agent):
    """Hears live types only; fails at odd numbers while the class is broken."""

    broken = True

    async def setup(self) -> None:
        self.seen: list[Any] = []

    @on(LOOK)
    async def on_look(self, event: Event) -> None:
        if type(self).broken and event.data["n"] % 2:
            raise ValueError("odd")
        self.seen.append(event.data["n"])


async def test_an_agent_of_live_types_opens_the_journal_only_for_a_replay(
    broker: MessageBroker,
) -> None:
    kind: type[Viewer] = type("Viewer", (Viewer,), {})
    async with running(broker, kind) as viewer, speaking(broker) as till:
        await till.publish(LOOK, {"n": 2})
        await till.flush()
        await eventually(lambda: viewer.seen == [2])
        assert not broker.has_journal

        for number in (1, 3):
            await till.publish(LOOK, {"n": number}, key="k")
        await till.flush()
        await dead(broker, 2)
        kind.broken = False
        await (await queue_of(broker)).replay(ALL_DEAD, limit=1)
        await eventually(lambda: viewer.seen == [2, 1])
        await (await queue_of(broker)).replay(ALL_DEAD)
        await eventually(lambda: viewer.seen == [2, 1, 3])

        assert not viewer.has_state


async def test_an_agent_of_live_types_that_is_down_hears_a_replay_when_it_is_back(
    broker: MessageBroker,
) -> None:
    kind: type[Viewer] = type("Viewer", (Viewer,), {})
    async with running(broker, kind), speaking(broker) as till:
        await till.publish(LOOK, {"n": 1})
        await till.flush()
        await dead(broker, 1)
    kind.broken = False
    await (await queue_of(broker)).replay(ALL_DEAD)

    for heard in ([1], []):
        async with running(broker, kind) as viewer, speaking(broker) as till:
            await eventually(partial(_has_seen, viewer, heard))
            await till.publish(LOOK, {"n": 2})
            await till.flush()
            await eventually(partial(_has_seen, viewer, [*heard, 2]))


def _has_seen(viewer: Any, numbers: list[int]) -> bool:
    return bool(viewer.seen == numbers)


async def test_a_replay_that_fails_again_comes_back_with_its_history(
    broker: MessageBroker, shop: type[Shop]
) -> None:
    async with running(broker, shop, consumer_max_retries=1) as stall, speaking(broker) as till:
        event = await till.publish(ORDER, {"n": 1})
        queue = await queue_of(broker)
        (first,) = await dead(broker, 1)
        for count in (2, 3):
            await queue.replay(ALL_DEAD)
            await eventually(partial(_has_failed, stall, count))
            await stall.consumer.drained()
        (last,) = await dead(broker, 1)

        assert last.id == first.id == f"{event.id}/shop/bills"
        assert (first.attempts, last.attempts) == (2, 6)
        assert last.first_at_s == first.first_at_s
        assert last.at_s > first.at_s
        assert [each.error for each in last.history] == ["ValueError: no printer"] * 2
        assert last.history[0].at_s == first.at_s
        assert stall.seen == [1]


def _has_failed(agent: Agent, times: int) -> bool:
    return len(agent.consumer.dead_letters.newest) == times


async def test_replaying_twice_has_one_effect(broker: MessageBroker, shop: type[Shop]) -> None:
    """Also when the letter was not removed, because the replaying process died in between."""
    async with running(broker, shop) as stall, speaking(broker) as till:
        await till.publish(ORDER, {"n": 1})
        (letter,) = await dead(broker, 1)
        shop.broken = False
        queue, journal = await queue_of(broker), await broker.open_journal()
        for _ in range(2):
            await queue.replay(ALL_DEAD)
            await eventually(lambda: stall.billed == [1])
            await stall.consumer.drained()
            await journal.bury([letter])
        await queue.replay(ALL_DEAD)
        await till.publish(ORDER, {"n": 2})
        await eventually(lambda: stall.billed == [1, 2])
        await stall.consumer.drained()

        assert len(await said(journal, BILL)) == 2


async def test_a_dry_run_changes_nothing(broker: MessageBroker, shop: type[Shop]) -> None:
    async with running(broker, shop), speaking(broker) as till:
        await till.publish(ORDER, {"n": 1})
        before = await dead(broker, 1)
        shop.broken = False

        report = await (await queue_of(broker)).replay(ALL_DEAD, dry_run=True)

        assert (report.dry_run, report.sent) == (True, {("shop", "bills"): 1})
        assert await dead(broker, 1) == before


async def test_a_limit_takes_the_oldest(broker: MessageBroker, shop: type[Shop]) -> None:
    async with running(broker, shop) as stall, speaking(broker) as till:
        for number in range(4):
            await till.publish(ORDER, {"n": number}, key="k")
        await dead(broker, 4)
        shop.broken = False

        await (await queue_of(broker)).replay(ALL_DEAD, limit=2, rate_per_s=math.inf)
        await eventually(lambda: stall.billed == [0, 1])

        await dead(broker, 2)


async def test_what_has_expired_is_refused_unless_one_insists(
    broker: MessageBroker, shop: type[Shop]
) -> None:
    shop.broken = False
    async with running(broker, shop) as stall, speaking(broker) as till:
        await till.publish(ORDER, {"n": 1}, expires_in_s=-1)
        (letter,) = await dead(broker, 1)
        queue = await queue_of(broker)

        refused = await queue.replay(ALL_DEAD)
        insisted = await queue.replay(ALL_DEAD, ignore_expiry=True)
        await eventually(lambda: stall.seen == stall.billed == [1])

        assert (letter.reason, letter.handler) == ("expired", None)
        assert refused.replayed == 0
        assert "it expired at" in refused.refused[0].why
        assert insisted.sent == {("shop", None): 1}


async def test_what_went_in_circles_begins_anew(broker: MessageBroker, shop: type[Shop]) -> None:
    shop.broken = False
    async with running(broker, shop, max_hops=3) as stall, speaking(broker) as till:
        event = till.make_event(ORDER, {"n": 1})
        await till.publish_event(msgspec.structs.replace(event, hops=9))
        (letter,) = await dead(broker, 1)

        await (await queue_of(broker)).replay(ALL_DEAD)
        await eventually(lambda: stall.seen == stall.billed == [1])

        assert letter.reason == "hops"


async def test_bytes_that_are_no_event_are_replayed_once_edited_into_one(
    broker: MessageBroker, shop: type[Shop]
) -> None:
    shop.broken = False
    async with running(broker, shop) as stall:
        await (await broker.open_journal()).append([Record(ORDER, "stranger", b"junk")])
        (letter,) = await dead(broker, 1)
        queue = await queue_of(broker)

        refused = await queue.replay(ALL_DEAD)
        edited = await queue.edit(letter.id, {"n": 7})
        await queue.replay(ALL_DEAD)
        await eventually(lambda: stall.seen == stall.billed == [7])

        assert "no event" in refused.refused[0].why
        assert edited.original == b"junk"


async def test_an_edited_event_goes_to_the_handler_that_failed(
    broker: MessageBroker, shop: type[Shop]
) -> None:
    async with running(broker, shop) as stall, speaking(broker) as till:
        event = await till.publish(ORDER, {"n": 1}, key="k")
        (letter,) = await dead(broker, 1)
        shop.broken = False
        queue = await queue_of(broker)

        edited = await queue.edit(letter.id, {"n": 2})
        await queue.replay(DeadQuery(ids=frozenset({letter.id})))
        await eventually(lambda: stall.billed == [2])

        assert stall.seen == [1]
        assert (await queue.ls()) == []
        assert edited.event == {**event.to_dict(), "data": {"n": 2}}
        assert edited.history[-1].error == 'edited; it was {"n": 1}'
        assert edited.attempts == letter.attempts


async def test_an_edit_is_held_against_the_schema(broker: MessageBroker) -> None:
    class Reader(Agent):
        @on(PRICED)
        async def on_priced(self, priced: Priced) -> None:
            raise ValueError("no")

    async with running(broker, Reader), speaking(broker) as till:
        await till.publish(PRICED, Priced(1.0))
        (letter,) = await dead(broker, 1)
        queue = await queue_of(broker)

        with pytest.raises(PayloadError, match="does not fit Priced"):
            await queue.edit(letter.id, {"price": "much"})
        with pytest.raises(DeadLetterError, match="there is no dead letter"):
            await queue.edit("nobody", {"price": 2.0})
        assert await queue.show(letter.id) == letter


async def test_a_handler_that_is_gone_loses_nothing(
    broker: MessageBroker, shop: type[Shop]
) -> None:
    """Renamed or removed meanwhile: the letter comes back and says so."""

    class Renamed(Agent):
        @on(ORDER)
        async def prints_bills(self, event: Event) -> None:
            """Do what `bills` did."""

    async with running(broker, shop), speaking(broker) as till:
        await till.publish(ORDER, {"n": 1})
        (letter,) = await dead(broker, 1)
    queue = await queue_of(broker)
    for kind in (Renamed, type("Empty", (Agent,), {})):
        async with running(broker, kind) as agent:
            await queue.replay(ALL_DEAD)
            await eventually(partial(_has_failed, agent, 1))
            await agent.consumer.drained()
        (again,) = await dead(broker, 1)

        assert (again.id, again.handler) == (letter.id, "bills")
        assert again.reason == "unheard"
        assert "no handler 'bills' of stall.order" in again.error


@pytest.mark.parametrize("topic", [ORDER, LOOK])
async def test_what_could_not_be_published_is_published_again(
    broker: MessageBroker, shop: type[Shop], topic: str
) -> None:
    shop.broken = False
    async with running(broker, shop) as stall, speaking(broker) as till:
        event = till.make_event(topic, {"n": 1})
        letter = till.dead_letters.letter(event, "unpublished", "the fabric was away", attempts=4)
        journal = await broker.open_journal()
        await journal.bury([letter])

        report = await DeadLetterQueue(journal, till).replay(ALL_DEAD)
        await eventually(lambda: stall.seen == stall.billed == [1])

        assert report.published == {topic: 1}
        await dead(broker, 0)


async def test_bytes_and_moments_of_a_payload_come_back_as_such(
    broker: MessageBroker, shop: type[Shop]
) -> None:
    shop.topic = ORDER
    moment = datetime(2024, 5, 6, tzinfo=UTC)
    async with running(broker, shop) as stall, speaking(broker) as till:
        await till.publish(ORDER, {"n": [b"\0\xff", moment]})
        await dead(broker, 1)
        shop.broken = False

        await (await queue_of(broker)).replay(ALL_DEAD)
        await eventually(lambda: bool(stall.billed))

        assert stall.billed == stall.seen
        assert stall.billed[0][0] == b"\0\xff"


async def test_letters_that_failed_alike_are_one_group(
    broker: MessageBroker, shop: type[Shop]
) -> None:
    async with running(broker, shop), speaking(broker) as till:
        for number in range(3):
            await till.publish(ORDER, {"n": number})
        await till.publish(ORDER, {"n": 9}, expires_in_s=-1)
        letters = await dead(broker, 4)
        failed, expired = await (await queue_of(broker)).groups()

        assert (failed.agent, failed.handler, failed.reason) == ("shop", "bills", "failed")
        assert (failed.error, failed.count) == ("ValueError: no printer", 3)
        assert (expired.handler, expired.reason, expired.count) == (None, "expired", 1)
        assert failed.newest_s == max(each.at_s for each in letters if each.handler)
        assert failed.oldest_s == min(each.at_s for each in letters if each.handler)


async def test_a_purge_takes_what_is_meant(broker: MessageBroker, shop: type[Shop]) -> None:
    async with running(broker, shop), speaking(broker) as till:
        for number in range(3):
            await till.publish(ORDER, {"n": number}, key="k")
        await dead(broker, 3)
        queue = await queue_of(broker)

        assert await queue.purge(DeadQuery(agent="nobody")) == 0
        assert await queue.purge(DeadQuery(error="ValueError"), limit=2) == 2
        (left,) = await queue.ls()
        assert left.event is not None
        assert left.event["data"] == {"n": 2}
