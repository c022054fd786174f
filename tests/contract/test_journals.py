"""One suite for all journals: what durable delivery promises."""

from __future__ import annotations

import asyncio
import os
import random
from functools import partial
from typing import TYPE_CHECKING

import pytest

from mesh.errors import ClosedError, ConfigurationError, NotConnectedError
from mesh.journal import (
    MAX_UNSETTLED,
    PARTITIONS,
    DeadCount,
    DeadQuery,
    Record,
    Step,
    partition_of,
)
from tests.plumbing.journals import (
    JournalFabric,
    MemoryFabric,
    RedisFabric,
    SQLiteFabric,
    drain,
    ids,
    letter,
    numbered,
    records,
    settle,
)
from tests.plumbing.processes import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from mesh.journal import Delivery, Journal


FABRICS = [
    "memory",
    "sqlite",
    pytest.param("redis", marks=pytest.mark.redis),
    pytest.param("redis cluster", marks=[pytest.mark.redis, pytest.mark.redis_cluster]),
]


@pytest.fixture(params=FABRICS)
async def fabric(request: pytest.FixtureRequest, rundir: Path) -> AsyncIterator[JournalFabric]:
    made: JournalFabric
    if request.param == "memory":
        made = MemoryFabric()
    elif request.param == "sqlite":
        made = SQLiteFabric(rundir / "journal.db")
    elif request.param == "redis cluster":
        port = request.getfixturevalue("redis_cluster").ports[0]
        made = RedisFabric(host="127.0.0.1", port=port, cluster=True)
    else:
        made = RedisFabric(url=request.getfixturevalue("redis_url"))
    yield made
    await made.close()


@pytest.fixture
async def journal(fabric: JournalFabric) -> Journal:
    """A journal whose group `risk` hears `order`."""
    journal = await fabric.open()
    await journal.declare("risk", ["order"])
    return journal


# -- append and declare --------------------------------------------------------------------------


async def test_a_journal_is_used_between_connect_and_close(fabric: JournalFabric) -> None:
    journal = fabric.make()
    with pytest.raises(NotConnectedError, match="connect"):
        await journal.append(records("a"))
    await journal.connect()
    await journal.close()
    await journal.close()
    with pytest.raises(ClosedError):
        await journal.read("risk", "risk")


async def test_what_was_appended_is_read_in_order(journal: Journal) -> None:
    assert await journal.append(records("a", "b", "c")) == 3
    handed = await journal.read("risk", "risk")

    assert ids(handed) == ["a", "b", "c"]
    assert [each.frame for each in handed] == [b"frame of a", b"frame of b", b"frame of c"]
    assert {each.topic for each in handed} == {"order"}
    assert {each.deliveries for each in handed} == {1}
    assert [each.partition for each in handed] == [partition_of(name) for name in "abc"]


async def test_frames_are_kept_byte_by_byte(journal: Journal) -> None:
    frames = [b"", b"\0\xff\0", bytes(range(256)) * 600]
    await journal.append([Record("order", f"ü{at}'\0", frame) for at, frame in enumerate(frames)])

    handed = await journal.read("risk", "risk")

    assert [each.frame for each in handed] == frames
    assert ids(handed) == ["ü0'\0", "ü1'\0", "ü2'\0"]


async def test_an_id_is_kept_once(journal: Journal) -> None:
    assert await journal.append(records("a", "a", "b")) == 2
    assert await journal.append(records("b", "c")) == 1

    assert ids(await journal.read("risk", "risk")) == ["a", "b", "c"]


async def test_concurrent_appends_are_all_counted(fabric: JournalFabric) -> None:
    journals = [await fabric.open() for _ in range(3)]
    await journals[0].declare("risk", ["order"])
    counts = await asyncio.gather(
        *(
            journals[number % 3].append(records(f"e{number}", f"e{number}-b", "shared"))
            for number in range(60)
        )
    )

    assert sum(counts) == 121
    assert len(await drain(journals[1], "risk", "risk")) == 121


async def test_order_of_one_appender_is_kept_among_many(fabric: JournalFabric) -> None:
    journals = [await fabric.open() for _ in range(2)]
    await journals[0].declare("risk", ["order"])

    async def append_all(journal: Journal, name: str) -> None:
        for number in range(50):
            await journal.append(records(f"{name}-{number}", key=name))

    await asyncio.gather(append_all(journals[0], "x"), append_all(journals[1], "y"))
    seen = ids(await drain(journals[0], "risk", "risk"))

    for name in "xy":
        mine = [each for each in seen if each.startswith(name)]
        assert mine == [f"{name}-{number}" for number in range(50)]


async def test_a_group_begins_now_or_with_the_earliest(journal: Journal) -> None:
    await journal.append(records("a"))
    await journal.declare("late", ["order"])
    await journal.declare("all", ["order"], start="earliest")
    await journal.append(records("b"))

    assert ids(await journal.read("late", "late")) == ["b"]
    assert ids(await journal.read("all", "all")) == ["a", "b"]


async def test_declaring_again_keeps_the_place_and_adds_topics(journal: Journal) -> None:
    await journal.append([*records("a"), *records("f0", topic="fill")])
    await journal.declare("risk", ["order", "fill"], start="earliest")
    assert ids(await drain(journal, "risk", "risk")) == ["a", "f0"]
    await journal.declare("risk", ["order"], start="earliest")
    await journal.append([*records("b"), *records("f1", topic="fill")])

    assert ids(await drain(journal, "risk", "risk")) == ["b", "f1"]


async def test_a_topic_added_while_reading_is_heard_from_its_start(journal: Journal) -> None:
    await journal.append([*records("f0", topic="fill"), *records("a", "b")])
    held = await journal.read("risk", "risk")
    await journal.declare("risk", ["fill"], start="earliest")

    assert ids(await journal.read("risk", "risk")) == ["f0"]
    assert await settle(journal, "risk", "risk", held) == []


async def test_an_unknown_start_is_refused(journal: Journal) -> None:
    with pytest.raises(ConfigurationError, match="yesterday"):
        await journal.declare("risk", ["order"], start="yesterday")


