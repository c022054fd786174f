"""Who hangs, and who may be killed for it: one row per verdict and boundary."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.supervision.gate import is_open
from mesh.supervision.liveness import (
    LivenessConfig,
    Sighting,
    Verdict,
    absence_s,
    choose,
    is_mass_stall,
    judge,
)
from mesh.supervision.supervisord import ProcessInfo

CONFIG = LivenessConfig()
NOW = 1000.0


def seen(silent_s: float | None, state: str = "ready", **facts: object) -> Sighting:
    beat = None if silent_s is None else NOW - silent_s
    given_facts: dict[str, object] = {"pid": 1, "since_s": 0.0, "beat_s": beat, "state": state}
    return Sighting(**{**given_facts, **facts})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sighting", "verdict"),
    [
        (seen(0, pid=0), Verdict.ABSENT),
        (seen(3.0), Verdict.READY),
        (seen(3.1), Verdict.SUSPECT),
        (seen(10.0), Verdict.SUSPECT),
        (seen(10.1), Verdict.HUNG),
        (seen(10.1, process_state="T"), Verdict.HUNG),
        (seen(10.1, process_state="D"), Verdict.EXEMPT),
        (seen(10.1, traced=True), Verdict.EXEMPT),
        (seen(10.1, own_s=2.0), Verdict.STARVED),
        (seen(10.1, own_s=2.1), Verdict.HUNG),
        (seen(3.1, own_s=2.0), Verdict.STARVED),
        (seen(10.1, process_state="D", own_s=0.0), Verdict.EXEMPT),
        (seen(0.1, needs_restart=True), Verdict.STUCK),
        (seen(None, since_s=NOW - 30.0), Verdict.STARTING),
        (seen(None, since_s=NOW - 30.1), Verdict.HUNG),
        (seen(29.0, "starting"), Verdict.STARTING),
        (seen(12.0, "draining"), Verdict.DRAINING),
        (seen(12.1, "draining"), Verdict.HUNG),
        # The monitor overslept: deadlines begin anew from `since_s`
        (seen(60.0, since_s=NOW - 1.0), Verdict.READY),
    ],
)
def test_a_verdict(sighting: Sighting, verdict: Verdict) -> None:
    assert judge(sighting, now_s=NOW, config=CONFIG) is verdict


def doomed(sightings: dict[str, Sighting], **facts: float) -> list[str]:
    known = {"observing_since_s": 0.0, "last_kill_s": 0.0, **facts}
    return choose(sightings, now_s=NOW, condemned=(), config=CONFIG, **known)


def test_one_of_two_agents_that_hangs_is_replaced() -> None:
    assert doomed({"a": seen(11, pid=1), "b": seen(0, pid=2)}) == ["a"]


def test_a_fresh_monitor_watches_first() -> None:
    assert doomed({"a": seen(11)}, observing_since_s=NOW - 4) == []


def test_everyone_silent_at_once_is_nobodys_fault() -> None:
    """A suspended machine, a busy CPU: nobody is killed, and later one every five seconds."""
    assert doomed({name: seen(11, pid=n) for n, name in enumerate("abcd", 1)}) == []
    late = {name: seen(31, pid=n) for n, name in enumerate("abcd", 1)}
    assert doomed(late) == ["a"]
    assert doomed(late, last_kill_s=NOW - 4) == []


def test_the_starved_excuse_nobody_else() -> None:
    """On a busy host the one that hangs is found among those that wait for a CPU."""
    fleet = {name: seen(11, pid=n, own_s=1.0) for n, name in enumerate("abcd", 1)}

    assert doomed(fleet) == []
    assert doomed({**fleet, "b": seen(11, pid=2, own_s=3.0)}) == ["b"]


@pytest.mark.parametrize(
    ("late_s", "waited_s", "away_s"),
    [(2.0, 0.0, 0.0), (2.5, 0.0, 2.5), (30.0, 29.0, 0.0), (30.0, 5.0, 25.0), (30.0, None, 30.0)],
)
def test_a_monitor_that_waits_for_a_cpu_is_slow_and_not_away(
    late_s: float, waited_s: float | None, away_s: float
) -> None:
    assert absence_s(late_s, waited_s) == away_s


def test_nobody_is_killed_twice() -> None:
    hung = {"a": seen(11, pid=7), "b": seen(0, pid=8)}

    again = choose(
        hung, now_s=NOW, observing_since_s=0.0, last_kill_s=0.0, condemned={7}, config=CONFIG
    )

    assert again == []


@given(st.lists(st.tuples(st.floats(0, 100), st.sampled_from("RSDTt"), st.booleans()), max_size=9))
def test_only_silent_agents_without_an_excuse_are_ever_chosen(
    fleet: list[tuple[float, str, bool]],
) -> None:
    sightings = {
        str(n): seen(silent, pid=n + 1, process_state=state, traced=traced)
        for n, (silent, state, traced) in enumerate(fleet)
    }

    for name in doomed(sightings):
        silent, state, traced = fleet[int(name)]
        assert silent > CONFIG.hung_s
        assert state != "D"
        assert not traced


def test_mass_needs_two() -> None:
    assert not is_mass_stall({"a": Verdict.HUNG})
    assert is_mass_stall({"a": Verdict.HUNG, "b": Verdict.SUSPECT})


def info(name: str, state: str, pid: int) -> ProcessInfo:
    return ProcessInfo(name, state, pid, 0, "", 0.0, 0.0)


def test_the_gate_waits_for_all_who_will_come() -> None:
    programs = [info("a", "RUNNING", 1), info("b", "RUNNING", 2), info("monitor", "RUNNING", 3)]

    assert not is_open([], set())
    assert not is_open(programs, {("a", 1)})
    assert not is_open(programs, {("a", 1), ("b", 99)}), "another process beats under its name"
    assert is_open(programs, {("a", 1), ("b", 2)})
    assert is_open([programs[0], info("b", "FATAL", 0)], {("a", 1)}), "b has given up"


def test_limits_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValueError, match="hung_s must be above suspect_s"):
        LivenessConfig(suspect_s=5, hung_s=5)
