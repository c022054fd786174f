"""`mesh journal`: what is kept for whom, and what may be forgotten."""

from __future__ import annotations

import asyncio
import re
import sys
from typing import TYPE_CHECKING, TypeVar

import click

from mesh.cli import say
from mesh.cli.exits import EXIT_WRONG
from mesh.cli.kept import has_journal, opened_journal, require_usual_journal
from mesh.cli.known import known_agents
from mesh.cli.place import Place, directory_option, json_option, settings_of
from mesh.errors import ConfigurationError
from mesh.topics import check_topic

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mesh.journal import GroupView, Journal, Size
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

    The last line tells how much is kept in all: settled events are, too, until they are trimmed. A
    group is an agent with all its replicas. Exit code 0, whether one is behind or not.

    \b
    Example:
      mesh journal ls
      mesh journal ls --json | jq '.groups[] | select(.pending > 1000)'
    """  # noqa: D301
    place = Place.find(directory)
    views, size = _with_journal(place.rundir, _look) or ([], None)
    known = known_agents(place)
    if json_form:
        rows = [
            {
                "group": view.group,
                "topic": view.topic,
                "pending": view.pending,
                "oldest_s": round(view.oldest_s, 3),
                "agent_known": not known.is_stray(view.group),
            }
            for view in views
        ]
        kept = {"events": size.events, "bytes": size.bytes} if size else {"events": 0, "bytes": 0}
        say.as_json({**kept, "groups": rows})
        return
    if not views:
        say.line("no groups: nothing durable was ever heard here")
    else:
        _show(views)
    if size is not None:
        say.line(f"kept: {say.counted(size.events, 'event')}, {say.size(size.bytes)}")
    for group in sorted(filter(known.is_stray, {view.group for view in views})):
        say.note(
            f"no agent {group} stands in {known.conf}; if it will not come back:"
            f" mesh journal forget {group}"
        )


async def _look(opened: Journal) -> tuple[list[GroupView], Size]:
    return await opened.groups(), await opened.size()


def _show(views: list[GroupView]) -> None:
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
        say.line(f"forgot {say.counted(gone or 0, 'event')} that every group had settled")


@journal.command()
@click.argument("group")
@click.option("--yes", is_flag=True, help="Do not ask; needed where nobody can answer.")
@click.option("--topic", metavar="TYPE", help="Only what it hears of this type; its state stays.")
@click.option(
    "--force", is_flag=True, help="Also of an agent that stands in supervisord.conf, or hears it."
)
@json_option
@directory_option
def forget(
    group: str, yes: bool, topic: str | None, force: bool, json_form: bool, directory: str | None
) -> None:
    """
    Forget a group for good: what it has not settled, and its state.

    Refused while a process of it lives, and while its agent stands in supervisord.conf. An agent
    that does not hear a type any more holds what it has not settled of it: --topic lets that go;
    stop the agent for the moment.

    Exit code 1 when there is no such group, 2 when it is refused, or would have to ask and there is
    nobody to answer, 78 while it lives.

    \b
    Example:
      mesh journal forget old_risk
      mesh journal forget risk --topic order.amended
      mesh journal forget old_risk --yes
    """  # noqa: D301
    place = Place.find(directory)
    if topic is not None:
        check_topic(topic)
    _require_gone(place, group, topic, force=force)
    said = f"what {group} hears of {topic}" if topic else group
    found = _with_journal(place.rundir, lambda opened: _found(opened, group, topic))
    owed, has_state = found or (0, False)
    if found is not None and not yes:
        of_topic = f" of {topic}" if topic else ""
        what = f"{say.counted(owed, 'event')} that {group} has not settled{of_topic}"
        what += ", and its state" if has_state else ""
        if not say.is_terminal(sys.stdin):
            raise click.UsageError(f"{what} would be forgotten; say --yes to mean it")
        click.confirm(f"Forget {what}, for good?", abort=True)
    # Asked in any case: of one that was half forgotten when Redis went away nothing is shown
    if not _with_journal(place.rundir, lambda opened: opened.forget(group, topic)):
        say.note(f"the journal knows nothing of {said}; see mesh journal ls", "red")
        sys.exit(EXIT_WRONG)
    if json_form:
        say.as_json({"group": group, "topic": topic, "forgotten": True, "pending": owed})
    else:
        say.line(f"{said} is forgotten, with {say.counted(owed, 'event')} it had not settled")


def _require_gone(place: Place, group: str, topic: str | None, *, force: bool) -> None:
    """Refuse what is in use; living consumers the journal itself finds."""
    known = known_agents(place)
    if (pid := known.running.get(group)) is not None:
        raise ConfigurationError(
            f"group {group!r} cannot be forgotten while it lives: pid {pid}; stop its agents first"
        )
    if force:
        return
    if topic is None and group in known.written:
        raise click.UsageError(
            f"{group} stands in {known.conf}: it would begin anew, without its state and what is"
            " kept for it; take it out first, or say --force"
        )
    if topic is not None and topic in known.hears(group):
        raise click.UsageError(
            f"{group} heard {topic} when it last ran: it would begin anew, without what is kept"
            " for it; let it run once without, or say --force"
        )


async def _found(opened: Journal, group: str, topic: str | None) -> tuple[int, bool] | None:
    """Count what would be forgotten, and say whether there is state; None: nothing is known."""
    views = [
        view
        for view in await opened.groups()
        if view.group == group and topic in (None, view.topic)
    ]
    has_state = topic is None and bool(await opened.load_state(group))
    return (sum(view.pending for view in views), has_state) if views or has_state else None


def _with_journal(rundir: RunDir, work: Callable[[Journal], Awaitable[_Value]]) -> _Value | None:
    """Do something with the journal of a mesh; None where there is none, and none is made."""

    async def run() -> _Value | None:
        config = settings_of(rundir)
        if not has_journal(rundir, config):
            require_usual_journal(rundir)
            return None
        async with opened_journal(rundir, config) as opened:
            return await work(opened)

    return asyncio.run(run())
