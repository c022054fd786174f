"""
Decides from heartbeats who hangs and who may be killed for it. Pure: time is an argument.

Two steps: `judge` looks at one agent, `choose` at the whole fleet, because silence of many at once
has another cause (a suspended machine, a lost file system) than silence of one.

What is promised:

- An agent that hangs is condemned when it has been silent for `hung_s`, also on a busy host: as
  soon as it has had `fair_s` of that time for itself, running or asleep. With a fifth of a core or
  more that is after 10 s, with a tenth after 20 s. Neither others that are silent for want of a CPU
  nor a monitor that has to wait for one puts it off.
- A starved host alone kills nobody: time in which an agent could have run and got no CPU is not
  its own (`STARVED`), and a healthy agent beats within a second of its own time.
- Silence of half the fleet that want of CPU does not explain is not taken for hanging before three
  times the limit; then one at a time is tried.
- Time in which the monitor itself was stopped counts for nobody (`absence_s`).

Where the kernel keeps no account of waiting (no /proc/PID/schedstat), want of CPU cannot be told
from hanging: the third promise then stands in for the first two.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

#: A round that comes so much too late means that we were stopped, not that all agents were.
OVERSLEPT_S = 2.0


class Verdict(enum.StrEnum):
    """How an agent is doing."""

    ABSENT = "absent"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    SUSPECT = "suspect"
    HUNG = "hung"
    STUCK = "stuck"
    #: Silent because the host does not let it run.
    STARVED = "starved"
    #: Silent, and nothing may be done about it: debugged, or in uninterruptible sleep.
    EXEMPT = "exempt"


@dataclass(frozen=True, slots=True, kw_only=True)
class LivenessConfig:
    """When silence becomes a verdict; all in seconds."""

    suspect_s: float = 3.0
    hung_s: float = 10.0
    #: How much of its silence an agent must have had for itself, running or asleep.
    fair_s: float = 2.0
    boot_s: float = 30.0
    drain_s: float = 12.0
    #: A fresh monitor watches for so long before it kills.
    observe_s: float = 5.0
    #: When many fall silent at once: so many times the limit, and one kill every `spread_s`.
    mass_factor: float = 3.0
    spread_s: float = 5.0

    def __post_init__(self) -> None:
        """Refuse limits in the wrong order."""
        if not 0 < self.suspect_s < self.hung_s:
            raise ValueError(
                f"hung_s must be above suspect_s, were {self.hung_s:g} and {self.suspect_s:g}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """What the monitor knows of one agent; all moments on its own monotonic clock."""

    pid: int
    #: When this pid was first seen; also when deadlines began anew after the monitor overslept.
    since_s: float
    #: The last beat of this very pid; None: none yet.
    beat_s: float | None = None
    state: str = "starting"
    needs_restart: bool = False
    #: From /proc: R, S, D, T, t or Z.
    process_state: str = "S"
    traced: bool = False
    #: Seconds since the last beat, at least, in which it did not wait for a CPU; None: not known.
    own_s: float | None = None


def judge(seen: Sighting, *, now_s: float, config: LivenessConfig) -> Verdict:
    """
    Say how one agent is doing.

    Args:
        seen: The last facts about it.
        now_s: The same clock as `seen`.
        config: The limits.
    """
    if not seen.pid:
        return Verdict.ABSENT
    silent_s = silence_s(seen, now_s)
    verdict = _by_silence(seen, silent_s, config)
    helpless = seen.traced or seen.process_state == "D"
    if helpless and verdict in (Verdict.HUNG, Verdict.STUCK, Verdict.SUSPECT):
        return Verdict.EXEMPT
    starved = seen.own_s is not None and seen.own_s <= config.fair_s
    if starved and verdict in (Verdict.HUNG, Verdict.SUSPECT):
        return Verdict.STARVED
    return verdict


def silence_s(seen: Sighting, now_s: float) -> float:
    """Give the seconds since an agent was last heard, or could have been."""
    heard_s = seen.since_s if seen.beat_s is None else max(seen.beat_s, seen.since_s)
    return now_s - heard_s


def _by_silence(seen: Sighting, silent_s: float, config: LivenessConfig) -> Verdict:
    if seen.beat_s is None or seen.state == "starting":
        return Verdict.STARTING if silent_s <= config.boot_s else Verdict.HUNG
    if seen.state in ("draining", "stopped"):
        return Verdict.DRAINING if silent_s <= config.drain_s else Verdict.HUNG
    if silent_s > config.hung_s:
        return Verdict.HUNG
    if silent_s > config.suspect_s:
        return Verdict.SUSPECT
    return Verdict.STUCK if seen.needs_restart else Verdict.READY


def _shared_silence_s(silences_s: Collection[float]) -> float:
    """Give the silence that as many share as make a mass stall: each is silent at least so long."""
    many = max(2, (len(silences_s) + 1) // 2)
    return sorted(silences_s, reverse=True)[many - 1] if len(silences_s) >= many else 0.0


def choose(
    sightings: Mapping[str, Sighting],
    *,
    now_s: float,
    observing_since_s: float,
    last_kill_s: float,
    condemned: Collection[int],
    config: LivenessConfig,
) -> list[str]:
    """
    Name the agents to be killed now.

    What half the fleet shares excuses nobody beyond it: while many are silent, an agent is named at
    once if it says itself that it is stuck, or was silent for the limit before the others were;
    whoever fell silent with them has three times the limit, and goes one by one.

    Args:
        sightings: What is known, by agent.
        now_s: The monitor's clock.
        observing_since_s: When the monitor began, or began anew, to watch.
        last_kill_s: When it killed last.
        condemned: Pids that are being killed already: nobody is killed twice.
        config: The limits.
    """
    if now_s - observing_since_s < config.observe_s:
        return []
    verdicts = {name: judge(seen, now_s=now_s, config=config) for name, seen in sightings.items()}
    wanted = [
        name
        for name, verdict in verdicts.items()
        if verdict in (Verdict.HUNG, Verdict.STUCK) and sightings[name].pid not in condemned
    ]
    if not is_mass_stall(verdicts):
        return wanted
    silent_s = {name: silence_s(seen, now_s) for name, seen in sightings.items() if seen.pid}
    shared_s = _shared_silence_s(silent_s.values())
    alone = [
        name
        for name in wanted
        if verdicts[name] is Verdict.STUCK or silent_s[name] - shared_s > config.hung_s
    ]
    if alone:
        return alone
    limit_s = config.hung_s * config.mass_factor
    patient = [name for name in wanted if silent_s[name] > limit_s]
    return patient[:1] if now_s - last_kill_s >= config.spread_s else []


def is_mass_stall(verdicts: Mapping[str, Verdict]) -> bool:
    """
    Say whether so many are silent at once that the cause must lie elsewhere.

    The starved do not count: the cause of their silence is known, and excuses nobody else's.
    """
    present = [verdict for verdict in verdicts.values() if verdict is not Verdict.ABSENT]
    silent = sum(verdict in (Verdict.SUSPECT, Verdict.HUNG) for verdict in present)
    return silent >= max(2, (len(present) + 1) // 2)


def absence_s(late_s: float, waited_s: float | None) -> float:
    """
    Give the time for which the monitor was away, so that silence in it proves nothing.

    A monitor that waits for a CPU is slow, not away: what it finds when it wakes is as true as
    ever, and were it excused, a busy host would put off every verdict again and again.

    Args:
        late_s: By how much a round of the monitor came too late.
        waited_s: How much of that it waited for a CPU; None: not known.

    Returns:
        Seconds by which all deadlines move; 0 for what is no more than a delay.
    """
    away_s = late_s - (waited_s or 0.0)
    return away_s if away_s > OVERSLEPT_S else 0.0
