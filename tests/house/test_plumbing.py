"""The checks of what a test leaves behind do find it: each is shown something left on purpose."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.plumbing import leaks, processes

if TYPE_CHECKING:
    from pathlib import Path

SLEEP = "import sys, time; print('up', flush=True); time.sleep(60)"


def test_an_open_socket_is_seen() -> None:
    before = leaks.open_files()
    with socket.socket():
        assert len(leaks.new_open_files(before)) == 1

    assert leaks.new_open_files(before) == []


async def test_a_running_task_is_seen() -> None:
    before = asyncio.all_tasks()
    task = asyncio.create_task(asyncio.Event().wait(), name="forgotten")

    assert "forgotten" in "".join(await leaks.new_tasks(before))
    task.cancel()
    assert await leaks.new_tasks(before) == []


@pytest.mark.parametrize("how", ["environment", "command", "cwd", "file", "socket"])
def test_a_process_that_uses_a_folder_is_seen_and_ended(rundir: Path, how: str) -> None:
    code, cwd = SLEEP, processes.ROOT
    environ = {name: value for name, value in os.environ.items() if name != "MESH_DIR"}
    words: list[str] = []
    if how == "environment":
        environ["MESH_DIR"] = str(rundir)
    elif how == "command":
        words = [str(rundir)]
    elif how == "cwd":
        cwd = rundir
    elif how == "file":
        code = f"import os; file = open(bytes({list(os.fsencode(rundir / 'x'))}), 'w'); {SLEEP}"
    else:
        path = list(os.fsencode(rundir / "x.sock"))
        code = f"import socket; s = socket.socket(1); s.bind(bytes({path})); {SLEEP}"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], env=environ, cwd=cwd, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert [one.pid for one in processes.processes_in(rundir)] == [process.pid]
        assert process.pid in {one.pid for one in processes.children()}

        processes.kill_all(lambda: processes.processes_in(rundir))

    assert processes.processes_in(rundir) == []


def test_a_program_that_does_not_end_is_killed_and_shown() -> None:
    with pytest.raises(AssertionError, match=r"did not end within 0\.5 s[^~]*up"):
        processes.run_program(sys.executable, "-c", SLEEP, timeout_s=0.5)


async def test_what_never_comes_is_named() -> None:
    with pytest.raises(AssertionError, match=r"not within 0 s: pigs fly"):
        await processes.eventually(lambda: False, within_s=0, what="pigs fly")


def test_redis_is_ours_and_empty(redis_url: str) -> None:
    import redis

    with redis.Redis.from_url(redis_url) as connection:
        assert connection.dbsize() == 0
        connection.set("left", "behind")


def test_redis_is_empty_again(redis_url: str) -> None:
    test_redis_is_ours_and_empty(redis_url)
