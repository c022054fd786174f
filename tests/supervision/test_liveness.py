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


def test_who_was_silent_long_before_the_others_is_not_excused_by_them() -> None:
    """Others that are heard now and then, late, put a verdict off by their own lateness alone."""
    late = {"b": seen(4, pid=2), "c": seen(3.5, pid=3), "d": seen(0, pid=4)}

    assert doomed({"a": seen(13.9, pid=1), **late}) == []
    assert doomed({"a": seen(14.1, pid=1), **late}) == ["a"]
    assert doomed({"a": seen(20.1, pid=1), **{n: seen(10, pid=2) for n in "bcd"}}) == ["a"]


def test_who_says_that_it_is_stuck_is_not_excused_by_the_silence_of_others() -> None:
    others = {name: seen(8, pid=number) for number, name in enumerate("bcd", 2)}

    assert doomed({"a": seen(1, pid=1, needs_restart=True), **others}) == ["a"]


@given(st.lists(st.floats(0, 9), min_size=1, max_size=9), st.floats(20, 100))
def test_who_hangs_is_named_within_twice_the_limit_however_late_the_others_are_heard(
    lateness_s: list[float], silent_s: float
) -> None:
    fleet = {str(number): seen(late, pid=number) for number, late in enumerate(lateness_s, 2)}

    assert doomed({"hung": seen(silent_s, pid=1), **fleet}) == ["hung"]


@given(st.lists(st.floats(0, 9.9), max_size=9), st.floats(3.1, 20))
def test_whoever_fell_silent_together_has_three_times_the_limit(
    lateness_s: list[float], stalled_s: float
) -> None:
    fleet = {
        str(number): seen(stalled_s + late, pid=number)
        for number, late in enumerate([0.0, *lateness_s], 1)
    }

    assert len(fleet) == 1 or doomed(fleet) == []


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
