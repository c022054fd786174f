"""`mesh up`, `down`, `restart`, `reload`: the life of a mesh."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import click

from mesh.cli.common import NoMeshError, project, rundir
from mesh.config import MessageBusConfig
from mesh.errors import EXIT_BUG, ConfigurationError
from mesh.supervision import boot
from mesh.supervision.supervisord import SupervisorClient, SupervisorUnavailableError


def parse_params(pairs: tuple[str, ...]) -> dict[str, str]:
    """
    Read ``key=value`` pairs.

    Raises:
        ConfigurationError: One has no ``=``.
    """
    wrong = [pair for pair in pairs if "=" not in pair or not pair.split("=", 1)[0].isidentifier()]
    if wrong:
        raise ConfigurationError([f"--param {pair}: write key=value" for pair in wrong])
    return dict(pair.split("=", 1) for pair in pairs)


@click.command()
@click.option("-d", "--detach", is_flag=True, help="Return when all agents are READY.")
@click.option("--agents", metavar="A,B", help="Only these agents (default: all).")
@click.option("--param", "pairs", multiple=True, metavar="KEY=VALUE", help="For the agents.")
def up(*, detach: bool, agents: str | None, pairs: tuple[str, ...]) -> int:
    r"""
    Start the mesh of ./supervisord.conf and wait until its agents are READY.

    Without -d it stays and takes everything down on Ctrl-C.

    \b
    mesh up -d --param speed=10
    """
    MessageBusConfig.from_env()
    return asyncio.run(_up(detach, agents.split(",") if agents else None, parse_params(pairs)))


async def _up(detach: bool, agents: list[str] | None, params: dict[str, str]) -> int:
    where = rundir()
    chosen = None if agents is None else [*agents, *boot.INFRASTRUCTURE]
    pid = await boot.up(project(), where, params=params, agents=chosen)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    states = await boot.wait_ready(where, on_change=_Progress())
    failed = [state for state in states if state.verdict == "failed"]
    for state in failed:
        click.echo(f"{state.name} failed: {state.last_words}", err=True)
    click.echo(f"mesh in {where.path}: {len(states) - len(failed)} of {len(states)} READY")
    if not detach:
        await _stay(pid, stop)
        with contextlib.suppress(SupervisorUnavailableError):
            await boot.down(where)
    return EXIT_BUG if failed else 0


async def _stay(pid: int, stop: asyncio.Event) -> None:
    """Return when told to stop, or when supervisord has ended."""
    ended = asyncio.Event()
    descriptor = os.pidfd_open(pid)
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, ended.set)
    try:
        waits = [asyncio.create_task(each.wait()) for each in (stop, ended)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


class _Progress:
    """Tell each program's news once."""

    def __init__(self) -> None:
        self._said: dict[str, str] = {}

    def __call__(self, states: list[boot.ProgramState]) -> None:
        for state in states:
            if self._said.get(state.name) != state.verdict:
                self._said[state.name] = state.verdict
                if state.verdict != "starting":
                    click.echo(f"  {state.name}: {state.verdict}", err=True)


@click.command()
def down() -> int:
    """Stop the mesh: sources first, the others when nothing is under way."""
    where = rundir()
    try:
        asyncio.run(boot.down(where))
    except SupervisorUnavailableError:
        raise NoMeshError(where) from None
    click.echo(f"mesh in {where.path}: stopped")
    return 0


@click.command()
@click.argument("names", nargs=-1, required=True)
def restart(names: tuple[str, ...]) -> int:
    r"""
    Stop agents, let them drain, start them anew.

    \b
    mesh restart features signals
    """
    where = rundir()

    async def go() -> list[boot.ProgramState]:
        if not await SupervisorClient(where.socket("supervisor")).is_up():
            raise NoMeshError(where)
        await boot.restart(where, names)
        return await boot.wait_ready(where, on_change=_Progress())

    states = asyncio.run(go())
    return EXIT_BUG if any(s.verdict == "failed" for s in states if s.name in names) else 0


@click.command()
def reload() -> int:
    """Take up what changed in ./supervisord.conf; other agents keep running."""
    where = rundir()

    async def go() -> list[boot.ProgramState]:
        added, changed, removed = await boot.reload(project(), where)
        for names, word in ((added, "added"), (changed, "restarted"), (removed, "removed")):
            for name in names:
                click.echo(f"{name}: {word}")
        if not (added or changed or removed):
            click.echo("nothing changed")
        return await boot.wait_ready(where, on_change=_Progress())

    try:
        states = asyncio.run(go())
    except SupervisorUnavailableError:
        raise NoMeshError(where) from None
    return EXIT_BUG if any(state.verdict == "failed" for state in states) else 0
