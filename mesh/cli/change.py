"""`mesh restart` and `mesh reload`."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING

import click

from mesh.cli import say
from mesh.cli.place import Place, directory_option, settings_of
from mesh.cli.starting import declare_durable_groups, ready, tell_failures, tell_unlisted
from mesh.errors import EXIT_BUG
from mesh.replicas import group_of
from mesh.supervision import boot
from mesh.supervision.conf import script_of
from mesh.supervision.supervisord import SupervisorClient

if TYPE_CHECKING:
    from pathlib import Path

    from mesh.rundir import RunDir
    from mesh.supervision.supervisord import ProcessInfo


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@directory_option
def restart(names: tuple[str, ...], directory: str | None) -> None:
    """
    Restart single agents; returns when they are READY again.

    Each drains before it ends, and goes on counting where it stopped.

    \b
    Example:
      mesh restart features risk
    """  # noqa: D301
    sys.exit(asyncio.run(_restart(Place.find(directory).rundir, names)))


@click.command()
@directory_option
def reload(directory: str | None) -> None:
    """
    Take up what changed in supervisord.conf; nobody else's process is touched.

    Scripts that were edited are named; `mesh restart NAME` takes them up.

    \b
    Example:
      mesh new hello && mesh reload
    """  # noqa: D301
    sys.exit(asyncio.run(_reload(Place.find(directory))))


async def _restart(rundir: RunDir, names: tuple[str, ...]) -> int:
    known = [each.name for each in await _client(rundir).processes()]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise click.UsageError(
            f"no such program: {', '.join(unknown)}; this mesh has {', '.join(known)}"
        )
    await boot.restart(rundir, list(dict.fromkeys(names)))
    states = [each for each in await ready(rundir, quiet=True) if each.name in names]
    for each in states:
        if each.verdict == "ready":
            say.line(f"{each.name} is READY (pid {each.pid})", "green")
    return EXIT_BUG if tell_failures(rundir, states) else 0


async def _reload(place: Place) -> int:
    rundir = place.rundir
    await _client(rundir).pid()  # says that no mesh runs, before anything is written
    await declare_durable_groups(place, settings_of(rundir))
    added, changed, removed = await boot.reload(place.project, rundir)
    for words, names in (("added", added), ("restarted", changed), ("removed", removed)):
        if names:
            say.line(f"{words}: {', '.join(names)}")
    if not (added or changed or removed):
        say.line("nothing changed in supervisord.conf")
    tell_unlisted(place.project)
    programs = await _client(rundir).processes()
    _tell_edited(place.project, [each for each in programs if each.name not in (*added, *changed)])
    states = [each for each in await ready(rundir, quiet=True) if each.name in (*added, *changed)]
    for each in states:
        if each.verdict == "ready":
            say.line(f"{each.name} is READY (pid {each.pid})", "green")
    return EXIT_BUG if tell_failures(rundir, states) else 0


def _tell_edited(project: Path, programs: list[ProcessInfo]) -> None:
    """Name programs whose script was written since they began: a reload leaves them as they are."""
    edited: list[str] = []
    for program in programs:
        script = script_of(project, group_of(program.name))
        with contextlib.suppress(OSError):
            # supervisord's clock shows whole seconds
            if script and (project / script).stat().st_mtime > program.started_at_s + 1:
                edited.append(program.name)
    if edited:
        names = " ".join(edited)
        say.note(f"edited since its start: `mesh restart {names}` takes that up", "yellow")


def _client(rundir: RunDir) -> SupervisorClient:
    return SupervisorClient(rundir.socket("supervisor"))
