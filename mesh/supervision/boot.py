"""Start, stop and change a whole mesh: what `mesh up`, `down` and `reload` do, for programs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mesh.errors import AlreadyRunningError, MeshError
from mesh.ledger import account, read_ledgers
from mesh.supervision.programs import (
    INFRASTRUCTURE,
    conf_of,
    programs_of,
    render,
    render_again,
    script_of,
)
from mesh.supervision.supervisord import (
    ProcessInfo,
    SupervisorClient,
    SupervisorError,
    SupervisorSilentError,
    SupervisorUnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from mesh.rundir import RunDir

__all__ = [
    "INFRASTRUCTURE",
    "BootError",
    "ProgramState",
    "down",
    "last_words",
    "program_state",
    "programs_of",
    "reload",
    "render",
    "restart",
    "script_of",
    "up",
    "wait_ready",
]

_LOOK_S = 0.1
#: What is ending already is waited for so long: supervisord's stopwaitsecs and a little.
_ENDING_S = 12.0
_FIRST_ANSWER_S = 10.0


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
) -> int:
    """
    Start a mesh; returns supervisord's pid once it answers.

    Args:
        project: Where supervisord.conf and agents/ are.
        rundir: The mesh's directory.
        params: Parameters for the agents.
        agents: Only these agents.

    Raises:
        AlreadyRunningError: A mesh runs in this directory; it is left alone.
        BootError: supervisord does not come up.
        ConfigurationError: The configuration cannot be used.
    """
    rundir.ensure()
    client = SupervisorClient(rundir.socket("supervisor"))
    with rundir.acquire(rundir.lock("mesh")):
        await _refuse_second(client, rundir)
        conf = render(project, rundir, agents)
        await _dismiss_adhoc_forwarder(rundir)
        await _await_predecessors(rundir, programs_of(project))
        _clear(rundir)
        environment = {**os.environ, "MESH_DIR": str(rundir.path)}
        environment |= {
            f"MESH_PARAM_{name.upper()}": value for name, value in (params or {}).items()
        }
        said = rundir.path / "log" / "supervisord.out"
        pid = await asyncio.to_thread(_spawn, conf, project, environment, said)
        try:
            await _await_answer(client, pid, said)
        except BaseException:
            # Nobody would know of it
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            raise
        return pid


async def wait_ready(
    rundir: RunDir,
    *,
    timeout_s: float = 60.0,
    on_change: Callable[[list[ProgramState]], None] | None = None,
) -> list[ProgramState]:
    """
    Return when every program is READY or has failed.

    Raises:
        BootError: Some are neither after `timeout_s`.
    """
    client = SupervisorClient(rundir.socket("supervisor"))
    give_up_s = time.monotonic() + timeout_s
    before: list[ProgramState] = []
    while True:
        # Asking also wakes supervisord, whose own loop turns once a second
        states = [program_state(rundir, each) for each in await client.processes()]
        if states != before and on_change is not None:
            on_change(states)
        before = states
        waiting = [state.name for state in states if state.verdict == "starting"]
        if not waiting:
            return states
        if time.monotonic() > give_up_s:
            raise BootError(f"not READY after {timeout_s:g} s: {', '.join(waiting)}")
        await asyncio.sleep(_LOOK_S)


def program_state(rundir: RunDir, program: ProcessInfo) -> ProgramState:
    """Say how a program stands, from supervisord's and its own word."""
    view = read_ledgers(rundir.ledgers).get(program.name)
    if program.has_given_up:
        return ProgramState(program.name, "failed", 0, last_words(rundir, program))
    mine = view is not None and view.pid == program.pid
    ready = mine and view is not None and view.state == "ready"
    return ProgramState(program.name, "ready" if ready else "starting", program.pid)


