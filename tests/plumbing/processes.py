"""Starts programs, waits for facts, and finds the processes that a test left behind."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from mesh.rundir import RunDir

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping

ROOT = Path(__file__).resolve().parents[2]
MESH = Path(sys.executable).with_name("mesh")

_LOOK_EVERY_S = 0.02
# Multiprocessing keeps these for the life of the process that needed them
_KEPT_CHILDREN = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Finished:
    """How a program ended and what it said."""

    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


@dataclass(frozen=True, slots=True)
class Process:
    """A process of this machine."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"{self.pid}: {self.command}"


@overload
async def eventually(
    condition: Callable[[], Coroutine[Any, Any, Value]], *, within_s: float = ..., what: str = ...
) -> Value: ...


@overload
async def eventually(
    condition: Callable[[], Value], *, within_s: float = ..., what: str = ...
) -> Value: ...


async def eventually(
    condition: Callable[[], Any], *, within_s: float = 10.0, what: str = ""
) -> Any:
    """Wait until `condition`, a plain or a coroutine function, gives something true; return it."""
    ends = time.monotonic() + within_s
    while True:
        outcome = condition()
        value = await outcome if inspect.isawaitable(outcome) else outcome
        if value:
            return value
        if time.monotonic() > ends:
            raise AssertionError(f"not within {within_s:g} s: {what or _words_of(condition)}")
        await asyncio.sleep(_LOOK_EVERY_S)


def wait_until(condition: Callable[[], Value], *, within_s: float = 10.0, what: str = "") -> Value:
    """Wait like `eventually`, where there is no loop."""
    ends = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > ends:
            raise AssertionError(f"not within {within_s:g} s: {what or _words_of(condition)}")
        time.sleep(_LOOK_EVERY_S)
    return value


def _words_of(condition: Callable[[], object]) -> str:
    return inspect.getsource(condition) if inspect.isfunction(condition) else repr(condition)


def environment(**changes: str | None) -> dict[str, str]:
    """Give the environment of this test with changes; None takes a variable away."""
    merged = {**os.environ, **{name: value for name, value in changes.items() if value is not None}}
    for name, value in changes.items():
        if value is None:
            merged.pop(name, None)
    return merged


def run_program(
    *argv: str | Path,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    stdin: str | None = None,
    timeout_s: float = 30.0,
) -> Finished:
    """Run a program to its end; it and its children are killed when the time is over."""
    process = subprocess.Popen(
        [os.fspath(word) for word in argv],
        env=env,
        cwd=cwd,
        stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            out, err = process.communicate(stdin, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            ended = Finished(process.returncode, out, err)
            raise AssertionError(f"{argv} did not end within {timeout_s:g} s: {ended}") from None
    return Finished(process.returncode, out, err)


def run_mesh(
    *args: str | Path,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    timeout_s: float = 30.0,
) -> Finished:
    """Run the installed `mesh` command to its end."""
    return run_program(MESH, *args, env=env, cwd=cwd, timeout_s=timeout_s)


def run_mesh_without_room(*args: str | Path, cwd: Path = ROOT) -> Finished:
    """Run the `mesh` command where no file can grow: every write to one fails with EFBIG."""
    return run_program("bash", "-c", 'ulimit -f 0; exec "$@"', "-", MESH, *args, cwd=cwd)


def run_mesh_unread(*args: str | Path, cwd: Path = ROOT, errors: bool = False) -> Finished:
    """Run the `mesh` command with an output, and with `errors` also a stderr, that nobody reads."""
    closes = "import os, subprocess, sys; reader, writer = os.pipe(); os.close(reader)\n"
    stderr = "writer" if errors else "None"
    runs = f"sys.exit(subprocess.call(sys.argv[1:], stdout=writer, stderr={stderr}))"
    return run_program(sys.executable, "-c", closes + runs, MESH, *args, cwd=cwd)


def run_python(
    code: str, *args: str, env: Mapping[str, str] | None = None, timeout_s: float = 30.0
) -> Finished:
    """Run a piece of Python in an interpreter of its own; warnings are errors there too."""
    return run_program(
        sys.executable, "-W", "error", "-c", code, *args, env=env, timeout_s=timeout_s
    )


@contextlib.asynccontextmanager
async def running(
    *argv: str | Path,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    stop_within_s: float = 10.0,
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a program beside the test, with pipes for its output; end it by SIGTERM, else SIGKILL."""
    process = await asyncio.create_subprocess_exec(
        *argv,
        env=env,
        cwd=cwd,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        await _end(process, stop_within_s)


async def _end(process: asyncio.subprocess.Process, within_s: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        # Reads the pipes too: a program that cannot write its last words never ends
        await asyncio.wait_for(process.communicate(), within_s)
    except TimeoutError:
        process.kill()
        await process.communicate()
        raise AssertionError(
            f"{process.pid} did not end within {within_s:g} s of SIGTERM"
        ) from None


def is_alive(pid: int) -> bool:
    """Say whether a process runs; one that is dead but not yet collected does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in {"Z", "X"}


def processes_in(folder: Path) -> list[Process]:
    """Find other processes that use a folder: by command line, environment, cwd, file or socket."""
    needle = os.fsencode(folder)
    sockets = _sockets_in(folder)
    found = []
    for entry in _pids():
        if entry != os.getpid() and is_alive(entry) and _uses(entry, needle, sockets):
            found.append(Process(entry, _command(entry)))
    return found


def children() -> list[Process]:
    """Give the living children of this process, without those multiprocessing keeps."""
    pids: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            pids.update(int(word) for word in (task / "children").read_text().split())
    found = [Process(pid, _command(pid)) for pid in sorted(pids) if is_alive(pid)]
    return [one for one in found if not any(kept in one.command for kept in _KEPT_CHILDREN)]


def kill_all(find: Callable[[], list[Process]]) -> None:
    """Kill what `find` gives until it gives nothing: a supervisor restarts while one looks away."""
    for _ in range(50):
        if not (left := find()):
            return
        for one in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(one.pid, 0)
        time.sleep(_LOOK_EVERY_S)
    raise AssertionError(f"could not be killed: {', '.join(map(str, find()))}")


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return "(gone)"


def _uses(pid: int, needle: bytes, sockets: frozenset[str]) -> bool:
    proc = Path(f"/proc/{pid}")
    with contextlib.suppress(OSError):
        if needle in (proc / "cmdline").read_bytes() or needle in (proc / "environ").read_bytes():
            return True
        if os.fsencode(os.readlink(proc / "cwd")).startswith(needle):
            return True
        for name in os.listdir(proc / "fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(proc / "fd" / name)
                if target in sockets or os.fsencode(target).startswith(needle):
                    return True
    return False


def _sockets_in(folder: Path) -> frozenset[str]:
    rows = (row.split() for row in Path("/proc/net/unix").read_text().splitlines()[1:])
    return frozenset(
        f"socket:[{row[6]}]" for row in rows if len(row) > 7 and row[7].startswith(str(folder))
    )


def end_forwarder(directory: Path) -> None:
    """End the forwarder that the first broker of a directory brought up; it would linger."""
    rundir = RunDir(directory)
    lock = rundir.lock("forwarder")
    pid = rundir.holder(lock)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    wait_until(lambda: rundir.holder(lock) is None)
