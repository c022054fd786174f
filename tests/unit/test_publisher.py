"""Publishers: batches, numbering, back-pressure, giving up."""

from __future__ import annotations

import asyncio
import math
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from mesh import (
    BackpressureError,
    ClosedError,
    Event,
    EventPublisher,
    EventType,
    InMemoryMessageBroker,
    PayloadError,
    PublisherConfig,
    event_type,
)
from mesh.causality import current_event
from mesh.codec import MAX_BATCH_BYTES, MAX_BATCH_EVENTS, decode_frame
from mesh.ledger import Ledger
from mesh.ledger_views import view_of
from tests.plumbing.processes import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from mesh.testing import FakeClock


class Reading(msgspec.Struct, frozen=True):
    value: float


READING = event_type("test.publisher.reading", schema=Reading)


class Fabric(InMemoryMessageBroker):
    """Keeps what it is given; can be full."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[tuple[str, bytes]] = []
        self.full = False

    def try_send(self, topic: str, frame: bytes) -> bool:
        if self._closed:
            self._require_open(connected=True)
        if not self.full:
            self.frames.append((topic, frame))
        return not self.full

    def batches(self, topic: str) -> list[list[object]]:
        """Give what left: a list of values a frame."""
        return [
            [event.data["value"] for event in decode_frame(name, frame).events]
            for name, frame in self.frames
            if name == topic
        ]


@pytest.fixture
async def fabric() -> AsyncIterator[Fabric]:
    async with Fabric() as broker:
        yield broker


def publisher_on(fabric: Fabric, **options: object) -> EventPublisher:
    return EventPublisher(PublisherConfig(agent_name="mouth", broker=fabric, **options))  # type: ignore[arg-type]


async def test_the_first_event_of_a_turn_leaves_at_once_and_the_rest_together(
    fabric: Fabric,
) -> None:
    publisher = publisher_on(fabric)

    for number in range(5):
        await publisher.publish(READING, Reading(number))
    assert fabric.batches(READING) == [[0]]
    await eventually(lambda: len(fabric.frames) == 2)

    assert fabric.batches(READING) == [[0], [1, 2, 3, 4]]
    await publisher.close()


@pytest.mark.parametrize(("wire_format", "together"), [("json", 1), ("msgpack", 256)])
async def test_how_many_events_share_a_frame_is_known(
    fabric: Fabric, wire_format: str, together: int
) -> None:
    """The fabric holds so many frames: who goes by events has to know how many are in one."""
    publisher = publisher_on(fabric, wire_format=wire_format)
    assert publisher.events_a_frame() == math.inf

    await publisher.publish_batch([(READING, {"value": n}) for n in range(256)])

    assert [publisher.events_a_frame() for _ in range(2)] == [together, together]
    await publisher.close()


@pytest.mark.parametrize("at_once", [True, False])
async def test_no_batch_is_over_its_limits_and_all_is_in_order(
    fabric: Fabric, at_once: bool
) -> None:
    publisher = publisher_on(fabric)
    count = 3 * MAX_BATCH_EVENTS
    if at_once:
        events = [(READING, {"value": n, "text": "x" * 300}) for n in range(count)]
        assert await publisher.publish_batch(events) == count
    else:
        for number in range(count):
            await publisher.publish(READING, {"value": number, "text": "x" * 300})
    await publisher.flush()

    sent = fabric.batches(READING)
    assert [value for batch in sent for value in batch] == list(range(count))
    assert max(map(len, sent)) <= MAX_BATCH_EVENTS
    assert max(len(frame) for _, frame in fabric.frames) < 2 * MAX_BATCH_BYTES
    numbers = [(one.first, one.count) for one in (decode_frame(*each) for each in fabric.frames)]
    assert [first for first, _ in numbers] == [
        1 + sum(count for _, count in numbers[:at]) for at in range(len(numbers))
    ]
    await publisher.close()


async def test_a_batch_with_one_bad_payload_is_not_published_at_all(fabric: Fabric) -> None:
    publisher = publisher_on(fabric)

    with pytest.raises(PayloadError, match=r"test\.publisher\.reading.*`float`.*`str`.*\$\.value"):
        await publisher.publish_batch([(READING, Reading(1)), (READING, {"value": "high"})])
    await publisher.flush()

    assert fabric.frames == []
    await publisher.close()


async def test_a_batch_of_many_types_keeps_the_order_of_each(fabric: Fabric) -> None:
    publisher = publisher_on(fabric)

    await publisher.publish_batch(
        [("a.a", {"value": 1}), ("b.b", {"value": 2}), ("a.a", {"value": 3})]
    )

    assert fabric.batches("a.a") == [[1, 3]]
    assert fabric.batches("b.b") == [[2]]
    await publisher.close()


async def test_what_is_changed_after_publishing_has_left_as_it_was(fabric: Fabric) -> None:
    publisher = publisher_on(fabric)
    payload = {"value": 1}

    await publisher.publish("a.a", {"value": 0})
    event = await publisher.publish("a.a", payload)
    payload["value"] = 99
    await publisher.flush()

    assert fabric.batches("a.a") == [[0], [1]]
    assert event.data == {"value": 1}
    await publisher.close()


async def test_a_fabric_that_stays_full_is_told_and_counted(fabric: Fabric) -> None:
    ledger = Ledger.in_memory()
    publisher = publisher_on(fabric, publish_timeout_s=0.05, ledger=ledger)
    fabric.full = True

    async def say_more_than_a_batch() -> None:
        for number in range(10 * MAX_BATCH_EVENTS):
            await publisher.publish("a.a", {"value": number})

    with pytest.raises(BackpressureError, match=r"memory took no event on 'a\.a' for 0\.05 s"):
        await say_more_than_a_batch()
    fabric.full = False
    await publisher.publish("a.a", {"value": -1})
    await publisher.flush()

    lost = view_of("mouth", ledger).dropped["unsent"]
    assert lost == MAX_BATCH_EVENTS
    (batch,) = [decode_frame(*each) for each in fabric.frames]
    assert batch.first == lost + 1, "the numbers of what was lost are spent, so it shows as a gap"
    await publisher.close()


async def test_a_publisher_waits_for_room(fabric: Fabric) -> None:
    publisher = publisher_on(fabric)
    fabric.full = True
    waiting = asyncio.create_task(publisher.publish_batch([("a.a", {"value": 1})]))
    await asyncio.sleep(0)
    assert not waiting.done()

    fabric.full = False
    fabric.resume_all()

    assert await waiting == 1
    assert fabric.batches("a.a") == [[1]]
    await publisher.close()


async def test_retrying_ends_with_a_dead_letter(
    fabric: Fabric, fake_clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = publisher_on(fabric, publish_timeout_s=0.01, clock=fake_clock)
    fabric.full = True

    trying = asyncio.create_task(
        publisher.publish_with_retry(
            event_type=EventType.SYSTEM_ALERT, data={"value": 1}, max_retries=2, retry_delay_ms=50
        )
    )
    for _ in range(2):
        await fake_clock.until_sleepers(1)
        await fake_clock.advance(1)

    assert await trying is False
    (letter,) = publisher.dead_letters.newest
    assert (letter.reason, letter.attempts, letter.topic) == (
        "unpublished",
        3,
        EventType.SYSTEM_ALERT,
    )
    assert "memory took no event" in letter.error
    assert "could not publish system.alert after 3 tries and keeps it" in caplog.text
    await publisher.close()


async def test_a_callers_mistake_is_not_tried_again(fabric: Fabric) -> None:
    publisher = publisher_on(fabric)

    with pytest.raises(PayloadError):
        await publisher.publish_with_retry(READING, {"value": "high"})
    await publisher.close()
    with pytest.raises(ClosedError):
        await publisher.publish_with_retry(READING, Reading(1))

    assert fabric.frames == []


@pytest.mark.parametrize("bad", [7, "x" * 600, "\ud800"])
async def test_a_key_that_cannot_travel_is_refused(fabric: Fabric, bad: str) -> None:
    publisher = publisher_on(fabric)

    with pytest.raises(PayloadError, match="key"):
        await publisher.publish(READING, Reading(1), key=bad)

    await publisher.flush()
    assert fabric.frames == []
    await publisher.close()


async def test_a_complete_event_can_be_published_again(fabric: Fabric) -> None:
    publisher = publisher_on(fabric)
    event = Event(READING, {"value": 1.5}, "somebody", key="k")

    await publisher.publish_event(event)
    await publisher.flush()

    (again,) = decode_frame(*fabric.frames[0]).events
    assert again == event
    with pytest.raises(PayloadError):
        await publisher.publish_event(Event(READING, {"value": "high"}, "somebody"))
    await publisher.close()


async def test_what_one_event_of_a_batch_has_and_others_have_not_arrives(fabric: Fabric) -> None:
    publisher = publisher_on(fabric)
    cause = Event("a.cause", {}, "somebody", correlation_id="c-1", id="e-1", hops=3)

    async def say(odd: dict[str, Any], *, caused: bool) -> list[Event]:
        said = [await publisher.publish("a.a", {"value": n}) for n in range(100)]
        current_event.set(cause if caused else None)
        said.append(await publisher.publish("a.a", {"value": 100}, **odd))
        current_event.set(None)
        said += [await publisher.publish("a.a", {"value": n}) for n in range(101, 200)]
        await publisher.flush()
        return said

    said = await say({}, caused=True)
    for odd in ({}, {"key": "k"}, {"correlation_id": "mine"}):
        said += await say(odd, caused=False)
    await publisher.publish_event(cause := msgspec.structs.replace(cause, type="a.a"))
    await publisher.flush()

    heard = [event for frame in fabric.frames for event in decode_frame(*frame).events]
    assert heard == [*said, cause]
    assert (said[100].causation_id, said[100].hops) == ("e-1", 4)
    await publisher.close()


@pytest.mark.parametrize("pairs", [[("a.a",)], [("a.a", {}, 3)], {"a.a": {}}, ["ab"], [None]])
async def test_what_is_no_pair_is_refused_with_its_value(fabric: Fabric, pairs: Any) -> None:
    publisher = publisher_on(fabric)

    with pytest.raises(PayloadError, match=r"takes pairs \(event type, payload\), got"):
        await publisher.publish_batch(pairs)
    assert await publisher.publish_batch([["a.a", {"value": 1}]]) == 1  # type: ignore[list-item]
    await publisher.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"source_agent": 5},
        {"source_agent": "\ud800"},
        {"id": object()},
        {"correlation_id": None},
        {"key": 5},
        {"timestamp": "now"},
        {"timestamp": datetime(2026, 1, 1)},  # noqa: DTZ001 - that is the mistake
        {"expires_at": 5},
        {"hops": -1},
    ],
)
async def test_an_event_of_somebody_elses_that_cannot_travel_is_refused_at_once(
    fabric: Fabric, wrong: dict[str, Any]
) -> None:
    """In the batch it would hold up all others of its type."""
    publisher = publisher_on(fabric)
    (name,) = wrong
    fields: dict[str, Any] = {"type": "a.a", "data": {"value": 1}, "source_agent": "x"}

    await publisher.publish("a.a", {"value": 0})
    with pytest.raises(PayloadError, match=name):
        await publisher.publish_event(Event(**(fields | wrong)))
    await publisher.publish("a.a", {"value": 2})
    await publisher.flush()

    assert [value for batch in fabric.batches("a.a") for value in batch] == [0, 2]
    await publisher.close()


@pytest.mark.parametrize("seconds", [math.nan, math.inf, 1e300, "5"])
async def test_a_moment_that_never_comes_is_refused(fabric: Fabric, seconds: Any) -> None:
    publisher = publisher_on(fabric)

    with pytest.raises(PayloadError, match="expires_in_s must be a number of seconds"):
        await publisher.publish("a.a", {"value": 0}, expires_in_s=seconds)
    await publisher.close()


@pytest.mark.parametrize("bad", ["\x01" * 200_000, math.nan])
async def test_a_batch_with_one_payload_that_json_cannot_carry_is_not_published_at_all(
    fabric: Fabric, bad: object
) -> None:
    publisher = publisher_on(fabric, wire_format="json")

    with pytest.raises(PayloadError):
        await publisher.publish_batch([("a.a", {"value": 1}), ("b.b", {"value": bad})])

    assert fabric.frames == []
    await publisher.close()


async def test_a_frame_of_long_keys_is_not_too_large_to_be_heard(fabric: Fabric) -> None:
    publisher = publisher_on(fabric)
    for number in range(600):
        await publisher.publish(
            READING, Reading(number), key=f"{number:0512}", correlation_id=f"{number:0512}"
        )
    await publisher.close()

    assert [value for batch in fabric.batches(READING) for value in batch] == list(range(600))
    batches = [decode_frame(READING, frame) for _, frame in fabric.frames]
    assert [each.first for each in batches[1:]] == [
        each.first + each.count for each in batches[:-1]
    ]
