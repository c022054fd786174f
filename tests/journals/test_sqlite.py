"""What only the SQLite journal can show: its file and its threads."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import sqlite3
import stat
import subprocess
import threading
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from mesh.errors import (
    BackpressureError,
    BrokerUnavailableError,
    ConfigurationError,
    DamagedJournalError,
    is_outage,
)
from mesh.journal import Record, Step
from mesh.journals import local
from mesh.journals.database import Database
from mesh.journals.sqlite import TIMEOUT_S, SQLiteJournal
from mesh.journals.threads import DatabaseThread
from mesh.journals.views import merged
from mesh.supervision.liveness import LivenessConfig
from mesh.supervision.monitor import ABORT_GRACE_S, LOOK_EVERY_S
from tests.plumbing.journals import drain, ids, letter, numbered, records, settle
from tests.plumbing.processes import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def path(rundir: Path) -> Path:
    return rundir / "journal.db"


# -- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("synchronous", ["NORMAL", "FULL"])
async def test_all_is_there_after_reopening(path: Path, synchronous: str) -> None:
    async with SQLiteJournal(path, synchronous=synchronous) as journal:  # type: ignore[arg-type]
        await journal.declare("risk", ["order"])
        await journal.append(numbered(10))
        held = await journal.read("risk", "risk", limit=4)
        await settle(journal, "risk", "risk", held[:2])
        await journal.commit("risk", "risk", [Step(state={"x": b"1"}, dead=[letter("a")])])
    async with SQLiteJournal(path, synchronous=synchronous) as journal:  # type: ignore[arg-type]
        again = await journal.read("risk", "risk")

        assert ids(again) == [f"e{number}" for number in range(2, 10)]
        assert {each.deliveries for each in again} == {1}
        assert await journal.load_state("risk") == {"x": b"1"}
        assert [each.id for each in await journal.dead()] == ["a"]
        assert await journal.append(numbered(10)) == 0


async def test_the_file_is_private(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT, 0o644))
    async with SQLiteJournal(path) as journal:
        await journal.append(records("a"))
        modes = {
            each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.glob("journal*")
        }

    assert modes == {"journal.db": 0o600, "journal.db-shm": 0o600, "journal.db-wal": 0o600}


async def test_its_threads_end_with_it(path: Path) -> None:
    before = set(threading.enumerate())
    async with SQLiteJournal(path):
        assert len(set(threading.enumerate()) - before) == 2

    assert set(threading.enumerate()) <= before
    assert [each.name for each in path.parent.glob("journal*")] == ["journal.db"]


async def test_a_database_of_another_program_is_refused(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE precious (data)")

    with pytest.raises(ConfigurationError, match="another program"):
        await SQLiteJournal(path).connect()


async def test_a_journal_of_a_newer_format_is_refused(path: Path) -> None:
    async with SQLiteJournal(path):
        pass
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")

    with pytest.raises(ConfigurationError, match="format 99"):
        await SQLiteJournal(path).connect()


@pytest.mark.parametrize("damage", ["no database at all, but long enough for a header" * 9, None])
async def test_a_damaged_file_is_named(path: Path, damage: str | None) -> None:
    if damage is None:
        async with SQLiteJournal(path) as journal:
            await journal.append(numbered(3000))
        with path.open("r+b") as damaged:
            damaged.seek(100)
            damaged.write(b"\xa5" * 4000)
    else:
        with path.open("w") as file:
            file.write(damage)

    with pytest.raises(ConfigurationError, match=f"(?s){path}.*damaged.*move the file away"):
        await SQLiteJournal(path).connect()


async def test_damage_that_shows_later_is_a_typed_error(path: Path) -> None:
    async with SQLiteJournal(path) as journal:
        await journal.declare("risk", ["order"])
        await journal.append(numbered(3000))
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(size // 2)
        file.write(b"\xa5" * (size // 2))
    async with SQLiteJournal(path) as journal:
        with pytest.raises(DamagedJournalError, match="damaged") as caught:
            await drain(journal, "risk", "risk")
    assert not is_outage(caught.value), "an agent that waits for its journal would wait for ever"


async def test_a_missing_directory_is_named(path: Path) -> None:
    missing = path.parent / "nowhere" / "journal.db"
    with pytest.raises(ConfigurationError, match="nowhere"):
        await SQLiteJournal(missing).connect()


async def test_a_link_is_not_followed(path: Path) -> None:
    os.symlink(path.parent / "elsewhere.db", path)
    with pytest.raises(ConfigurationError, match=str(path)):
        await SQLiteJournal(path).connect()


async def test_an_unknown_synchronous_is_refused(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="OFF"):
        SQLiteJournal(path, synchronous="OFF")  # type: ignore[arg-type]


async def test_a_locked_file_is_waited_for_then_named(path: Path) -> None:
    async with SQLiteJournal(path, timeout_s=0.2) as journal:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(BrokerUnavailableError, match=r"locked by another process for 0.2"):
                await journal.append(records("a"))
            other.execute("ROLLBACK")
        assert await journal.append(records("b")) == 1


async def test_all_who_wait_for_a_locked_file_are_told_together(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in its turn would wait as many times as long."""
    async with SQLiteJournal(path, timeout_s=0.2) as journal:
        waits = 0

        def begin(database: Database) -> None:
            nonlocal waits
            waits += 1
            really_begin(database)

        really_begin = Database.begin
        monkeypatch.setattr(Database, "begin", begin)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            outcomes = await asyncio.gather(
                *(journal.append(records(f"e{at}")) for at in range(20)), return_exceptions=True
            )
            other.execute("ROLLBACK")

        assert {type(outcome) for outcome in outcomes} == {BrokerUnavailableError}
        # One for the first, one for all that came while it waited
        assert waits <= 2
        assert await journal.append(records("after")) == 1


