"""
A mesh of processes from one Python call, without supervisord: for notebooks and tests.

    async with launch([MarketData, "agents/risk.py"], params={"csv": "bars.csv"}) as mesh:
        await mesh.sources_done()
        await mesh.quiet()
        print(mesh.account().lost)

Each agent runs in a process of its own, and none of them outlives this one, however it ends.
Nobody restarts what dies here; that is what `mesh up` is for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from collections import deque
from typing import TYPE_CHECKING, Any, Self

from mesh import codec
from mesh.account import Account, account
from mesh.card import read_cards
from mesh.config import MessageBusConfig
from mesh.errors import FrameError, MeshError
from mesh.events import declarations
from mesh.factory import make_broker
from mesh.ledger import Ledger
from mesh.ledger_views import LedgerView, read_ledgers
from mesh.origins import live, origins_of
from mesh.publisher import EventPublisher, PublisherConfig
from mesh.requests import Requester
from mesh.rundir import RunDir
from mesh.supervision.beats import BeatListener
from mesh.workers import give_manager_back, sentinel_of, start_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from mesh.agent import Agent
    from mesh.beats import Beat
    from mesh.broker import MessageBroker
    from mesh.events import Event

#: The name under which `LaunchedMesh.publish` speaks.
LAUNCHER = "launch"
#: Counters in shared memory wake nobody: they are looked at this often.
_LOOK_EVERY_S = 0.01
_KEPT_EVENTS = 10_000
_WORDS = 20
#: Above the time an agent takes to drain.
_END_GRACE_S = 4.0


class LaunchError(MeshError):
    """An agent did not start, or ended by itself; the message holds its own last words."""


def launch(
    agents: Sequence[type[Agent] | str | Path],
    *,
    params: Mapping[str, str] | None = None,
    directory: str | Path | None = None,
    config: MessageBusConfig | None = None,
    start_timeout_s: float = 30.0,
) -> LaunchedMesh:
    """
    Run agents as processes for the length of an ``async with``.

    Args:
        agents: Agent classes of importable modules, or paths of scripts.
        params: Parameters for all of them (``{"csv": "bars.csv"}``).
        directory: The run directory; default: a fresh one, removed at the end.
        config: Settings; default: the environment's.
        start_timeout_s: How long all agents may take to become READY.

    Raises:
        ConfigurationError: An agent cannot be found by another process, two have one name, or the
            settings choose a fabric that does not reach other processes.
    """
    return LaunchedMesh(agents, params or {}, directory, config, start_timeout_s)


class LaunchedMesh:
    """A running mesh of processes; made by `launch`."""

    def __init__(
        self,
        agents: Sequence[type[Agent] | str | Path],
        params: Mapping[str, str],
        directory: str | Path | None,
        config: MessageBusConfig | None,
        start_timeout_s: float,
    ) -> None:
        """Check everything; nothing runs yet."""
        self.config = config or MessageBusConfig.from_env()
        self._origins = origins_of(agents, self.config)
        self._params = dict(params)
        self._directory = directory
        self._start_timeout_s = start_timeout_s
        self._processes: dict[str, Any] = {}
        self._ready: set[str] = set()
        self._open = False
        self._changed = asyncio.Event()
        self._ear = _Ear()
        self._exits = contextlib.AsyncExitStack()

    # -- life ----------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """
        Start all agents; returns when they are READY and their sources may speak.

        Raises:
            LaunchError: An agent ended, or was not READY in time; says what it said.
            AlreadyRunningError: Another mesh lives in the directory.
        """
        async with contextlib.AsyncExitStack() as exits:
            self.rundir = self._make_rundir(exits)
            exits.enter_context(_monitors(self.rundir))
            self._beats = await exits.enter_async_context(BeatListener(self.rundir, self._heard))
            await self._join_fabric(exits)
            exits.push_async_callback(self._end_all)
            await self._start_all()
            await self._broker.attach(self._topics(), self._ear)
            await self._broker.synchronize()
            self._open_gate()
            self._exits = exits.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """
        Stop all agents; they drain, within limits.

        Raises:
            LaunchError: An agent had ended by an error of its own, and nothing else is raised.
        """
        failed = [name for name, process in self._processes.items() if (process.exitcode or 0) > 0]
        await self._exits.aclose()
        if failed and kind is None:
            raise LaunchError("\n".join(self._epitaph(name) for name in failed))

    @property
    def pids(self) -> dict[str, int]:
        """Give the processes by agent name."""
        return {name: process.pid or 0 for name, process in self._processes.items()}

    # -- what users do -------------------------------------------------------------------------

    async def publish(self, event_type: str, data: Any, *, key: str | None = None) -> Event:
        """Publish an event from outside."""
        event = await self._publisher.publish(event_type, data, key=key)
        await self._publisher.flush()
        return event

    async def request(self, event_type: str, data: Any, *, timeout_s: float = 5.0) -> Any:
        """
        Ask an agent; gives the reply's payload.

        Raises:
            RequestTimeoutError: Nobody replied in time.
        """
        reply = await self._requester.request(event_type, data, timeout_s=timeout_s)
        return reply.data

    async def expect(
        self,
        event_type: str,
        timeout_s: float = 10.0,
        *,
        where: Callable[[Event], bool] | None = None,
    ) -> Event:
        """
        Return the next event of a type, of those said since the start and not given yet.

        A type that is neither declared in this process nor heard by one of the agents is listened
        to from the first call on.

        Raises:
            TimeoutError: None came; the message names the agents that have ended.
        """
        await self._broker.attach([event_type], self._ear)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._ear.next(str(event_type), where)
        except TimeoutError:
            ended = [name for name, one in self._processes.items() if one.exitcode is not None]
            words = "".join(f"\n{self._epitaph(name)}" for name in ended)
            raise TimeoutError(
                f"no {str(event_type)!r} was said within {timeout_s:g} s{words}"
            ) from None

    async def sources_done(self) -> None:
        """
        Return when every source has returned.

        Raises:
            LaunchError: An agent ended meanwhile; says what it said.
        """
        while True:
            views = self.views()
            states = {name: views[name].sources for name in self._origins if name in views}
            if all(state in ("none", "done") for state in states.values()):
                return
            self._check_alive()
            await asyncio.sleep(_LOOK_EVERY_S)

    async def quiet(self) -> None:
        """
        Return when everything published has been handled, and what that published, and so on.

        Raises:
            LaunchError: An agent ended meanwhile; says what it said.
        """
        still: tuple[int, int] | None = None
        while True:
            await self._publisher.flush()
            views = self.views()
            joined = account(views, self._hears(), settled=False)
            now = (_said(joined), sum(view.handled for view in views.values()))
            # Ledgers are read one after the other: only what two looks agree upon is true
            if joined.in_flight == 0 and now == still:
                return
            still = now if joined.in_flight == 0 else None
            self._check_alive()
            await asyncio.sleep(_LOOK_EVERY_S)

    def account(self) -> Account:
        """Give the account of all events; what is under way counts as lost: be `quiet` first."""
        return account(self.views(), self._hears(), settled=True)

    def views(self) -> dict[str, LedgerView]:
        """Give every agent's counters."""
        return read_ledgers(self.rundir.ledgers)

    # -- start ---------------------------------------------------------------------------------

    def _make_rundir(self, exits: contextlib.AsyncExitStack) -> RunDir:
        if self._directory is not None:
            return RunDir(self._directory).ensure()
        # Sockets lie in it, and their paths end at 107 bytes
        parent = min(tempfile.gettempdir(), "/tmp", key=len)  # noqa: S108 - mkdtemp makes it private
        rundir = RunDir(tempfile.mkdtemp(prefix="lg-", dir=parent)).ensure()
        exits.callback(shutil.rmtree, rundir.path, ignore_errors=True)
        exits.push_async_callback(_end_forwarder, rundir)
        return rundir

    async def _join_fabric(self, exits: contextlib.AsyncExitStack) -> None:
        self._broker: MessageBroker = make_broker(self.config, self.rundir.path)
        exits.push_async_callback(self._broker.close)
        await self._broker.connect()
        ledger = Ledger.open(self.rundir.ledger(LAUNCHER))
        self._publisher = EventPublisher(
            PublisherConfig(agent_name=LAUNCHER, broker=self._broker, ledger=ledger)
        )
        exits.push_async_callback(self._publisher.close)
        self._requester = Requester(self._broker, self._publisher)
        exits.push_async_callback(self._requester.close)

    async def _start_all(self) -> None:
        loop = asyncio.get_running_loop()
        for name, origin in self._origins.items():
            process = start_process(
                live, origin, name, str(self.rundir.path), self.config, self._params, name=name
            )
            self._processes[name] = process
            loop.add_reader(sentinel_of(process), self._exited, sentinel_of(process))
        try:
            async with asyncio.timeout(self._start_timeout_s):
                while not self._ready.issuperset(self._origins):
                    self._check_alive()
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            late = sorted(self._origins.keys() - self._ready)
            raise LaunchError(
                f"not READY within {self._start_timeout_s:g} s: {', '.join(late)}\n"
                + "\n".join(self._epitaph(name) for name in late)
            ) from None

    def _open_gate(self) -> None:
        self._open = True
        for name in self._origins:
            self._beats.open_gate(name)

    def _heard(self, beat: Beat) -> bool:
        if beat.name not in self._origins:
            return False
        if beat.state == "ready" and beat.name not in self._ready:
            self._ready.add(beat.name)
            self._changed.set()
        if self._open and beat.sources == "waiting":
            self._beats.open_gate(beat.name)
        return True

    # -- end -----------------------------------------------------------------------------------

    def _exited(self, sentinel: int) -> None:
        asyncio.get_running_loop().remove_reader(sentinel)
        self._changed.set()

    async def _end_all(self) -> None:
        """Stop sources first, then the others; kill who does not end."""
        views = self.views()
        sources = [n for n in self._processes if n in views and views[n].sources != "none"]
        await self._end(sources)
        with contextlib.suppress(TimeoutError, LaunchError):
            async with asyncio.timeout(_END_GRACE_S):
                await self.quiet()
        await self._end([name for name in self._processes if name not in sources])
        for _ in self._processes:
            await give_manager_back()

    async def _end(self, names: list[str]) -> None:
        living = [self._processes[name] for name in names]
        for process in living:
            asyncio.get_running_loop().remove_reader(sentinel_of(process))
            if process.is_alive():
                process.terminate()
        give_up_s = self.config.drain_timeout_s + _END_GRACE_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(give_up_s):
                for process in living:
                    await process.join()
        for process in living:
            if process.is_alive():
                process.kill()
                await process.join()

    def _check_alive(self) -> None:
        ended = [name for name, one in self._processes.items() if one.exitcode is not None]
        if ended:
            raise LaunchError("\n".join(self._epitaph(name) for name in ended))

    def _epitaph(self, name: str) -> str:
        """Give an agent's own last words."""
        code = self._processes[name].exitcode
        how = "did not become READY" if code is None else f"ended with exit code {code}"
        lines: list[str] = []
        with contextlib.suppress(OSError):
            lines = self.rundir.output(name).read_text(errors="replace").splitlines()[-_WORDS:]
        return "\n".join([f"{name} {how}:", *(f"    {line}" for line in lines)])

    def _topics(self) -> list[str]:
        heard = {topic for topics in self._hears().values() for topic in topics}
        return sorted(heard | {each.topic for each in declarations()})

    def _hears(self) -> dict[str, frozenset[str]]:
        return {name: frozenset(card.hears) for name, card in read_cards(self.rundir).items()}


