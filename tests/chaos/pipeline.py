"""
The example pipeline under fire: however often its agents are killed, the fills are the same to the
byte as those of an undisturbed run in one process.

``scripts/chaos --pipeline bars.csv --fabric redis`` does it in three ways: it kills those behind
the signals, that are durable; with all types durable it kills anybody; and it kills supervisord
too, and brings the mesh up again on the same journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agents.feed import Feed
from mesh.card import read_cards
from mesh.config import MessageBusConfig
from mesh.factory import make_broker
from mesh.ledger_views import read_ledgers
from mesh.publisher import EventPublisher, PublisherConfig
from mesh.requests import Requester
from mesh.supervision import boot
from mesh.supervision.supervisord import SupervisorClient, SupervisorError
from tests.plumbing.processes import MESH, environment, running

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mesh.rundir import RunDir

#: Those behind the first durable type.
MONEY = ("risk", "execution", "portfolio")
ALL = ("market_data", "features", "signals", *MONEY, "forwarder", "monitor")
ON_ZEROMQ = {"LEGION_BROKER_TYPE": "zmq"}
REPORT_REQUESTED = "portfolio.report.requested"
_LOOK_S = 0.05
#: Nervous: a fill every few rows.
_PARAMS = {"fast": "3", "slow": "9", "band": "0", "max_orders": "1000000"}
_ALL_DURABLE = {"LEGION_DURABLE_EVENTS": "*"}


@dataclass(slots=True)
class Outcome:
    """The fills of a run without and with kills."""

    calm: dict[str, Any]
    stormy: dict[str, Any]
    kills: list[str] = field(default_factory=list)
    #: How many kills were asked for.
    times: int = 0

    @property
    def problems(self) -> list[str]:
        problems = [
            f"{name}: {self.stormy.get(name)}, undisturbed {self.calm[name]}"
            for name in ("fills", "fills_digest")
            if self.stormy.get(name) != self.calm[name]
        ]
        if len(self.kills) < self.times:
            words = f"the run ended after {len(self.kills)} of {self.times} kills: it was no proof"
            problems.append(words)
        return problems

    def to_dict(self) -> dict[str, Any]:
        fills = {name: self.stormy.get(name) for name in ("fills", "fills_digest")}
        return {**fills, "kills": len(self.kills), "problems": self.problems}

    def table(self) -> str:
        """Give it for people."""
        words = "\n".join(f"BROKEN: {each}" for each in self.problems) or "the same, to the byte"
        return (
            f"fills   {self.calm['fills']:>8,}\ndigest  {self.calm['fills_digest']}\n"
            f"kills   {len(self.kills):>8,}  ({', '.join(self.kills)})\n{words}\n"
        )


async def storm(
    project: Path,
    rundir: RunDir,
    csv: Path,
    fabric: Mapping[str, str] = ON_ZEROMQ,
    *,
    seed: int,
    times: int,
    speed: str = "max",
    everything: bool = False,
) -> Outcome:
    """
    Run the pipeline as `mesh run` with and without kills.

    Args:
        project: With supervisord.conf and agents/.
        rundir: Of the run with kills.
        csv: Its input.
        fabric: The settings of what joins its processes.
        seed: Decides who is killed.
        times: How many kills.
        speed: As for `mesh run`.
        everything: All types are durable, and anybody is killed.
    """
    calm = await calm_run(project, csv)
    durable = _ALL_DURABLE if everything else {}
    settings = environment(MESH_DIR=str(rundir.path), **fabric, **durable)
    words = (*_words(csv), "--speed", speed)
    async with running(MESH, *words, env=settings, cwd=project, stop_within_s=60) as run:
        said = asyncio.create_task(run.communicate(), name="mesh-run")
        killer = Killer(rundir, seed, ALL if everything else MONEY)
        # Who dies while the mesh starts for the first time ends the run, rightly
        while not said.done() and not _has_begun(rundir):  # noqa: ASYNC110 - counters wake nobody
            await asyncio.sleep(_LOOK_S)
        while len(killer.kills) < times and not said.done():
            await killer.kill_one()
            await asyncio.sleep(_LOOK_S)
        out, err = await said
    assert run.returncode in (0, 1), f"mesh run ended with {run.returncode}: {err.decode()}"
    return Outcome(calm, json.loads(out), killer.kills, times)


def speed_for(csv: Path, seconds: float) -> str:
    """Tell at what speed a file is said within some seconds."""
    feed = Feed(csv)
    feed.check()
    times = [row.time for row in feed.rows()]
    return f"{(times[-1] - times[0]).total_seconds() / seconds:g}"


async def storm_over_supervisord(
    project: Path,
    rundir: RunDir,
    csv: Path,
    fabric: Mapping[str, str] = ON_ZEROMQ,
    *,
    seed: int,
    times: int,
) -> Outcome:
    """
    Run the pipeline as `mesh up`, with every type durable, and kill supervisord too.

    Args:
        project: With supervisord.conf and agents/.
        rundir: Of the run with kills.
        csv: Its input.
        fabric: The settings of what joins its processes.
        seed: Decides who is killed.
        times: How often supervisord is killed.
    """
    calm = await calm_run(project, csv)
    params = {**_PARAMS, "csv": str(csv), "speed": "max"}
    killer = Killer(rundir, seed, ALL)
    config = MessageBusConfig.from_env(fabric)
    journal = make_broker(config, rundir.path).make_journal()
    rundir.ensure()
    try:
        for life in range(times + 1):
            pid = await boot.up(
                project,
                rundir,
                params=params,
                broker_type=config.broker_type,
                environment={**fabric, **_ALL_DURABLE},
            )
            if life == 0:
                await journal.connect()
            states = await boot.wait_ready(rundir)
            assert all(state.verdict == "ready" for state in states), states
            if life < times:
                await killer.kill_one()
                killer.kills.append("supervisord")
                os.kill(pid, signal.SIGKILL)
                await asyncio.to_thread(os.waitpid, pid, 0)
        await _quiet(rundir, journal)
        account = await _ask(rundir, config)
        await boot.down(rundir)
        with contextlib.suppress(ChildProcessError):
            await asyncio.to_thread(os.waitpid, pid, 0)
    finally:
        await journal.close()
    return Outcome(calm, account, killer.kills, times)


async def calm_run(project: Path, csv: Path) -> dict[str, Any]:
    """Run the pipeline in one process, undisturbed; give its report."""
    words = (*_words(csv), "--speed", "max", "--memory")
    async with running(MESH, *words, env=environment(), cwd=project) as run:
        out, err = await run.communicate()
    assert run.returncode == 0, err.decode()
    report: dict[str, Any] = json.loads(out)
    return report


def _words(csv: Path) -> list[str]:
    params = [word for name, value in _PARAMS.items() for word in ("--param", f"{name}={value}")]
    return ["run", "--csv", str(csv), *params, "--json"]


class Killer:
    """
    Kills programs of a mesh in turn, each only when it runs again.

    Args:
        rundir: The mesh's.
        seed: Decides in what order.
        victims: Who.
    """

    def __init__(self, rundir: RunDir, seed: int, victims: Sequence[str]) -> None:
        self.kills: list[str] = []
        self._client = SupervisorClient(rundir.socket("supervisor"))
        self._random = random.Random(seed)
        self._victims = victims

    async def kill_one(self) -> None:
        """Kill somebody who is RUNNING, if there is anybody."""
        try:
            programs = await self._client.processes()
        except SupervisorError:
            return
        # Who is killed again and again while it starts is given up by supervisord, rightly
        living = {each.name: each.pid for each in programs if each.state == "RUNNING"}
        if victims := [name for name in self._victims if name in living]:
            name = self._random.choice(victims)
            with contextlib.suppress(ProcessLookupError):
                os.kill(living[name], signal.SIGKILL)
                self.kills.append(name)


def _has_begun(rundir: RunDir) -> bool:
    view = read_ledgers(rundir.ledgers).get("market_data")
    return view is not None and view.sources in ("running", "done")


async def _quiet(rundir: RunDir, journal: Any, still_s: float = 45.0) -> None:
    """Return when the source has ended and the journal holds nothing for anybody."""
    loop = asyncio.get_running_loop()
    before, moved_s, names = -1, loop.time(), set(ALL)
    while True:
        left = sum(view.pending for view in await journal.groups() if view.group in names)
        views = read_ledgers(rundir.ledgers)
        if not left and "market_data" in views and views["market_data"].sources == "done":
            return
        if left != before:
            before, moved_s = left, loop.time()
        assert loop.time() - moved_s < still_s, f"{left} events wait, and nothing moves"
        await asyncio.sleep(_LOOK_S)


async def _ask(rundir: RunDir, config: MessageBusConfig) -> dict[str, Any]:
    """Ask the portfolio for its account."""
    assert any(REPORT_REQUESTED in card.hears for card in read_cards(rundir).values())
    async with make_broker(config, rundir.path) as broker:
        publisher = EventPublisher(PublisherConfig(agent_name="asker", broker=broker))
        requester = Requester(broker, publisher)
        try:
            return dict((await requester.request(REPORT_REQUESTED, {}, timeout_s=15)).data)
        finally:
            await requester.close()
            await publisher.close()
