"""`mesh scale`: more replicas of one agent, or fewer."""

from __future__ import annotations

import asyncio
import sys

import click

from mesh.card import read_card
from mesh.cli import say
from mesh.cli.place import Place, directory_option, settings_of
from mesh.cli.starting import declare_durable_groups, ready, tell_failures
from mesh.errors import EXIT_BUG
from mesh.ledger_views import read_ledgers
from mesh.replicas import MARK, MAX_REPLICAS
from mesh.supervision import boot
from mesh.supervision.conf import INFRASTRUCTURE
from mesh.supervision.supervisord import SupervisorClient


@click.command()
@click.argument("name")
@click.argument("count", metavar="N", type=click.IntRange(1, MAX_REPLICAS))
@click.option("--sources", is_flag=True, help="Its sources shall run in every replica.")
@directory_option
def scale(name: str, count: int, sources: bool, directory: str | None) -> None:
    """
    Run N replicas of an agent; nobody else's process is touched.

    They share its events, each key going to one of them, and its durable state. Fewer replicas: the
    last ones drain and leave. The number holds for this run directory until it is changed, also
    over `mesh reload`, `mesh down` and `mesh up`.

    \b
    Example:
      mesh scale features 3
      mesh scale features 1
    """  # noqa: D301
    sys.exit(asyncio.run(_scale(Place.find(directory), name, count, sources=sources)))


async def _scale(place: Place, name: str, count: int, *, sources: bool) -> int:
    rundir = place.rundir
    client = SupervisorClient(rundir.socket("supervisor"))
    known = [each.name for each in await client.processes()]
    _check(name, known)
    card = read_card(rundir, name)
    if card is not None and count > card.max_replicas:
        raise click.UsageError(f"{name} says that there may be {card.max_replicas} of it at most")
    view = read_ledgers(rundir.ledgers).get(name)
    if view is not None and view.sources != "none" and count > 1 and not sources:
        raise click.UsageError(
            f"{name} has a source, which would say everything once a replica;"
            " if that is meant, add --sources"
        )
    await declare_durable_groups(place, settings_of(rundir), [name])
    added, removed = await boot.scale(place.project, rundir, name, count)
    if removed:
        say.line(f"drained and gone: {', '.join(removed)}")
    states = [each for each in await ready(rundir, quiet=True) if each.name in added]
    for each in states:
        if each.verdict == "ready":
            say.line(f"{each.name} is READY (pid {each.pid})", "green")
    say.line(f"{name}: {count} replica{'s' if count > 1 else ''}")
    return EXIT_BUG if tell_failures(rundir, states) else 0


def _check(name: str, known: list[str]) -> None:
    if MARK in name:
        raise click.UsageError(f"{name} is a replica; scale {name.partition(MARK)[0]}")
    if name in INFRASTRUCTURE:
        raise click.UsageError(f"there is one {name} a mesh")
    if name not in known:
        agents = [each for each in known if each not in INFRASTRUCTURE and MARK not in each]
        raise click.UsageError(f"no such agent: {name}; this mesh has {', '.join(agents)}")