class _Ear:
    """Keeps what is said for `expect`."""

    def __init__(self) -> None:
        self._events: dict[str, deque[Event]] = {}
        self._news = asyncio.Event()

    def receive(self, topic: str, frame: bytes) -> None:
        with contextlib.suppress(FrameError):
            kept = self._events.setdefault(topic, deque(maxlen=_KEPT_EVENTS))
            kept.extend(codec.decode_frame(topic, frame).events)
            self._news.set()

    def has_room(self) -> bool:
        return True

    async def next(self, topic: str, where: Callable[[Event], bool] | None) -> Event:
        while True:
            self._news.clear()
            waiting = self._events.setdefault(topic, deque(maxlen=_KEPT_EVENTS))
            while waiting:
                event = waiting.popleft()
                if where is None or where(event):
                    return event
            await self._news.wait()


@contextlib.contextmanager
def _monitors(rundir: RunDir) -> Iterator[None]:
    """Hold the place of the monitor: only one may open the gate of a directory."""
    with rundir.acquire(rundir.lock("monitor")):
        yield


async def _end_forwarder(rundir: RunDir) -> None:
    """End the forwarder of a directory that is about to be removed."""
    pid = rundir.holder(rundir.lock("forwarder"))
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        while rundir.holder(rundir.lock("forwarder")):  # noqa: ASYNC110 - a lock wakes nobody
            await asyncio.sleep(_LOOK_EVERY_S)


def _said(joined: Account) -> int:
    return sum(n for topic, n in joined.published.items() if not topic.startswith("agent."))