def last_words(rundir: RunDir, program: ProcessInfo) -> str:
    """Give the last line a failed program printed, or what supervisord says of it."""
    with contextlib.suppress(OSError):
        text = rundir.output(program.name).read_text(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if lines:
            return lines[-1]
    if program.spawn_error:
        return program.spawn_error
    return f"ended at once with exit code {program.exit_status}, without a word"


async def down(rundir: RunDir, *, timeout_s: float = 30.0) -> None:
    """
    Stop a mesh: sources first, the others when nothing is under way, supervisord last.

    Raises:
        SupervisorUnavailableError: No mesh runs here.
        BootError: supervisord did not end in time.
    """
    client = SupervisorClient(rundir.socket("supervisor"))
    pid = await client.pid()
    programs = await client.processes()
    names = [each.name for each in programs if not each.has_given_up]
    views = read_ledgers(rundir.ledgers)
    sources = [name for name in names if name in views and views[name].sources != "none"]
    # One that cannot be stopped singly ends with supervisord
    with contextlib.suppress(SupervisorError):
        await _stop_all(client, sources)
        await _settle(rundir)
        await _stop_all(client, [n for n in names if n not in sources and n not in INFRASTRUCTURE])
        await _stop_all(client, [name for name in names if name in INFRASTRUCTURE])
    with contextlib.suppress(SupervisorUnavailableError):
        programs += await client.processes()
        await client.shutdown()
    await _await_end(pid, timeout_s)
    _kill_left(rundir, {each.pid for each in programs if each.pid})


async def reload(project: Path, rundir: RunDir) -> tuple[list[str], list[str], list[str]]:
    """
    Take up what changed in supervisord.conf; nobody else's process is touched.

    Returns:
        The programs that were added, restarted and removed.
    """
    client = SupervisorClient(rundir.socket("supervisor"))
    if conf_of(rundir).exists():
        render_again(project, rundir)
    added, changed, removed = await client.reload()
    for name in (*changed, *removed):
        await client.stop(name)
        await client.remove(name)
    for name in (*added, *changed):
        await client.add(name)
    return added, changed, removed


async def restart(rundir: RunDir, names: Collection[str]) -> None:
    """Stop programs and start them anew."""
    client = SupervisorClient(rundir.socket("supervisor"))
    await _stop_all(client, list(names))
    for name in names:
        await client.start(name)


async def _stop_all(client: SupervisorClient, names: Iterable[str]) -> None:
    """Stop programs at the same time; all are tried before the first failure is raised."""
    outcomes = await asyncio.gather(*map(client.stop, names), return_exceptions=True)
    for outcome in outcomes:
        if outcome is not None:
            raise outcome


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
    give_up_s = time.monotonic() + _FIRST_ANSWER_S
    while time.monotonic() < give_up_s:
        if await client.is_up():
            return
        if not _lives(pid):
            break
        await asyncio.sleep(0.05)
    words = said.read_text(errors="replace").strip()
    raise BootError(f"supervisord did not start: {words or 'no answer on its socket'}")


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


def _kill_left(rundir: RunDir, pids: Iterable[int]) -> None:
    """Kill what supervisord should have ended, and nobody who has got the number since."""
    for pid in pids:
        with contextlib.suppress(OSError):
            facts = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if b"MESH_SUPERVISED=1" in facts and _names_directory(facts, rundir):
                os.kill(pid, signal.SIGKILL)


def _names_directory(environment: list[bytes], rundir: RunDir) -> bool:
    return b"MESH_DIR=" + os.fsencode(rundir.path) in environment


async def _refuse_second(client: SupervisorClient, rundir: RunDir) -> None:
    """Return when no supervisord lives here; one that is ending is waited for."""
    what = f"the mesh in {rundir.path}"
    give_up_s = time.monotonic() + _ENDING_S
    while True:
        try:
            raise AlreadyRunningError(what, await client.pid())
        except SupervisorSilentError:
            # It may be stopped; taking its socket from it would make a second mesh
            raise AlreadyRunningError(what, _written_pid(rundir)) from None
        except SupervisorUnavailableError:
            return
        except SupervisorError:
            if time.monotonic() > give_up_s:
                raise AlreadyRunningError(what, _written_pid(rundir)) from None
        await asyncio.sleep(0.05)


def _written_pid(rundir: RunDir) -> int | None:
    try:
        return int((rundir.path / "run" / "supervisord.pid").read_text())
    except (OSError, ValueError):
        return None


async def _await_predecessors(rundir: RunDir, names: Iterable[str]) -> None:
    """Wait for agents that are just ending because their supervisord was killed."""
    give_up_s = time.monotonic() + _ENDING_S
    for name in names:
        while (pid := rundir.holder(rundir.lock(name))) is not None:
            if time.monotonic() > give_up_s:
                raise AlreadyRunningError(f"{name} in {rundir.path}", pid)
            await asyncio.sleep(0.05)


async def _dismiss_adhoc_forwarder(rundir: RunDir) -> None:
    """Ask the forwarder of a plain script to make room for the supervised one."""
    path = rundir.lock("forwarder")
    pid = rundir.holder(path)
    if not pid:
        return
    if rundir.note(path) != "adhoc":
        raise AlreadyRunningError(f"the forwarder in {rundir.path}", pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    for _ in range(100):
        if rundir.holder(path) is None:
            return
        await asyncio.sleep(0.05)
    raise BootError(f"the ad-hoc forwarder (pid {pid}) in {rundir.path} does not leave")


def _clear(rundir: RunDir) -> None:
    """Begin a new account; what a living process of a script of its own uses stays."""
    for pattern in ("ledger/*", "agents/*", "run/*.sock*", "log/*.out*"):
        for path in rundir.path.glob(pattern):
            name = path.name if pattern == "ledger/*" else path.name.rsplit(".", 1)[0]
            if rundir.holder(rundir.lock(name.removesuffix(".ctl"))) is None:
                path.unlink(missing_ok=True)
