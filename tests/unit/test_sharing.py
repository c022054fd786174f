"""Replicas that share live events: each is handled once, and the account closes."""

from __future__ import annotations

from contextlib import AsyncExitStack
from itertools import chain
from typing import TYPE_CHECKING

import pytest

from mesh import (
    ConsumerConfig,
    Event,
    EventConsumer,
    EventHandlerRegistry,
    EventPublisher,
    InMemoryMessageBroker,
    PublisherConfig,
)
from mesh.account import LinkAccount, account
from mesh.ledger import Ledger
from mesh.ledger_views import Backlog, read_ledgers, retire
from mesh.replicas import Roster, replica_names

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable
    from pathlib import Path

NAMES = replica_names("ear", 3)


class Group:
    """Replicas of one process each, as far as ledgers go."""

    def __init__(self, broker: InMemoryMessageBroker, folder: Path) -> None:
        self.broker = broker
        self.folder = folder
        self.heard: dict[str, list[int]] = {name: [] for name in NAMES}
        self.consumers: dict[str, EventConsumer] = {}
        self.ledgers: list[Ledger] = []
        self.mouth = EventPublisher(
            PublisherConfig(agent_name="mouth", broker=broker, ledger=self.open("mouth"))
        )

    def open(self, name: str) -> Ledger:
        self.ledgers.append(Ledger.open(self.folder / name))
        return self.ledgers[-1]

    def all(self) -> list[int]:
        return list(chain.from_iterable(self.heard.values()))

    async def begin(self, name: str) -> EventConsumer:
        registry = EventHandlerRegistry()

        async def hear(event: Event) -> None:
            self.heard[name].append(event.data["n"])

        await registry.register("t.x", hear, name, "hear")
        consumer = EventConsumer(
            ConsumerConfig(
                agent_name=name,
                group="ear",
                broker=self.broker,
                handler_registry=registry,
                ledger=self.open(name),
            )
        )
        await consumer.start()
        self.consumers[name] = consumer
        return consumer

    async def share_until_the_second_ends(self) -> None:
        """Two replicas share the first 200 events; then one of them ends."""
        for name in NAMES[:2]:
            await self.begin(name)
        self.share(*NAMES[:2])
        await self.say(range(200))
        await self.consumers.pop("ear@2").stop()

    def share(self, *names: str, before: Iterable[str] | None = None) -> None:
        after = tuple(sorted(names))
        roster = Roster(1, after if before is None else tuple(sorted(before)), after)
        for consumer in self.consumers.values():
            consumer.share(roster)

    async def say(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            await self.mouth.publish("t.x", {"n": number}, key=f"key-{number % 40}")
        await self.mouth.flush()
        for consumer in self.consumers.values():
            await consumer.drained()

    def link(self) -> LinkAccount:
        links = account(read_ledgers(self.folder)).links
        assert list(links) == ["mouth>t.x>ear"]
        return links["mouth>t.x>ear"]


@pytest.fixture
async def group(tmp_path: Path) -> AsyncIterator[Group]:
    async with AsyncExitStack() as exits:
        broker = await exits.enter_async_context(InMemoryMessageBroker())
        made = Group(broker, tmp_path)
        yield made
        await made.mouth.close()
        for consumer in made.consumers.values():
            await consumer.stop()
        for ledger in made.ledgers:
            ledger.close()


async def test_each_event_is_handled_once_and_a_key_by_one(group: Group) -> None:
    await group.begin("ear")
    await group.say(range(100))
    for name in NAMES[1:]:
        await group.begin(name)
    group.share(*NAMES)
    await group.say(range(100, 1000))

    assert sorted(group.all()) == list(range(1000))
    keys = [{number % 40 for number in heard if number >= 100} for heard in group.heard.values()]
    assert sum(map(len, keys)) == 40
    assert all(keys)
    assert group.link() == LinkAccount(published=1000, received=1000, lost=0, in_flight=0)
    handled = [read_ledgers(group.folder)[name].handled for name in NAMES]
    assert handled == [len(group.heard[name]) for name in NAMES]


async def test_what_nobody_handles_while_keys_move_is_lost_and_counted(group: Group) -> None:
    for name in NAMES[:2]:
        await group.begin(name)
    group.share("ear")
    await group.say(range(200))
    group.share("ear", "ear@2", before=["ear"])
    await group.say(range(200, 400))
    group.share("ear", "ear@2")
    await group.say(range(400, 600))

    lost = 600 - sum(map(len, group.heard.values()))
    assert lost > 50
    assert len(set(group.all())) == 600 - lost
    assert group.link() == LinkAccount(published=600, received=600 - lost, lost=lost, in_flight=0)


async def test_what_a_dead_replica_missed_is_counted_but_not_what_others_had(
    group: Group,
) -> None:
    await group.share_until_the_second_ends()
    await group.say(range(200, 400))
    missed = 400 - sum(map(len, group.heard.values()))
    assert group.link().lost + group.link().in_flight >= missed
    await group.begin("ear@2")
    group.share(*NAMES[:2])
    await group.say(range(400, 600))

    assert 0 < missed < 200
    assert group.link() == LinkAccount(
        published=600, received=600 - missed, lost=missed, in_flight=0
    )
    assert read_ledgers(group.folder)["ear@2"].in_["mouth", "t.x"].lost == 0


async def test_a_retired_replica_misses_nothing_and_comes_back(group: Group) -> None:
    await group.share_until_the_second_ends()
    retire(group.folder / "ear@2")
    group.share("ear")
    await group.say(range(200, 400))
    assert group.link() == LinkAccount(published=400, received=400, lost=0, in_flight=0)

    await group.begin("ear@2")
    group.share(*NAMES[:2])
    assert group.link() == LinkAccount(published=400, received=400, lost=0, in_flight=0)
    assert Backlog(group.folder).under_way() == 0, "it hears nothing of what was said without it"
    await group.say(range(400, 600))

    assert group.link() == LinkAccount(published=600, received=600, lost=0, in_flight=0)
    assert sorted(group.all()) == list(range(600))


async def test_what_was_lost_stays_counted_when_a_replica_comes_back(group: Group) -> None:
    await group.share_until_the_second_ends()
    await group.say(range(200, 400))
    await group.begin("ear@2")
    group.share(*NAMES[:2])
    await group.say(range(400, 401))
    before = group.link()
    await group.consumers.pop("ear@2").stop()
    retire(group.folder / "ear@2")
    group.share("ear")
    assert group.link() == before

    await group.begin("ear@2")
    group.share(*NAMES[:2])

    assert before.lost > 0
    assert group.link() == before


async def test_who_gets_keys_of_another_is_told_which_and_forgets_them(group: Group) -> None:
    told: dict[str, set[str]] = {name: set() for name in NAMES[:2]}
    keys = [f"key-{number}" for number in range(40)]
    for name in NAMES[:2]:
        consumer = await group.begin(name)

        def note(came: Callable[[str], bool], name: str = name) -> None:
            told[name] |= set(filter(came, keys))

        vars(consumer)["rebalanced"] = note
    first, second = told.values()

    group.share("ear")
    assert not first  # it had them all
    group.share(*NAMES[:2], before=["ear"])
    group.share(*NAMES[:2])
    assert not first
    second.clear()
    await group.say(range(40))
    gone = {f"key-{number}" for number in group.heard["ear@2"]}
    group.share("ear", before=NAMES[:2])
    assert not first
    group.share("ear")
    assert first == gone


async def test_a_hook_that_fails_is_said_and_the_keys_move(
    group: Group, caplog: pytest.LogCaptureFixture
) -> None:
    consumer = await group.begin("ear")
    group.share("ear", "ear@2")

    def fail(came: Callable[[str], bool]) -> None:
        raise ValueError("a mistake of the user's")

    vars(consumer)["rebalanced"] = fail
    group.share("ear")
    await group.say(range(40))

    assert group.heard["ear"] == list(range(40))
    assert "a mistake of the user's" in caplog.text


async def test_bytes_that_are_no_event_are_put_aside_once(group: Group) -> None:
    for name in NAMES:
        await group.begin(name)
    group.share(*NAMES)
    for number in range(20):
        for consumer in group.consumers.values():
            consumer.live.receive("t.x", b"junk %d" % number)

    counted = [consumer.dead_letters.total for consumer in group.consumers.values()]
    assert sum(counted) == 20
