"""What every process of a mesh does first: privacy, one incarnation, last words, its parent."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import time
from typing import IO, TYPE_CHECKING

from mesh.errors import AlreadyRunningError

if TYPE_CHECKING:
    from mesh.rundir import Lock, RunDir

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
    keep_stacks(rundir, name)


def keep_stacks(rundir: RunDir, name: str) -> None:
    """
    Write every thread's stack to ``stacks/<name>.<pid>.txt`` on SIGABRT or a native crash.

    faulthandler writes from C, so the stack of a blocked loop is kept as well.
    """
    global _stacks
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
            return rundir.acquire(rundir.lock(name))
        except AlreadyRunningError:
            if time.monotonic() > patience_ends:
                raise
            time.sleep(0.05)
