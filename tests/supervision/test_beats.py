"""Whose beats count, and what else is asked about an agent that is silent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mesh.beats import Beat
from mesh.ledger import STATES, Ledger
from mesh.ledger_views import LedgerView, view_of
from mesh.supervision import kernel
from mesh.supervision.liveness import LivenessConfig
from mesh.supervision.sightings import Probe, Sightings
from mesh.supervision.supervisord import ProcessInfo
from tests.plumbing.processes import run_python

if TYPE_CHECKING:
    from mesh.supervision.liveness import Sighting

RISK = ProcessInfo("risk", "RUNNING", 1, 0, "", 0.0, 0.0)
CONFIG = LivenessConfig()


class Facts:
    """What the probe tells; tests change it."""

    def __init__(self) -> None:
        self.waited_s: float | None = 0.0
        self.view: LedgerView | None = None

    def sightings(self) -> Sightings:
        return Sightings(
            CONFIG,
            Probe(
                process_state=lambda _: ("S", False),
                waited_s=lambda _: self.waited_s,
                ledger=lambda _: self.view,
            ),
        )


def beat(name: str, pid: int, at_s: float = 0.0) -> Beat:
    return Beat(name=name, pid=pid, seq=1, state="ready", mono_s=at_s)


def look(sightings: Sightings, now_s: float) -> Sighting:
    return sightings.look([RISK], now_s)["risk"]


def test_a_beat_in_anothers_name_does_not_hide_his() -> None:
    """Otherwise any process could have a healthy agent killed for silence."""
    sightings = Facts().sightings()

    assert sightings.hear(beat("risk", 1), 0.0)
    assert sightings.hear(beat("risk", 2), 0.0)

    assert look(sightings, 0.0).beat_s == 0.0


def test_strangers_are_bounded_and_forgotten() -> None:
    sightings = Facts().sightings()

    assert sightings.hear(beat("risk", 1), 0.0)
    taken = sum(sightings.hear(beat(f"stranger{number}", 2), 0.0) for number in range(2000))
    sightings.forget([RISK], 1e12)

    assert taken < 1000
    assert [each.name for each in sightings.beats()] == ["risk"]


def test_a_beat_that_is_read_late_is_as_old_as_it_is() -> None:
    """A monitor that was slow must not take what waited in its socket for a sign of life now."""
    sightings = Facts().sightings()
    sightings.hear(beat("risk", 1, at_s=50.0), 58.0)

    assert look(sightings, 58.0).beat_s == 50.0
    assert look(sightings, 58.0).since_s == 58.0

    sightings.hear(beat("risk", 1, at_s=9e9), 60.0)
    assert look(sightings, 60.0).beat_s == 60.0, "nor is one of the future"


@pytest.mark.parametrize(("state", "shown"), [("ready", "ready"), ("absent", "starting")])
def test_a_silent_agent_is_looked_up_in_its_ledger(state: str, shown: str) -> None:
    """A monitor that has just begun, or whose socket overflowed, heard nothing: no sign of it."""
    facts = Facts()
    ledger = Ledger.in_memory()
    ledger.set("pid", 1)
    ledger.set("state", STATES.index(state))
    ledger.set("beat_mono_ms", 99_000)
    facts.view = view_of("risk", ledger)
    sightings = facts.sightings()
    look(sightings, 90.0)

    seen = look(sightings, 100.0)

    assert (seen.beat_s, seen.state) == (99.0, shown)


def test_the_ledger_of_a_predecessor_is_nobodys_sign_of_life() -> None:
    facts = Facts()
    ledger = Ledger.in_memory()
    ledger.set("pid", 77)
    ledger.set("beat_mono_ms", 99_000)
    facts.view = view_of("risk", ledger)
    sightings = facts.sightings()
    look(sightings, 90.0)

    assert look(sightings, 100.0).beat_s is None


def test_waiting_for_a_cpu_is_not_an_agents_own_time() -> None:
    facts = Facts()
    sightings = facts.sightings()
    sightings.hear(beat("risk", 1, at_s=100.0), 100.0)

    facts.waited_s = 7.0
    assert look(sightings, 108.0).own_s == 1.0

    facts.waited_s = None
    assert look(sightings, 108.0).own_s is None, "a kernel that keeps no account"


def test_time_the_monitor_was_away_counts_for_nobody() -> None:
    sightings = Facts().sightings()
    sightings.hear(beat("risk", 1, at_s=100.0), 100.0)

    sightings.excuse(20.0, 121.0)

    assert look(sightings, 121.0).beat_s == 120.0
    sightings.excuse(20.0, 122.0)
    assert look(sightings, 122.0).beat_s == 122.0, "never later than now"


def test_the_kernel_tells_of_a_process() -> None:
    told = run_python(
        "import os\nfrom mesh.supervision import kernel\n"
        "print(kernel.process_state(os.getpid()), kernel.lives(os.getpid()))\n"
        "print((kernel.waited_s(os.getpid()) or 0.0) >= 0.0)"
    )

    assert told.out.splitlines() == ["('R', False) True", "True"], told
    assert kernel.process_state(2**22 + 1) == ("?", False)
    assert kernel.waited_s(2**22 + 1) is None
    assert not kernel.lives(2**22 + 1)
