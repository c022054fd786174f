"""`mesh run`: the agents as supervised processes, from start to report."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mesh.card import read_cards
from mesh.cli import say
from mesh.cli.exits import AgentFailedError
from mesh.cli.logbook import warnings_since
from mesh.cli.report import by_reason, make_report
from mesh.cli.run_memory import GIVEN_UP, REPORT_REQUESTED, SOURCE_FAILED
from mesh.cli.signals import stop_signals, unless
from mesh.cli.starting import ready, tell_failures
from mesh.cli.watching import Watch
from mesh.dead_letter_queue import DeadLetterQueue
from mesh.errors import EXIT_CONFIGURATION, ConfigurationError, MeshError
from mesh.factory import make_broker
from mesh.journal import cannot_keep
from mesh.ledger_views import LedgerView, read_ledgers
from mesh.publisher import EventPublisher, PublisherConfig
from mesh.requests import Requester
from mesh.supervision import boot
from mesh.supervision.conf import INFRASTRUCTURE
from mesh.supervision.declaring import durable_topics, look_at_scripts
from mesh.supervision.last_words import last_printed, last_words
from mesh.supervision.supervisord import SupervisorClient, SupervisorError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from mesh.cli.place import Place
    from mesh.config import MessageBusConfig
    from mesh.journal import Journal
    from mesh.rundir import RunDir
    from mesh.supervision.supervisord import ProcessInfo

#: Under this name the report is asked for.
_ASKER = "mesh-run"
_GUARD_S = 0.2
#: A run keeps its durable events and dead letters apart: they are no part of what `mesh up` keeps.
_JOURNAL = "run"
#: Of an agent that has skipped rows: enough for the first of them and how many there were.
_TOLD_WARNINGS = 25


async def run_processes(
    place: Place,
    config: MessageBusConfig,
    agents: Collection[str] | None,
    params: Mapping[str, str],
) -> dict[str, Any]:
    """
    Run the programs of supervisord.conf to the end of their input; give the report.

    Raises:
        AlreadyRunningError: A mesh runs in this directory.
        ConfigurationError: An agent refuses its settings.
        AgentFailedError: An agent did not start.
    """
    rundir = place.rundir
    began_s = time.time()
    with stop_signals() as stop:
        await boot.up(
            place.project,
            rundir,
            params=params,
            agents=agents,
            broker_type=config.broker_type,
            environment={"MESH_JOURNAL": _JOURNAL},
            on_free=partial(_begin_journal, place, config, agents),
            on_wait=say.note,
        )
        run = _Run(rundir, config, stop)
        try:
            report = await run.report()
            report["interrupted"] = stop.is_set()
        finally:
            await run.close()
            with contextlib.suppress(SupervisorError):
                await boot.down(rundir)
    _add_last_words(rundir, report)
    _tell_bad_rows(rundir, report, began_s)
    # Not before the agents have ended: until then they may still write letters out
    read = {name for card in read_cards(rundir).values() for name in card.params_read}
    return report | {
        "dead_letters": await _dead_letters(config, rundir),
        "params_unread": sorted(params.keys() - read),
    }


def _add_last_words(rundir: RunDir, report: Mapping[str, Any]) -> None:
    """Say what sources failed with, which they print when the report is made already."""
    for name, agent in report["agents"].items():
        if agent["problem"] == SOURCE_FAILED and (words := last_printed(rundir, name)):
            agent["problem"] += f": {words}"


def _tell_bad_rows(rundir: RunDir, report: Mapping[str, Any], since_s: float) -> None:
    """Say what agents have logged of the rows that they skipped; in memory it is seen anyway."""
    for name, agent in report["agents"].items():
        if not agent["dropped"].get("bad_rows"):
            continue
        warnings = warnings_since(rundir.log(name), since_s)
        for line in warnings[:_TOLD_WARNINGS]:
            say.note(line)
        if len(warnings) > _TOLD_WARNINGS:
            more = say.counted(len(warnings) - _TOLD_WARNINGS, "more warning")
            say.note(f"{more}: mesh logs {name}")


async def _dead_letters(config: MessageBusConfig, rundir: RunDir) -> dict[str, int] | None:
    """Count what the run has put aside, by reason; None when its journal does not answer."""
    try:
        async with _any_journal(config, rundir) as journal:
            return by_reason(await DeadLetterQueue(journal).groups())
    except MeshError as error:
        say.note(f"dead letters cannot be counted: {error}", "red")
        return None


async def _begin_journal(
    place: Place, config: MessageBusConfig, agents: Collection[str] | None
) -> None:
    """A run begins with nothing kept: what the last one kept goes."""
    journal = make_broker(config, place.rundir.path, journal=_JOURNAL).make_journal()
    try:
        await journal.connect()
    except ConfigurationError as error:
        # Of no importance where nothing durable is heard
        topics = durable_topics(await look_at_scripts(place.project, place.rundir, agents))
        if topics:
            raise cannot_keep(topics, config.broker_type, error) from None
        journal = _any_journal(config, place.rundir)
    async with journal:
        await journal.erase()


def _any_journal(config: MessageBusConfig, rundir: RunDir) -> Journal:
    """Give the run's journal, to look and to erase; who must keep something in it is stricter."""
    lenient = replace(config, redis_allow_volatile=True)
    return make_broker(lenient, rundir.path, journal=_JOURNAL).make_journal()


