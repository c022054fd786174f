"""The Redis journal beside bare redis-py on a stream, and beside itself with a long backlog."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

from redis.asyncio import Redis

from benchmarks.journal import thousand_at_once
from benchmarks.processes import private_directory, program
from benchmarks.redis_peer import serve_command, socket_of
from mesh import RedisMessageBroker
from mesh.journal import Record, Step
from mesh.journals.redis import RedisJournal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_FRAME = b"f" * 200
_BATCH = 100
_READ = 500
_DURABLE = ["--appendonly", "yes", "--appendfsync", "everysec"]


def end_to_end(count: int = 50_000) -> float:
    """Append batches of 100 in one journal, read 500 and settle them in another; events/s."""
    with _server() as place:
        return asyncio.run(_end_to_end(place, count))


def peer_end_to_end(count: int = 50_000) -> float:
    """XADD 100 a pipeline on one connection, XREADGROUP 500 and XACK on another; events/s."""
    with _server() as place:
        return asyncio.run(_peer_end_to_end(place, count))


def publish_thousand(rounds: int = 30) -> float:
    """`publish_batch` of 1,000 durable events, everything on; us."""
    with _server() as place:
        return asyncio.run(_publish_thousand(place, rounds))


def peer_thousand(rounds: int = 30) -> float:
    """The same 1,000 frames encoded already, in one bare pipeline of redis-py; us."""
    with _server() as place:
        return asyncio.run(_peer_thousand(place, rounds))


def first_touch(backlog: int) -> float:
    """Open a journal with so many un-acked events, read 256, settle 100, append 100; ms."""
    with _server() as place:
        asyncio.run(_fill(place, backlog))
        times = [asyncio.run(_touch(place, turn)) for turn in range(9)]
        return sorted(times)[len(times) // 2]


async def _end_to_end(place: Path, count: int) -> float:
    async with (
        RedisJournal(unix_socket_path=place) as out,
        RedisJournal(unix_socket_path=place) as into,
    ):
        await into.declare("bench", ["bench"])
        start = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_settle_all(into, count))
            for first in range(0, count, _BATCH):
                await out.append(_records(first, _BATCH))
        return count / (time.perf_counter() - start)


async def _settle_all(journal: RedisJournal, count: int) -> None:
    while count:
        batch = await journal.read("bench", "bench", limit=_READ, wait_s=1.0)
        await journal.commit("bench", "bench", [Step(acks=batch)])
        count -= len(batch)


async def _peer_end_to_end(place: Path, count: int) -> float:
    url = f"unix://{place}"
    async with Redis.from_url(url) as out, Redis.from_url(url) as into:
        await into.xgroup_create("bench", "bench", "$", mkstream=True)
        start = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_peer_settle_all(into, count))
            for first in range(0, count, _BATCH):
                await _add_all(out, range(first, first + _BATCH))
        return count / (time.perf_counter() - start)


async def _peer_settle_all(client: Redis, count: int) -> None:
    while count:
        replied: Any = await client.xreadgroup(
            "bench", "bench", {"bench": ">"}, count=_READ, block=1000
        )
        for _, entries in replied:
            await client.xack("bench", "bench", *(position for position, _ in entries))
            count -= len(entries)


async def _publish_thousand(place: Path, rounds: int) -> float:
    async with RedisMessageBroker(unix_socket_path=place) as broker:
        return await thousand_at_once(broker, rounds)


async def _peer_thousand(place: Path, rounds: int) -> float:
    async with Redis.from_url(f"unix://{place}") as out:
        times = []
        for turn in range(rounds):
            start = time.perf_counter()
            await _add_all(out, range(turn * 1000, (turn + 1) * 1000))
            times.append(time.perf_counter() - start)
        return sorted(times)[rounds // 2] * 1e6


async def _add_all(client: Redis, numbers: range) -> None:
    pipe = client.pipeline(transaction=False)
    for at in numbers:
        pipe.xadd("bench", {"id": f"e{at}", "event": _FRAME})
    await pipe.execute()


async def _touch(place: Path, turn: int) -> float:
    start = time.perf_counter()
    async with RedisJournal(unix_socket_path=place) as journal:
        batch = await journal.read("bench", "bench")
        assert len(batch) == 256
        await journal.commit("bench", "bench", [Step(acks=[each]) for each in batch[:_BATCH]])
        await journal.append(_records(10_000_000 + turn * _BATCH, _BATCH))
        await journal.release("bench", "bench", batch[_BATCH:])
        return (time.perf_counter() - start) * 1000


async def _fill(place: Path, count: int) -> None:
    async with RedisJournal(unix_socket_path=place) as journal:
        await journal.declare("bench", ["bench"])
        for first in range(0, count, 1000):
            await journal.append(_records(first, min(1000, count - first)))


def _records(first: int, count: int) -> list[Record]:
    return [
        Record("bench", f"e{at}", _FRAME, f"key-{at % 50}") for at in range(first, first + count)
    ]


@contextlib.contextmanager
def _server() -> Iterator[Path]:
    with (
        private_directory() as directory,
        program(*serve_command(directory), *_DURABLE, stdout=subprocess.DEVNULL),
    ):
        while not _answers(socket_of(directory)):
            time.sleep(0.005)
        yield socket_of(directory)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
        connection.connect(str(path))
        connection.sendall(b"PING\r\n")
        return connection.recv(64).startswith(b"+PONG")
    return False
