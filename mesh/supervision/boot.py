"""Start, stop and change a whole mesh: what `mesh up`, `down` and `reload` do, for programs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mesh.account import account
from mesh.config import MessageBusConfig
from mesh.errors import AlreadyRunningError, ConfigurationError, MeshError
from mesh.ledger_views import read_ledgers, retire
from mesh.replicas import group_of, replica_names
from mesh.supervision.conf import (
    INFRASTRUCTURE,
    has_own_redis,
    read_replicas,
    render,
    rendered_programs,
    write_replicas,
)
from mesh.supervision.kernel import environment_of
from mesh.supervision.last_words import last_words
from mesh.supervision.leftovers import make_room
from mesh.supervision.redis_server import settings_for
from mesh.supervision.supervisord import ProcessInfo, SupervisorClient

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping
    from pathlib import Path

    from mesh.rundir import RunDir

_LOOK_S = 0.1
#: As many as supervisord gives an agent that fails at once: the first and three `startretries`.
_STARTS = 4


class BootError(MeshError):
    """supervisord did not come up or did not go down; the message says what it said."""


@dataclass(frozen=True, slots=True)
class ProgramState:
    """One program on its way to READY."""

    name: str
    #: starting, ready, or failed.
    verdict: str
    pid: int
    #: The last line it printed, when it failed.
    last_words: str = ""


async def up(
    project: Path,
    rundir: RunDir,
    *,
    params: Mapping[str, str] | None = None,
    agents: Collection[str] | None = None,
    replicas: Mapping[str, int] | None = None,
    broker_type: str = "zmq",
    with_redis: bool = False,
    environment: Mapping[str, str] | None = None,
    on_free: Callable[[], Awaitable[None]] | None = None,
    on_wait: Callable[[str], None] | None = None,
) -> int:
    """
    Start a mesh; returns supervisord's pid once it answers.

    What a killed supervisord left is waited for, some seconds at most.

    Args:
        project: Where supervisord.conf and agents/ are.
        rundir: The mesh's directory.
        params: Parameters for the agents.
        agents: Only these agents.
        replicas: How many there shall be of an agent; default one.
        broker_type: The fabric; only ZeroMQ needs the forwarder.
        with_redis: Keep a redis-server for this mesh too, and use it as the fabric.
        environment: Set for all programs, over this process's own.
        on_free: Awaited when nothing runs here any more, before anything is started.
        on_wait: Told in words what holds the start up.

    Raises:
        AlreadyRunningError: A mesh runs in this directory; it is left alone.
        BootError: supervisord does not come up.
        ConfigurationError: The configuration cannot be used.
    """
    rundir.ensure()
    client = SupervisorClient(rundir.socket("supervisor"))
    with rundir.acquire(rundir.lock("mesh")):
        if await client.is_up():
            raise AlreadyRunningError(f"the mesh in {rundir.path}", await client.pid())
        given = settings_for(rundir, os.environ) if with_redis else os.environ
        variables = {**given, **(environment or {}), "MESH_DIR": str(rundir.path)}
        variables |= {f"MESH_PARAM_{name.upper()}": value for name, value in (params or {}).items()}
        with_forwarder = broker_type == "zmq" and not with_redis
        conf = render(
            project,
            rundir,
            agents,
            replicas=replicas,
            with_forwarder=with_forwarder,
            with_redis=with_redis,
            environ=variables,
        )
        await make_room(rundir, {*INFRASTRUCTURE, *rendered_programs(rundir)}, on_wait)
        _clear(rundir)
        if on_free is not None:
            await on_free()
        rundir.fabric.write_text(MessageBusConfig.from_env(variables).fabric())
        said = rundir.path / "log" / "supervisord.out"
        pid = await asyncio.to_thread(_spawn, conf, project, variables, said)
        await _await_answer(client, pid, said)
        return pid


async def wait_ready(
    rundir: RunDir,
    *,
    timeout_s: float = 60.0,
    until_begun: bool = False,
    on_change: Callable[[list[ProgramState]], None] | None = None,
) -> list[ProgramState]:
    """
    Return when every program is READY or has failed.

    supervisord gives up programs that end within `startsecs`. One that takes longer to fail, it
    starts for ever: here that counts as failed after as many starts.

    Args:
        rundir: The mesh's directory.
        timeout_s: How long to wait.
        until_begun: After `up`: once sources speak, all have been READY, and who starts again then
            is not waited for.
        on_change: Told of every change.

    Raises:
        BootError: Some are neither after `timeout_s`.
    """
    client = SupervisorClient(rundir.socket("supervisor"))
    give_up_s = time.monotonic() + timeout_s
    before: list[ProgramState] = []
    pids: dict[str, set[int]] = {}
    while True:
        # Asking also wakes supervisord, whose own loop turns once a second
        programs = await client.processes()
        states = [program_state(rundir, each) for each in programs]
        has_begun = until_begun and _has_begun(rundir, {program.name for program in programs})
        for at, program in enumerate(programs):
            if states[at].verdict != "starting":
                continue
            if has_begun:
                states[at] = replace(states[at], verdict="ready")
                continue
            if program.state == "RUNNING":  # it has outlived `startsecs`
                pids.setdefault(program.name, set()).add(program.pid)
            if len(pids.get(program.name, ())) > _STARTS:
                words = last_words(rundir, program)
                states[at] = ProgramState(program.name, "failed", program.pid, words)
        if states != before and on_change is not None:
            on_change(states)
        before = states
        waiting = [state.name for state in states if state.verdict == "starting"]
        if not waiting:
            return states
        if time.monotonic() > give_up_s:
            raise BootError(f"not READY after {timeout_s:g} s: {', '.join(waiting)}")
        await asyncio.sleep(_LOOK_S)


def _has_begun(rundir: RunDir, names: Collection[str]) -> bool:
    """Say whether the monitor has let the sources of these programs speak."""
    views = read_ledgers(rundir.ledgers)
    spoken = ("running", "done", "failed")
    return any(views[name].sources in spoken for name in names & views.keys())


def program_state(rundir: RunDir, program: ProcessInfo) -> ProgramState:
    """Say how a program stands, from supervisord's and its own word."""
    view = read_ledgers(rundir.ledgers).get(program.name)
    if program.has_given_up:
        return ProgramState(program.name, "failed", 0, last_words(rundir, program))
    mine = view is not None and view.pid == program.pid
    ready = mine and view is not None and view.state == "ready"
    return ProgramState(program.name, "ready" if ready else "starting", program.pid)


