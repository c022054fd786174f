"""What is known of each agent: its beats; of silent ones, what ledger and kernel say as well."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mesh.supervision.liveness import Sighting, silence_s

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from mesh.beats import Beat
    from mesh.ledger_views import LedgerView
    from mesh.supervision.liveness import LivenessConfig
    from mesh.supervision.supervisord import ProcessInfo

#: Processes that may beat at a time, and how long one that supervisord does not know is remembered.
_MAX_BEATERS = 1000
_STRANGER_S = 5.0
#: How old the account of waiting may be at a beat; a flood of beats asks the kernel no more often.
_FRESH_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Where facts come from that no beat tells."""

    #: A process's state letter, and whether a debugger holds it.
    process_state: Callable[[int], tuple[str, bool]]
    #: How long a process has waited for a CPU in its life.
    waited_s: Callable[[int], float | None]
    #: An agent's counters, by its name.
    ledger: Callable[[str], LedgerView | None]


@dataclass(slots=True)
class _Known:
    """One process; all moments on the monitor's clock."""

    since_s: float
    beat: Beat | None = None
    beat_s: float | None = None
    state: str = "starting"
    #: The account of waiting at the last beat, or a little earlier, and when it was taken.
    waited_s: float | None = None
    counted_s: float = 0.0


class Sightings:
    """
    Keeps what is known of every process of a mesh.

    Args:
        config: The limits; who keeps them is not looked at more closely.
        probe: Where other facts come from.
    """

    def __init__(self, config: LivenessConfig, probe: Probe) -> None:
        """Know nobody yet."""
        self._config = config
        self._probe = probe
        #: By name and pid: who beats in another's name does not hide the one who bears it.
        self._known: dict[tuple[str, int], _Known] = {}

    def hear(self, beat: Beat, now_s: float) -> bool:
        """Take a beat; False when there are too many processes already."""
        key = (beat.name, beat.pid)
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _MAX_BEATERS:
                return False
            known = self._meet(key, now_s)
        known.beat, known.state = beat, beat.state
        # When it was sent, not when we came to read it: what is read late is no sign of life now
        self._is_alive(known, beat.pid, min(beat.mono_s, now_s), now_s)
        return True

    def beat_of(self, name: str, pid: int) -> Beat | None:
        """Give the last beat of a process."""
        known = self._known.get((name, pid))
        return None if known is None else known.beat

    def beats(self) -> Iterator[Beat]:
        """Give the last beat of everybody."""
        return (known.beat for known in list(self._known.values()) if known.beat is not None)

    def forget(self, programs: Iterable[ProcessInfo], now_s: float) -> None:
        """Forget who is not, or not yet, one of supervisord's processes."""
        current = {(program.name, program.pid) for program in programs}
        self._known = {
            key: known
            for key, known in self._known.items()
            if key in current or now_s - known.counted_s < _STRANGER_S
        }

    def excuse(self, absence_s: float, now_s: float) -> None:
        """Let time in which the monitor was away count for nobody."""
        for known in self._known.values():
            known.since_s = min(now_s, known.since_s + absence_s)
            known.counted_s = min(now_s, known.counted_s + absence_s)
            if known.beat_s is not None:
                known.beat_s = min(now_s, known.beat_s + absence_s)

    def look(self, programs: Iterable[ProcessInfo], now_s: float) -> dict[str, Sighting]:
        """Give the facts about the programs that should beat, by name."""
        return {
            program.name: self._look_at(program.name, program.pid, now_s)
            for program in programs
            if program.name != "monitor" and program.state in ("RUNNING", "STARTING")
        }

    def _look_at(self, name: str, pid: int, now_s: float) -> Sighting:
        key = (name, pid)
        known = self._known.get(key) or self._meet(key, now_s)
        seen = _sighting(pid, known)
        if silence_s(seen, now_s) <= self._config.suspect_s:
            return seen
        self._ask_ledger(name, pid, known, now_s)
        seen = _sighting(pid, known)
        if silence_s(seen, now_s) <= self._config.suspect_s:
            return seen
        state, traced = self._probe.process_state(pid)
        own_s = self._own_s(pid, known, now_s)
        return replace(seen, process_state=state, traced=traced, own_s=own_s)

    def _ask_ledger(self, name: str, pid: int, known: _Known, now_s: float) -> None:
        """
        Believe the ledger where it knows more: memory that is shared loses no beats.

        A socket that nobody reads for a while does, and a monitor that has just begun heard none.
        """
        view = self._probe.ledger(name)
        if view is None or view.pid != pid or not view.beat_mono_s:
            return
        known.state = "starting" if view.state == "absent" else view.state
        if known.beat_s is None or view.beat_mono_s > known.beat_s:
            self._is_alive(known, pid, min(view.beat_mono_s, now_s), now_s)

    def _own_s(self, pid: int, known: _Known, now_s: float) -> float | None:
        waited_s = self._probe.waited_s(pid)
        if waited_s is None or known.waited_s is None:
            return None
        return now_s - known.counted_s - (waited_s - known.waited_s)

    def _meet(self, key: tuple[str, int], now_s: float) -> _Known:
        known = self._known[key] = _Known(since_s=now_s)
        known.waited_s, known.counted_s = self._probe.waited_s(key[1]), now_s
        return known

    def _is_alive(self, known: _Known, pid: int, beat_s: float, now_s: float) -> None:
        known.beat_s = beat_s if known.beat_s is None else max(known.beat_s, beat_s)
        if now_s - known.counted_s > _FRESH_S:
            known.waited_s, known.counted_s = self._probe.waited_s(pid), now_s


def _sighting(pid: int, known: _Known) -> Sighting:
    return Sighting(
        pid=pid,
        since_s=known.since_s,
        beat_s=known.beat_s,
        state=known.state,
        needs_restart=known.beat is not None and known.beat.needs_restart,
    )