async def test_an_undeclared_group_is_refused(journal: Journal) -> None:
    with pytest.raises(ConfigurationError, match="nobody"):
        await journal.read("nobody", "nobody")


async def test_topics_are_heard_in_one_order(journal: Journal) -> None:
    await journal.declare("risk", ["fill", "never"])
    await journal.append([*records("a"), *records("b", topic="fill"), *records("c")])
    await journal.append([*records("d", topic="deaf"), *records("e", topic="fill")])

    assert ids(await journal.read("risk", "risk")) == ["a", "b", "c", "e"]


async def test_every_group_gets_every_event(journal: Journal) -> None:
    await journal.declare("audit", ["order"])
    await journal.append(records("a", "b"))

    assert ids(await drain(journal, "risk", "risk")) == ["a", "b"]
    assert ids(await drain(journal, "audit", "audit")) == ["a", "b"]


# -- reading and settling ------------------------------------------------------------------------


async def test_nothing_is_handed_out_twice_while_it_is_held(journal: Journal) -> None:
    await journal.append(records("a", "b", "c"))

    assert ids(await journal.read("risk", "risk", limit=2)) == ["a", "b"]
    assert ids(await journal.read("risk", "risk")) == ["c"]
    assert await journal.read("risk", "risk") == []


async def test_a_consumer_holds_a_bounded_number(journal: Journal) -> None:
    await journal.append(numbered(MAX_UNSETTLED + 10))
    held = await journal.read("risk", "risk", limit=10_000)
    assert len(held) == MAX_UNSETTLED
    assert await journal.read("risk", "risk") == []

    await settle(journal, "risk", "risk", held[3:5])

    assert ids(await journal.read("risk", "risk")) == ["e512", "e513"]


async def test_what_is_settled_out_of_order_stays_settled(fabric: JournalFabric) -> None:
    journal, heir = await fabric.open(), await fabric.open()
    await journal.declare("risk", ["order"])
    await journal.append(records("a", "b", "c", "d", "e", key="k"))
    held = await journal.read("risk", "risk")
    await settle(journal, "risk", "risk", [held[3], held[1]])

    await heir.free("risk", "risk")

    assert ids(await drain(heir, "risk", "heir")) == ["a", "c", "e"]
    assert await drain(heir, "risk", "heir") == []
    await heir.leave("risk", "heir")
    assert await journal.read("risk", "late") == []


async def test_settling_in_reverse_leaves_nothing(journal: Journal) -> None:
    await journal.append(numbered(100, keys=3))
    held = await journal.read("risk", "risk")
    for each in reversed(held):
        assert await settle(journal, "risk", "risk", [each]) == []
    await journal.leave("risk", "risk")

    assert await journal.read("risk", "other") == []
    assert [view.pending for view in await journal.groups()] == [0]


async def test_a_step_is_settled_once(journal: Journal) -> None:
    await journal.append(records("a"))
    (held,) = await journal.read("risk", "risk")
    step = Step(acks=[held], records=records("out"))

    assert await journal.commit("risk", "risk", [step, step]) == [step]
    assert await journal.commit("risk", "risk", [step]) == [step]


async def test_a_reader_waits_until_something_is_appended(journal: Journal) -> None:
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(journal.read("risk", "risk", wait_s=30))
        await asyncio.sleep(0)
        await journal.append(records("a"))

    assert ids(waiting.result()) == ["a"]


async def test_a_reader_waits_until_it_has_room(journal: Journal) -> None:
    await journal.append(numbered(MAX_UNSETTLED + 1))
    held = await journal.read("risk", "risk", limit=MAX_UNSETTLED)
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(journal.read("risk", "risk", wait_s=30))
        await asyncio.sleep(0)
        await settle(journal, "risk", "risk", held[-1:])

    assert ids(waiting.result()) == [f"e{MAX_UNSETTLED}"]


async def test_another_journals_append_is_seen_after_wake(fabric: JournalFabric) -> None:
    out, into = await fabric.open(), await fabric.open()
    await into.declare("risk", ["order"])
    out.on_append = into.wake
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(into.read("risk", "risk", wait_s=30))
        await asyncio.sleep(0)
        await out.append(records("a"))

    assert ids(waiting.result()) == ["a"]


async def test_on_append_tells_the_topics(journal: Journal) -> None:
    told: set[str] = set()
    journal.on_append = told.update
    await journal.append([*records("a"), *records("b", topic="fill")])
    await eventually(lambda: told == {"order", "fill"})
    told.clear()
    await journal.commit("risk", "risk", [Step(records=records("c", topic="breach"))])
    await eventually(lambda: told == {"breach"})


async def test_a_cancelled_read_loses_nothing(journal: Journal) -> None:
    await journal.append(numbered(20))
    for turns in range(6):
        reading = asyncio.ensure_future(journal.read("risk", "risk"))
        for _ in range(turns):
            await asyncio.sleep(0)
        reading.cancel()
        outcome = (await asyncio.gather(reading, return_exceptions=True))[0]
        if isinstance(outcome, list):
            await journal.release("risk", "risk", outcome)

    async def all_there() -> bool:
        handed = await journal.read("risk", "risk")
        await journal.release("risk", "risk", handed)
        return ids(handed) == [f"e{number}" for number in range(20)]

    await eventually(all_there)


async def test_released_events_come_again_as_if_never_handed_out(journal: Journal) -> None:
    await journal.append(records("a", "b", "c", key="k"))
    held = await journal.read("risk", "risk")
    await settle(journal, "risk", "risk", held[:1])
    await journal.release("risk", "risk", held[1:])
    again = await journal.read("risk", "risk")

    assert [(each.id, each.deliveries) for each in again] == [("b", 1), ("c", 1)]
    assert await settle(journal, "risk", "risk", again) == []
    assert await journal.read("risk", "risk") == []


async def test_a_released_event_cannot_be_settled(journal: Journal) -> None:
    await journal.append(records("a"))
    held = await journal.read("risk", "risk")
    await journal.release("risk", "risk", held)

    assert len(await settle(journal, "risk", "risk", held)) == 1
    assert ids(await journal.read("risk", "risk")) == ["a"]


