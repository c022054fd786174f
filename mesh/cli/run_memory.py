"""`mesh run --memory`: the same scripts, all in this process."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from mesh.cli.exits import AgentFailedError
from mesh.cli.report import by_reason, make_report
from mesh.cli.signals import stop_signals, unless
from mesh.cli.watching import LOOK_S, Watch
from mesh.dead_letter_queue import DeadLetterQueue
from mesh.errors import ConfigurationError, MeshError, first_leaf, words_of
from mesh.inprocess import InProcessMesh
from mesh.loading import AgentScriptError, words_with_place
from mesh.logs import set_up_logging
from mesh.supervision.conf import programs_of, script_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from mesh.cli.place import Place
    from mesh.config import MessageBusConfig

#: Asks the portfolio for its account.
REPORT_REQUESTED = "portfolio.report.requested"
SOURCE_FAILED = "its source failed"
#: Follows the words of an agent that does not start.
GIVEN_UP = "the run was given up: not all agents started"


async def run_memory(
    place: Place,
    config: MessageBusConfig,
    agents: Collection[str] | None,
    params: Mapping[str, str],
) -> dict[str, Any]:
    """
    Run the scripts of supervisord.conf in this process; give the report.

    Raises:
        ConfigurationError: An agent is unknown, or refuses its settings.
        AgentFailedError: An agent did not start.
    """
    scripts = scripts_of(place.project, agents)
    close_log = set_up_logging("run", None, "WARNING")
    try:
        # Scripts import each other's payloads by the dotted name from the project
        with contextlib.chdir(place.project), stop_signals() as stop:
            report = await _run(_make(scripts, params, config), stop)
            return report | {"interrupted": stop.is_set()}
    finally:
        close_log()


def scripts_of(project: Path, agents: Collection[str] | None) -> list[Path]:
    """
    List the scripts of the agents in supervisord.conf, sources last started, first stopped.

    Raises:
        ConfigurationError: An agent that was asked for is not there.
    """
    found = {name: script_of(project, name) for name in programs_of(project)}
    scripts = {name: project / script for name, script in found.items() if script is not None}
    unknown = [name for name in agents or () if name not in scripts]
    if unknown:
        raise ConfigurationError(
            [
                f"{name!r} is no agent of {project / 'supervisord.conf'}; it has"
                f" {', '.join(scripts)}"
                for name in unknown
            ]
        )
    # The file starts those who hear before those who say; here the first is also drained first
    return [scripts[name] for name in reversed(scripts) if agents is None or name in agents]


class _ToldError(Exception):
    """Leaves a mesh whose source has failed, with the report in hand."""

    def __init__(self, report: dict[str, Any]) -> None:
        super().__init__("the report tells it")
        self.report = report


async def _run(mesh: InProcessMesh, stop: asyncio.Event) -> dict[str, Any]:
    hears = {name: frozenset(agent.hears()) for name, agent in mesh.agents.items()}
    try:
        with Watch(mesh.views, lambda: hears) as watch:
            async with contextlib.AsyncExitStack() as until_closed:
                await _open(mesh, until_closed)
                quiet, problems = await _until_quiet(mesh, watch, stop)
                report = make_report(
                    mesh.views(),
                    hears,
                    await _portfolio(mesh),
                    seconds=watch.seconds,
                    settled=quiet,
                    problems=problems,
                ) | {
                    "dead_letters": await _dead_letters(mesh),
                    "params_unread": sorted(mesh.params.keys() - mesh.params.read),
                }
                if problems:
                    # The mesh would raise the failure once more
                    raise _ToldError(report)
    except _ToldError as told:
        return told.report
    return report


def _make(
    scripts: Sequence[Path], params: Mapping[str, str], config: MessageBusConfig
) -> InProcessMesh:
    try:
        return InProcessMesh(scripts, params=params, config=config)
    except AgentScriptError as error:
        raise _not_started(error.script.stem, str(error)) from error
    except ConfigurationError:
        raise
    except Exception as error:
        # Its own `__init__`; which agent's, only the place can tell
        raise _not_started(None, words_with_place(error)) from error


async def _open(mesh: InProcessMesh, until_closed: contextlib.AsyncExitStack) -> None:
    """Open all agents; one that cannot start ends the run in the words of a run over processes."""
    try:
        await until_closed.enter_async_context(mesh)
    except Exception as error:
        first = first_leaf(error)
        # One is opened after the other: the last that has begun is the one
        name = [name for name, view in mesh.views().items() if view.state != "absent"][-1]
        if isinstance(first, ConfigurationError):
            raise ConfigurationError([f"{name}: {each}" for each in first.problems]) from None
        words = str(first) if isinstance(first, MeshError) else words_with_place(first)
        raise _not_started(name, words) from error


def _not_started(name: str | None, words: str) -> AgentFailedError:
    *_, last = words.splitlines() or [""]
    return AgentFailedError(f"{f'{name}: {last}' if name else last}\n{GIVEN_UP}")


async def _until_quiet(
    mesh: InProcessMesh, watch: Watch, stop: asyncio.Event
) -> tuple[bool, dict[str, str]]:
    """Wait for the end of the input; say whether all is handled, and which source failed how."""
    watcher = asyncio.create_task(_show(watch), name="watch")
    quiet, problems = False, {}
    try:
        if await unless(stop, mesh.sources_done()):
            quiet = await unless(stop, mesh.quiet())
    except Exception as error:  # noqa: BLE001 - an agent's own failure is told by the report
        problems[_failed_source(mesh)] = f"{SOURCE_FAILED}: {words_of(first_leaf(error))}"
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
    watch.look()
    return quiet, problems


async def _show(watch: Watch) -> None:
    while True:
        watch.look()
        await asyncio.sleep(LOOK_S)


async def _portfolio(mesh: InProcessMesh) -> dict[str, Any]:
    if not any(REPORT_REQUESTED in agent.hears() for agent in mesh.agents.values()):
        return {}
    with contextlib.suppress(MeshError):
        reply: dict[str, Any] = await mesh.request(REPORT_REQUESTED, {})
        return reply
    return {}


async def _dead_letters(mesh: InProcessMesh) -> dict[str, int]:
    """Count what was put aside, by reason."""
    for agent in mesh.agents.values():
        await agent.consumer.dead_letters.written()
    return by_reason(await DeadLetterQueue(await mesh.broker.open_journal()).groups())


def _failed_source(mesh: InProcessMesh) -> str:
    states = {name: view.sources for name, view in mesh.views().items()}
    return next((name for name, state in states.items() if state == "failed"), "mesh")