class _Run:
    """One run over processes."""

    def __init__(self, rundir: RunDir, config: MessageBusConfig, stop: asyncio.Event) -> None:
        self._rundir = rundir
        self._config = config
        self._stop = stop
        self._client = SupervisorClient(rundir.socket("supervisor"))
        self._quiet = False
        self._failed_sources: set[str] = set()
        self._journal: Journal | None = None

    async def close(self) -> None:
        """Let go of the journal."""
        if self._journal is not None:
            await self._journal.close()

    async def report(self) -> dict[str, Any]:
        if not await unless(self._stop, self._start()):
            say.note("interrupted before all agents were READY")
        with Watch(self._views, self._hears, self._pending) as watch:
            if not self._stop.is_set():
                await unless(self._stop, self._until_quiet(watch))
            if self._stop.is_set():
                await self._end_sources()
                self._quiet = await watch.quiet()
            return make_report(
                self._views(),
                self._hears(),
                await self._portfolio(),
                seconds=watch.seconds,
                settled=True,
                problems=self._problems(await self._client.processes()),
            )

    async def _start(self) -> None:
        """Wait until all are READY; an agent that fails at its first start ends the run."""
        waiting = asyncio.create_task(ready(self._rundir, until_begun=True), name="ready")
        guarding = asyncio.create_task(self._guard(at_start=True), name="guard")
        try:
            await asyncio.wait({waiting, guarding}, return_when=asyncio.FIRST_COMPLETED)
            if guarding.done():
                self._refuse(guarding.result())
            elif failed := tell_failures(self._rundir, waiting.result()):
                for name in failed:
                    if _last_exit_status(self._rundir, name) == EXIT_CONFIGURATION:
                        raise ConfigurationError(f"{name} refuses the configuration, as said above")
                raise AgentFailedError(GIVEN_UP)
        finally:
            for task in (waiting, guarding):
                task.cancel()
            await asyncio.gather(waiting, guarding, return_exceptions=True)

    async def _until_quiet(self, watch: Watch) -> None:
        """Wait for the end of the input and what follows; an agent that is given up ends it too."""
        working = asyncio.create_task(self._work(watch), name="work")
        guarding = asyncio.create_task(self._guard(), name="guard")
        try:
            await asyncio.wait({working, guarding}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        finally:
            for task in (working, guarding):
                task.cancel()
            await asyncio.gather(working, guarding, return_exceptions=True)

    async def _work(self, watch: Watch) -> None:
        await watch.sources_done()
        # Noted at once: a successor begins with a new state
        self._failed_sources = {n for n, view in self._views().items() if view.sources == "failed"}
        self._quiet = await watch.quiet()

    async def _guard(self, *, at_start: bool = False) -> ProcessInfo:
        """Return the first program that is given up; an agent has one try for its first start."""
        # One that has been READY will be so again
        known = set(INFRASTRUCTURE)
        while True:
            # Before supervisord is asked, too: a successor begins with a new state
            known |= self._ready_once()
            for program in await self._client.processes():
                has_ended = at_start and program.state in ("BACKOFF", "EXITED")
                if program.has_given_up or (
                    has_ended and program.name not in known | self._ready_once()
                ):
                    return program
            await asyncio.sleep(_GUARD_S)

    def _ready_once(self) -> set[str]:
        return {name for name, view in self._views().items() if view.ready_at_s}

    def _refuse(self, program: ProcessInfo) -> None:
        words = f"{program.name}: {last_words(self._rundir, program)}"
        if _last_exit_status(self._rundir, program.name) == EXIT_CONFIGURATION:
            raise ConfigurationError(words)
        raise AgentFailedError(f"{words}\n{GIVEN_UP}")

    async def _end_sources(self) -> None:
        for name, view in self._views().items():
            if view.sources in ("waiting", "running"):
                with contextlib.suppress(SupervisorError):
                    await self._client.stop(name)

    async def _portfolio(self) -> dict[str, Any]:
        """Ask for the account; nothing when nobody keeps one."""
        if not any(REPORT_REQUESTED in topics for topics in self._hears().values()):
            return {}
        async with make_broker(self._config, self._rundir.path) as broker:
            publisher = EventPublisher(PublisherConfig(agent_name=_ASKER, broker=broker))
            requester = Requester(broker, publisher)
            try:
                return dict((await requester.request(REPORT_REQUESTED, {})).data)
            except MeshError as error:
                say.note(str(error), "red")
                return {}
            finally:
                await requester.close()
                await publisher.close()

    async def _pending(self) -> int:
        """Count what the journal still has for the agents."""
        if self._journal is None:
            self._journal = _any_journal(self._config, self._rundir)
            await self._journal.connect()
        names = self._views()
        return sum(view.pending for view in await self._journal.groups() if view.group in names)

    def _views(self) -> dict[str, LedgerView]:
        views = read_ledgers(self._rundir.ledgers)
        return {name: view for name, view in views.items() if name not in INFRASTRUCTURE}

    def _hears(self) -> dict[str, frozenset[str]]:
        return {name: frozenset(card.hears) for name, card in read_cards(self._rundir).items()}

    def _problems(self, programs: list[ProcessInfo]) -> dict[str, str]:
        views = self._views()
        problems: dict[str, str] = {}
        for program in programs:
            view = views.get(program.name)
            # A source that was told to stop has done so
            stopped = program.state == "STOPPED" and self._stop.is_set()
            if stopped:
                continue
            if program.has_given_up:
                problems[program.name] = f"{program.state}: {last_words(self._rundir, program)}"
            elif program.name in self._failed_sources or (
                view is not None and view.sources == "failed"
            ):
                problems[program.name] = SOURCE_FAILED
        return problems


def _last_exit_status(rundir: RunDir, name: str) -> int | None:
    """Read a program's last exit status from supervisord's log: its RPC forgets it at a retry."""
    try:
        text = rundir.log("supervisord").read_text(errors="replace")
    except OSError:
        return None
    found = re.findall(rf"exited: {re.escape(name)} \(exit status (\d+);", text)
    return int(found[-1]) if found else None
