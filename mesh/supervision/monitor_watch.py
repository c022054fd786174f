"""
Agents end a monitor that was stopped (SIGSTOP), for it watches them all and nobody watches it.

Its own thread ends it when its loop is blocked, and supervisord starts it anew; of a process that
is stopped, only others can tell.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from typing import TYPE_CHECKING

from mesh.ledger import CELL_OF
from mesh.ledger_views import MappedLedger
from mesh.supervision import kernel
from mesh.supervision.liveness import LivenessConfig

if TYPE_CHECKING:
    from mesh.rundir import RunDir

_log = logging.getLogger(__name__)

#: As an agent's.
_HUNG_S = LivenessConfig().hung_s


class MonitorWatch:
    """
    One agent's look at the monitor of its mesh.

    Args:
        rundir: The mesh's directory.
        hung_s: For how long a monitor that is stopped may be silent.
    """

    def __init__(self, rundir: RunDir, *, hung_s: float = _HUNG_S) -> None:
        """Know of no monitor yet."""
        self._rundir = rundir
        self._hung_s = hung_s
        self._ledger: MappedLedger | None = None
        #: Its pid, when it was found stopped at the last look.
        self._found = 0

    def look(self) -> bool:
        """
        Kill the monitor if it has been stopped for too long; to be called about once a second.

        Returns:
            Whether it was killed.
        """
        found, self._found = self._found, self._stopped_pid()
        # Twice: the whole mesh may have been stopped, and be woken one process after the other
        if not self._found or found != self._found:
            return False
        if self._rundir.holder(self._rundir.lock("monitor")) != self._found:
            return False  # another process has this number by now
        _log.error(
            "the monitor (pid %d) was stopped and has not watched for %g s: it is replaced",
            self._found,
            self._hung_s,
        )
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._found, signal.SIGKILL)
        return True

    def _stopped_pid(self) -> int:
        """Give the pid of a monitor that is stopped; 0: it is not, or there is none."""
        if self._ledger is None:
            try:
                self._ledger = MappedLedger(self._rundir.ledger("monitor"))
            except (OSError, ValueError):
                return 0
        cells = self._ledger.cells
        pid, beat_s = cells[CELL_OF["pid"]], cells[CELL_OF["beat_mono_ms"]] / 1000
        if not beat_s or time.monotonic() - beat_s < self._hung_s:
            return 0
        # Who waits for a CPU is left alone, and so is one that a debugger holds
        return pid if kernel.process_state(pid) == ("T", False) else 0
