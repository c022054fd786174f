"""What every process of a mesh does first: privacy, one incarnation, last words, its parent."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mesh.env import is_supervised
from mesh.errors import AlreadyRunningError

if TYPE_CHECKING:
    from mesh.rundir import Lock, RunDir

#: The note in the locks of processes that end with their supervisord.
SUPERVISED = "supervised"
_PR_SET_PDEATHSIG = 1
#: A predecessor that is just dying is waited for so long.
_LOCK_PATIENCE_S = 2.0

_stacks: IO[str] | None = None


def die_with_parent(parent: int | None = None) -> None:
    """
    Ask the kernel for SIGTERM when the parent dies. Call it in the main thread.

    Args:
        parent: Its pid, where it is known; if it is gone already the process ends at once.
    """
    before = os.getppid() if parent is None else parent
    # Bound to the thread that forked us: supervisord has one, and so has a spawning main thread
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != before:
        os._exit(0)


def parent_of(pid: int) -> int | None:
    """Give the parent of a process; None when it has ended."""
    facts = _facts_of(pid)
    return int(facts[1]) if facts else None


def is_running(pid: int) -> bool:
    """Say whether a process runs; one that is dead but not collected yet does not."""
    return bool(_facts_of(pid))


def _facts_of(pid: int) -> list[str]:
    """Read a living process's state, parent and so on; nothing when it has ended."""
    try:
        # The name before them, in parentheses, may hold anything
        facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
    return [] if facts[0] in "ZX" else facts


def prepare(rundir: RunDir, name: str, *, parent_bound: bool) -> None:
    """
    Make this process private and ready to tell how it died.

    Args:
        rundir: The mesh's directory, where stacks are kept.
        name: The agent's name.
        parent_bound: End when the parent ends, so that no orphan survives a killed supervisord.
    """
    os.umask(0o077)
    if parent_bound:
        die_with_parent()
        supervisor = rundir.supervisor_pid() if is_supervised() else None
        # Killed while this interpreter was starting: nobody will tell us any more. Another may have
        # taken its place meanwhile, and wants our name for a child of its own
        parent = os.getppid()
        # (A child of an agent's own is fine too)
        if supervisor is not None and supervisor not in {parent, parent_of(parent)}:
            os._exit(0)
    keep_stacks(rundir, name)


def keep_stacks(rundir: RunDir, name: str) -> None:
    """
    Write every thread's stack to ``stacks/<name>.<pid>.txt`` on SIGABRT or a native crash.

    faulthandler writes from C, so the stack of a blocked loop is kept as well.
    """
    global _stacks
    drop_empty_stacks()
    _stacks = rundir.stack(name, os.getpid()).open("w")
    faulthandler.enable(_stacks, all_threads=True)


def drop_empty_stacks() -> None:
    """Remove this process's stacks file when nothing was written to it: it ended well."""
    global _stacks
    if _stacks is None:
        return
    faulthandler.disable()
    path = _stacks.name
    _stacks.close()
    _stacks = None
    if os.path.getsize(path) == 0:
        os.unlink(path)


def only_incarnation(rundir: RunDir, name: str) -> Lock:
    """
    Take the one lock of an agent's name, for as long as this process lives.

    Raises:
        AlreadyRunningError: Another process lives under this name.
    """
    patience_ends = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            return rundir.acquire(rundir.lock(name), note=SUPERVISED if is_supervised() else "")
        except AlreadyRunningError:
            if time.monotonic() > patience_ends:
                raise
            time.sleep(0.05)