# -- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["released", "freed"])
async def test_a_step_is_of_the_event_as_it_was_handed_out_last(journal: Journal, way: str) -> None:
    """What was made of an earlier handing-out may rest on a state that is not true any more."""
    await journal.append(records("a"))
    old = await journal.read("risk", "risk")
    if way == "released":
        await journal.release("risk", "risk", old)
    else:
        await journal.free("risk", "risk")
    new = await journal.read("risk", "risk")
    assert ids(new) == ["a"]
    late = [Step(acks=old, state={"n": b"old"}), Step(done=[(old[0], "on_order")])]

    assert await journal.commit("risk", "risk", late) == late
    await journal.release("risk", "risk", old)
    assert await journal.commit("risk", "risk", [Step(acks=new, state={"n": b"new"})]) == []
    assert await journal.load_state("risk") == {"n": b"new"}


async def test_a_step_is_applied_whole(journal: Journal) -> None:
    await journal.declare("fills", ["fill"])
    await journal.append(records("a"))
    (held,) = await journal.read("risk", "risk")
    step = Step(
        acks=[held],
        records=records("f", topic="fill"),
        dead=[letter("dead")],
        state={"limit": b"7"},
    )

    assert await journal.commit("risk", "risk", [step]) == []

    assert await drain(journal, "risk", "risk") == []
    assert ids(await journal.read("fills", "fills")) == ["f"]
    assert [each.id for each in await journal.dead()] == ["dead"]
    assert await journal.load_state("risk") == {"limit": b"7"}


async def test_a_refused_step_changes_nothing_and_its_neighbours_are_applied(
    fabric: JournalFabric,
) -> None:
    journal, other = await fabric.open(), await fabric.open()
    await journal.declare("risk", ["order"])
    await journal.append(records("a"))
    (lost,) = await journal.read("risk", "risk")
    await other.free("risk", "risk")
    (taken,) = await other.read("risk", "b")
    late = Step(acks=[lost], records=records("f"), dead=[letter("dead")], state={"limit": b"7"})
    source = Step(records=records("g"), state={"seen": b"1"})

    assert await journal.commit("risk", "risk", [late, source]) == [late]

    assert await journal.dead() == []
    assert await journal.load_state("risk") == {"seen": b"1"}
    assert await settle(other, "risk", "b", [taken]) == []
    assert {each.id for each in await journal.scan()} == {"a", "g"}


async def test_what_may_rest_on_a_refused_step_is_refused_with_it(journal: Journal) -> None:
    await journal.append(records("a", "b", "c"))
    first, second, third = await journal.read("risk", "risk")
    await journal.release("risk", "risk", [first])
    lost = Step(acks=[first], state={"n": b"1"})
    after = [
        Step(acks=[second], state={"n": b"2"}),
        Step(done=[(third, "on_order")], records=records("f")),
        Step(acks=[third], records=records("f")),
    ]
    source = Step(records=records("g"))

    assert await journal.commit("risk", "risk", [lost, *after, source]) == [lost, *after]
    assert await journal.load_state("risk") == {}
    await journal.release("risk", "risk", [second, third])
    again = await drain(journal, "risk", "risk")
    assert sorted(ids(again)) == ["a", "b", "c", "g"]
    assert {each.deliveries for each in again} == {1}
    assert {each.id for each in await journal.scan()} == {"a", "b", "c", "g"}


async def test_a_step_with_one_lost_event_is_refused_whole(fabric: JournalFabric) -> None:
    journal = await fabric.open()
    await journal.declare("risk", ["order"])
    await journal.append(records("a", "b"))
    first, second = await journal.read("risk", "risk")
    await settle(journal, "risk", "risk", [first])
    both = Step(acks=[second, first])

    assert await journal.commit("risk", "risk", [both]) == [both]
    assert await settle(journal, "risk", "risk", [second]) == []


async def test_a_source_commits_without_being_a_consumer(fabric: JournalFabric) -> None:
    journal = await fabric.open()
    await journal.declare("risk", ["order"])
    step = Step(records=records("a"), state={"seen": b"1"})

    assert await journal.commit("feed", "feed", [step]) == []
    assert await journal.load_state("feed") == {"seen": b"1"}
    assert ids(await journal.read("risk", "risk")) == ["a"]


async def test_state_belongs_to_its_group_and_can_be_removed(journal: Journal) -> None:
    await journal.commit("risk", "risk", [Step(state={"a": b"1", "b": b"", "c": b"\0"})])
    await journal.commit("risk", "risk", [Step(state={"a": None}), Step(state={"c": b"2"})])

    assert await journal.load_state("risk") == {"b": b"", "c": b"2"}
    assert await journal.load_state("other") == {}


async def test_records_of_steps_are_deduplicated(journal: Journal) -> None:
    await journal.append(records("a", "out"))
    (held, _) = await journal.read("risk", "risk")

    assert await journal.commit("risk", "risk", [Step(acks=[held], records=records("out"))]) == []
    assert [each.id for each in await journal.scan()] == ["a", "out"]


async def test_done_marks_travel_with_the_delivery(fabric: JournalFabric) -> None:
    journal, heir = await fabric.open(), await fabric.open()
    await journal.declare("risk", ["order"])
    await journal.append(records("a", "b"))
    first, second = await journal.read("risk", "risk")
    assert await journal.commit("risk", "risk", [Step(done=[(first, "x"), (first, "y")])]) == []
    await journal.commit("risk", "risk", [Step(done=[(second, "x")])])
    await journal.commit("risk", "risk", [Step(acks=[second])])
    await heir.free("risk", "risk")
    (again,) = await heir.read("risk", "heir")

    assert (again.id, again.done) == ("a", frozenset({"x", "y"}))


async def test_done_marks_stay_with_a_released_event(journal: Journal) -> None:
    await journal.append(records("a"))
    (held,) = await journal.read("risk", "risk")
    await journal.commit("risk", "risk", [Step(done=[(held, "x")])])
    await journal.release("risk", "risk", [held])
    (again,) = await journal.read("risk", "risk")

    assert (again.deliveries, again.done) == (1, frozenset({"x"}))


