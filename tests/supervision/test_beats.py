"""Whose beats count: those of the process that supervisord started under the name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.beats import Beat
from mesh.ledger import Ledger
from mesh.rundir import RunDir
from mesh.supervision.monitor import Monitor
from mesh.supervision.supervisord import ProcessInfo, SupervisorClient

if TYPE_CHECKING:
    from pathlib import Path


def beat(name: str, pid: int) -> Beat:
    return Beat(name=name, pid=pid, seq=1, state="ready", mono_s=1.0)


def monitor(own_mesh_dir: Path) -> Monitor:
    rundir = RunDir(own_mesh_dir)
    made = Monitor(rundir, SupervisorClient(rundir.socket("supervisor")), Ledger.in_memory())
    made._programs = [ProcessInfo("risk", "RUNNING", 1, 0, "", 0.0, 0.0)]
    return made


def test_a_beat_in_anothers_name_does_not_hide_his(own_mesh_dir: Path) -> None:
    """Otherwise any process could have a healthy agent killed for silence."""
    watching = monitor(own_mesh_dir)

    assert watching._hear(beat("risk", 1))
    assert watching._hear(beat("risk", 2))

    assert watching._sightings(0.0)["risk"].beat_s is not None


def test_strangers_are_bounded_and_forgotten(own_mesh_dir: Path) -> None:
    watching = monitor(own_mesh_dir)

    assert watching._hear(beat("risk", 1))
    taken = sum(watching._hear(beat(f"stranger{number}", 2)) for number in range(2000))
    watching._forget(1e12)

    assert taken < 1000
    assert list(watching._beats) == [("risk", 1)]
