"""The client against a real supervisord with tiny programs of the shipped settings."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING, cast

import pytest

from mesh.cli.exits import code_of
from mesh.errors import ConfigurationError
from mesh.supervision.supervisord import (
    NOT_RUNNING,
    ProcessInfo,
    SupervisorClient,
    SupervisorError,
    SupervisorSilentError,
    SupervisorUnavailableError,
)
from tests.plumbing.processes import eventually, is_alive, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

_HEAD = """
[supervisord]
logfile={dir}/supervisord.log
pidfile={dir}/supervisord.pid
childlogdir={dir}
{user}
[unix_http_server]
file={dir}/s.sock
chmod=0700
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
"""
_PROGRAM = """
[program:{name}]
command={python} -c "{code}"
autostart=false
autorestart=unexpected
exitcodes=78
startsecs=1
startretries=3
killasgroup=true
redirect_stderr=true
stdout_logfile={dir}/{name}.out
"""
_SLEEPS = "import time; time.sleep(99)"


def write_conf(folder: Path, **programs: str) -> Path:
    user = "user=root" if os.geteuid() == 0 else ""
    text = _HEAD.format(dir=folder, user=user) + "".join(
        _PROGRAM.format(name=name, python=sys.executable, code=code, dir=folder)
        for name, code in programs.items()
    )
    path = folder / "supervisord.conf"
    path.write_text(text)
    return path


@contextlib.asynccontextmanager
async def supervisord(folder: Path, **programs: str) -> AsyncIterator[SupervisorClient]:
    conf = write_conf(folder, **programs)
    client = SupervisorClient(folder / "s.sock")
    argv = (sys.executable, "-m", "supervisor.supervisord", "-n", "-c", conf)
    async with running(*argv, cwd=folder):
        await until(client.is_up, "supervisord answers")
        yield client


async def info(client: SupervisorClient, name: str) -> ProcessInfo:
    return next(each for each in await client.processes() if each.name == name)


async def in_state(client: SupervisorClient, name: str, state: str) -> ProcessInfo:
    async def is_there() -> bool:
        return (await info(client, name)).state == state

    await until(is_there, f"{name} is {state}")
    return await info(client, name)


async def until(condition: Callable[[], Awaitable[object]], what: str) -> None:
    # mypy finds no type for a union of a value and what gives one
    await eventually(cast("Callable[[], bool]", condition), within_s=20, what=what)


async def test_programs_start_stop_and_take_signals(rundir: Path) -> None:
    async with supervisord(rundir, one=_SLEEPS, two=_SLEEPS) as client:
        assert {each.name: each.state for each in await client.processes()} == {
            "one": "STOPPED",
            "two": "STOPPED",
        }
        assert is_alive(await client.pid())

        await client.start("one")
        first = await in_state(client, "one", "RUNNING")
        assert is_alive(first.pid)

        await client.signal("one", "KILL")
        await eventually(lambda: not is_alive(first.pid))
        second = await in_state(client, "one", "RUNNING")
        assert second.pid != first.pid

        await client.stop("one")
        assert not is_alive(second.pid)
        assert (await info(client, "one")).state == "STOPPED"
        await client.stop("one")  # already there


async def test_an_end_by_itself_is_no_reason_to_stay_down(rundir: Path) -> None:
    """Exit 0 after a while: started again. Exit 78: a setting that stays wrong."""
    ends = "import time,sys; time.sleep(1.5); sys.exit({})"
    async with supervisord(rundir, ends=ends.format(0), refuses=ends.format(78)) as client:
        for name in ("ends", "refuses"):
            await client.start(name)
        first = await in_state(client, "ends", "RUNNING")

        async def is_another() -> bool:
            found = await info(client, "ends")
            return found.state == "RUNNING" and found.pid != first.pid

        await until(is_another, "started again")
        refused = await in_state(client, "refuses", "EXITED")
        assert refused.exit_status == 78
        assert refused.has_given_up


@pytest.mark.parametrize(
    ("state", "spawn_error", "for_s", "given_up"),
    [
        ("RUNNING", "", 0, False),
        ("BACKOFF", "Exited too quickly", 9, False),
        ("FATAL", "Exited too quickly", 0, True),
        ("STOPPED", "", 0, True),
        ("EXITED", "", 0, True),
        ("EXITED", "Bad exit code -1", 1, False),
        ("EXITED", "Bad exit code -1", 9, True),
    ],
)
def test_who_was_killed_a_moment_ago_is_not_given_up(
    state: str, spawn_error: str, for_s: int, given_up: bool
) -> None:
    """supervisord shows EXITED until the next turn of its loop; only by then it is respawned."""
    found = ProcessInfo("one", state, 0, 0, spawn_error, 100.0, 200.0, 200.0 + for_s)

    assert found.has_given_up == given_up


async def test_a_program_that_cannot_start_is_given_up(rundir: Path) -> None:
    async with supervisord(rundir, broken="import nothing_of_this_name") as client:
        await client.start("broken")

        given_up = await in_state(client, "broken", "FATAL")

        assert given_up.has_given_up
        assert "ModuleNotFoundError" in (rundir / "broken.out").read_text()


async def test_reload_touches_only_what_changed(rundir: Path) -> None:
    async with supervisord(rundir, stays=_SLEEPS, goes=_SLEEPS) as client:
        await client.start("stays")
        before = await in_state(client, "stays", "RUNNING")
        write_conf(rundir, stays=_SLEEPS, comes=_SLEEPS)

        added, changed, removed = await client.reload()

        assert (added, changed, removed) == (["comes"], [], ["goes"])
        await client.remove("goes")
        await client.add("comes")
        assert {each.name for each in await client.processes()} == {"stays", "comes"}
        assert (await info(client, "stays")).pid == before.pid


async def test_what_cannot_be_read_again_changes_nothing(rundir: Path) -> None:
    async with supervisord(rundir, one=_SLEEPS) as client:
        with (rundir / "supervisord.conf").open("a") as file:
            file.write("[program:two]\n")

        with pytest.raises(ConfigurationError, match="program:two does not specify a command"):
            await client.reload()

        assert [each.name for each in await client.processes()] == ["one"]


async def test_refusals_say_what_was_asked(rundir: Path) -> None:
    async with supervisord(rundir, one=_SLEEPS) as client:
        with pytest.raises(SupervisorError, match=r"BAD_NAME.*nobody"):
            await client.start("nobody")
        with pytest.raises(SupervisorError, match=r"BAD_SIGNAL|NOT_RUNNING") as refused:
            await client.signal("one", "USR1")
        assert refused.value.code == NOT_RUNNING


@pytest.mark.parametrize("name", ["", "a b", "a:b", "*", "../x", "x" * 65, "é", "a\n", "<a>"])
async def test_names_that_are_none_never_leave(rundir: Path, name: str) -> None:
    """Nobody listens: a name that was let through would fail by another error."""
    client = SupervisorClient(rundir / "s.sock")

    for call in (client.start, client.stop, client.add, client.remove):
        with pytest.raises(SupervisorError, match="no program name") as refused:
            await call(name)
        assert not isinstance(refused.value, SupervisorUnavailableError)


async def test_nobody_there_is_said_with_what_to_do(rundir: Path) -> None:
    client = SupervisorClient(rundir / "s.sock")

    assert not await client.is_up()
    with pytest.raises(SupervisorUnavailableError, match="mesh up"):
        await client.processes()


async def test_a_stopped_supervisord_does_not_hold_the_caller(rundir: Path) -> None:
    async with supervisord(rundir, one=_SLEEPS) as client:
        pid = await client.pid()
        os.kill(pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(10):
                with pytest.raises(SupervisorSilentError, match="did not answer") as silent:
                    await client.processes()
        finally:
            os.kill(pid, signal.SIGCONT)
        assert f"supervisord (pid {pid})" in str(silent.value)
        assert f"kill -9 {pid}" in str(silent.value)
        assert code_of(silent.value) == 69