async def test_a_step_of_done_marks_is_refused_like_any(fabric: JournalFabric) -> None:
    journal, other = await fabric.open(), await fabric.open()
    await journal.declare("risk", ["order"])
    await journal.append(records("a"))
    (held,) = await journal.read("risk", "risk")
    await other.free("risk", "risk")
    step = Step(done=[(held, "x")], state={"a": b"1"})

    assert await journal.commit("risk", "risk", [step]) == [step]
    assert await journal.load_state("risk") == {}


# -- replicas ------------------------------------------------------------------------------------


async def test_two_consumers_share_and_each_key_goes_to_one(fabric: JournalFabric) -> None:
    one, two = await fabric.open(), await fabric.open()
    await one.declare("risk", ["order"])
    await _join(one, "a")
    await _join(two, "b")
    await one.append(numbered(160))

    of_one, of_two = await _read_all(one, "a"), await _read_all(two, "b")

    keys = [{each.partition for each in handed} for handed in (of_one, of_two)]
    assert [len(each) for each in keys] == [PARTITIONS / 2] * 2
    assert not keys[0] & keys[1]
    assert sorted(ids(of_one + of_two)) == sorted(f"e{number}" for number in range(160))
    for handed in (of_one, of_two):
        assert [int(each.frame) for each in handed] == sorted(int(each.frame) for each in handed)


async def test_a_joining_replica_waits_for_what_is_in_work(fabric: JournalFabric) -> None:
    """A key is never handled twice at once, and keeps its order when it moves."""
    one, two = await fabric.open(), await fabric.open()
    await one.declare("risk", ["order"])
    await one.append(numbered(32))
    held = await one.read("risk", "a", limit=20)
    assert await two.read("risk", "b") == []
    held += await one.read("risk", "a")

    await settle(one, "risk", "a", held)
    await _join(one, "a")
    of_two = await _read_all(two, "b")

    assert not {each.partition for each in of_two} & {each.partition for each in held[20:]}
    assert sorted(int(each.frame) for each in [*held, *of_two]) == list(range(32))


async def test_a_leaving_replica_hands_over_without_suspicion(fabric: JournalFabric) -> None:
    one, two = await fabric.open(), await fabric.open()
    await one.declare("risk", ["order"])
    await one.append(numbered(20))
    held = await one.read("risk", "a", limit=10)
    await settle(one, "risk", "a", held[:4])
    await one.leave("risk", "a")

    handed = await two.read("risk", "b")

    assert ids(handed) == [f"e{number}" for number in range(4, 20)]
    assert {each.deliveries for each in handed} == {1}
    assert len(await settle(one, "risk", "a", held[4:])) == 6


async def test_who_leaves_while_it_joins_is_gone(journal: Journal) -> None:
    for number in range(5):
        name = f"gone-{number}"
        joining = asyncio.create_task(journal.read("risk", name, wait_s=5))
        await asyncio.sleep(0)
        joining.cancel()
        await journal.leave("risk", name)
    await journal.append(records("a", "b", "c", "d", "e", "f"))

    assert len(await drain(journal, "risk", "here")) == 6


async def test_a_closing_journal_gives_back_what_it_holds(fabric: JournalFabric) -> None:
    one, two = await fabric.open(), await fabric.open()
    await one.declare("risk", ["order"])
    await one.append(records("a", "b"))
    await one.read("risk", "a")
    await one.close()

    assert [(each.id, each.deliveries) for each in await two.read("risk", "b")] == [
        ("a", 1),
        ("b", 1),
    ]


async def test_scaling_down_and_up_keeps_every_key_in_order(fabric: JournalFabric) -> None:
    journals = [await fabric.open() for _ in range(3)]
    await journals[0].declare("risk", ["order"])
    await journals[0].append(numbered(480))
    handled: list[Delivery] = []

    async def turn(number: int, limit: int) -> None:
        batch = await journals[number].read("risk", f"c{number}", limit=limit)
        assert await settle(journals[number], "risk", f"c{number}", batch) == []
        handled.extend(batch)

    await turn(0, 30)
    for at in range(12):
        await turn(at % 3, 10)
    await journals[1].leave("risk", "c1")
    for at in range(4):
        await turn(at % 2 * 2, 20)
    await journals[0].leave("risk", "c0")

    async def finished() -> bool:
        await turn(1, 100)
        await turn(2, 100)
        return len(handled) >= 480

    await eventually(finished)
    assert len({each.id for each in handled}) == len(handled) == 480
    for partition in range(PARTITIONS):
        order = [int(each.frame) for each in handled if each.partition == partition]
        assert order == sorted(order)


async def test_who_gets_partitions_sees_another_tenure(fabric: JournalFabric) -> None:
    """What it knew of the group's state may be old: others had those partitions until now."""
    one, two = await fabric.open(), await fabric.open()
    await one.declare("risk", ["order"])
    await one.append(numbered(16))
    first = await one.read("risk", "a")
    await settle(one, "risk", "a", first)
    await one.append(records("b"))
    await one.append(records("c"))
    same = await drain(one, "risk", "a")
    assert {each.tenure for each in [*first, *same]} == {first[0].tenure}

    await _join(two, "b")
    await one.append([Record("order", f"then-{at}", b"", f"key-{at}") for at in range(40)])
    await drain(one, "risk", "a")
    of_two = await _read_all(two, "b")
    await two.commit(
        "risk", "b", [Step(acks=of_two, state={"by two": b"1"}), Step(state={"more": b"2"})]
    )
    await two.leave("risk", "b")
    await one.append([Record("order", f"last-{at}", b"", f"key-{at}") for at in range(40)])
    last = await _read_all(one, "a")

    assert first[0].tenure not in {each.tenure for each in last}
    assert len({each.tenure for each in last}) == 1
    assert await one.load_state("risk") == {"by two": b"1", "more": b"2"}


