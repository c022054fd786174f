"""Starting, stopping and changing a mesh, on a real supervisord with a forwarder and a monitor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING

import pytest

from mesh.errors import AlreadyRunningError
from mesh.ledger import SOURCES, STATES, Ledger
from mesh.ledger_views import read_ledger
from mesh.rundir import RunDir
from mesh.supervision import boot, leftovers
from mesh.supervision.boot import BootError, ProgramState
from mesh.supervision.supervisord import SupervisorClient, SupervisorUnavailableError
from tests.plumbing.processes import (
    environment,
    eventually,
    is_alive,
    processes_in,
    run_program,
    running,
)
from tests.plumbing.projects import copy_example

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(90)

_BROKEN = """
[program:broken]
command=%(here)s/.venv/bin/python -c "raise SystemExit('no such thing')"
startretries=0
exitcodes=78
redirect_stderr=true
stdout_logfile=%(here)s/.mesh/log/broken.out
"""

_HANGING = """
import time
from mesh import Agent, every


class Hanging(Agent):
    @every(0.2)
    async def hang(self) -> None:
        print("hanging", flush=True)
        while True:
            time.sleep(1)
"""
_HANGING_PROGRAM = """
[program:hanging]
command=%(here)s/.venv/bin/python -m mesh.runtime agents/hanging.py
environment=MESH_AGENT="hanging"
directory=%(here)s
stopwaitsecs=1
redirect_stderr=true
stdout_logfile=%(here)s/.mesh/log/hanging.out
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return copy_example(tmp_path / "a project")


@pytest.fixture
def home(own_mesh_dir: Path) -> RunDir:
    return RunDir(own_mesh_dir)


@contextlib.asynccontextmanager
async def mesh(project: Path, home: RunDir, *agents: str) -> AsyncIterator[int]:
    pid = await boot.up(project, home, agents=agents)
    try:
        yield pid
    finally:
        if await SupervisorClient(home.socket("supervisor")).is_up():
            await boot.down(home)


async def pids(home: RunDir) -> dict[str, int]:
    states = await boot.wait_ready(home)
    assert all(each.verdict == "ready" for each in states), states
    return {each.name: each.pid for each in states}


def _is_ready(home: RunDir, name: str) -> bool:
    view = read_ledger(home.ledger(name))
    return view is not None and view.state == "ready"


def _sources(home: RunDir, name: str) -> str:
    view = read_ledger(home.ledger(name))
    return "none" if view is None else view.sources


async def test_up_and_down_leave_nothing(project: Path, home: RunDir) -> None:
    async with mesh(project, home, "risk") as pid:
        programs = await pids(home)
        assert set(programs) == {"forwarder", "monitor", "risk"}

        await boot.down(home)

        assert not any(is_alive(each) for each in (pid, *programs.values()))
        assert processes_in(home.path) == []
    with pytest.raises(SupervisorUnavailableError):
        await boot.down(home)


async def test_percent_signs_in_paths_mean_nothing(project: Path, own_mesh_dir: Path) -> None:
    """supervisord reads them in some values once, in others twice."""
    home = RunDir(own_mesh_dir / "50%(here)s")
    odd = project.with_name("100% ours")
    os.rename(project, odd)

    async with mesh(odd, home, "risk"):
        assert set(await pids(home)) == {"forwarder", "monitor", "risk"}
        assert home.output("risk").exists()


async def test_what_is_special_elsewhere_means_nothing_in_paths(
    project: Path, own_mesh_dir: Path
) -> None:
    odd = project.with_name("it's a#1;b,c=[d] $HOME \\")
    home = RunDir(own_mesh_dir / odd.name)
    os.rename(project, odd)

    async with mesh(odd, home, "risk"):
        assert set(await pids(home)) == {"forwarder", "monitor", "risk"}
        assert home.output("risk").exists()


async def test_a_second_up_is_refused_and_the_first_undisturbed(
    project: Path, home: RunDir
) -> None:
    async with mesh(project, home, "risk") as pid:
        before = await pids(home)

        with pytest.raises(AlreadyRunningError) as refused:
            await boot.up(project, home)

        assert refused.value.pid == pid
        assert await pids(home) == before


async def test_up_again_after_supervisord_was_killed(project: Path, home: RunDir) -> None:
    """The stale socket goes, and agents that are still ending are waited for."""
    async with mesh(project, home, "risk") as pid:
        before = await pids(home)
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: not is_alive(pid))

        async with mesh(project, home, "risk"):
            after = await pids(home)
            assert not any(is_alive(each) for each in before.values())
            assert set(after) == set(before)


