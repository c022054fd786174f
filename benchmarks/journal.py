"""The SQLite journal beside the barest use of SQLite, and beside itself with a long backlog."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
import tempfile
import time
from pathlib import Path

from benchmarks.agents import SAMPLE, Sample
from mesh import EventPublisher, InMemoryMessageBroker, MessageBroker, PublisherConfig
from mesh.events import set_delivery
from mesh.journal import Journal, Record, Step
from mesh.journals.sqlite import SQLiteJournal

_FRAME = b"f" * 200
_BATCH = 100
#: Folders with a backlog of so many events; made once a run.
_backlogs: dict[int, Path] = {}


def append_batches(count: int = 50_000) -> float:
    """Append batches of 100, each awaited; events/s."""
    with tempfile.TemporaryDirectory(prefix="lgb-") as folder:
        return asyncio.run(_append(Path(folder, "journal.db"), count))


def bare_batches(count: int = 50_000) -> float:
    """Insert 100 rows a commit into one plain table of the same content; events/s."""
    with tempfile.TemporaryDirectory(prefix="lgb-") as folder:
        connection = _bare(folder)
        with contextlib.closing(connection):
            batches = [
                [("bench", f"e{at}", _FRAME) for at in range(first, first + _BATCH)]
                for first in range(0, count, _BATCH)
            ]
            start = time.perf_counter()
            for batch in batches:
                _insert(connection, batch)
            return count / (time.perf_counter() - start)


def end_to_end(count: int = 50_000) -> float:
    """Append in one journal, read and settle in another on the same file; events/s."""
    with tempfile.TemporaryDirectory(prefix="lgb-") as folder:
        return asyncio.run(_end_to_end(Path(folder, "journal.db"), count))


def publish_thousand(rounds: int = 30) -> float:
    """`publish_batch` of 1,000 durable events, everything on; us."""
    with tempfile.TemporaryDirectory(prefix="lgb-") as folder:
        return asyncio.run(_publish_thousand(Path(folder), rounds))


def bare_thousand(rounds: int = 30) -> float:
    """The same 1,000 frames encoded already, in one transaction of plain SQLite; us."""
    with tempfile.TemporaryDirectory(prefix="lgb-") as folder:
        connection = _bare(folder)
        with contextlib.closing(connection):
            times = []
            for turn in range(rounds):
                rows = [("bench", f"e{turn}-{at}", _FRAME) for at in range(1000)]
                start = time.perf_counter()
                _insert(connection, rows)
                times.append(time.perf_counter() - start)
            return sorted(times)[rounds // 2] * 1e6


def first_touch(backlog: int) -> float:
    """Open a journal with so many un-acked events, read 256, settle 100, append 100; ms."""
    with tempfile.TemporaryDirectory(prefix="lgb-") as folder:
        path = Path(folder, "journal.db")
        shutil.copy(_with_backlog(backlog), path)
        path.read_bytes()  # both sizes begin with the file in memory
        times = [asyncio.run(_touch(path, turn)) for turn in range(9)]
        return sorted(times)[len(times) // 2]


def forget_backlogs() -> None:
    """Remove what `first_touch` has made."""
    for path in _backlogs.values():
        shutil.rmtree(path.parent)
    _backlogs.clear()


def _bare(folder: str) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{folder}/bare.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(
        "CREATE TABLE events (seq INTEGER PRIMARY KEY, topic TEXT, id TEXT, frame BLOB)"
    )
    return connection


def _insert(connection: sqlite3.Connection, rows: list[tuple[str, str, bytes]]) -> None:
    connection.execute("BEGIN")
    connection.executemany("INSERT INTO events (topic, id, frame) VALUES (?, ?, ?)", rows)
    connection.execute("COMMIT")


async def _publish_thousand(folder: Path, rounds: int) -> float:
    async with _OnDisk(folder) as broker:
        return await thousand_at_once(broker, rounds)


async def thousand_at_once(broker: MessageBroker, rounds: int) -> float:
    """`publish_batch` of 1,000 durable events over a connected broker; the median in us."""
    set_delivery(("bench.*",))
    events = [(SAMPLE, Sample("BTCUSD", 1.5, 2.5, 0.0, "")) for _ in range(1000)]
    publisher = EventPublisher(PublisherConfig(agent_name="sender", broker=broker))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        await publisher.publish_batch(events)
        times.append(time.perf_counter() - start)
    await publisher.close()
    set_delivery()
    return sorted(times)[rounds // 2] * 1e6


class _OnDisk(InMemoryMessageBroker):
    """A fabric in memory with a journal on disk."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def make_journal(self) -> Journal:
        return SQLiteJournal(self._folder / "journal.db")


async def _append(path: Path, count: int) -> float:
    batches = [_records(first, _BATCH) for first in range(0, count, _BATCH)]
    async with SQLiteJournal(path) as journal:
        start = time.perf_counter()
        for batch in batches:
            await journal.append(batch)
        return count / (time.perf_counter() - start)


async def _end_to_end(path: Path, count: int) -> float:
    async with SQLiteJournal(path) as out, SQLiteJournal(path) as into:
        out.on_append = into.wake
        await into.declare("bench", ["bench"])
        start = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_settle_all(into, count))
            for first in range(0, count, _BATCH):
                await out.append(_records(first, _BATCH))
        return count / (time.perf_counter() - start)


async def _settle_all(journal: SQLiteJournal, count: int) -> None:
    while count:
        batch = await journal.read("bench", "bench", wait_s=1.0)
        await journal.commit("bench", "bench", [Step(acks=[each]) for each in batch])
        count -= len(batch)


async def _touch(path: Path, turn: int) -> float:
    start = time.perf_counter()
    async with SQLiteJournal(path) as journal:
        batch = await journal.read("bench", "bench")
        assert len(batch) == 256
        await journal.commit("bench", "bench", [Step(acks=[each]) for each in batch[:_BATCH]])
        await journal.append(_records(10_000_000 + turn * _BATCH, _BATCH))
        await journal.release("bench", "bench", batch[_BATCH:])
        return (time.perf_counter() - start) * 1000


def _with_backlog(count: int) -> Path:
    if count not in _backlogs:
        path = Path(tempfile.mkdtemp(prefix="lgb-"), "journal.db")
        asyncio.run(_fill(path, count))
        _backlogs[count] = path
    return _backlogs[count]


async def _fill(path: Path, count: int) -> None:
    async with SQLiteJournal(path) as journal:
        await journal.declare("bench", ["bench"])
        for first in range(0, count, 1000):
            await journal.append(_records(first, min(1000, count - first)))


def _records(first: int, count: int) -> list[Record]:
    return [
        Record("bench", f"e{at}", _FRAME, f"key-{at % 50}") for at in range(first, first + count)
    ]
