"""What only the Redis journal can show: its streams for strangers, its settings, its memory."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis

from mesh.errors import BrokerUnavailableError, ConfigurationError, TopicError
from mesh.journal import Feature, Record, Step, partition_of
from mesh.journals import local
from mesh.journals.redis import RedisJournal
from tests.plumbing.journals import KEYS, RedisFabric, drain, ids, letter, numbered, records, settle
from tests.plumbing.processes import ROOT, eventually
from tests.plumbing.redis_server import RedisServer
from tests.redis.tools import Proxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.redis

STREAM = "legion:{default:0}:durable:order"


@pytest.fixture
async def fabric(redis_url: str) -> AsyncIterator[RedisFabric]:
    made = RedisFabric(url=redis_url)
    yield made
    await made.close()


@pytest.fixture
async def journal(fabric: RedisFabric) -> RedisJournal:
    """A journal whose group `risk` hears `order`."""
    journal = fabric.make()
    await fabric.take(journal)
    await journal.declare("risk", ["order"])
    return journal


@pytest.fixture
def stranger(redis_url: str) -> Iterator[Any]:
    """A plain client."""
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


# -- strangers -----------------------------------------------------------------------------------


async def test_a_stranger_reads_what_was_appended(journal: RedisJournal, stranger: Any) -> None:
    await journal.append([Record("order", "a", b'{"id":"a"}', KEYS[0])])
    ((position, fields),) = stranger.xrange(STREAM)

    assert fields == {"id": "a", "event": '{"id":"a"}'}
    (held,) = await journal.read("risk", "risk")
    assert held.position == position


async def test_a_strangers_group_gets_everything_and_keeps_it(
    journal: RedisJournal, stranger: Any
) -> None:
    """Also what our own groups have settled: nothing that a group has not acked is trimmed."""
    await journal.append([Record("order", name, b"{}", KEYS[0]) for name in "abc"])
    stranger.xgroup_create(STREAM, "auditor", "0")
    await drain(journal, "risk", "risk")
    ((_, entries),) = stranger.xreadgroup("auditor", "one", {STREAM: ">"}, count=2)
    stranger.xack(STREAM, "auditor", entries[0][0])

    assert [fields["id"] for _, fields in entries] == ["a", "b"]
    assert await journal.trim(max_age_s=-1) == 1
    assert [each.id for each in await journal.scan()] == ["b", "c"]


async def test_what_a_stranger_adds_is_handed_out(journal: RedisJournal, stranger: Any) -> None:
    event = {"specversion": "1.0", "id": "s1", "source": "stranger", "type": "order", "data": {}}
    stranger.xadd(STREAM, {"event": json.dumps(event)})
    stranger.xadd(STREAM, {"event": json.dumps(event), "id": "s2", "colour": "blue"})
    odd = stranger.xadd(STREAM, {"no": "event"})
    await journal.append([Record("order", "ours", b"{}", KEYS[0])])
    handed = await journal.read("risk", "risk")

    assert ids(handed) == ["s1", "s2", odd, "ours"]
    assert json.loads(handed[0].frame) == event
    assert handed[2].frame == b""
    assert await settle(journal, "risk", "risk", handed) == []
    assert stranger.xpending(STREAM, "risk")["pending"] == 0


async def test_a_stranger_sees_how_far_a_group_is(journal: RedisJournal, stranger: Any) -> None:
    await journal.append([Record("order", name, b"{}", KEYS[0]) for name in "abcde"])
    held = await journal.read("risk", "risk", limit=4)
    await settle(journal, "risk", "risk", [held[0], held[2]])

    groups = {each["name"]: each for each in stranger.xinfo_groups(STREAM)}

    assert groups["risk"]["lag"] == 1
    assert groups["risk:settled"]["last-delivered-id"] == held[2].position
    (overtaken,) = stranger.xpending_range(STREAM, "risk", "-", "+", 10)
    assert (overtaken["message_id"], overtaken["consumer"]) == (held[1].position, "risk")


async def test_positions_go_on_behind_a_stranger_with_a_fast_clock(
    journal: RedisJournal, stranger: Any
) -> None:
    stranger.xadd(STREAM, {"event": "{}", "id": "future"}, id="9999999999999-7")
    await journal.append([Record("order", name, b"{}", KEYS[0]) for name in "ab"])

    assert ids(await journal.read("risk", "risk")) == ["future", "a", "b"]


async def test_an_entry_that_a_stranger_deletes_is_not_missed(
    journal: RedisJournal, stranger: Any, fabric: RedisFabric
) -> None:
    await journal.append([Record("order", name, b"{}", KEYS[0]) for name in "abc"])
    held = await journal.read("risk", "risk")
    stranger.xdel(STREAM, held[1].position)
    await journal.free("risk", "risk")

    assert ids(await drain(journal, "risk", "heir")) == ["a", "c"]
    assert [view.pending for view in await journal.groups()] == [0]


# -- memory of ids -------------------------------------------------------------------------------


async def test_ids_are_remembered_for_so_many_and_in_bounded_memory(
    fabric: RedisFabric, stranger: Any
) -> None:
    journal = RedisJournal(**(fabric.options | {"remembered_ids": 100}))
    await fabric.take(journal)
    for first in range(0, 1000, 50):
        await journal.append(records(*(f"e{at}" for at in range(first, first + 50))))

    assert await journal.append(records(*(f"e{at}" for at in range(900, 1000)))) == 0
    known = stranger.scard("legion:default:ids") + stranger.scard("legion:default:ids:old")
    assert 100 <= known <= 200


async def test_an_append_of_doubtful_outcome_is_kept_once(redis_url: str, stranger: Any) -> None:
    """The answer is lost on the way; the second try finds the ids known."""
    if not redis_url.startswith("unix://"):
        pytest.skip("needs a server on a Unix socket")
    async with Proxy(Path(redis_url.removeprefix("unix://"))) as proxy:
        async with RedisJournal("127.0.0.1", proxy.port, silent_s=0.2) as journal:
            await journal.append(records("a"))
            proxy.lose_answers()
            appended = await journal.append(records("b", "c"))
            assert appended in {0, 2}
            assert [each.id for each in await journal.scan()] == ["a", "b", "c"]


# -- many appends and waits ----------------------------------------------------------------------


async def test_redis_wakes_readers_of_other_processes(
    fabric: RedisFabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the look of every second, Redis alone carries a chain of two journals."""
    monkeypatch.setattr(local, "LOOK_EVERY_S", 3600.0)
    one, two = fabric.make(), fabric.make()
    for each in (one, two):
        await fabric.take(each)
    await one.declare("risk", ["order"])
    async with asyncio.TaskGroup() as tasks:
        for number in range(20):
            reading = tasks.create_task(two.read("risk", "risk", wait_s=3600))
            await asyncio.sleep(0)
            await one.append(records(f"e{number}"))
            handed = await reading
            assert ids(handed) == [f"e{number}"]
            await settle(two, "risk", "risk", handed)