async def down(rundir: RunDir, *, timeout_s: float = 30.0) -> None:
    """
    Stop a mesh: sources first, the others when nothing is under way, supervisord last.

    Raises:
        SupervisorUnavailableError: No mesh runs here.
        BootError: supervisord did not end in time.
    """
    client = SupervisorClient(rundir.socket("supervisor"))
    pid = await client.pid()
    names = [each.name for each in await client.processes() if not each.has_given_up]
    views = read_ledgers(rundir.ledgers)
    sources = [name for name in names if name in views and views[name].sources != "none"]
    await _stop_all(client, sources)
    await _settle(rundir)
    await _stop_all(client, [n for n in names if n not in sources and n not in INFRASTRUCTURE])
    await _stop_all(client, [name for name in names if name in INFRASTRUCTURE])
    await client.shutdown()
    await _await_end(pid, timeout_s)


async def reload(project: Path, rundir: RunDir) -> tuple[list[str], list[str], list[str]]:
    """
    Take up what changed in supervisord.conf; nobody else's process is touched.

    Returns:
        The programs that were added, restarted and removed.

    Raises:
        ConfigurationError: supervisord could not read it; everything stays as it is.
    """
    client = SupervisorClient(rundir.socket("supervisor"))
    await _render_again(client, project, rundir, read_replicas(rundir))
    added, changed, removed = await client.reload()
    for name in (*changed, *removed):
        await client.stop(name)
        await client.remove(name)
    for name in removed:
        _take_leave(rundir, name)
    for name in (*added, *changed):
        await client.add(name)
    return added, changed, removed