async def test_a_killed_supervisords_agent_that_hangs_is_killed(
    project: Path, home: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot hear that its supervisord is gone, and nobody else would ever end it."""
    monkeypatch.setattr(leftovers, "PATIENCE_S", 0.5)
    said: list[str] = []
    (project / "agents" / "hanging.py").write_text(_HANGING)
    with (project / "supervisord.conf").open("a") as file:
        file.write(_HANGING_PROGRAM)
    async with mesh(project, home, "hanging") as pid:
        hung = (await pids(home))["hanging"]
        await eventually(lambda: home.output("hanging").read_text() == "hanging\n")
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: not is_alive(pid))

        await boot.up(project, home, agents=["hanging"], on_wait=said.append)

        assert not is_alive(hung)
        assert said[0].startswith("waiting for ")
        assert said[1:] == [f"hanging (pid {hung}) did not end within 0.5 s and is killed"]


async def test_who_lives_in_the_directory_is_left_alone(project: Path, home: RunDir) -> None:
    home.ensure()
    with home.acquire(home.lock("risk")):
        with pytest.raises(AlreadyRunningError, match="agent 'risk'") as refused:
            await boot.up(project, home, agents=["risk"])

        assert refused.value.pid == os.getpid()
        assert not await SupervisorClient(home.socket("supervisor")).is_up()


async def test_a_script_run_by_hand_keeps_its_counters(project: Path, home: RunDir) -> None:
    home.ensure()
    with home.acquire(home.lock("visitor")):
        for path in (home.ledger("visitor"), home.ledger("risk")):
            path.write_text("0")

        async with mesh(project, home, "portfolio"):
            assert home.ledger("visitor").exists()
            assert not home.ledger("risk").exists()


@pytest.mark.parametrize("successor", [False, True], ids=["nobody else", "another one"])
async def test_a_program_does_not_start_when_its_supervisord_is_gone(
    home: RunDir, successor: bool
) -> None:
    """Killed before the program could ask the kernel for word of it; another one's may be there."""
    home.ensure()
    async with running("sleep", "60") as named:
        if not successor:
            named.kill()
            await named.wait()
        (home.path / "run" / "supervisord.pid").write_text(f"{named.pid}\n")

        ended = await asyncio.to_thread(
            run_program,
            sys.executable,
            *("-m", "mesh.supervision.monitor"),
            env=environment(MESH_SUPERVISED="1"),
        )

    assert ended.code == 0, ended
    assert not home.ledger("monitor").exists()


async def test_an_ad_hoc_forwarder_makes_room(project: Path, home: RunDir) -> None:
    home.ensure()
    argv = (sys.executable, "-m", "mesh.brokers.forwarder", "--adhoc", home.path)
    async with running(*argv) as adhoc:
        await eventually(lambda: _is_ready(home, "forwarder"))

        async with mesh(project, home, "risk"):
            assert await adhoc.wait() == 0
            assert (await pids(home))["forwarder"] != adhoc.pid


async def test_a_program_that_fails_is_named_with_its_last_words(
    project: Path, home: RunDir
) -> None:
    with (project / "supervisord.conf").open("a") as file:
        file.write(_BROKEN)
    async with mesh(project, home, "broken"):
        states = {each.name: each for each in await boot.wait_ready(home)}

        assert states["broken"].verdict == "failed"
        assert states["broken"].last_words == "no such thing"
        assert states["forwarder"].verdict == "ready"


async def test_a_program_without_a_file_for_its_output_has_last_words_too(
    project: Path, home: RunDir
) -> None:
    """As people write them by hand, here with a script that is not there."""
    command = "%(here)s/.venv/bin/python -m mesh.runtime agents/ghost.py"
    with (project / "supervisord.conf").open("a") as file:
        file.write(f"\n[program:ghost]\ncommand={command}\nstartretries=0\n")
    async with mesh(project, home, "ghost"):
        states = {each.name: each for each in await boot.wait_ready(home)}

        assert states["ghost"].verdict == "failed"
        assert "agents/ghost.py: no such file" in states["ghost"].last_words


@pytest.mark.parametrize("source", ["running", "failed"])
async def test_who_starts_again_once_sources_speak_is_no_matter_of_the_start(
    project: Path, home: RunDir, source: str
) -> None:
    async with mesh(project, home, "market_data", "risk"):
        pid = (await pids(home))["risk"]
        await eventually(lambda: _sources(home, "market_data") == "running")
        ledger = Ledger.open(home.ledger("risk"))
        ledger.set("state", STATES.index("starting"))  # as its next incarnation would
        ledger.close()
        speaker = Ledger.open(home.ledger("market_data"))
        speaker.set("sources", SOURCES.index(source))
        speaker.close()

        states = await boot.wait_ready(home, timeout_s=5, until_begun=True)

        with pytest.raises(BootError, match=r"not READY after 0 s: .*risk"):
            await boot.wait_ready(home, timeout_s=0)
        assert {each.name: each for each in states}["risk"] == ProgramState("risk", "ready", pid)


async def test_restart_gives_one_program_a_new_process(project: Path, home: RunDir) -> None:
    async with mesh(project, home, "risk", "portfolio"):
        before = await pids(home)

        await boot.restart(home, ["risk"])

        after = await pids(home)
        assert {name for name in after if after[name] != before[name]} == {"risk"}


async def test_two_at_the_same_time_make_one_mesh(project: Path, home: RunDir) -> None:
    home.ensure()
    outcomes = await asyncio.gather(
        boot.up(project, home, agents=["risk"]),
        boot.up(project, home, agents=["risk"]),
        return_exceptions=True,
    )
    try:
        assert sum(isinstance(each, AlreadyRunningError) for each in outcomes) == 1
        assert sum(isinstance(each, int) for each in outcomes) == 1
    finally:
        await boot.down(home)