async def test_who_takes_over_from_the_dead_sees_another_tenure(fabric: JournalFabric) -> None:
    one, two = await fabric.open(), await fabric.open()
    await one.declare("risk", ["order"])
    await _join(one, "a")
    await _join(two, "b")
    await one.append([Record("order", f"e{at}", b"", f"key-{at}") for at in range(60)])
    held = await one.read("risk", "a")
    own = await _read_all(two, "b")
    await settle(two, "risk", "b", own)
    await two.free("risk", "a")

    taken = await drain(two, "risk", "b")

    assert len(held) == len(taken)
    assert own[0].tenure not in {each.tenure for each in taken}


# -- death ---------------------------------------------------------------------------------------


async def test_what_a_dead_consumer_held_comes_alone_and_counted(fabric: JournalFabric) -> None:
    one, two = await fabric.open(), await fabric.open()
    await one.declare("risk", ["order"])
    await one.append(records("a", "b", "c"))
    held = await one.read("risk", "a")
    await settle(one, "risk", "a", held[:1])
    await two.free("risk", "a")

    (first,) = await two.read("risk", "b")
    assert (first.id, first.deliveries) == ("b", 2)
    assert await two.read("risk", "b") == []
    await settle(two, "risk", "b", [first])
    (second,) = await two.read("risk", "b")
    assert (second.id, second.deliveries) == ("c", 2)
    await settle(two, "risk", "b", [second])

    await one.append(records("d", "e"))
    after = await two.read("risk", "b")
    assert [(each.id, each.deliveries) for each in after] == [("d", 1), ("e", 1)]


async def test_a_poison_event_is_known_by_its_count(fabric: JournalFabric) -> None:
    """Each handing-out is counted before it happens; the neighbours are not blamed."""
    journal = await fabric.open()
    await journal.declare("risk", ["order"])
    await journal.append(records("poison", "b", "c"))
    assert len(await journal.read("risk", "r0")) == 3
    for life in range(1, 5):
        await journal.free("risk", f"r{life - 1}")
        handed = await journal.read("risk", f"r{life}")
        assert [(each.id, each.deliveries) for each in handed] == [("poison", life + 1)]
    await journal.commit("risk", "r4", [Step(acks=handed, dead=[letter("poison")])])

    (after,) = await journal.read("risk", "r4")
    assert (after.id, after.deliveries) == ("b", 2)


async def test_a_released_suspect_is_not_counted(fabric: JournalFabric) -> None:
    one, two = await fabric.open(), await fabric.open()
    await one.declare("risk", ["order"])
    await one.append(records("a"))
    await one.read("risk", "a")
    await two.free("risk", "a")
    held = await two.read("risk", "b")
    await two.release("risk", "b", held)
    await two.leave("risk", "b")

    (again,) = await one.read("risk", "c")
    assert again.deliveries == 2


async def test_a_waiting_reader_gets_the_next_suspect_when_one_is_settled(
    fabric: JournalFabric,
) -> None:
    one, two = await fabric.open(), await fabric.open()
    await one.declare("risk", ["order"])
    await one.append(records("a", "b"))
    await one.read("risk", "a")
    await two.free("risk", "a")
    held = await two.read("risk", "b")
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(two.read("risk", "b", wait_s=30))
        await asyncio.sleep(0)
        await settle(two, "risk", "b", held)

    assert ids(waiting.result()) == ["b"]


async def test_a_silent_consumer_loses_its_lease(fabric: JournalFabric) -> None:
    one, two = await fabric.open(), await fabric.open()
    await one.declare("risk", ["order"])
    await one.append(records("a"))
    held = await one.read("risk", "a")
    assert await two.read("risk", "b") == []
    await fabric.let_leases_end()

    taken = await _read_all(two, "b")

    assert [(each.id, each.deliveries) for each in taken] == [("a", 2)]
    assert len(await settle(one, "risk", "a", held)) == 1
    assert await settle(two, "risk", "b", taken) == []


async def test_a_renewed_lease_goes_on(fabric: JournalFabric) -> None:
    one, two = await fabric.open(), await fabric.open()
    await one.declare("risk", ["order"])
    await one.append(records("a"))
    held = await one.read("risk", "a")
    await fabric.let_leases_end()
    await one.renew("risk", "a")

    assert await two.read("risk", "b") == []
    assert await settle(one, "risk", "a", held) == []


async def test_who_lost_its_lease_can_come_back(fabric: JournalFabric) -> None:
    one, two = await fabric.open(), await fabric.open()
    await one.declare("risk", ["order"])
    await one.read("risk", "a")
    await two.free("risk", "a")
    await one.append(records("b"))

    assert ids(await one.read("risk", "a")) == ["b"]


async def test_a_freed_consumer_gets_its_own_events_counted(journal: Journal) -> None:
    await journal.append(records("a", "b"))
    held = await journal.read("risk", "risk")
    await journal.free("risk", "risk")
    (again,) = await journal.read("risk", "risk")

    assert (again.id, again.deliveries) == ("a", 2)
    assert len(await settle(journal, "risk", "risk", held[1:])) == 1


async def test_a_successor_of_the_same_name_takes_over_and_fences(fabric: JournalFabric) -> None:
    old, new = await fabric.open(), await fabric.open()
    await old.declare("risk", ["order"])
    await old.append(records("a", "b"))
    held = await old.read("risk", "risk")
    (first,) = await new.read("risk", "risk")

    assert (first.id, first.deliveries) == ("a", 2)
    late = Step(acks=[held[0]], state={"x": b"1"})
    assert await old.commit("risk", "risk", [late]) == [late]
    with pytest.raises(ClosedError, match="successor"):
        await old.read("risk", "risk")
    await old.leave("risk", "risk")
    await old.renew("risk", "risk")
    assert await settle(new, "risk", "risk", [first]) == []
    assert ids(await drain(new, "risk", "risk")) == ["b"]
    assert await new.load_state("risk") == {}


async def test_order_is_kept_through_deaths(fabric: JournalFabric) -> None:
    journal = await fabric.open()
    await journal.declare("risk", ["order"])
    await journal.append(numbered(200, keys=5))
    handled: list[Delivery] = []
    for life in range(8):
        name = f"r{life}"
        for _ in range(life):
            batch = await journal.read("risk", name, limit=7)
            assert await settle(journal, "risk", name, batch[:4]) == []
            handled.extend(batch[:4])
            await journal.release("risk", name, batch[4:])
        await journal.read("risk", name, limit=9)
        await journal.free("risk", name)
    handled += await drain(journal, "risk", "last")

    assert len({each.id for each in handled}) == len(handled) == 200
    for partition in range(PARTITIONS):
        order = [int(each.frame) for each in handled if each.partition == partition]
        assert order == sorted(order)