def test_a_process_that_hangs_with_the_file_is_ended_before_others_give_up() -> None:
    found_and_ended_s = LivenessConfig().hung_s + LOOK_EVERY_S + ABORT_GRACE_S

    assert found_and_ended_s < TIMEOUT_S


async def test_a_removed_file_takes_no_more(path: Path) -> None:
    async with SQLiteJournal(path) as journal:
        for each in path.parent.glob("journal*"):
            each.unlink()

        async def is_refused() -> bool:
            try:
                await journal.append([Record("order", os.urandom(8).hex(), b"")])
            except BrokerUnavailableError as error:
                return "removed" in str(error)
            return False

        await eventually(is_refused)


@pytest.fixture
def small_disk(rundir: Path) -> Iterator[Path]:
    """Mount a file system of 2 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    disk = rundir / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, check=False, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.fault
async def test_a_full_disk_is_a_typed_error_and_resumes(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    with ballast.open("wb") as file:
        file.write(bytes(600_000))
    accepted: list[str] = []

    async def fill(journal: SQLiteJournal) -> None:
        while len(accepted) < 1000:
            batch = [f"e{len(accepted) + at}" for at in range(10)]
            await journal.append([Record("order", each, bytes(2000), "k") for each in batch])
            accepted.extend(batch)

    async with SQLiteJournal(small_disk / "journal.db", full_s=0.3) as journal:
        await journal.declare("risk", ["order"])
        with pytest.raises(BrokerUnavailableError, match=r"journal.db cannot grow: the disk is"):
            await fill(journal)
        os.unlink(ballast)
        await journal.append(records("after", key="k"))
        kept = ids(await drain(journal, "risk", "risk"))

    assert accepted
    assert kept == [*accepted, "after"]


# -- the writer ----------------------------------------------------------------------------------


async def test_a_mistake_of_one_caller_does_not_harm_its_neighbours(path: Path) -> None:
    """All share a transaction; the one that fails is undone alone."""
    wrong = Record("order", "wrong", {"no": "bytes"}, "k")  # type: ignore[arg-type]
    async with SQLiteJournal(path) as journal:
        await journal.declare("risk", ["order"])
        outcomes = await asyncio.gather(
            journal.append(records("a")),
            journal.append([*records("half"), wrong]),
            journal.append(records("b")),
            return_exceptions=True,
        )

        assert [outcomes[0], outcomes[2]] == [1, 1]
        assert isinstance(outcomes[1], sqlite3.ProgrammingError)
        assert ids(await journal.read("risk", "risk")) == ["a", "b"]


async def test_a_full_queue_makes_appenders_wait_then_refuses(path: Path) -> None:
    async with SQLiteJournal(path, timeout_s=0.3, max_queued_bytes=10_000) as journal:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            outcomes = await asyncio.gather(
                *(journal.append([Record("order", f"e{at}", bytes(3000))]) for at in range(8)),
                return_exceptions=True,
            )
            other.execute("ROLLBACK")
        kinds = Counter(type(outcome) for outcome in outcomes)
        assert kinds[BackpressureError] >= 1
        assert set(kinds) <= {BackpressureError, BrokerUnavailableError, int}
        assert await journal.append(records("after")) == 1


async def test_a_narrow_queue_lets_everybody_through_in_turn(path: Path) -> None:
    async with SQLiteJournal(path, max_queued_bytes=5000) as journal:
        counts = await asyncio.gather(
            *(journal.append([Record("order", f"e{at}", bytes(4000), "k")]) for at in range(60))
        )
        kept = [each.id for each in await journal.scan()]

    assert counts == [1] * 60
    assert kept == [f"e{at}" for at in range(60)]


async def test_appends_that_come_together_share_transactions(path: Path) -> None:
    batches: list[set[str]] = []
    async with SQLiteJournal(path) as journal:
        journal.on_append = lambda topics: batches.append(set(topics))
        await asyncio.gather(*(journal.append(records(f"e{at}")) for at in range(200)))

    assert len(batches) < 20


async def test_wake_is_enough(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the look of every second, bells alone carry a chain of two processes."""
    monkeypatch.setattr(local, "LOOK_EVERY_S", 3600.0)
    async with SQLiteJournal(path) as one, SQLiteJournal(path) as two:
        one.on_append, two.on_append = two.wake, one.wake
        await one.declare("risk", ["order"])
        async with asyncio.TaskGroup() as tasks:
            for number in range(20):
                reading = tasks.create_task(two.read("risk", "risk", wait_s=3600))
                await asyncio.sleep(0)
                await one.append(records(f"e{number}"))
                assert ids(await reading) == [f"e{number}"]
                await settle(two, "risk", "risk", reading.result())


