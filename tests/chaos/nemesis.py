"""Does to a mesh what happens to meshes, about once a second; the same seed does it again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from typing import TYPE_CHECKING, NamedTuple

from tests.chaos.words import AGENTS
from tests.plumbing.processes import is_alive

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.chaos.stage import Stage

#: What can happen, and how often of all.
WEIGHTS = {
    "kill agent": 40,
    "end agent": 8,
    "pause agent": 14,
    "hang agent": 3,
    "kill forwarder": 8,
    "pause forwarder": 4,
    "hang forwarder": 1,
    "kill monitor": 6,
    "pause monitor": 3,
    "hang monitor": 1,
    "pause supervisord": 3,
    "kill supervisord": 3,
    "kill all": 1,
}
SERVER_WEIGHTS = {"kill server": 8, "pause server": 4}
_PAIRS = 0.15
_PAUSE_S = (0.1, 2.5)
#: A hang lasts until somebody replaces who hangs, and no longer than this.
_HANG_S = 45.0
#: Nobody replaces the monitor: it looks after itself.
_MONITOR_HANG_S = 15.0
_LOOK_S = 0.1


class Fault(NamedTuple):
    """What was done."""

    at_s: float
    what: str
    whom: str


class Nemesis:
    """
    Strikes at a stage.

    Args:
        stage: At whom.
        seed: Decides what is done, to whom, and when.
    """

    def __init__(self, stage: Stage, seed: int) -> None:
        self.faults: list[Fault] = []
        self._stage = stage
        self._random = random.Random(seed)
        self._weights = WEIGHTS if stage.fabric.name == "zmq" else _without_forwarder()
        self._begun_s = asyncio.get_running_loop().time()
        self._pauses: set[asyncio.Task[None]] = set()
        self._hangs = False

    async def torment(self, is_over: Callable[[], bool]) -> None:
        """Strike again and again until it is over."""
        loop = asyncio.get_running_loop()
        while not is_over():
            due_s = loop.time() + self._random.uniform(0.3, 1.7)
            # Counters of other processes wake nobody
            while loop.time() < due_s and not is_over():  # noqa: ASYNC110
                await asyncio.sleep(_LOOK_S)
            for _ in range(1 + (self._random.random() < _PAIRS)):
                await self.strike()

    async def heal(self) -> None:
        """Let everybody go on."""
        for task in self._pauses:
            task.cancel()
        await asyncio.gather(*self._pauses, return_exceptions=True)

    async def strike(self) -> None:
        """Do one thing, if there is somebody to do it to."""
        chance = self._random
        what = chance.choices(list(self._weights), list(self._weights.values()))[0]
        verb, _, whom = what.partition(" ")
        # Drawn in any case: what comes later must not depend on who lives now
        agent, pause_s, number = chance.choice(AGENTS), chance.uniform(*_PAUSE_S), chance.random()
        if whom == "server":
            await self._strike_server(verb, number, pause_s)
            return
        name = agent if whom == "agent" else whom
        pids = await self._stage.pids()
        if what in ("kill supervisord", "kill all"):
            if "supervisord" in pids:
                self._note(verb, whom)
                others = list(pids.values()) if whom == "all" else []
                await self._stage.kill_supervisord(*others)
            return
        if (pid := pids.get(name)) is None:
            return
        if verb == "hang":
            if self._hangs:
                return
            pause_s = _MONITOR_HANG_S if name == "monitor" else _HANG_S
        self._note(verb, name)
        if verb in ("kill", "end"):
            _signal(pid, signal.SIGKILL if verb == "kill" else signal.SIGTERM)
        else:
            self._pause(pid, pause_s, hangs=verb == "hang")

    async def _strike_server(self, verb: str, number: float, pause_s: float) -> None:
        servers = self._stage.fabric.servers
        server = servers[int(number * len(servers))]
        self._note(verb, "redis-server")
        if verb == "kill":
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(server.start)
        else:
            self._pause(server.pid, pause_s, hangs=False)

    def _pause(self, pid: int, pause_s: float, *, hangs: bool) -> None:
        task = asyncio.create_task(self._stop_for(pid, pause_s, hangs=hangs), name=f"pause-{pid}")
        self._pauses.add(task)
        task.add_done_callback(self._pauses.discard)

    async def _stop_for(self, pid: int, pause_s: float, *, hangs: bool) -> None:
        loop = asyncio.get_running_loop()
        self._hangs |= hangs
        _signal(pid, signal.SIGSTOP)
        try:
            until_s = loop.time() + pause_s
            # Nor does a death of somebody else's child
            while loop.time() < until_s and is_alive(pid):  # noqa: ASYNC110
                await asyncio.sleep(_LOOK_S)
        finally:
            self._hangs &= not hangs
            if is_alive(pid):
                _signal(pid, signal.SIGCONT)

    def _note(self, verb: str, whom: str) -> None:
        at_s = asyncio.get_running_loop().time() - self._begun_s
        self.faults.append(Fault(round(at_s, 2), verb, whom))


def _without_forwarder() -> dict[str, int]:
    kept = {what: weight for what, weight in WEIGHTS.items() if "forwarder" not in what}
    return kept | SERVER_WEIGHTS


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
