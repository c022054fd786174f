"""
What an earlier mesh left in a run directory before a new one starts there.

A killed supervisord leaves agents that drain for some seconds, and still hold their locks; a plain
script leaves an ad-hoc forwarder. Both make room. Whoever means to stay is left alone, and refuses
the newcomer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from typing import TYPE_CHECKING

from mesh.errors import AlreadyRunningError
from mesh.process import SUPERVISED, parent_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from mesh.rundir import RunDir

ADHOC = "adhoc"
#: As long as supervisord itself waits for a program (stopwaitsecs): 8 s to drain and some to end.
PATIENCE_S = 10.0
_KILL_GRACE_S = 5.0
_LOOK_S = 0.05


async def make_room(
    rundir: RunDir, names: Collection[str], on_wait: Callable[[str], None] | None = None
) -> None:
    """
    Return when nobody lives in the directory under one of these names.

    Agents whose supervisord is gone have been told to end by the kernel; they are waited for, and
    killed when they hang. An ad-hoc forwarder is asked to leave.

    Args:
        rundir: The directory. Its supervisord does not answer.
        names: The programs about to be started.
        on_wait: Told once, in words, who is waited for.

    Raises:
        AlreadyRunningError: Somebody stays; carries the pid.
    """
    give_up_s = time.monotonic() + PATIENCE_S
    killed = told = False
    asked: set[int] = set()
    while living := _living(rundir, names):
        _refuse_stayers(rundir, living)
        _dismiss_adhoc(rundir, living, asked)
        if time.monotonic() > give_up_s:
            if killed:
                raise AlreadyRunningError(*_first(rundir, living))
            killed, give_up_s = True, time.monotonic() + _KILL_GRACE_S
            _kill_orphans(rundir, living, on_wait)
        if not told and on_wait is not None:
            on_wait(f"waiting for {_in_words(living)} of an earlier mesh to end")
            told = True
        await asyncio.sleep(_LOOK_S)


def _living(rundir: RunDir, names: Collection[str]) -> dict[str, int]:
    holders = {name: rundir.holder(rundir.lock(name)) for name in names}
    return {name: pid for name, pid in holders.items() if pid is not None}


def _refuse_stayers(rundir: RunDir, living: dict[str, int]) -> None:
    """Refuse at once where waiting is in vain: run by hand, or by a supervisord that lives."""
    staying = {
        name: pid
        for name, pid in living.items()
        if rundir.note(rundir.lock(name)) not in (SUPERVISED, ADHOC)
        # It may have ended between two looks
        and rundir.holder(rundir.lock(name)) == pid
    }
    if staying:
        raise AlreadyRunningError(*_first(rundir, staying))
    supervisor = rundir.supervisor_pid()
    if supervisor is not None and supervisor in map(parent_of, living.values()):
        raise AlreadyRunningError(
            f"the mesh in {rundir.path}, whose supervisord does not answer,", supervisor
        )


def _dismiss_adhoc(rundir: RunDir, living: dict[str, int], asked: set[int]) -> None:
    for name, pid in living.items():
        if pid and pid not in asked and rundir.note(rundir.lock(name)) == ADHOC:
            asked.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)


def _kill_orphans(
    rundir: RunDir, living: dict[str, int], on_wait: Callable[[str], None] | None
) -> None:
    """Do what supervisord would have done to a program that does not end."""
    if on_wait is not None:
        on_wait(f"{_in_words(living)} did not end within {PATIENCE_S:g} s and is killed")
    for name, pid in living.items():
        # The lock is held, so the pid in it is its holder's and nobody else's
        if pid and rundir.holder(rundir.lock(name)) == pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _first(rundir: RunDir, living: dict[str, int]) -> tuple[str, int]:
    name, pid = next(iter(living.items()))
    what = f"the {name}" if name in ("forwarder", "monitor") else f"agent {name!r}"
    return f"{what} in {rundir.path}", pid


def _in_words(living: dict[str, int]) -> str:
    return ", ".join(f"{name} (pid {pid})" for name, pid in living.items())
