"""Steps that change the state, on Redis: applied once, whatever dies or is delivered late."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

import pytest

from mesh.errors import BrokerUnavailableError
from mesh.journal import PARTITIONS, Delivery, Record, Step
from mesh.journals.redis_consumers import Consumer
from mesh.journals.redis_steps import Settlement
from tests.plumbing.journals import KEYS, RedisFabric, drain, ids, numbered

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from mesh.journals.redis import RedisJournal
    from mesh.journals.redis_lua import Script
    from tests.plumbing.redis_cluster import Cluster

pytestmark = pytest.mark.redis

on_a_cluster = [pytest.mark.redis_cluster]


@pytest.fixture
async def cluster(redis_cluster: Cluster) -> AsyncIterator[RedisFabric]:
    made = RedisFabric(host="127.0.0.1", port=redis_cluster.ports[0], cluster=True)
    yield made
    await made.close()


@pytest.fixture(params=["one", pytest.param("cluster", marks=on_a_cluster)])
async def any_redis(request: pytest.FixtureRequest) -> AsyncIterator[RedisFabric]:
    if request.param == "one":
        made = RedisFabric(url=request.getfixturevalue("redis_url"))
    else:
        port = request.getfixturevalue("redis_cluster").ports[0]
        made = RedisFabric(host="127.0.0.1", port=port, cluster=True)
    yield made
    await made.close()


async def opened(fabric: RedisFabric) -> RedisJournal:
    journal = fabric.make()
    await fabric.take(journal)
    return journal


def intercept(journal: RedisJournal, act: Callable[[Script, Sequence[Any]], None]) -> None:
    """Call `act` with each script and its arguments before it is run; it may raise."""
    run = journal._store.run

    async def watched(script: Script, *arguments: Any, **options: Any) -> Any:
        act(script, arguments)
        return await run(script, *arguments, **options)

    journal._store.run = watched  # type: ignore[method-assign]


def dies_before_settling(journal: RedisJournal, *, after: int) -> None:
    """Let so many partitions hear what was decided, and no more."""
    heard = 0

    def act(script: Script, arguments: Sequence[Any]) -> None:
        nonlocal heard
        if "step" in arguments[1]:
            heard += 1
            if heard > after:
                raise BrokerUnavailableError("killed here")

    intercept(journal, act)


def fills(count: int) -> list[Record]:
    """Events f0, f1, ... over all partitions in turn."""
    return [Record("fill", f"f{number}", b"", KEYS[number % PARTITIONS]) for number in range(count)]


def counting(handed: Sequence[Delivery], before: int = 0) -> list[Step]:
    """Steps that count their events in the state, one after another."""
    return [
        Step(acks=[each], state={"count": b"%d" % number, each.id: b"%d" % each.deliveries})
        for number, each in enumerate(handed, before + 1)
    ]


@pytest.mark.redis_cluster
@pytest.mark.parametrize("heir", ["successor", "freed", "lease ended"])
@pytest.mark.parametrize("after", [0, 3])
async def test_on_a_cluster_a_step_that_was_decided_is_settled_by_the_heir(
    cluster: RedisFabric, heir: str, after: int
) -> None:
    """The state and what is settled of 16 partitions change together, or the count is wrong."""
    one, two = await opened(cluster), await opened(cluster)
    await one.declare("risk", ["order", "fill"])
    await one.append(numbered(40) + fills(6))
    handed = await one.read("risk", "risk", limit=30)
    decided = [each for each in handed if each.id not in {"e3", "e20"}]
    dies_before_settling(one, after=after)
    assert await one.commit("risk", "risk", counting(decided)) == []

    name = "risk" if heir == "successor" else "risk@2"
    if heir == "freed":
        await two.free("risk", "risk")
    elif heir == "lease ended":
        await cluster.let_leases_end()
    again = await drain(two, "risk", name)

    assert {"e3", "e20"} < set(ids(again))
    assert set(ids(again)).isdisjoint(ids(decided))
    assert len(again) == 46 - len(decided)
    assert (await two.load_state("risk"))["count"] == b"%d" % len(decided)
    assert [view.pending for view in await two.groups() if view.group == "risk"] == [0, 0]


@pytest.mark.redis_cluster
async def test_streams_that_did_not_answer_hear_of_a_decision_later(cluster: RedisFabric) -> None:
    journal = await opened(cluster)
    await journal.declare("risk", ["order"])
    await journal.append(numbered(20))
    handed = await journal.read("risk", "risk")
    run = journal._store.run
    dies_before_settling(journal, after=1)
    assert await journal.commit("risk", "risk", counting(handed)) == []
    assert [view.pending for view in await journal.groups()] == [18]
    journal._store.run = run  # type: ignore[method-assign]

    assert await journal.read("risk", "risk") == []
    assert [view.pending for view in await journal.groups()] == [0]


@pytest.mark.redis_cluster
async def test_what_was_decided_and_then_given_back_does_not_come_again(
    cluster: RedisFabric,
) -> None:
    """An agent at its end cannot reach the streams; the heir still can."""
    one, two = await opened(cluster), await opened(cluster)
    await one.declare("risk", ["order"])
    await one.append(numbered(20))
    handed = await one.read("risk", "risk")
    run = one._store.run
    dies_before_settling(one, after=1)
    assert await one.commit("risk", "risk", counting(handed)) == []
    one._store.run = run  # type: ignore[method-assign]
    await one.release("risk", "risk", handed)
    await one.leave("risk", "risk")

    assert await drain(two, "risk", "risk") == []


@pytest.mark.redis_cluster
async def test_a_decision_is_refused_once_another_owns_the_partition(cluster: RedisFabric) -> None:
    one, two = await opened(cluster), await opened(cluster)
    await one.declare("risk", ["order"])
    await one.append(numbered(20))
    handed = await one.read("risk", "risk")
    await two.free("risk", "risk")
    await two.read("risk", "risk@2", limit=1)

    steps = counting(handed)
    assert await one.commit("risk", "risk", steps) == steps
    assert await two.load_state("risk") == {}


@pytest.mark.redis_cluster
async def test_deaths_between_a_decision_and_its_settling_count_every_event_once(
    cluster: RedisFabric,
) -> None:
    """Heirs of heirs, each dying after another partition, and some commits that live."""
    draw = random.Random(7)
    journal = await opened(cluster)
    await journal.declare("risk", ["order", "fill"])
    await journal.append(numbered(350) + fills(50))
    counted: list[str] = []
    while True:
        journal = await opened(cluster)
        count = int((await journal.load_state("risk")).get("count", b"0"))
        handed = await journal.read("risk", "risk", limit=draw.randint(5, 60))
        if not handed:
            break
        chosen = [each for each in handed if draw.random() < 0.8] or handed[:1]
        if draw.random() < 0.7:
            dies_before_settling(journal, after=draw.randint(0, PARTITIONS))
        assert await journal.commit("risk", "risk", counting(chosen, count)) == []
        counted += ids(chosen)

    assert len(counted) == len(set(counted)) == 400
    assert (await journal.load_state("risk"))["count"] == b"400"


async def test_a_call_that_is_delivered_late_does_not_change_the_state_back(
    any_redis: RedisFabric,
) -> None:
    """What a lost connection still brings was tried again on another, and overtaken."""
    journal = await opened(any_redis)
    await journal.declare("risk", ["order"])
    await journal.append(numbered(4, keys=1))
    calls: list[tuple[Script, Sequence[Any]]] = []
    intercept(journal, lambda script, arguments: calls.append((script, arguments)))
    for number in range(1, 3):
        handed = await journal.read("risk", "risk", limit=1)
        await journal.commit("risk", "risk", counting(handed, number - 1))
    late = [call for call in calls if "number" in call[1][1]]
    assert len(late) == 2
    for script, arguments in late[:1]:
        await journal._store.run(script, *arguments)

    assert (await journal.load_state("risk"))["count"] == b"2"
    assert len(await drain(journal, "risk", "risk")) == 2


async def test_a_successor_counts_its_steps_anew(any_redis: RedisFabric) -> None:
    one, two = await opened(any_redis), await opened(any_redis)
    await one.declare("risk", ["order"])
    await one.append(numbered(6, keys=1))
    for number in range(3):
        handed = await one.read("risk", "risk", limit=1)
        await one.commit("risk", "risk", counting(handed, number))
    handed = await two.read("risk", "risk", limit=1)
    await two.commit("risk", "risk", counting(handed, 3))

    assert (await two.load_state("risk"))["count"] == b"4"
    await asyncio.gather(one.close(), two.close())


async def test_a_redis_that_came_back_with_an_older_state_is_noticed(
    any_redis: RedisFabric,
) -> None:
    """A failover may forget the last steps of a group, and know its streams: all is done again."""
    journal = await opened(any_redis)
    await journal.declare("risk", ["order"])
    await journal.append(numbered(8, keys=1))
    first = await journal.read("risk", "risk", limit=2)
    await journal.commit("risk", "risk", counting(first))
    held = await journal.read("risk", "risk", limit=2)
    steps = b"legion:default:group:{risk}:steps"
    await journal._store.call(steps, "DEL", steps)
    journal._came_back()

    doubtful = counting(held, 2)
    assert await journal.commit("risk", "risk", doubtful) == doubtful
    again = await journal.read("risk", "risk", limit=2)
    assert ids(again)[0] == ids(held)[0]
    assert again[0].tenure != held[0].tenure


async def test_what_is_found_out_while_the_group_is_asked_is_not_forgotten(
    any_redis: RedisFabric,
) -> None:
    """A commit finds that Redis came back older, in the middle of a read."""
    journal = await opened(any_redis)
    await journal.declare("risk", ["order"])
    assert await journal.read("risk", "a") == []
    (me,) = journal._consumers.values()

    def compare_beside_it(script: Script, arguments: Sequence[Any]) -> None:
        if script.name == "peek" and not me.losses:
            me.drop(list(me.lanes.values()))
            me.losses, me.stale = 1, True

    intercept(journal, compare_beside_it)
    assert await journal.read("risk", "a") == []
    await journal.append(numbered(3))

    assert ids(await journal.read("risk", "a")) == ["e0", "e1", "e2"]


def test_a_plan_of_before_an_outage_is_outdated_whoever_has_compared_since() -> None:
    me = Consumer("risk", "a")
    plan = Settlement(me)
    assert not plan.is_outdated()

    me.returns += 1
    assert me.in_doubt
    me.compared = me.returns

    assert plan.is_outdated()
    assert not me.in_doubt
    assert not Settlement(me).is_outdated()


@pytest.mark.parametrize("answer", ["none", "refusal"])
async def test_what_is_given_back_and_did_not_arrive_is_not_passed_over(
    any_redis: RedisFabric, answer: str
) -> None:
    """Younger ones are settled meanwhile; then the process dies."""
    one, two = await opened(any_redis), await opened(any_redis)
    await one.declare("risk", ["order"])
    await one.append([Record("order", name, b"", KEYS[0]) for name in ("old", "young")])
    old, young = await one.read("risk", "risk")
    run, is_asked = one._store.run, asyncio.Event()

    async def without_release(script: Script, *arguments: Any, **options: Any) -> Any:
        if script.name == "release":
            is_asked.set()
            await asyncio.Event().wait() if answer == "none" else None
            raise BrokerUnavailableError("away")
        return await run(script, *arguments, **options)

    one._store.run = without_release  # type: ignore[method-assign]
    giving_back = asyncio.create_task(one.release("risk", "risk", [old]))
    await is_asked.wait()
    if answer == "refusal":
        await asyncio.wait({giving_back})
        assert isinstance(giving_back.exception(), BrokerUnavailableError)
    refused = await one.commit("risk", "risk", counting([young]))
    giving_back.cancel()
    await two.free("risk", "risk")

    left = {"old"} | {each.id for step in refused for each in step.acks}
    assert set(ids(await drain(two, "risk", "risk@2"))) == left


@pytest.mark.parametrize("end", ["leave", "release"])
async def test_a_commit_whose_answer_was_lost_is_not_undone_by_giving_back(
    any_redis: RedisFabric, end: str
) -> None:
    """A stopped server does it after all, when the agent has given up waiting and ends."""
    one, two = await opened(any_redis), await opened(any_redis)
    await one.declare("risk", ["order"])
    await one.append(numbered(20))
    handed = await one.read("risk", "risk")
    run = one._store.run

    async def unanswered(script: Script, *arguments: Any, **options: Any) -> Any:
        done = await run(script, *arguments, **options)
        if "sets" in arguments[1]:
            raise BrokerUnavailableError("away")
        return done

    one._store.run = unanswered  # type: ignore[method-assign]
    with pytest.raises(BrokerUnavailableError):
        await one.commit("risk", "risk", counting(handed))
    one._store.run = run  # type: ignore[method-assign]
    if end == "release":
        await one.release("risk", "risk", handed)
    await one.leave("risk", "risk")

    assert await drain(two, "risk", "risk") == []
    assert (await two.load_state("risk"))["count"] == b"20"