async def test_steps_of_many_tasks_share_transactions(journal: RedisJournal, stranger: Any) -> None:
    await journal.append(numbered(200))
    held = await journal.read("risk", "risk")
    before = stranger.info("commandstats")["cmdstat_evalsha"]["calls"]
    refused = await asyncio.gather(
        *(journal.commit("risk", "risk", [Step(acks=[each])]) for each in held)
    )

    assert refused == [[]] * 200
    assert stranger.info("commandstats")["cmdstat_evalsha"]["calls"] - before < 10


async def test_a_mistake_of_one_caller_does_not_harm_its_neighbours(
    journal: RedisJournal,
) -> None:
    await journal.append(records("a", "b"))
    first, second = await journal.read("risk", "risk")
    wrong = Step(acks=[second], records=[Record("no topic!", "x", b"")])
    outcomes = await asyncio.gather(
        journal.commit("risk", "risk", [Step(acks=[first])]),
        journal.commit("risk", "risk", [wrong]),
        return_exceptions=True,
    )

    assert outcomes[0] == []
    assert isinstance(outcomes[1], TopicError)
    assert await settle(journal, "risk", "risk", [second]) == []


# -- settings ------------------------------------------------------------------------------------


@pytest.fixture
def forgetful() -> Iterator[RedisServer]:
    server = RedisServer(settings={"maxmemory-policy": "allkeys-lru"}).start()
    yield server
    server.close()


