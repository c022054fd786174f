"""`mesh up` and `mesh down`."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING

import click

from mesh.cli import say
from mesh.cli.exits import EXIT_WRONG
from mesh.cli.place import (
    Place,
    agents_option,
    checked_settings,
    directory_option,
    param_option,
)
from mesh.cli.signals import stop_signals, unless, until_exit
from mesh.cli.starting import (
    declare_durable_groups,
    left_running,
    ready,
    tell_failures,
    tell_unlisted,
    tell_unread,
)
from mesh.errors import EXIT_BUG
from mesh.supervision import boot
from mesh.supervision.boot import BootError
from mesh.supervision.conf import has_own_redis, programs_of, read_replicas
from mesh.supervision.supervisord import SupervisorError, SupervisorUnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mesh.config import MessageBusConfig


@click.command()
@click.option("-d", "--detach", is_flag=True, help="Return when all agents are READY.")
@click.option(
    "--with-redis", is_flag=True, help="Keep a redis-server for this mesh, as its fabric."
)
@agents_option
@param_option
@directory_option
def up(
    detach: bool,
    with_redis: bool,
    agents: Sequence[str] | None,
    params: Mapping[str, str],
    directory: str | None,
) -> None:
    """
    Start every agent of supervisord.conf as a supervised process.

    Without -d it stays, and takes everything down on Ctrl-C or SIGTERM. Exit code 69 when Redis
    does not answer (with -d the mesh runs on and waits for it), 70 when an agent failed (the others
    run), 75 when a mesh runs in this directory already, 78 when the configuration cannot be used.

    Parameters and their defaults are the agents' own. The example reads csv (default: an invented
    market) and speed, which is 1 for real time, N for N times as fast, or max (default: max with
    csv, else 1).

    \b
    Example:
      mesh up -d --param csv=bars.csv --param speed=max
      MESH_DIR=/tmp/second mesh up --agents market_data,features
      LEGION_BROKER_TYPE=redis REDIS_HOST=redis.example mesh up
      mesh up --with-redis
    """  # noqa: D301 - click's mark for lines it must not wrap
    place = Place.find(directory)
    # Where there is no project no run directory is made either
    programs_of(place.project)
    config = checked_settings(place.rundir, with_redis=with_redis)
    if not with_redis and has_own_redis(place.rundir):
        say.note(
            "this mesh was last up with a redis-server of its own: what that keeps in"
            f" {place.rundir.path / 'redis'} (durable events, dead letters) is not seen without"
            " --with-redis",
            "yellow",
        )
    code = asyncio.run(_up(place, agents, params, config, detach=detach, with_redis=with_redis))
    sys.exit(code)


@click.command()
@directory_option
def down(directory: str | None) -> None:
    """
    Stop the mesh, losing nothing that is under way.

    Sources stop first, the others when everything under way is handled.

    \b
    Example:
      mesh down
      mesh down --dir /tmp/second
    """  # noqa: D301
    rundir = Place.find(directory).rundir
    began_s = time.monotonic()
    asyncio.run(boot.down(rundir))
    say.line(f"the mesh in {rundir.path} is down ({time.monotonic() - began_s:.1f} s)")


async def _up(
    place: Place,
    agents: Sequence[str] | None,
    params: Mapping[str, str],
    config: MessageBusConfig,
    *,
    detach: bool,
    with_redis: bool,
) -> int:
    rundir = place.rundir

    async def declare() -> None:
        # A server of the mesh's own is not there yet: agents then declare what they hear themselves
        if not with_redis:
            await declare_durable_groups(place, config, agents)

    with stop_signals() as stop:
        began_s = time.monotonic()
        pid = await boot.up(
            place.project,
            rundir,
            params=params,
            agents=agents,
            replicas=read_replicas(rundir),
            broker_type=config.broker_type,
            with_redis=with_redis,
            on_free=declare,
            on_wait=say.note,
        )
        try:
            failed: list[str] = []

            async def start() -> None:
                states = await ready(rundir)
                failed.extend(tell_failures(rundir, states))
                if agents is None:
                    tell_unlisted(place.project)
                if not failed:
                    tell_unread(rundir, params)
                count = sum(state.verdict == "ready" for state in states)
                say.line(
                    f"{count} of {say.counted(len(states), 'program')} READY"
                    f" in {time.monotonic() - began_s:.1f} s"
                    f" (supervisord is {pid}, directory {rundir.path})"
                )

            finished = await unless(stop, start())
            if detach and finished:
                return EXIT_BUG if failed else 0
            if not detach and finished:
                say.note("Ctrl-C takes the mesh down")
                if await unless(stop, until_exit(pid)):
                    say.note("supervisord ended; the mesh is down", "red")
                    return EXIT_WRONG
        except BootError as late:
            if detach:
                raise await left_running(rundir, config, late) from None
            await _take_down(place)
            raise
        except BaseException:
            if not detach:
                await _take_down(place)
            raise
        await _take_down(place)
        return EXIT_BUG if failed else 0


async def _take_down(place: Place) -> None:
    try:
        await boot.down(place.rundir)
    except SupervisorError as error:
        # One that is gone is as good as down; one that is silent is not gone
        if type(error) is not SupervisorUnavailableError:
            say.note(str(error), "red")
            return
    say.note("the mesh is down")
