"""A whole mesh on one Redis that is killed, and that refuses for every reason it can have."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import pytest
import redis

from mesh.config import MessageBusConfig
from tests.faults.project import write_project
from tests.outages.pair import HERE, Pair
from tests.plumbing.processes import eventually, run_mesh
from tests.plumbing.redis_server import RedisServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.fault,
    pytest.mark.redis,
    pytest.mark.timeout(120),
]


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A server of this test's own, which keeps every write."""
    made = RedisServer(append_only=True).start()
    yield made
    made.close()


class Harm:
    """What is done to a server."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server

    async def do(self, *words: str | int) -> Any:
        def run() -> Any:
            with redis.Redis.from_url(self.server.url, decode_responses=True) as client:
                return client.execute_command(*words)

        return await asyncio.to_thread(run)

    async def kill(self) -> None:
        await asyncio.to_thread(self.server.kill)

    async def start(self) -> None:
        await asyncio.to_thread(self.server.start)

    async def make_replica(self) -> None:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            await self.do("REPLICAOF", "127.0.0.1", nobody.getsockname()[1])

    async def make_master(self) -> None:
        await self.do("REPLICAOF", "NO", "ONE")

    async def fill(self) -> None:
        used = (await self.do("INFO", "memory"))["used_memory"]
        await self.do("CONFIG", "SET", "maxmemory", used)

    async def make_room(self) -> None:
        await self.do("CONFIG", "SET", "maxmemory", 0)

    async def break_disk(self) -> None:
        """A directory lies where the snapshot shall, so none can be written."""
        (self.server.folder / "dump.rdb").mkdir()
        await self.do("CONFIG", "SET", "save", "3600 1000000")
        await self._save("err")

    async def mend_disk(self) -> None:
        (self.server.folder / "dump.rdb").rmdir()
        await self._save("ok")

    async def _save(self, outcome: str) -> None:
        await self.do("BGSAVE")

        async def is_told() -> bool:
            info = await self.do("INFO", "persistence")
            ended = not info["rdb_bgsave_in_progress"]
            return bool(ended and info["rdb_last_bgsave_status"] == outcome)

        await eventually(is_told)

    async def load_slowly(self) -> None:
        """Started anew, it takes its time over each key in its file, and answers in between."""
        await self.do("BGREWRITEAOF")

        async def is_written() -> bool:
            info = await self.do("INFO", "persistence")
            return not info["aof_rewrite_in_progress"] and not info["aof_rewrite_scheduled"]

        await eventually(is_written)
        await self.kill()
        conf = self.server.folder / "redis.conf"
        self._usual = conf.read_text()
        slow = "key-load-delay 50000\nloading-process-events-interval-bytes 1024\n"
        conf.write_text(self._usual + slow)
        await asyncio.to_thread(self.server.start, wait=False)

    async def load_fast(self) -> None:
        await self.do("CONFIG", "SET", "key-load-delay", 0)
        await asyncio.to_thread(self.server.wait_up)
        (self.server.folder / "redis.conf").write_text(self._usual)

    async def hang(self) -> None:
        await self.do("CONFIG", "SET", "busy-reply-threshold", 50)
        self._hanging = asyncio.create_task(self.do("EVAL", "while true do end", 0))

    async def end_hanging(self) -> None:
        await self.do("SCRIPT", "KILL")
        await asyncio.gather(self._hanging, return_exceptions=True)


async def test_a_mesh_lives_through_all_that_can_happen_to_its_redis(
    server: RedisServer, tmp_path: Path, own_mesh_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One trouble after the other, the agents the same; each ends within seconds by itself."""
    monkeypatch.setenv("LEGION_BROKER_TYPE", "redis")
    monkeypatch.setenv("REDIS_URL", server.url)
    monkeypatch.setenv("LEGION_PUBLISH_TIMEOUT_S", "1")
    pair = Pair(own_mesh_dir, MessageBusConfig.from_env(), "hawker")
    harm = Harm(server)
    write_project(tmp_path, *pair.agents, folder=HERE)
    started = await asyncio.to_thread(run_mesh, "up", "-d", cwd=tmp_path)
    try:
        assert started.code == 0, started
        await pair.begins()
        lost = "BrokerUnavailableError"
        await pair.weathers(harm.kill, harm.start, lost, "redis at unix:")
        await pair.weathers(harm.make_replica, harm.make_master, lost, "read-only replica")
        await pair.weathers(harm.fill, harm.make_room, "BackpressureError", "out of memory")
        await pair.weathers(harm.break_disk, harm.mend_disk, lost, "cannot write to its disk")
        await pair.weathers(harm.hang, harm.end_hanging, lost, "busy with a script")
        await pair.weathers(harm.load_slowly, harm.load_fast, lost, "loading its data")
        pair.is_the_same()
        # Refusals ended the hawker's source, which was called again each time
        assert [words[0] for words in pair.notes("hawker")].count("called") > 3
        await pair.starts_anew("counter", harm.kill, harm.start)
        await pair.closes()
    finally:
        stopped = await asyncio.to_thread(run_mesh, "down", cwd=tmp_path)
    assert stopped.code == 0, stopped