async def test_a_redis_that_may_forget_is_refused(forgetful: RedisServer) -> None:
    with pytest.raises(ConfigurationError) as refused:
        await RedisJournal(url=forgetful.url).connect()

    said = str(refused.value)
    assert "maxmemory-policy='allkeys-lru'" in said
    assert "set `maxmemory-policy noeviction`" in said
    assert "set `appendonly yes`" in said
    async with RedisJournal(url=forgetful.url, allow_volatile=True) as journal:
        assert await journal.append(records("a")) == 1


async def test_features_tell_that_a_cluster_is_not_atomic() -> None:
    one, many = RedisJournal(), RedisJournal(cluster=True)

    assert Feature.ATOMIC in one.features
    assert many.features == one.features - {Feature.ATOMIC}


async def test_no_message_shows_a_password() -> None:
    server = RedisServer(append_only=True, settings={"requirepass": "hunter2"}).start()
    try:
        place = {"unix_socket_path": server.socket}
        async with RedisJournal(**place, password="hunter2") as journal:  # type: ignore[arg-type]
            await journal.append(records("a"))
            assert "hunter2" not in repr(vars(journal))
        with pytest.raises(BrokerUnavailableError) as refused:
            await RedisJournal(**place, password="hunter3").connect()  # type: ignore[arg-type]
        assert "hunter3" not in str(refused.value)
    finally:
        server.close()


async def test_the_documented_rights_suffice() -> None:
    name, on, password, *rights = _documented_rights()
    assert (name, on, password) == ("legion", "on", ">...")
    server = RedisServer(append_only=True).start()
    try:
        with redis.Redis.from_url(server.url) as root:
            root.execute_command("ACL", "SETUSER", name, "on", ">secret", *rights)
        options = {"url": server.url, "username": name, "password": "secret"}
        async with RedisJournal(**options) as journal, RedisJournal(**options) as heir:  # type: ignore[arg-type]
            await journal.declare("risk", ["order"])
            await journal.append(numbered(20))
            held = await journal.read("risk", "risk")
            marked = Step(done=[(held[2], "x")], state={"a": b"1", "b": None})
            assert await journal.commit("risk", "risk", [marked]) == []
            await settle(journal, "risk", "risk", held[1:5])
            await journal.release("risk", "risk", held[9:])
            await journal.bury([gone := letter("a"), letter("b")])
            await journal.exhume([gone])
            await heir.free("risk", "risk")
            await drain(heir, "risk", "heir")
            await heir.renew("risk", "heir")
            assert [each.id for each in await journal.dead()] == ["b"]
            assert [view.pending for view in await journal.groups()] == [0]
            assert await journal.trim(max_age_s=-1) + await journal.trim(max_bytes=0) == 20
            assert await journal.load_state("risk") == {"a": b"1"}
    finally:
        server.close()


def _documented_rights() -> list[str]:
    documented = (ROOT / "docs" / "redis.md").read_text().partition("ACL user of the journal")[2]
    return documented.partition("ACL SETUSER ")[2].partition("```")[0].split()


async def test_a_key_of_another_kind_is_told_and_harms_no_retry(
    journal: RedisJournal, stranger: Any
) -> None:
    other = f"legion:{{default:{partition_of(KEYS[1])}}}:durable:order"
    stranger.delete(other)
    stranger.set(other, "mine")
    batch = [Record("order", "a", b"", KEYS[0]), Record("order", "b", b"", KEYS[1])]
    with pytest.raises(BrokerUnavailableError, match="WRONGTYPE"):
        await journal.append(batch)
    stranger.delete(other)

    await journal.append(batch)

    assert sorted(each.id for each in await journal.scan()) == ["a", "b"]


async def test_waiting_for_a_group_that_was_lost_ends_in_hearing_it_all(
    journal: RedisJournal, stranger: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert await journal.read("risk", "risk") == []
    stranger.flushdb()
    await journal.append(records("a", "b"))

    async def both() -> bool:
        return ids(await journal.read("risk", "risk")) == ["a", "b"]

    await eventually(both)
    assert "DATA_LOSS_SUSPECTED" in caplog.text
