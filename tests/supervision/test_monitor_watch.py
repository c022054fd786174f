"""A monitor that was stopped is ended by the agents it watches, and no other process is."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from mesh.ledger import Ledger
from mesh.rundir import RunDir
from mesh.supervision.kernel import process_state
from mesh.supervision.monitor_watch import MonitorWatch
from tests.plumbing.processes import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Holds a lock for as long as it lives, as the monitor does.
HOLDER = """
import sys, time
from mesh.rundir import RunDir
home = RunDir(sys.argv[1])
with home.acquire(home.lock(sys.argv[2])):
    print("held", flush=True)
    time.sleep(3600)
"""


@pytest.fixture
def home(rundir: Path) -> RunDir:
    return RunDir(rundir).ensure()


@contextlib.contextmanager
def holding(home: RunDir, lock: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", HOLDER, str(home.path), lock]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            yield process
        finally:
            process.kill()


def beats(home: RunDir, pid: int, *, age_s: float) -> None:
    ledger = Ledger.open(home.ledger("monitor"))
    ledger.set("pid", pid)
    ledger.set("beat_mono_ms", int((time.monotonic() - age_s) * 1000))
    ledger.close()


@pytest.mark.parametrize(
    ("lock", "stopped", "age_s", "killed"),
    [
        ("monitor", True, 11, True),
        ("monitor", True, 5, False),
        ("monitor", False, 11, False),
        ("another", True, 11, False),
    ],
)
def test_only_a_monitor_that_was_stopped_for_long_is_killed(
    home: RunDir, lock: str, stopped: bool, age_s: float, killed: bool
) -> None:
    with holding(home, lock) as monitor:
        if stopped:
            os.kill(monitor.pid, signal.SIGSTOP)
            wait_until(lambda: process_state(monitor.pid)[0] == "T")
        beats(home, monitor.pid, age_s=age_s)
        watch = MonitorWatch(home)

        assert [watch.look(), watch.look()] == [False, killed]
        if killed:
            assert monitor.wait(10) == -signal.SIGKILL
        else:
            assert monitor.poll() is None


def test_a_mesh_without_a_monitor_has_nothing_to_look_at(home: RunDir) -> None:
    watch = MonitorWatch(home)

    assert [watch.look(), watch.look()] == [False, False]