# -- what a backlog costs ------------------------------------------------------------------------


async def test_reads_walk_indexes_without_sorting(path: Path) -> None:
    async with SQLiteJournal(path):
        pass
    with contextlib.closing(sqlite3.connect(path)) as connection:
        plans = [
            connection.execute(f"EXPLAIN QUERY PLAN {statement}", values).fetchall()
            for statement, values in [
                (merged("seq, frame", 3, " AND partition IN (1, 2)"), [1, 0, 2, 0, 3, 0, 10]),
                (merged("seq, frame", 1), [1, 0, 10]),
            ]
        ]

    words = "\n".join(row[-1] for plan in plans for row in plan)
    assert "events_by_topic" in words
    assert "SCAN" not in words
    assert "TEMP B-TREE" not in words


async def test_cursors_of_idle_partitions_follow(path: Path) -> None:
    """Or a successor would look through everything since one of them last moved."""
    async with SQLiteJournal(path) as journal:
        await journal.declare("risk", ["order"])
        await journal.append(numbered(300, keys=1))
        await drain(journal, "risk", "risk")
        await journal.renew("risk", "risk")
        with contextlib.closing(sqlite3.connect(path)) as connection:
            lowest = connection.execute("SELECT min(seq) FROM cursors").fetchone()

    assert lowest == (300,)


async def test_a_successor_begins_near_where_its_predecessor_was(path: Path) -> None:
    """Also when most partitions had no event for long, and nobody renewed."""
    async with SQLiteJournal(path) as journal:
        await journal.declare("risk", ["order"])
        for first in range(0, 20_000, 1000):
            await journal.append(
                [Record("order", f"e{at}", b"", "k") for at in range(first, first + 1000)]
            )
            await drain(journal, "risk", "risk")
        with contextlib.closing(sqlite3.connect(path)) as connection:
            (lowest,) = connection.execute("SELECT min(seq) FROM cursors").fetchone()

    assert lowest > 13_000


async def test_nothing_is_left_of_what_is_settled(path: Path) -> None:
    """At the latest when a lease is renewed."""
    async with SQLiteJournal(path) as journal:
        await journal.declare("risk", ["order"])
        await journal.append(numbered(100))
        held = await journal.read("risk", "a")
        await settle(journal, "risk", "a", held[50:])
        await journal.commit("risk", "a", [Step(done=[(held[0], "x"), (held[1], "y")])])
        await journal.free("risk", "a")
        await drain(journal, "risk", "b")
        await journal.renew("risk", "b")
        with contextlib.closing(sqlite3.connect(path)) as connection:
            left = {
                table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
                for table in ("acked", "attempts", "done")
            }

    assert left == {"acked": 0, "attempts": 0, "done": 0}


async def test_trimming_gives_the_disk_back(path: Path) -> None:
    async with SQLiteJournal(path) as journal:
        for at in range(20):
            await journal.append([Record("t", f"e{at}-{n}", bytes(10_000)) for n in range(50)])
        assert await journal.trim(max_bytes=1_000_000) > 800
    assert os.stat(path).st_size < 2_000_000


async def test_many_topics_are_trimmed_and_a_group_hears_a_bounded_number(path: Path) -> None:
    names = [f"t{number}" for number in range(900)]
    async with SQLiteJournal(path) as journal:
        await journal.append([Record(name, name, b"x") for name in names])
        await journal.declare("risk", names[:400], start="earliest")
        assert len(await journal.read("risk", "risk", limit=512)) == 400
        with pytest.raises(ConfigurationError, match="at most 400"):
            await journal.declare("risk", names[400:500])
        assert await journal.trim(max_age_s=-1) == 500
        assert len(await journal.scan()) == 400


async def test_who_gives_up_opening_a_damaged_journal_leaves_no_error_behind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "journal.db"
    path.write_bytes(b"no database" * 1000)
    thread = DatabaseThread(
        "writer", Database(path, "NORMAL", 1.0), lambda *_: None, lambda *_: None
    )
    opening = asyncio.create_task(thread.start())
    await asyncio.sleep(0)
    opening.cancel()
    await asyncio.gather(opening, return_exceptions=True)
    await thread.stop()

    del thread
    gc.collect()
    assert "never retrieved" not in caplog.text