async def test_only_the_dead_process_is_freed_not_its_successor(fabric: JournalFabric) -> None:
    """Who finds a process dead may come after its successor, whose events are in work."""
    one, two = await fabric.open(), await fabric.open()
    await one.declare("risk", ["order"])
    await one.append(records("a"))
    held = await one.read("risk", "a")
    await two.free_process("risk", "a", os.getpid() + 1)
    await two.free_process("risk", "nobody", os.getpid())
    await two.free_process("nobody", "nobody", os.getpid())
    assert await two.read("risk", "b") == []
    assert await one.read("risk", "a") == []

    await two.free_process("risk", "a", os.getpid())

    taken = await _read_all(two, "b")
    assert [(each.id, each.deliveries) for each in taken] == [("a", 2)]
    assert len(await settle(one, "risk", "a", held)) == 1


async def test_freeing_a_stranger_does_nothing(journal: Journal) -> None:
    await journal.free("risk", "nobody")
    await journal.free("nobody", "nobody")
    await journal.leave("nobody", "nobody")
    await journal.renew("nobody", "nobody")
    await journal.release("nobody", "nobody", [])


@pytest.mark.parametrize("seed", range(8))
async def test_any_history_settles_everything_once(fabric: JournalFabric, seed: int) -> None:
    """A seeded run of all calls by several consumers; the account must be right at its end."""
    play = Play(random.Random(seed), [await fabric.open() for _ in range(3)], fabric)
    await play.begin()
    for _ in range(150):
        await play.turn()
    await play.finish()

    assert sorted(play.settled) == sorted(play.appended)
    assert {view.pending for view in await play.journals[0].groups()} == {0}


class Play:
    """Random calls, and what they must have led to."""

    NAMES = ("a", "b", "c")

    def __init__(
        self, chance: random.Random, journals: list[Journal], fabric: JournalFabric
    ) -> None:
        self.chance = chance
        self.journals = journals
        self.fabric = fabric
        self.appended: list[str] = []
        self.settled: list[str] = []
        self.held: dict[str, list[Delivery]] = {name: [] for name in self.NAMES}

    async def begin(self) -> None:
        for topic in ("order", "fill"):
            await self.journals[0].declare("risk", [topic])

    async def turn(self) -> None:
        weights = {
            self.append: 4, self.read: 8, self.settle: 8, self.give_back: 1, self.leave: 1,
            self.free: 1, self.renew: 1, self.let_leases_end: 0.3,
        }  # fmt: skip
        (act,) = self.chance.choices(list(weights), list(weights.values()))
        await act(self.chance.choice(self.NAMES))

    async def finish(self) -> None:
        await self.let_leases_end("")
        for name in self.NAMES:
            await self._of(name).free("risk", name)
            self.held[name] = []
        for each in await drain(self.journals[0], "risk", "last"):
            self.settled.append(each.id)

    async def append(self, _: str) -> None:
        first = len(self.appended)
        added = [
            Record(
                self.chance.choice(["order", "fill"]),
                f"e{number}",
                b"%d" % number,
                f"key-{self.chance.randrange(12)}",
            )
            for number in range(first, first + self.chance.randrange(1, 30))
        ]
        self.appended += [record.id for record in added]
        journal = self.chance.choice(self.journals)
        assert await journal.append(added) == len(added)

    async def read(self, name: str) -> None:
        limit = self.chance.choice([1, 5, 20, 256])
        handed = await self._of(name).read("risk", name, limit=limit)
        assert len(handed) <= limit
        assert not {each.id for each in handed} & set(self.settled)
        for partition in {each.partition for each in handed}:
            mine = [int(each.frame) for each in handed if each.partition == partition]
            assert mine == sorted(mine)
        if any(each.deliveries > 1 for each in handed):
            assert len(handed) == 1
        self.held[name] += handed

    async def settle(self, name: str) -> None:
        mine = self.held[name]
        chosen = [each for each in mine if self.chance.random() < 0.6]
        self.chance.shuffle(chosen)
        steps = [Step(acks=[each]) for each in chosen]
        refused = await self._of(name).commit("risk", name, steps)
        self.settled += [step.acks[0].id for step in steps if step not in refused]
        self.held[name] = [each for each in mine if each not in chosen]

    async def give_back(self, name: str) -> None:
        mine = self.held[name]
        cut = self.chance.randrange(len(mine) + 1)
        await self._of(name).release("risk", name, mine[cut:])
        self.held[name] = mine[:cut]

    async def leave(self, name: str) -> None:
        await self._of(name).leave("risk", name)

    async def free(self, name: str) -> None:
        await self.chance.choice(self.journals).free("risk", name)

    async def renew(self, name: str) -> None:
        await self._of(name).renew("risk", name)

    async def let_leases_end(self, _: str) -> None:
        await self.fabric.let_leases_end()

    def _of(self, name: str) -> Journal:
        return self.journals[self.NAMES.index(name)]


# -- dead letters --------------------------------------------------------------------------------


