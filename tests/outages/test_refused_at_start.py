"""A Redis that may forget is refused at the start, wherever something durable would need it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import TYPE_CHECKING

import pytest

from mesh.journals.sqlite import SQLiteJournal
from mesh.rundir import RunDir
from tests.faults.project import write_project
from tests.outages.pair import HERE
from tests.plumbing.journals import numbered
from tests.plumbing.processes import MESH, end_forwarder, environment, run_mesh, run_program
from tests.plumbing.redis_server import RedisServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.acceptance, pytest.mark.fault, pytest.mark.redis]

#: Far from the minute that waiting for a fabric takes, on a busy machine too.
REFUSED_S = 20.0


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisServer]:
    """A server without an append-only file, as the settings' Redis."""
    server = RedisServer().start()
    monkeypatch.setenv("LEGION_BROKER_TYPE", "redis")
    monkeypatch.setenv("REDIS_URL", server.url)
    yield server
    server.close()


@pytest.mark.parametrize(
    "words",
    [
        (MESH, "up", "-d"),
        (MESH, "run"),
        (sys.executable, "agents/counter.py"),
        (sys.executable, "agents/till.py"),
    ],
    ids=["mesh up", "mesh run", "a plain consumer", "a plain publisher"],
)
def test_type_fabric_and_setting_are_named(
    forgetful: RedisServer, tmp_path: Path, words: tuple[str | Path, ...]
) -> None:
    write_project(tmp_path, "till", "counter", folder=HERE)
    begun_s = time.monotonic()

    ended = run_program(*words, cwd=tmp_path, env=environment(), timeout_s=30)

    assert ended.code == 78, ended
    assert time.monotonic() - begun_s < REFUSED_S
    for named in (
        "outage.order is durable, and redis cannot keep that",
        "set `appendonly yes`",
        "LEGION_REDIS_ALLOW_VOLATILE=true",
        "LEGION_ALLOW_DOWNGRADE=outage.order",
    ):
        assert named in ended.err


@pytest.mark.parametrize("keeps", [True, False])
def test_the_doctor_finds_what_a_start_would_refuse(
    forgetful: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    write_project(tmp_path, "till", "counter", folder=HERE)
    if keeps:
        monkeypatch.setenv("LEGION_REDIS_ALLOW_VOLATILE", "true")

    told = run_mesh("doctor", "--json", cwd=tmp_path)

    rows = json.loads(told.out)["rows"]
    (journal,) = (row for row in rows if row["check"] == "journal")
    assert (told.code, journal["verdict"]) == ((0, "ok") if keeps else (1, "fail")), told
    if not keeps:
        assert "outage.order is durable, and redis cannot keep that" in journal["found"]
        assert journal["remedy"].startswith("set `appendonly yes`")
        assert journal["found"].endswith("a restart would lose what was accepted")


def test_the_doctor_does_not_ask_for_a_journal_that_nobody_needs(
    forgetful: RedisServer, tmp_path: Path
) -> None:
    write_project(tmp_path, "till", folder=HERE)
    (tmp_path / "agents" / "till.py").write_text(LIVE)

    told = run_mesh("doctor", "--json", cwd=tmp_path)

    assert told.code == 0, told
    assert "journal" not in {row["check"] for row in json.loads(told.out)["rows"]}


@pytest.mark.parametrize(
    "words", [(MESH, "up", "-d"), (sys.executable, "agents/counter.py")], ids=["mesh up", "agent"]
)
async def test_a_journal_whose_pages_are_damaged_is_no_outage(
    own_mesh_dir: Path, tmp_path: Path, words: tuple[str | Path, ...]
) -> None:
    """Its first page is sound, so it opens; to wait for it would be to wait for ever."""
    write_project(tmp_path, "till", "counter", folder=HERE)
    path = RunDir(own_mesh_dir).ensure().journal()
    async with SQLiteJournal(path) as journal:
        await journal.append(numbered(3000))
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))

    ended = await asyncio.to_thread(
        run_program, *words, cwd=tmp_path, env=environment(), timeout_s=60
    )
    end_forwarder(own_mesh_dir)

    assert ended.code == 78, ended
    assert "outage.order is durable, and zmq cannot keep that" in ended.err
    assert f"the journal {path} is damaged" in ended.err
    assert "move the file away together with its -wal and -shm" in ended.err


LIVE = """
from mesh import Agent, Event, on, run, source


class Live(Agent):
    @on("live.said")
    async def listen(self, event: Event) -> None:
        raise ValueError("no luck")

    @source
    async def speak(self) -> None:
        await self.publish("live.said", {})


if __name__ == "__main__":
    run(Live)
"""


def test_live_events_need_no_more_than_it_gives(forgetful: RedisServer, tmp_path: Path) -> None:
    """A run of live events alone is none of the journal's business."""
    write_project(tmp_path, "till", folder=HERE)
    (tmp_path / "agents" / "till.py").write_text(LIVE)

    ended = run_mesh("run", "--json", cwd=tmp_path)

    assert ended.code == 1, ended
    assert '"1 event could not be handled"' in ended.out
    assert "Traceback" not in ended.err
