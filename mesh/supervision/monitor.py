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
from pathlib import Path
from typing import TYPE_CHECKING

from mesh import process
from mesh.env import is_supervised
from mesh.errors import (
    EXIT_BUG,
    EXIT_CONFIGURATION,
    EXIT_LOCKED,
    AlreadyRunningError,
    ConfigurationError,
)
from mesh.ledger import STATES, Ledger
from mesh.logs import set_up_logging
from mesh.rundir import RunDir
from mesh.supervision.beats import Beat, BeatListener
from mesh.supervision.gate import is_open
from mesh.supervision.liveness import LivenessConfig, Sighting, choose, judge, silence_s
from mesh.supervision.supervisord import (
    ProcessInfo,
    SupervisorClient,
    SupervisorError,
    SupervisorUnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger("mesh.monitor")

#: Each look also wakes supervisord's one-second loop: a dead agent is back in 0.1 s, not in 1 s.
LOOK_EVERY_S = 0.2
ABORT_GRACE_S = 2.0
#: A round that comes so much too late means that we were stopped, not that all agents were.
OVERSLEPT_S = 2.0
_SILENT_LOOP_S = 15.0
#: Processes that may beat at a time, and how long one that supervisord does not know is remembered.
_MAX_BEATERS = 1000
_STRANGER_S = 5.0


class Monitor:
    """
    Watches one mesh.

    Args:
        rundir: The mesh's directory.
        supervisor: The door to its supervisord.
        ledger: The monitor's own counters.
        config: The limits.
    """

    def __init__(
        self,
        rundir: RunDir,
        supervisor: SupervisorClient,
        ledger: Ledger,
        config: LivenessConfig | None = None,
    ) -> None:
        """Know nothing yet."""
        self._rundir = rundir
        self._supervisor = supervisor
        self._ledger = ledger
        self._config = config or LivenessConfig()
        #: By name and pid: who beats in another's name does not hide the one who bears it.
        self._beats: dict[tuple[str, int], tuple[Beat, float]] = {}
        self._since: dict[str, tuple[int, float]] = {}
        self._condemned: set[int] = set()
        self._programs: list[ProcessInfo] = []
        self._gate_open = False
        self._observing_since_s = time.monotonic()
        self._last_kill_s = 0.0
        self._complained: set[tuple[str, int, str]] = set()
        self.turned_s = time.monotonic()

    async def run(self, stop: asyncio.Event) -> None:
        """Watch until told to stop."""
        async with BeatListener(self._rundir, self._hear) as self._listener:
            self._ledger.set("ready_at_us", time.time_ns() // 1000)
            self._ledger.set("state", STATES.index("ready"))
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(self._watch(tasks), name="watch")
                await stop.wait()
                watching.cancel()

    def _hear(self, beat: Beat) -> bool:
        key = (beat.name, beat.pid)
        if key not in self._beats and len(self._beats) >= _MAX_BEATERS:
            return False
        self._beats[key] = (beat, time.monotonic())
        # The beat that says READY may be the one that completes the mesh: no need to wait a round
        if self._gate_open and beat.state == "ready":
            self._open_gate(beat)
        return True

    def _open_gate(self, beat: Beat) -> None:
        # A name becomes a path here: only those that supervisord knows
        if beat.sources == "waiting" and any(beat.name == each.name for each in self._programs):
            self._listener.open_gate(beat.name)

    def _forget(self, now_s: float) -> None:
        """Forget who is not, or not yet, one of supervisord's processes."""
        current = {(program.name, program.pid) for program in self._programs}
        self._beats = {
            key: (beat, heard_s)
            for key, (beat, heard_s) in self._beats.items()
            if key in current or now_s - heard_s < _STRANGER_S
        }

    async def _watch(self, tasks: asyncio.TaskGroup) -> None:
        planned_s = time.monotonic()
        while True:
            now_s = time.monotonic()
            if now_s - planned_s > OVERSLEPT_S:
                _log.warning("slept %.1f s too long; all deadlines begin anew", now_s - planned_s)
                self._begin_anew(now_s)
            self.turned_s = now_s
            self._ledger.set("beat_mono_ms", int(now_s * 1000))
            await self._look(tasks)
            planned_s = time.monotonic() + LOOK_EVERY_S
            await asyncio.sleep(LOOK_EVERY_S)

    async def _look(self, tasks: asyncio.TaskGroup) -> None:
        try:
            self._programs = await self._supervisor.processes()
        except SupervisorUnavailableError as error:
            self._complain_once("supervisord", 0, str(error))
            return
        now_s = time.monotonic()
        self._forget(now_s)
        self._count_rejected()
        self._try_gate()
        sightings = self._sightings(now_s)
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

    def _begin_anew(self, now_s: float) -> None:
        self._observing_since_s = now_s
        self._since = {name: (pid, now_s) for name, (pid, _) in self._since.items()}

    def _try_gate(self) -> None:
        if self._gate_open:
            return
        ready = {key for key, (beat, _) in self._beats.items() if beat.state == "ready"}
        if is_open(self._programs, ready):
            self._gate_open = True
            _log.info("all agents are READY: sources may speak")
            for beat, _ in self._beats.values():
                self._open_gate(beat)

    def _sightings(self, now_s: float) -> dict[str, Sighting]:
        sightings: dict[str, Sighting] = {}
        for program in self._programs:
            if program.name == "monitor" or program.state not in ("RUNNING", "STARTING"):
                continue
            pid, since_s = self._since.get(program.name, (0, 0.0))
            if pid != program.pid:
                since_s = now_s
                self._since[program.name] = (program.pid, now_s)
            sightings[program.name] = self._sighting(program, since_s)
        return sightings

    def _sighting(self, program: ProcessInfo, since_s: float) -> Sighting:
        beat, heard_s = self._beats.get((program.name, program.pid), (None, 0.0))
        state, traced = "S", False
        if time.monotonic() - max(heard_s, since_s) > self._config.suspect_s:
            state, traced = _process_state(program.pid)
        return Sighting(
            pid=program.pid,
            since_s=since_s,
            beat_s=heard_s if beat is not None else None,
            state=beat.state if beat is not None else "starting",
            needs_restart=beat is not None and beat.needs_restart,
            process_state=state,
            traced=traced,
        )

    def _count_rejected(self) -> None:
        if self._listener.rejected:
            self._ledger.count("rejected_beats", self._listener.rejected)
            self._listener.rejected = 0

    def _tell(self, sightings: dict[str, Sighting], now_s: float) -> None:
        for name, seen in sightings.items():
            verdict = judge(seen, now_s=now_s, config=self._config)
            if verdict in ("suspect", "exempt"):
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
        if _lives(seen.pid) and self._is_current(name, seen.pid):
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


def _process_state(pid: int) -> tuple[str, bool]:
    """Read a process's state letter, and whether a debugger holds it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return "?", False
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    return facts.get("State", "?").strip()[:1], facts.get("TracerPid", "0").strip() != "0"


def _in_words(seen: Sighting) -> str:
    words = {
        "T": "the process is stopped (T)",
        "D": "the process is in uninterruptible sleep (D)",
        "R": "the process is running (R): its loop is blocked",
        "S": "the process is sleeping (S): its loop is blocked",
    }
    return words.get(seen.process_state, f"process state {seen.process_state}")


def _lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _tripwire(turned_s: Callable[[], float]) -> None:
    """End the monitor when its loop is silent; supervisord starts it anew."""
    while True:
        before_s = time.monotonic()
        time.sleep(1)
        now_s = time.monotonic()
        overslept = now_s - before_s > 1 + OVERSLEPT_S
        if not overslept and now_s - turned_s() > _SILENT_LOOP_S:
            os._exit(EXIT_BUG)


async def _main(rundir: RunDir) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    ledger = Ledger.open(rundir.ledger("monitor"))
    monitor = Monitor(rundir, SupervisorClient(rundir.socket("supervisor")), ledger)
    threading.Thread(
        target=_tripwire, args=(lambda: monitor.turned_s,), name="tripwire", daemon=True
    ).start()
    await monitor.run(stop)
    ledger.set("state", STATES.index("stopped"))


def main() -> int:
    """Run the monitor of MESH_DIR; returns the exit code."""
    try:
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
            asyncio.run(_main(rundir))
        finally:
            close_log()
            process.drop_empty_stacks()
    return 0


if __name__ == "__main__":
    sys.exit(main())