async def test_dead_letters_are_chosen_counted_and_removed(journal: Journal) -> None:
    await journal.bury(
        [
            letter("a", at_s=1.0),
            letter("b", at_s=3.0, handler=None, reason="timeout", error="TimeoutError"),
            letter("c", at_s=2.0, topic="fill", agent="fills", event={"data": {"x": [1]}}),
            letter("d", at_s=2.5, frame=b"\0raw", error="100% wrong"),
        ]
    )

    async def chosen(**query: object) -> list[str]:
        return [each.id for each in await journal.dead(DeadQuery(**query))]  # type: ignore[arg-type]

    assert await chosen() == ["b", "d", "c", "a"]
    assert await chosen(ids=frozenset({"a", "c", "x"})) == ["c", "a"]
    assert await chosen(ids=frozenset()) == []
    assert await chosen(topic="fill") == ["c"]
    assert await chosen(agent="risk", handler="check") == ["d", "a"]
    assert await chosen(reason="timeout") == ["b"]
    assert await chosen(error="ValueError: no") == ["c", "a"]
    assert await chosen(error="%") == []
    assert [each.id for each in await journal.dead(limit=2)] == ["b", "d"]
    assert await journal.count_dead(DeadQuery(agent="risk")) == {
        ("risk", "check", "failed", "ValueError: no"): DeadCount(1, 1.0, 1.0),
        ("risk", "check", "failed", "100% wrong"): DeadCount(1, 2.5, 2.5),
        ("risk", "", "timeout", "TimeoutError"): DeadCount(1, 3.0, 3.0),
    }
    await journal.bury([letter("e", at_s=0.5)])
    assert (await journal.count_dead())["risk", "check", "failed", "ValueError: no"] == DeadCount(
        2, 0.5, 1.0
    )
    assert sum(each.count for each in (await journal.count_dead()).values()) == 5
    assert (await journal.dead(DeadQuery(ids=frozenset({"d"}))))[0].frame == b"\0raw"
    a, b = letter("a", at_s=1.0), letter("b", at_s=3.0)
    assert await journal.exhume([a, b, letter("x"), a]) == 2
    assert await journal.exhume([]) == 0
    assert await chosen() == ["d", "c", "e"]


async def test_a_letter_that_failed_anew_since_it_was_read_is_not_removed(journal: Journal) -> None:
    """Else a replay that fails at once would take the news of it away."""
    await journal.bury([letter("a", at_s=0.1 + 0.2), letter("b", at_s=1.7e9 + 0.123456)])
    read = await journal.dead()
    await journal.bury([letter("a", at_s=9.25, attempts=2)])

    assert await journal.exhume(read) == 1
    assert await journal.dead() == [letter("a", at_s=9.25, attempts=2)]


async def test_a_letter_of_the_same_id_replaces(journal: Journal) -> None:
    await journal.bury([letter("a", attempts=3)])
    await journal.bury([letter("a", attempts=6, at_s=9.0)])

    assert await journal.dead() == [letter("a", attempts=6, at_s=9.0)]


# -- views and retention -------------------------------------------------------------------------


async def test_groups_tell_what_is_pending(journal: Journal) -> None:
    await journal.declare("audit", ["order", "fill"])
    await journal.append(numbered(10))
    held = await journal.read("risk", "risk")
    await settle(journal, "risk", "risk", [held[0], held[5], held[6]])

    views = {(view.group, view.topic): view for view in await journal.groups()}

    assert {place: view.pending for place, view in views.items()} == {
        ("risk", "order"): 7,
        ("audit", "order"): 10,
        ("audit", "fill"): 0,
    }
    assert views["audit", "fill"].oldest_s == 0
    assert views["risk", "order"].oldest_s >= 0


async def test_scan_gives_the_past_by_pages(journal: Journal) -> None:
    await journal.append([*numbered(5), *records("f", topic="fill"), *records("z")])
    await drain(journal, "risk", "risk")

    first = await journal.scan(limit=4)
    rest = await journal.scan(after=first[-1].position)

    assert [each.id for each in [*first, *rest]] == ["e0", "e1", "e2", "e3", "e4", "f", "z"]
    assert [each.id for each in await journal.scan(["fill"])] == ["f"]
    assert [each.id for each in await journal.scan(["order", "fill"], limit=6)][-1] == "f"
    assert await journal.scan(["never"]) == []
    assert rest[0].frame == b"4"
    assert rest[0].at_s > 0


async def test_scan_can_begin_with_what_comes_later(journal: Journal) -> None:
    before = await journal.newest()
    await journal.append(numbered(30))
    middle = await journal.newest()
    await journal.append(records("z"))

    assert before is None
    assert [each.id for each in await journal.scan(after=middle)] == ["z"]


async def test_the_size_is_that_of_what_is_kept_settled_or_not(journal: Journal) -> None:
    empty = await journal.size()
    await journal.append([Record("order", f"e{at}", bytes(10_000), f"k{at}") for at in range(100)])
    full = await journal.size()
    await drain(journal, "risk", "risk")
    settled = await journal.size()
    await journal.trim(max_age_s=-1)
    after = await journal.size()

    assert (empty.events, full.events, settled.events, after.events) == (0, 100, 100, 0)
    assert full.bytes - empty.bytes >= 1_000_000
    assert after.bytes < full.bytes - 900_000


async def test_trim_forgets_only_what_every_group_has_settled(journal: Journal) -> None:
    await journal.declare("audit", ["order"])
    await journal.append([*numbered(20), *records("free", topic="unheard")])
    await drain(journal, "risk", "risk")
    held = await journal.read("audit", "audit")
    await settle(journal, "audit", "audit", [each for each in held if each.partition % 2])

    assert await journal.trim(max_age_s=3600) == 0
    await journal.trim(max_age_s=-1)

    left = {each.id for each in await journal.scan()}
    unsettled = {each.id for each in held if not each.partition % 2}
    assert unsettled <= left
    assert "free" not in left
    assert (
        await settle(journal, "audit", "audit", [each for each in held if not each.partition % 2])
        == []
    )
    await journal.trim(max_age_s=-1)
    assert await journal.scan() == []


async def test_trim_by_size_begins_with_the_oldest(journal: Journal) -> None:
    frame = b"x" * 10_000
    await journal.append([Record("order", f"e{at}", frame, "k") for at in range(200)])
    await drain(journal, "risk", "risk")

    assert await journal.trim(max_bytes=100_000_000) == 0
    gone = await journal.trim(max_bytes=1_000_000)

    assert 100 <= gone < 200
    assert (await journal.scan())[0].id == f"e{gone}"
    await journal.append(records("after"))
    assert ids(await journal.read("risk", "risk")) == ["after"]


async def _join(journal: Journal, consumer: str) -> None:
    assert await journal.read("risk", consumer, limit=0) == []


