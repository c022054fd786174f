"""The monitor keeps the journal from growing for ever, and forgets nothing that is owed."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from mesh.card import Card, write_card
from mesh.config import MessageBusConfig
from mesh.journal import PARTITIONS, Record
from mesh.journals.sqlite import SQLiteJournal
from mesh.rundir import RunDir
from mesh.supervision.door import JournalDoor
from mesh.supervision.trimming import Trimmer
from tests.plumbing.journals import KEYS, drain
from tests.plumbing.processes import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

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
async def trimming(home: RunDir, config: MessageBusConfig) -> AsyncIterator[asyncio.Task[None]]:
    async with contextlib.aclosing(JournalDoor(home)) as door:
        running = asyncio.create_task(Trimmer(home, door, config, every_s=0.02).run())
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


async def test_a_mesh_without_durable_types_gets_no_journal(rundir: Path) -> None:
    home = RunDir(rundir).ensure()
    door = JournalDoor(home)
    used = asyncio.Event()
    door.use = lambda _: used.set()  # type: ignore[assignment,return-value]
    trimmer = Trimmer(home, door, SMALL, every_s=0.01)
    running = asyncio.create_task(trimmer.run())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(used.wait(), 0.2)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)

    assert not home.journal().exists()


async def test_everything_can_be_kept_for_ever(home: RunDir) -> None:
    forever = MessageBusConfig(journal_max_age_s=0, journal_max_bytes=0)
    async with trimming(home, forever) as running:
        await running
