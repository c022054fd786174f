"""A host that has too much to do: who hangs is found all the same, and nobody else is killed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mesh.beats import Beat
from mesh.ledger import Ledger
from mesh.ledger_views import view_of
from mesh.supervision.liveness import LivenessConfig, absence_s, choose
from mesh.supervision.sightings import Probe, Sightings
from mesh.supervision.supervisord import ProcessInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mesh.ledger_views import LedgerView

CONFIG = LivenessConfig()
STEP_S = 0.1
#: What a Unix datagram socket holds by default.
QUEUE = 10
NEW = view_of("", Ledger.in_memory())


@dataclass
class Thread:
    """
    A main thread that has something to do now and then, and waits for a CPU first.

    Args:
        every_s: From one deed to the next.
        delays_s: How long it waits for a CPU before each; over and over.
    """

    every_s: float
    delays_s: Sequence[float] = (0.0,)
    waited_s: float = 0.0
    deeds: int = 0
    _due_s: float = 0.0
    _waits_s: float = 0.0

    def turn(self, now_s: float) -> bool:
        """Live one step; True when the deed is done in it."""
        if now_s < self._due_s:
            return False
        if self._waits_s < self.delays_s[self.deeds % len(self.delays_s)]:
            self._waits_s += STEP_S
            self.waited_s += STEP_S
            return False
        self.deeds += 1
        self._due_s, self._waits_s = now_s + self.every_s, 0.0
        return True


@dataclass
class Host:
    """A fleet and its monitor on a clock that only moves when it is told to."""

    agents: dict[str, Thread]
    monitor: Thread
    #: From this moment on the agent `hangs` beats no more; it gets so much of a CPU.
    hangs: str = ""
    from_s: float = 30.0
    share: float = 0.0
    kept_account: bool = True
    now_s: float = 0.0
    _queue: list[Beat] = field(default_factory=list)
    #: What the agents write into shared memory: a full queue takes no beat, and this does.
    _ledgers: dict[str, LedgerView] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._pids = {name: pid for pid, name in enumerate(self.agents, 1)}
        self._programs = [
            ProcessInfo(name, "RUNNING", pid, 0, "", 0.0, 0.0) for name, pid in self._pids.items()
        ]
        threads = {self._pids[name]: agent for name, agent in self.agents.items()}
        waited_s: Callable[[int], float | None] = lambda pid: (  # noqa: E731
            threads[pid].waited_s if self.kept_account else None
        )
        self._seen = Sightings(
            CONFIG,
            Probe(
                process_state=lambda _: ("R", False),
                waited_s=waited_s,
                ledger=self._ledgers.get,
            ),
        )
        self._looked_s = self._waited_s = 0.0

    def run_until(self, end_s: float) -> list[str]:
        """Live on until somebody is condemned, or it is so late; gives whom."""
        while self.now_s < end_s:
            self.now_s += STEP_S
            for name, agent in self.agents.items():
                if name == self.hangs and self.now_s >= self.from_s:
                    agent.waited_s += STEP_S * (1 - self.share)
                elif agent.turn(self.now_s):
                    self._beat(name)
            if self.monitor.turn(self.now_s) and (doomed := self._look()):
                return doomed
        return []

    def _beat(self, name: str) -> None:
        pid = self._pids[name]
        self._ledgers[name] = replace(
            NEW, name=name, pid=pid, state="ready", beat_mono_s=self.now_s
        )
        if len(self._queue) < QUEUE:
            self._queue.append(Beat(name=name, pid=pid, seq=1, state="ready", mono_s=self.now_s))

    def _look(self) -> list[str]:
        for beat in self._queue:
            self._seen.hear(beat, self.now_s)
        self._queue.clear()
        late_s = self.now_s - self._looked_s - self.monitor.every_s
        own = self.monitor.waited_s - self._waited_s if self.kept_account else None
        if away_s := absence_s(late_s, own):
            self._seen.excuse(away_s, self.now_s)
        self._looked_s, self._waited_s = self.now_s, self.monitor.waited_s
        return choose(
            self._seen.look(self._programs, self.now_s),
            now_s=self.now_s,
            observing_since_s=0.0,
            last_kill_s=-100.0,
            condemned=(),
            config=CONFIG,
        )


delays = st.lists(st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.5, 3.5, 8.0, 25.0]), min_size=1)
agents = st.lists(delays.map(lambda row: Thread(1.0, row)), min_size=1, max_size=5).map(
    lambda rows: {f"agent{number}": row for number, row in enumerate(rows)}
)
monitors = st.lists(st.sampled_from([0.0, 0.1, 0.5, 2.5, 3.0]), min_size=1).map(
    lambda row: Thread(0.2, row)
)


@given(agents, monitors)
@settings(max_examples=25, deadline=None)
def test_a_starved_host_alone_kills_nobody(fleet: dict[str, Thread], monitor: Thread) -> None:
    """However long agents and monitor wait for a CPU."""
    assert Host(fleet, monitor).run_until(120.0) == []


@given(agents, monitors, st.floats(0.2, 1.0))
# More beats than the monitor's socket holds: what it does not hear it reads in the ledgers
@example(
    {
        **{f"agent{number}": Thread(1.0) for number in range(4)},
        "agent4": Thread(1.0, [0.0, 0.0, 0.0, 0.0, 1.5, 25.0]),
    },
    Thread(0.2, [0.0, 0.0, 3.0, 3.0, 0.1]),
    1.0,
)
@settings(max_examples=25, deadline=None)
def test_a_blocked_loop_is_found_on_a_starved_host(
    fleet: dict[str, Thread], monitor: Thread, share: float
) -> None:
    """
    The limit is 10 s of silence; the last beat is read a round late, and a round is 3.2 s at most.

    What is left of the promised 20 s is for the kill and the successor's start.
    """
    host = Host({"hung": Thread(1.0), **fleet}, monitor, hangs="hung", share=share)

    assert host.run_until(host.from_s + 1.0 + 10.0 + 2 * 3.2) == ["hung"]


def test_six_busy_loops_on_two_cores_put_nothing_off() -> None:
    """Each thread that wants a CPU gets two sevenths of one; those that sleep get theirs soon."""
    fleet = {name: Thread(1.0, [0.1, 0.4, 3.5, 0.2]) for name in ("forwarder", "portfolio")}
    monitor = Thread(0.2, [0.1, 0.2, 0.1, 2.6, 0.3])
    host = Host({"hung": Thread(1.0), **fleet}, monitor, hangs="hung", share=2 / 7)

    assert host.run_until(host.from_s + 13.0) == ["hung"]


def test_where_no_account_is_kept_a_starved_fleet_is_still_left_alone() -> None:
    fleet = {f"agent{number}": Thread(1.0, [0.0] * 20 + [15.0]) for number in range(4)}

    assert Host(fleet, Thread(0.2), kept_account=False).run_until(120.0) == []
