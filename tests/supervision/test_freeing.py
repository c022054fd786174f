"""The monitor frees what dead processes held, and nothing of that disturbs its watch."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from typing import TYPE_CHECKING

import pytest

from mesh.beats import LOOK
from mesh.card import Card, write_card
from mesh.journals.sqlite import SQLiteJournal
from mesh.rundir import RunDir
from mesh.supervision.door import JournalDoor
from mesh.supervision.freeing import Freer
from mesh.supervision.supervisord import ProcessInfo
from tests.plumbing.journals import records
from tests.plumbing.processes import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

HOLD = """
import asyncio, sys
from pathlib import Path
from mesh.journals.sqlite import SQLiteJournal

async def main():
    journal = SQLiteJournal(Path(sys.argv[1]))
    await journal.connect()
    assert len(await journal.read("risk", "risk", wait_s=20)) == 1
    print("held", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def home(rundir: Path) -> RunDir:
    return RunDir(rundir).ensure()


@pytest.fixture
async def door(home: RunDir) -> AsyncIterator[JournalDoor]:
    async with contextlib.aclosing(JournalDoor(home)) as made:
        yield made


def info(name: str, pid: int) -> ProcessInfo:
    return ProcessInfo(name, "RUNNING", pid, 0, "", 1.0, 0.0)


def tell_of(home: RunDir, name: str, pid: int, state: str = "ready") -> None:
    """Write the card that an agent of durable types would have."""
    write_card(
        home,
        Card(
            name=name,
            pid=pid,
            script="",
            hears=("order",),
            says=(),
            started_at_s=0.0,
            state=state,
            group="risk",
            durable=("order",),
        ),
    )


async def process(*words: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, *words, stdout=asyncio.subprocess.PIPE
    )


async def test_what_a_killed_process_held_is_another_ones_in_a_moment(
    home: RunDir, door: JournalDoor
) -> None:
    """The others are told to look, the dead one's successor included."""
    told: list[tuple[str, bytes]] = []
    deaths: list[bool] = []
    async with (
        SQLiteJournal(home.journal()) as journal,
        Freer(home, door, lambda *word: told.append(word), lambda: deaths.append(True)) as freer,
    ):
        await journal.declare("risk", ["order"])
        await journal.append(records("a"))
        holder = await process("-c", HOLD, str(home.journal()))
        assert holder.stdout is not None
        assert await holder.stdout.readline() == b"held\n"
        tell_of(home, "risk", holder.pid)
        freer.watch([info("risk", holder.pid), info("risk@2", os.getpid()), info("other", 0)])
        assert await journal.read("risk", "risk@2") == []

        holder.kill()
        await eventually(lambda: told)
        await holder.communicate()

        assert deaths == [True]
        assert sorted(told) == [("risk", LOOK), ("risk@2", LOOK)]
        (taken,) = await eventually(lambda: journal.read("risk", "risk@2"))
        assert (taken.id, taken.deliveries) == ("a", 2)


async def test_a_journal_that_is_away_is_told_once_and_holds_nobody_up(
    home: RunDir, door: JournalDoor, caplog: pytest.LogCaptureFixture
) -> None:
    home.journal().write_text("no database")
    deaths: list[bool] = []
    async with Freer(home, door, lambda *_: None, lambda: deaths.append(True)) as freer:
        for number in range(3):
            gone = await process("-c", "pass")
            tell_of(home, f"risk@{number}", gone.pid)
            freer.watch([info(f"risk@{number}", gone.pid)])
            await gone.communicate()
            await eventually(lambda: len(deaths) == number + 1)  # noqa: B023 - awaited at once
        await eventually(lambda: "the journal is away" in caplog.text)

    assert caplog.text.count("the journal is away") == 1


async def test_who_ended_well_needs_nobody(home: RunDir, door: JournalDoor) -> None:
    gone = await process("-c", "pass")
    deaths: list[bool] = []
    async with Freer(home, door, lambda *_: None, lambda: deaths.append(True)) as freer:
        tell_of(home, "risk", gone.pid, state="stopped")
        freer.watch([info("risk", gone.pid)])
        await gone.communicate()
        await eventually(lambda: deaths)

    assert not home.journal().exists()
