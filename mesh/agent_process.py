"""One agent in a process of its own: its beginning, its beats, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from mesh.agent import Agent, AgentContext
from mesh.beats import Beat, BeatSender
from mesh.card import Card, write_card
from mesh.errors import (
    EXIT_BUG,
    BrokerUnavailableError,
    ConfigurationError,
    MeshError,
    first_leaf,
    words_of,
)
from mesh.events import EventType, is_downgraded, is_durable
from mesh.factory import make_broker
from mesh.ledger import SOURCES, STATES, Ledger
from mesh.params import Params
from mesh.replicas import Roster, group_of
from mesh.rosters import read_rosters
from mesh.supervision.monitor_watch import MonitorWatch
from mesh.telemetry import tracing_middleware
from mesh.values import Value

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

    from mesh.config import MessageBusConfig
    from mesh.rundir import Lock, RunDir

_log = logging.getLogger("mesh.runtime")

BEAT_S = 1.0


class Launch(Value, frozen=True, kw_only=True):
    """How one agent process is started."""

    kind: type[Agent]
    name: str
    script: str
    rundir: RunDir
    config: MessageBusConfig
    params: Mapping[str, str]
    #: What replicas of one agent share; default: what the name says.
    group: str | None = None
    #: End when the parent ends.
    parent_bound: bool
    #: Wait for the monitor's word before sources speak.
    gated: bool
    #: Somebody sits before it: say on stderr when it is READY.
    by_hand: bool = False


class AgentProcess:
    """
    The composition root: everything that an agent needs is made and ended here.

    Args:
        launch: How it is started.
        lock: Held for as long as it lives: no other process runs under its name.
        close_log: Writes out what the log still holds.
    """

    def __init__(self, launch: Launch, lock: Lock, close_log: Callable[[], None]) -> None:
        """Nothing begins yet."""
        self._launch = launch
        self._lock = lock
        self._close_log = close_log
        self._stop = asyncio.Event()
        self._agent: Agent | None = None
        self._ledger = Ledger.open(launch.rundir.ledger(launch.name))
        # Not what a killed predecessor has left there
        self._ledger.set("state", STATES.index("starting"))
        self._lag_s = 0.0
        self._host = socket.gethostname()
        self._started_s = time.time()
        self._params = Params(launch.params)
        self._roster = self._first_roster()

    async def main(self) -> int:
        """Run until told to stop; the agent's own end by an error is exit code 70."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        launch = self._launch
        async with BeatSender(launch.rundir, launch.name) as beats:
            if not launch.gated:
                beats.gate_open.set()
            beats.on_look = self._on_look
            beats.on_roster = partial(self._on_roster, beats)
            async with asyncio.TaskGroup() as tasks:
                beating = tasks.create_task(self._beat(beats), name="beat")
                code = await self._live(beats)
                beating.cancel()
            if code == 0 and not launch.gated:
                # Nobody starts it again: what it does not hear from now on is no loss
                self._ledger.set("retired", 1)
            beats.send(self._beat_now(beats))
        return code

    def _on_signal(self, number: signal.Signals) -> None:
        if not self._stop.is_set():
            self._stop.set()
            return
        # The second one means it: what is unfinished is not waited for
        _log.warning(
            "%s was told to end a second time (%s) and ends at once: durable events in hand come"
            " again, live ones count as lost",
            self._launch.name,
            number.name,
        )
        self._close_log()
        # As if it had never been handled, so that nobody takes it for an error of the agent
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        os._exit(128 + number)  # the first process of a container does not die of a signal

    def _first_roster(self) -> Roster | None:
        """Share nothing until the monitor says what, where others may have it meanwhile."""
        name, group = self._launch.name, group_of(self._launch.name)
        if not self._launch.gated:
            return None
        if name == group and group not in read_rosters(self._launch.rundir):
            return None
        return Roster(0, (), ())

    def _on_roster(self, beats: BeatSender, roster: Roster) -> None:
        if _state(self._ledger) in ("draining", "stopped"):
            return  # others take over what was this one's
        if self._roster is None or roster.version > self._roster.version:
            self._roster = roster
            self._share()
        beats.send(self._beat_now(beats))

    def _share(self) -> None:
        if self._roster is not None and self._agent is not None and self._launch.kind.shared:
            self._agent.consumer.share(self._roster)

    def _on_look(self) -> None:
        if self._agent is not None:
            self._agent.consumer.look()

    async def _live(self, beats: BeatSender) -> int:
        launch = self._launch
        broker = make_broker(launch.config, launch.rundir.path)
        agent = self._agent = self._make(beats, broker)
        self._share()
        # Before anything is held: should this process die, it is known what of
        self._write_card("starting")
        try:
            for opening in (broker.connect, agent.open):
                if not await self._unless_stopped(opening()):
                    return 0
            self._write_card("ready")
            beats.send(self._beat_now(beats))
            _log.info("%s is READY (pid %d)", launch.name, os.getpid())
            if launch.by_hand:
                where, log = launch.rundir.path, launch.rundir.log(launch.name)
                print(f"{launch.name} is READY in {where}, its log is {log}", file=sys.stderr)  # noqa: T201
            with contextlib.suppress(BrokerUnavailableError):  # for eyes
                ready = {"name": launch.name, "pid": os.getpid()}
                await agent.publish(EventType.AGENT_READY, ready)
            return await self._work(agent)
        finally:
            self._write_card("draining")
            if self._roster is not None:
                # Said only when it is so
                self._roster = Roster(self._roster.version, (), ())
                self._share()
            self._ledger.set("state", STATES.index("draining"))
            beats.send(self._beat_now(beats))
            await agent.close()
            await broker.close()
            self._write_card("stopped")
            _log.info("%s ends", launch.name)

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do it, unless a signal comes first; a fabric that is away may be waited for long."""
        doing = asyncio.create_task(work, name="open")
        stopping = asyncio.create_task(self._stop.wait(), name="stop")
        await asyncio.wait({doing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        finished = doing.done()
        doing.cancel()
        outcome, _ = await asyncio.gather(doing, stopping, return_exceptions=True)
        if finished and outcome is not None:
            raise outcome
        return finished

    async def _work(self, agent: Agent) -> int:
        """Run sources and timers until a signal comes."""
        working = asyncio.create_task(agent.work(), name="work")
        stopping = asyncio.create_task(self._stop.wait(), name="stop")
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done() and working.exception() is None:
            await stopping  # sources have ended; handlers go on
        stopping.cancel()
        working.cancel()
        outcomes = await asyncio.gather(working, stopping, return_exceptions=True)
        failure = outcomes[0]
        if isinstance(failure, BaseException) and not isinstance(failure, asyncio.CancelledError):
            if isinstance(failure, BaseExceptionGroup) and failure.subgroup(ConfigurationError):
                raise first_leaf(failure.subgroup(ConfigurationError))
            _log.error("%s failed and ends", agent.name, exc_info=failure)
            print(words_of(first_leaf(failure)), file=sys.stderr)  # noqa: T201
            return EXIT_BUG
        return 0

    def _make(self, beats: BeatSender, broker: Any) -> Agent:
        launch = self._launch
        handler_layers, publish_layers = tracing_middleware(launch.config.tracing, launch.name)
        return launch.kind(
            AgentContext(
                name=launch.name,
                group=launch.group or group_of(launch.name),
                broker=broker,
                config=launch.config,
                params=self._params,
                ledger=self._ledger,
                gate=beats.gate_open,
                patient=launch.gated,
                ledgers=launch.rundir.ledgers,
                middleware=handler_layers,
                publisher_middleware=publish_layers,
            )
        )

    async def _beat(self, beats: BeatSender) -> None:
        """Beat from the handlers' own loop: a beat proves that the loop turns."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        monitor = MonitorWatch(self._launch.rundir) if self._launch.gated else None
        while True:
            self._lag_s = max(0.0, loop.time() - due)
            beat = self._beat_now(beats)
            beats.send(beat)
            await self._tell(beat)
            if monitor is not None:
                monitor.look()
            due = loop.time() + BEAT_S
            await asyncio.sleep(BEAT_S)

    async def _tell(self, beat: Beat) -> None:
        """Say the same on the bus, for eyes; nothing depends on it."""
        agent = self._agent
        if agent is not None and beat.state == "ready":
            with contextlib.suppress(MeshError):
                # Names are unique in a mesh, hosts and directories tell where one of them is
                where = {"host": self._host, "directory": str(self._launch.rundir.path)}
                await agent.publish(EventType.AGENT_HEARTBEAT, {**beat.facts(), **where})

    def _beat_now(self, beats: BeatSender) -> Beat:
        ledger, agent = self._ledger, self._agent
        running, age_s, handler = agent.consumer.in_flight() if agent else (0, 0.0, None)
        queued = agent.consumer.queued() if agent else 0
        ledger.set("beat_mono_ms", int(time.monotonic() * 1000))
        ledger.set("lag_us", int(self._lag_s * 1e6))
        ledger.set("queue", queued)
        if beats.rejected:
            ledger.count("foreign_words", beats.rejected)
            beats.rejected = 0
        return beats.make(
            state=_state(ledger),
            lag_ms=self._lag_s * 1e3,
            inflight=running,
            oldest_ms=age_s * 1e3,
            handler=handler,
            queue=queued,
            handled=ledger.handled(),
            failed=ledger.get("failed"),
            lost=ledger.lost(),
            dropped=sum(ledger.counts().values()),
            needs_restart=agent.consumer.is_stuck() if agent else False,
            sources=SOURCES[ledger.get("sources")],
            roster=0 if self._roster is None else self._roster.version,
        )

    def _write_card(self, state: str) -> None:
        launch = self._launch
        says = sorted({key for key in self._ledger.topics_said() if not key.startswith("agent.")})
        write_card(
            launch.rundir,
            Card(
                name=launch.name,
                pid=os.getpid(),
                script=launch.script,
                group=launch.group or group_of(launch.name),
                hears=tuple(launch.kind.hears()),
                max_replicas=launch.kind.max_replicas,
                durable=tuple(filter(is_durable, launch.kind.hears())),
                downgraded=tuple(filter(is_downgraded, launch.kind.hears())),
                params_read=tuple(sorted(self._params.read)),
                says=tuple(says),
                started_at_s=self._started_s,
                state=state,
            ),
        )


def _state(ledger: Ledger) -> str:
    state = STATES[ledger.get("state")]
    return "starting" if state == "absent" else state
