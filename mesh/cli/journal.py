"""`mesh journal`: what is kept for whom, and what may be forgotten."""

from __future__ import annotations

import asyncio
import re
import sys
from typing import TYPE_CHECKING, TypeVar

import click

from mesh.cli import say
from mesh.cli.exits import EXIT_WRONG
from mesh.cli.kept import has_journal, opened_journal
from mesh.cli.place import CONF, Place, directory_option, json_option, settings_of
from mesh.replicas import group_of
from mesh.supervision.conf import programs_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from mesh.journal import Journal
    from mesh.rundir import RunDir

_Value = TypeVar("_Value")

_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", re.ASCII)
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_BYTES = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def _amount(units: dict[str, int], example: str) -> Callable[..., float | None]:
    """Make what reads a number with a unit."""

    def read(context: click.Context, option: click.Parameter, value: str | None) -> float | None:
        if value is None:
            return None
        found = _AMOUNT.fullmatch(value.strip())
        unit = None if found is None else units.get(found[2].lower())
        if found is None or unit is None:
            known = ", ".join(filter(None, units))
            raise click.BadParameter(f"{value!r}: write it like {example} (units: {known})")
        return float(found[1]) * unit

    return read


@click.group()
def journal() -> None:
    """
    Look at what durable events are kept for whom, and forget what nobody needs.

    A running mesh trims its journal once a minute, as LEGION_JOURNAL_MAX_AGE_S and
    LEGION_JOURNAL_MAX_BYTES say. What a group has not settled is kept, whatever its age: an agent
    that is gone for good holds it for ever, until its group is forgotten.

    \b
    Example:
      mesh journal ls                   groups, how far behind they are
      mesh journal trim --max-age 1d    forget now what all groups have settled
      mesh journal forget old_risk      an agent that will not come back
    """  # noqa: D301


@journal.command(short_help="List groups, and how far behind they are.")
@json_option
@directory_option
def ls(json_form: bool, directory: str | None) -> None:
    """
    List the groups of the journal by topic: what they have not settled, and since when.

    A group is an agent with all its replicas. Exit code 0, whether one is behind or not.

    \b
    Example:
      mesh journal ls
      mesh journal ls --json | jq '.groups[] | select(.pending > 1000)'
    """  # noqa: D301
    place = Place.find(directory)
    views = _with_journal(place.rundir, lambda opened: opened.groups()) or []
    agents = _agents(place.project)
    if json_form:
        rows = [
            {
                "group": view.group,
                "topic": view.topic,
                "pending": view.pending,
                "oldest_s": round(view.oldest_s, 3),
                "agent_known": agents is None or view.group in agents,
            }
            for view in views
        ]
        say.as_json({"groups": rows})
        return
    if not views:
        say.line("no groups: nothing durable was ever heard here")
        return
    say.table(
        ("group", "topic", "pending", "oldest"),
        [
            (
                view.group,
                view.topic,
                view.pending,
                say.duration(view.oldest_s) if view.pending else "-",
            )
            for view in views
        ],
        ["yellow" if view.pending else "" for view in views],
    )
    for group in sorted({view.group for view in views} - agents) if agents else ():
        say.note(
            f"no agent {group} stands in {place.project / CONF}; if it will not come"
            f" back: mesh journal forget {group}"
        )


@journal.command()
@click.option(
    "--max-age",
    callback=_amount(_SECONDS, "90m or 7d"),
    metavar="AGE",
    help="Forget what is older: 30s, 90m, 12h, 7d.",
)
@click.option(
    "--max-bytes",
    callback=_amount(_BYTES, "500M or 2G"),
    metavar="SIZE",
    help="Forget the oldest until the journal is smaller: 500M, 2G.",
)
@json_option
@directory_option
def trim(
    max_age: float | None, max_bytes: float | None, json_form: bool, directory: str | None
) -> None:
    """
    Forget old events that every group has settled, now; the mesh may run.

    \b
    Example:
      mesh journal trim --max-age 1d
      mesh journal trim --max-bytes 500M
    """  # noqa: D301
    if max_age is None and max_bytes is None:
        raise click.UsageError("say how much is kept: --max-age, --max-bytes, or both")
    size = None if max_bytes is None else int(max_bytes)
    gone = _with_journal(
        Place.find(directory).rundir,
        lambda opened: opened.trim(max_age_s=max_age, max_bytes=size),
    )
    if json_form:
        say.as_json({"forgotten": gone or 0})
    else:
        say.line(f"forgot {gone or 0} events that every group had settled")


@journal.command()
@click.argument("group")
@click.option("--yes", is_flag=True, help="Do not ask; needed where nobody can answer.")
@click.option("--force", is_flag=True, help="Also an agent that stands in supervisord.conf.")
@json_option
@directory_option
def forget(group: str, yes: bool, force: bool, json_form: bool, directory: str | None) -> None:
    """
    Forget a group for good: what it has not settled, and its state.

    Refused while a process of it lives, and while its agent stands in supervisord.conf. Exit code 1
    when there is no such group, 2 when it would have to ask and there is nobody to answer.

    \b
    Example:
      mesh journal forget old_risk
      mesh journal forget old_risk --yes
    """  # noqa: D301
    place = Place.find(directory)
    if not force and group in (_agents(place.project) or ()):
        raise click.UsageError(
            f"{group} stands in {place.project / CONF}: it would begin anew, without"
            " its state and what is kept for it; take it out first, or say --force"
        )
    views = _with_journal(place.rundir, lambda opened: opened.groups()) or []
    owed = sum(view.pending for view in views if view.group == group)
    if not any(view.group == group for view in views):
        say.note(f"the journal knows no group {say.clean(group)!r}; see mesh journal ls", "red")
        sys.exit(EXIT_WRONG)
    if not yes:
        what = f"{owed} events that {group} has not settled, and its state"
        if not say.is_terminal(sys.stdin):
            raise click.UsageError(f"{what} would be forgotten; say --yes to mean it")
        click.confirm(f"Forget {what}, for good?", abort=True)
    known = _with_journal(place.rundir, lambda opened: opened.forget(group))
    if json_form:
        say.as_json({"group": group, "forgotten": bool(known), "pending": owed})
    else:
        say.line(f"{group} is forgotten, with {owed} events it had not settled")


def _agents(project: Path) -> set[str] | None:
    """Give the agents of a project; None where there is none."""
    if not (project / CONF).is_file():
        return None
    return {group_of(name) for name in programs_of(project)}


def _with_journal(rundir: RunDir, work: Callable[[Journal], Awaitable[_Value]]) -> _Value | None:
    """Do something with the journal of a mesh; None where there is none, and none is made."""

    async def run() -> _Value | None:
        config = settings_of(rundir)
        if not has_journal(rundir, config):
            return None
        async with opened_journal(rundir, config) as opened:
            return await work(opened)

    return asyncio.run(run())