async def _read_all(journal: Journal, consumer: str) -> list[Delivery]:
    """Read without settling until nothing more comes, once something came."""
    handed = await eventually(partial(journal.read, "risk", consumer))
    while more := await journal.read("risk", consumer):
        handed += more
    return handed


async def test_erasing_leaves_nothing_behind(fabric: JournalFabric) -> None:
    journal = await fabric.open()
    await journal.declare("risk", ["order"])
    await journal.append(records("a", "b", "c"))
    await journal.commit("risk", "one", [Step(state={"position": b"1"})])
    await journal.bury([letter("gone")])

    await journal.erase()

    assert await journal.scan() == []
    assert await journal.dead() == []
    assert await journal.load_state("risk") == {}
    assert sum(view.pending for view in await journal.groups()) == 0
    await journal.declare("risk", ["order"])
    await journal.append(records("d", "e"))
    assert len(await journal.read("risk", "one", wait_s=5)) == 2


# -- forgetting a group --------------------------------------------------------------------------


async def test_a_group_that_is_gone_for_good_is_forgotten_with_all_it_owed(
    fabric: JournalFabric, journal: Journal
) -> None:
    await journal.declare("audit", ["order"])
    await journal.append(numbered(20))
    held = await journal.read("risk", "risk", limit=7)
    step = Step(acks=[held[3]], done=[(held[4], "check")], state={"position": b"7"})
    await journal.commit("risk", "risk", [step])
    await journal.leave("risk", "risk")
    await drain(journal, "audit", "audit")
    assert await journal.trim(max_age_s=-1) < 20

    assert await journal.forget("risk") is True
    assert await journal.forget("risk") is False
    assert {view.group for view in await journal.groups()} == {"audit"}
    assert await journal.load_state("risk") == {}
    await journal.trim(max_age_s=-1)
    assert await journal.scan() == []

    # Who comes back under its name is new
    other = await fabric.open()
    await other.declare("risk", ["order"])
    await journal.append(records("new"))
    assert ids(await drain(other, "risk", "risk")) == ["new"]
    assert ids(await drain(journal, "audit", "audit")) == ["new"]


async def test_a_group_that_lives_is_not_forgotten(fabric: JournalFabric, journal: Journal) -> None:
    other = await fabric.open()
    await journal.append(numbered(3))
    held = await journal.read("risk", "risk@2")
    with pytest.raises(ConfigurationError, match=r"'risk' cannot be forgotten while .*: risk@2"):
        await other.forget("risk")

    assert await settle(journal, "risk", "risk@2", held) == []
    await fabric.let_leases_end()
    assert await other.forget("risk") is True


async def test_a_group_that_was_never_there_cannot_be_forgotten(journal: Journal) -> None:
    assert await journal.forget("nobody") is False


async def test_a_group_that_only_has_state_is_forgotten_too(journal: Journal) -> None:
    """A source hears nothing."""
    await journal.commit("feed", "feed", [Step(state={"row": b"7"})])

    assert await journal.forget("feed", "order") is False
    assert await journal.load_state("feed") == {"row": b"7"}
    assert await journal.forget("feed") is True
    assert await journal.load_state("feed") == {}
    assert await journal.forget("feed") is False


async def test_one_topic_of_a_group_is_forgotten_and_the_rest_stays(
    fabric: JournalFabric, journal: Journal
) -> None:
    """Also what a dead consumer had in hand, of both topics, and what is marked of it."""
    await journal.declare("risk", ["order", "fill"])
    await journal.append([*numbered(16), *records(*"abcdefgh", topic="fill")])
    other = await fabric.open()
    held = await other.read("risk", "risk")
    of = {topic: [each for each in held if each.topic == topic] for topic in ("order", "fill")}
    step = Step(
        acks=[of["order"][1], of["fill"][1]],
        done=[(of["order"][2], "check"), (of["fill"][2], "check")],
        state={"position": b"7"},
    )
    assert await other.commit("risk", "risk", [step]) == []
    await journal.free("risk", "risk")

    assert await journal.forget("risk", "never") is False
    assert await journal.forget("risk", "fill") is True
    assert await journal.forget("risk", "fill") is False
    assert {view.topic: view.pending for view in await journal.groups()} == {"order": 15}
    assert await journal.load_state("risk") == {"position": b"7"}
    await journal.trim(max_age_s=-1)
    assert await journal.scan(["fill"]) == []

    left = await drain(journal, "risk", "risk")
    assert sorted(ids(left)) == sorted(each.id for each in of["order"] if each != of["order"][1])
    assert {each.id for each in left if each.done} == {of["order"][2].id}
    # Heard anew, it begins anew
    await journal.declare("risk", ["fill"])
    await journal.append(records("new", topic="fill"))
    (new,) = await drain(journal, "risk", "risk")
    assert (new.id, new.deliveries) == ("new", 1)


async def test_one_topic_of_a_group_that_lives_is_not_forgotten(
    fabric: JournalFabric, journal: Journal
) -> None:
    """And refused, nothing has changed: what it holds it can settle."""
    other = await fabric.open()
    await journal.append(numbered(3))
    held = await journal.read("risk", "risk")
    for topic in ("order", None):
        with pytest.raises(ConfigurationError, match="cannot be forgotten while it lives: risk"):
            await other.forget("risk", topic)

    assert await settle(journal, "risk", "risk", held) == []
    await journal.append(records("next"))
    assert ids(await journal.read("risk", "risk", wait_s=5)) == ["next"]


async def test_who_was_taken_for_dead_can_settle_nothing_of_a_forgotten_group(
    fabric: JournalFabric, journal: Journal
) -> None:
    other = await fabric.open()
    await journal.append(numbered(3))
    held = await journal.read("risk", "risk")
    await fabric.let_leases_end()
    assert await other.forget("risk") is True
    await other.declare("risk", ["order"])
    await other.append(records("new"))

    late = Step(acks=held, state={"late": b"1"}, records=records("echo", topic="fill"))
    assert await journal.commit("risk", "risk", [late]) == [late]

    assert await other.load_state("risk") == {}
    assert await other.scan(["fill"]) == []
    assert ids(await drain(other, "risk", "risk@2")) == ["new"]
