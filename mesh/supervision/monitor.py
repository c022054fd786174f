"""
The heartbeat monitor: an ordinary supervised program, ``python -m mesh.supervision.monitor``.

It hears every agent's beats, opens the start gate, and ends what hangs: SIGABRT, so that the stacks
are kept, two seconds later SIGKILL, both through supervisord, which then starts the agent anew.
Never stop and start: a monitor that died in between would leave the agent down for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

from mesh import process
from mesh.beats import roster_word
from mesh.config import MessageBusConfig
from mesh.env import is_supervised
from mesh.errors import (
    EXIT_BUG,
    EXIT_CONFIGURATION,
    EXIT_LOCKED,
    AlreadyRunningError,
    ConfigurationError,
)
from mesh.ledger import STATES, Ledger
from mesh.ledger_views import read_ledger
from mesh.logs import set_up_logging
from mesh.rosters import read_rosters, write_rosters
from mesh.rundir import RunDir
from mesh.supervision import kernel
from mesh.supervision.agreement import Agreement
from mesh.supervision.beats import Beat, BeatListener
from mesh.supervision.door import JournalDoor
from mesh.supervision.freeing import Freer
from mesh.supervision.gate import is_open
from mesh.supervision.liveness import (
    OVERSLEPT_S,
    LivenessConfig,
    Sighting,
    absence_s,
    choose,
    judge,
    silence_s,
)
from mesh.supervision.sharing import Rosters, Seen
from mesh.supervision.sightings import Probe, Sightings
from mesh.supervision.supervisord import (
    ProcessInfo,
    SupervisorClient,
    SupervisorError,
    SupervisorUnavailableError,
)
from mesh.supervision.trimming import Trimmer

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger("mesh.monitor")

#: Each look also wakes supervisord's one-second loop: a dead agent is back in 0.1 s, not in 1 s.
LOOK_EVERY_S = 0.2
ABORT_GRACE_S = 2.0
_SILENT_LOOP_S = 15.0


class Monitor:
    """
    Watches one mesh.

    Args:
        rundir: The mesh's directory.
        supervisor: The door to its supervisord.
        ledger: The monitor's own counters.
        config: The limits.
        settings: The mesh's; default: the environment's.
    """

    def __init__(
        self,
        rundir: RunDir,
        supervisor: SupervisorClient,
        ledger: Ledger,
        config: LivenessConfig | None = None,
        settings: MessageBusConfig | None = None,
    ) -> None:
        """Know nothing yet."""
        self._rundir = rundir
        self._supervisor = supervisor
        self._ledger = ledger
        self._config = config or LivenessConfig()
        self._settings = settings or MessageBusConfig.from_env()
        probe = Probe(
            process_state=kernel.process_state,
            waited_s=kernel.waited_s,
            ledger=lambda name: read_ledger(rundir.ledger(name)),
        )
        self._vitals = Sightings(self._config, probe)
        self._condemned: set[int] = set()
        self._programs: list[ProcessInfo] = []
        self._gate_open = False
        self._observing_since_s = time.monotonic()
        self._last_kill_s = 0.0
        self._rosters = Rosters(read_rosters(rundir))
        #: Set when it is time to look, although the pause is not over.
        self._nudge = asyncio.Event()
        self._complained: set[tuple[str, int, str]] = set()
        self.turned_s = time.monotonic()

    async def run(self, stop: asyncio.Event) -> None:
        """Watch until told to stop."""
        door = JournalDoor(self._rundir)
        async with (
            contextlib.aclosing(door),
            BeatListener(self._rundir, self._hear) as self._listener,
            Freer(self._rundir, door, self._listener.tell, self._nudge.set) as self._freer,
        ):
            self._ledger.set("ready_at_us", time.time_ns() // 1000)
            self._ledger.set("state", STATES.index("ready"))
            async with asyncio.TaskGroup() as tasks:
                trimmer = Trimmer(
                    self._rundir, door, self._settings, lambda: self._ledger.count("failed_trims")
                )
                endless = [
                    tasks.create_task(self._watch(tasks), name="watch"),
                    tasks.create_task(trimmer.run(), name="trim"),
                    tasks.create_task(Agreement(self._rundir).run(), name="agreement"),
                ]
                await stop.wait()
                for task in endless:
                    task.cancel()

    def _hear(self, beat: Beat) -> bool:
        before = self._vitals.beat_of(beat.name, beat.pid)
        if not self._vitals.hear(beat, time.monotonic()):
            return False
        if before is not None and (before.roster, before.state) != (beat.roster, beat.state):
            self._share()
        # The beat that says READY may be the one that completes the mesh: no need to wait a round
        if self._gate_open and beat.state == "ready":
            self._open_gate(beat)
        return True

    def _open_gate(self, beat: Beat) -> None:
        # A name becomes a path here: only those that supervisord knows
        if beat.sources == "waiting" and any(beat.name == each.name for each in self._programs):
            self._listener.open_gate(beat.name)

    async def _watch(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            self.turned_s = time.monotonic()
            self._ledger.set("beat_mono_ms", int(self.turned_s * 1000))
            await self._look(tasks)
            planned_s = time.monotonic() + LOOK_EVERY_S
            waited_s = kernel.waited_s(os.getpid())
            self._nudge.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await self._nudge.wait()
            self._excuse(time.monotonic(), planned_s, waited_s)

    async def _look(self, tasks: asyncio.TaskGroup) -> None:
        try:
            self._programs = await self._supervisor.processes()
        except SupervisorUnavailableError as error:
            self._complain_once("supervisord", 0, str(error))
            return
        now_s = time.monotonic()
        self._freer.watch(self._programs)
        self._vitals.forget(self._programs, now_s)
        self._share()
        self._count_rejected()
        self._try_gate()
        sightings = self._vitals.look(self._programs, now_s)
        self._tell(sightings, now_s)
        doomed = choose(
            sightings,
            now_s=now_s,
            observing_since_s=self._observing_since_s,
            last_kill_s=self._last_kill_s,
            condemned=self._condemned,
            config=self._config,
        )
        for name in doomed:
            self._last_kill_s = now_s
            self._condemned.add(sightings[name].pid)
            tasks.create_task(self._end(name, sightings[name], now_s), name=f"end-{name}")

    def _excuse(self, now_s: float, planned_s: float, waited_before_s: float | None) -> None:
        late_s = now_s - planned_s
        if late_s <= OVERSLEPT_S:
            return
        waited_s = kernel.waited_s(os.getpid())
        if waited_s is not None and waited_before_s is not None:
            waited_s -= waited_before_s
        away_s = absence_s(late_s, waited_s)
        if away_s:
            _log.warning("was away for %.1f s; all deadlines move by that", away_s)
            self._vitals.excuse(away_s, now_s)
        else:
            _log.warning("waited %.1f s for a CPU: this host is overloaded", late_s)

    def _try_gate(self) -> None:
        if self._gate_open:
            return
        ready = {(each.name, each.pid) for each in self._vitals.beats() if each.state == "ready"}
        settled = self._rosters.is_settled(each.name for each in self._programs)
        if settled and is_open(self._programs, ready):
            self._gate_open = True
            _log.info("all agents are READY: sources may speak")
            for beat in self._vitals.beats():
                self._open_gate(beat)

    def _share(self) -> None:
        """Say who shares what, where an agent has replicas."""
        if not self._programs:
            return  # not looked yet: nobody is known to be gone
        before = dict(self._rosters.current)
        words = self._rosters.turn(
            map(self._seen, (each for each in self._programs if each.pid)),
            now_ms=time.time_ns() // 1_000_000,
            patient=time.monotonic() - self._observing_since_s < self._config.suspect_s,
        )
        if self._rosters.current != before:
            # Before it is said: who begins now reads it
            with contextlib.suppress(OSError):
                write_rosters(self._rundir, self._rosters.current)
            _log.info("live events are shared: %s", self._rosters.current)
        for name, roster in words:
            self._listener.tell(name, roster_word(roster))

    def _seen(self, program: ProcessInfo) -> Seen:
        beat = self._vitals.beat_of(program.name, program.pid)
        return Seen(
            name=program.name,
            ready=beat is not None and beat.state == "ready",
            draining=beat is not None and beat.state in ("draining", "stopped"),
            silent=beat is None,
            version=0 if beat is None else beat.roster,
        )

    def _count_rejected(self) -> None:
        if self._listener.rejected:
            self._ledger.count("rejected_beats", self._listener.rejected)
            self._listener.rejected = 0

    def _tell(self, sightings: dict[str, Sighting], now_s: float) -> None:
        for name, seen in sightings.items():
            verdict = judge(seen, now_s=now_s, config=self._config)
            if verdict in ("suspect", "starved", "exempt"):
                self._complain_once(
                    name,
                    seen.pid,
                    f"{name} is {verdict}: silent for {silence_s(seen, now_s):.1f} s,"
                    f" {_in_words(seen)}",
                )

    def _complain_once(self, name: str, pid: int, words: str) -> None:
        key = (name, pid, words.split(":", 1)[0])
        if key not in self._complained:
            self._complained.add(key)
            _log.warning("%s", words)

    async def _end(self, name: str, seen: Sighting, now_s: float) -> None:
        """End one hung process; supervisord respawns it."""
        why = (
            "a cancelled handler does not end, or it is deaf: see its log"
            if seen.needs_restart
            else (f"no beat for {silence_s(seen, now_s):.1f} s, {_in_words(seen)}")
        )
        self._write_down(name, seen.pid, why)
        _log.error("%s (pid %d) hangs and is replaced: %s", name, seen.pid, why)
        if seen.process_state not in ("T", "t"):
            await self._signal(name, seen.pid, "ABRT")
            await asyncio.sleep(ABORT_GRACE_S)
        if kernel.lives(seen.pid) and self._is_current(name, seen.pid):
            await self._signal(name, seen.pid, "KILL")

    async def _signal(self, name: str, pid: int, signal_name: str) -> None:
        if not self._is_current(name, pid):
            return
        try:
            await self._supervisor.signal(name, signal_name)
        except SupervisorError as error:
            _log.warning("supervisord did not pass SIG%s on to %s: %s", signal_name, name, error)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, getattr(signal, f"SIG{signal_name}"))

    def _is_current(self, name: str, pid: int) -> bool:
        return any(program.name == name and program.pid == pid for program in self._programs)

    def _write_down(self, name: str, pid: int, why: str) -> None:
        self._ledger.count(f"replaced_{name}")
        entry = {
            "at": time.time(),
            "name": name,
            "pid": pid,
            "reason": why,
            "stacks": str(self._rundir.stack(name, pid)),
        }
        path = self._rundir.path / "log" / "restarts.jsonl"
        with contextlib.suppress(OSError), path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def _in_words(seen: Sighting) -> str:
    words = {
        "T": "the process is stopped (T)",
        "D": "the process is in uninterruptible sleep (D)",
        "R": "the process is running (R): its loop is blocked",
        "S": "the process is sleeping (S): its loop is blocked",
    }
    return words.get(seen.process_state, f"process state {seen.process_state}")


def _tripwire(turned_s: Callable[[], float]) -> None:
    """End the monitor when its loop is silent; supervisord starts it anew."""
    while True:
        before_s = time.monotonic()
        time.sleep(1)
        now_s = time.monotonic()
        overslept = now_s - before_s > 1 + OVERSLEPT_S
        if not overslept and now_s - turned_s() > _SILENT_LOOP_S:
            os._exit(EXIT_BUG)


async def _main(rundir: RunDir, settings: MessageBusConfig) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    ledger = Ledger.open(rundir.ledger("monitor"))
    supervisor = SupervisorClient(rundir.socket("supervisor"))
    monitor = Monitor(rundir, supervisor, ledger, settings=settings)
    threading.Thread(
        target=_tripwire, args=(lambda: monitor.turned_s,), name="tripwire", daemon=True
    ).start()
    await monitor.run(stop)
    ledger.set("state", STATES.index("stopped"))


def main() -> int:
    """Run the monitor of MESH_DIR; returns the exit code."""
    try:
        settings = MessageBusConfig.from_env()
        rundir = RunDir.from_env().ensure()
        process.prepare(rundir, "monitor", parent_bound=is_supervised())
        lock = process.only_incarnation(rundir, "monitor")
    except ConfigurationError as error:
        print(error, file=sys.stderr)  # noqa: T201 - before there is a log
        return EXIT_CONFIGURATION
    except AlreadyRunningError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return EXIT_LOCKED
    with lock:
        close_log = set_up_logging("monitor", rundir.log("monitor"))
        try:
            asyncio.run(_main(rundir, settings))
        finally:
            close_log()
            process.drop_empty_stacks()
    return 0


if __name__ == "__main__":
    sys.exit(main())