async def scale(
    project: Path, rundir: RunDir, name: str, count: int
) -> tuple[list[str], list[str]]:
    """
    Run so many replicas of an agent; nobody else's process is touched.

    Replicas that are too many drain first. The wish holds for this directory until it is changed,
    also after `down`.

    Returns:
        The programs that were added and removed.

    Raises:
        ConfigurationError: The mesh was not started by `up`.
    """
    if not rendered_programs(rundir):
        raise ConfigurationError(
            f"the mesh in {rundir.path} was started by supervisord alone, which reads the project's"
            " supervisord.conf; replicas need a mesh that `mesh up` has started"
        )
    client = SupervisorClient(rundir.socket("supervisor"))
    wanted = replica_names(name, count)
    there = [each.name for each in await client.processes() if group_of(each.name) == name]
    added = [each for each in wanted if each not in there]
    removed = [each for each in there if each not in wanted]
    await _render_again(client, project, rundir, {**read_replicas(rundir), name: count})
    if not removed:
        write_replicas(rundir, name, count)
    await client.reload()
    await _stop_all(client, removed)
    for each in removed:
        await client.remove(each)
        _take_leave(rundir, each)
    for each in added:
        await client.add(each)
    write_replicas(rundir, name, count)
    return added, removed


def _take_leave(rundir: RunDir, name: str) -> None:
    """Note that an agent has ended for good; not before it has: until then it counts."""
    retire(rundir.ledger(name))
    rundir.card(name).unlink(missing_ok=True)


async def _render_again(
    client: SupervisorClient, project: Path, rundir: RunDir, replicas: Mapping[str, int]
) -> None:
    """Render as `up` did; where supervisord was started by hand it reads the project's own file."""
    programs = rendered_programs(rundir)
    if programs:
        render(
            project,
            rundir,
            replicas=replicas,
            with_forwarder="forwarder" in programs,
            with_redis=has_own_redis(rundir),
            environ=environment_of(await client.pid()),
        )


async def restart(rundir: RunDir, names: Collection[str]) -> None:
    """Stop programs and start them anew."""
    client = SupervisorClient(rundir.socket("supervisor"))
    await _stop_all(client, list(names))
    for name in names:
        await client.start(name)


async def _stop_all(client: SupervisorClient, names: list[str]) -> None:
    async with asyncio.TaskGroup() as tasks:
        for name in names:
            tasks.create_task(client.stop(name), name=f"stop-{name}")


async def _settle(rundir: RunDir, patience_s: float = 1.0) -> None:
    """Return when nothing is under way, or nothing has moved for a while."""
    seen, since_s = -1, time.monotonic()
    while True:
        under_way = account(read_ledgers(rundir.ledgers)).in_flight
        now_s = time.monotonic()
        if under_way != seen:
            seen, since_s = under_way, now_s
        if under_way == 0 or now_s - since_s > patience_s:
            return
        await asyncio.sleep(0.02)


def _spawn(conf: Path, project: Path, environment: dict[str, str], said: Path) -> int:
    """
    Start supervisord so that it outlives us; gives its pid.

    Not by asyncio: its transport ends the child when the loop that made it is closed.
    """
    command = [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(conf)]
    with said.open("wb") as output:
        child = subprocess.Popen(  # noqa: S603 - our own command, no shell
            command,
            cwd=project,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=output,
            start_new_session=True,
        )
    # It outlives us on purpose; keep the interpreter from warning about it
    child.returncode = 0
    return child.pid


async def _await_answer(client: SupervisorClient, pid: int, said: Path) -> None:
    for _ in range(200):
        if await client.is_up():
            return
        if not _lives(pid):
            break
        await asyncio.sleep(0.05)
    words = await asyncio.to_thread(said.read_text, errors="replace")
    raise BootError(f"supervisord did not start: {words.strip() or 'no answer on its socket'}")


async def _await_end(pid: int, timeout_s: float) -> None:
    give_up_s = time.monotonic() + timeout_s
    while _lives(pid):
        if time.monotonic() > give_up_s:
            raise BootError(f"supervisord (pid {pid}) did not end within {timeout_s:g} s")
        await asyncio.sleep(0.05)


def _lives(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _clear(rundir: RunDir) -> None:
    """Begin a new account. What belongs to a script that somebody runs by hand stays."""
    run = rundir.path / "run"
    by_hand = [lock.stem for lock in run.glob("*.lock") if rundir.holder(lock) is not None]
    kept = {
        path
        for name in by_hand
        for path in (
            rundir.ledger(name),
            rundir.card(name),
            rundir.socket(f"{name}.ctl"),
            rundir.output(name),
        )
    }
    for folder, pattern in (
        ("ledger", "*"),
        ("agents", "*"),
        ("run", "*.sock*"),
        ("run", "rosters.json"),
        ("log", "*.out*"),
    ):
        for path in (rundir.path / folder).glob(pattern):
            if path not in kept:
                path.unlink(missing_ok=True)
