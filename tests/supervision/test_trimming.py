"""The monitor keeps the journal from growing for ever, and forgets nothing that is owed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from typing import TYPE_CHECKING

import pytest

from mesh.card import Card, write_card
from mesh.config import MessageBusConfig
from mesh.errors import EXIT_CONFIGURATION
from mesh.journal import PARTITIONS, Record
from mesh.journals.sqlite import SQLiteJournal
from mesh.ledger import Ledger
from mesh.rundir import RunDir
from mesh.supervision.door import JournalDoor
from mesh.supervision.trimming import Trimmer
from tests.plumbing.journals import KEYS, drain
from tests.plumbing.processes import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from mesh.journal import Journal

SMALL = MessageBusConfig(journal_max_age_s=0, journal_max_bytes=2**20)


@pytest.fixture
def home(rundir: Path) -> RunDir:
    home = RunDir(rundir).ensure()
    card = Card(
        name="risk",
        pid=1,
        script="",
        hears=("order",),
        says=(),
        started_at_s=0.0,
        state="ready",
        durable=("order",),
    )
    write_card(home, card)
    return home


@contextlib.asynccontextmanager
async def trimming(
    home: RunDir, config: MessageBusConfig, failed: Callable[[], None] = lambda: None
) -> AsyncIterator[asyncio.Task[None]]:
    async with contextlib.aclosing(JournalDoor(home)) as door:
        trimmer = Trimmer(home, door, config, failed, first_s=0, every_s=0.02)
        running = asyncio.create_task(trimmer.run())
        yield running
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_journal_does_not_grow_beyond_its_limit(home: RunDir) -> None:
    """What is settled goes, the oldest first; what a group has not settled stays."""
    async with SQLiteJournal(home.journal()) as journal:
        await journal.declare("risk", ["order"])
        await journal.declare("audit", ["order"])
        await journal.append(large(0, 100))
        await drain(journal, "risk", "risk")
        await drain(journal, "audit", "audit")
        await journal.append(large(100, 150))
        await drain(journal, "risk", "risk")
        async with trimming(home, SMALL):

            async def left() -> set[str]:
                return {each.id for each in await journal.scan()}

            async def is_trimmed() -> bool:
                return len(await left()) < 100

            await eventually(is_trimmed)
            assert {f"e{number}" for number in range(100, 150)} <= await left()
            await drain(journal, "audit", "audit")

            async def is_small() -> bool:
                return len(await left()) < 60

            await eventually(is_small)
            assert "e149" in await left()


def large(begin: int, end: int) -> list[Record]:
    """Events of 20 kB; some fifty are the limit."""
    return [
        Record("order", f"e{number}", bytes(20_000), KEYS[number % PARTITIONS])
        for number in range(begin, end)
    ]


class Turns(Trimmer):
    """Counts the looks at whether there is a journal."""

    looks = 0

    def _is_used(self) -> bool:
        self.looks += 1
        return super()._is_used()


@pytest.mark.parametrize("fabric", ["zmq", "redis"])
async def test_where_nothing_is_durable_no_journal_is_asked_for(rundir: Path, fabric: str) -> None:
    home = RunDir(rundir).ensure()
    door = JournalDoor(home)
    used: list[object] = []
    door.use = used.append  # type: ignore[method-assign,assignment]
    config = MessageBusConfig(broker_type=fabric)
    trimmer = Turns(home, door, config, lambda: None, first_s=0, every_s=0.01)
    running = asyncio.create_task(trimmer.run())
    await eventually(lambda: trimmer.looks >= 3)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)

    assert used == []
    assert not home.journal().exists()


async def test_what_nobody_hears_is_forgotten_too(rundir: Path) -> None:
    """Without a hearer there is no card that tells of durable types."""
    home = RunDir(rundir).ensure()
    async with SQLiteJournal(home.journal()) as journal:
        await journal.append(large(0, 100))
        async with trimming(home, SMALL):

            async def is_small() -> bool:
                return len(await journal.scan()) < 60

            await eventually(is_small)


async def test_a_redis_that_a_source_alone_writes_to_is_trimmed(rundir: Path) -> None:
    home = RunDir(rundir).ensure()
    Ledger.open(home.ledger("feed")).count_said("order", 1, 1.0)
    door, asked = JournalDoor(home), asyncio.Event()

    async def use(_: object) -> bool:
        asked.set()
        return True

    door.use = use  # type: ignore[method-assign,assignment]
    config = MessageBusConfig(broker_type="redis")
    running = asyncio.create_task(Trimmer(home, door, config, lambda: None, first_s=0).run())
    await asyncio.wait_for(asked.wait(), 5)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_journal_that_is_away_is_told_once_and_each_failure_counted(
    home: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    home.journal().write_text("no database")
    failures: list[bool] = []
    async with trimming(home, SMALL, lambda: failures.append(True)):
        await eventually(lambda: len(failures) >= 3)
        home.journal().unlink()
        async with SQLiteJournal(home.journal()):
            await eventually(lambda: "the journal is back" in caplog.text)

    assert caplog.text.count("the journal is away") == 1


async def test_an_outage_of_one_closes_nothing_that_another_has_opened_anew(home: RunDir) -> None:
    """Trimming and freeing share a journal, and can both find it broken."""
    async with contextlib.aclosing(JournalDoor(home)) as door:
        in_hand, opened = asyncio.Event(), []

        async def fail(_: Journal) -> None:
            await in_hand.wait()
            raise OSError("gone")

        async def fail_late(_: Journal) -> None:
            in_hand.set()
            await first
            await door.use(note)
            raise OSError("gone, too")

        async def note(journal: Journal) -> None:
            await journal.groups()
            opened.append(journal)

        first = asyncio.create_task(door.use(fail))
        await door.use(fail_late)
        await door.use(note)

        assert len(opened) == 2
        assert opened[0] is opened[1]


async def test_settings_that_cannot_be_used_end_the_monitor_for_good(home: RunDir) -> None:
    """Another exit code would have it started over and over."""
    ended = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mesh.supervision.monitor"),
        env={**os.environ, "MESH_DIR": str(home.path), "LEGION_JOURNAL_MAX_AGE_S": "soon"},
        stderr=asyncio.subprocess.PIPE,
    )
    _, words = await ended.communicate()

    assert ended.returncode == EXIT_CONFIGURATION
    assert words.decode() == "LEGION_JOURNAL_MAX_AGE_S=soon: must be a number\n"


async def test_everything_can_be_kept_for_ever(home: RunDir) -> None:
    forever = MessageBusConfig(journal_max_age_s=0, journal_max_bytes=0)
    async with trimming(home, forever) as running:
        await running
