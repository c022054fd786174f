"""`mesh dlq`: what could not be handled, and what becomes of it."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from mesh.card import read_cards
from mesh.cli import dlq_views as views
from mesh.cli import say
from mesh.cli.exits import EXIT_WRONG
from mesh.cli.kept import opened_queue
from mesh.cli.known import known_agents
from mesh.cli.place import Place, directory_option, json_option
from mesh.cli.publish import load_schemas, parse_payload
from mesh.dead_letter_queue import ReplayReport, plain
from mesh.journal import ALL_DEAD, DeadQuery

if TYPE_CHECKING:
    from collections.abc import Callable

    from mesh.cli.known import KnownAgents
    from mesh.dead_letter_queue import DeadGroup
    from mesh.deadletters import DeadLetter
    from mesh.rundir import RunDir

_Command = TypeVar("_Command", bound="Callable[..., Any]")

_SHOWN = 50
#: A replay that takes longer says so.
_LONG_S = 5.0
_limit_option = click.option(
    "--limit", metavar="N", type=click.IntRange(min=1), help="At most so many, the oldest."
)
_all_option = click.option("--all", "everything", is_flag=True, help="All dead letters.")
_dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Only say what would happen; nothing changes."
)


def _selection(command: _Command) -> _Command:
    """Add the options that choose letters."""
    options = (
        click.option("--agent", metavar="NAME", help="Of this agent."),
        click.option("--handler", metavar="NAME", help="That this handler failed with."),
        click.option("--type", "topic", metavar="TYPE", help="Of this event type."),
        click.option("--reason", metavar="WORD", help="failed, timeout, expired, poison, ..."),
        click.option("--error", metavar="TEXT", help="Whose error begins so."),
        click.option("--id", "ids", metavar="ID", multiple=True, help="This one; may be repeated."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group()
def dlq() -> None:
    """
    Look at dead letters, send them back, correct them, throw them away.

    A dead letter is what could not be handled: an event whose handler gave up, one that expired or
    ended its process over and over, bytes that are no event, a publish that failed. They are kept
    with the events of the mesh, also while it is down (unless that has a redis-server of its own).

    \b
    Example:
      mesh dlq ls                                       what failed, and how often
      mesh dlq ls --letters --agent risk                each of an agent's letters, with its id
      mesh dlq show ID                                  the event, the error, its history
      mesh dlq replay --agent risk --handler on_order   back to the one handler that failed
      mesh dlq edit ID '{"price": 3.5}'                 correct the payload first
      mesh dlq purge --reason expired --yes             throw away
    """  # noqa: D301 - click's mark for lines it must not wrap


@dlq.command(short_help="List what failed alike, how often and when.")
@_selection
@click.option("--letters", is_flag=True, help="Each letter, the newest first, instead of groups.")
@click.option(
    "--limit",
    metavar="N",
    type=click.IntRange(min=1),
    default=_SHOWN,
    show_default=True,
    help="Show at most so many.",
)
@json_option
@directory_option
def ls(letters: bool, limit: int, json_form: bool, directory: str | None, **chosen: Any) -> None:
    """
    List what failed alike: agent, handler, reason, first line of the error; how often and when.

    Exit code 0, whether there are dead letters or not.

    \b
    Example:
      mesh dlq ls
      mesh dlq ls --agent risk --letters
      mesh dlq ls --json | jq '.total'
    """  # noqa: D301
    query = _query(**chosen)
    total, groups, found = asyncio.run(
        _look(Place.find(directory).rundir, query, limit if letters else 0)
    )
    if json_form:
        told: dict[str, Any] = {"total": total}
        if letters:
            told["letters"] = [plain(each) for each in found]
        else:
            told["groups"] = [views.group_facts(each) for each in groups[:limit]]
        say.as_json(told)
    elif not total:
        say.line("no dead letters")
    elif letters:
        views.show_letters(found, total)
    else:
        views.show_groups(groups, limit, total)


@dlq.command(short_help="Show one letter, or those of one event.")
@click.argument("letter_id", metavar="ID")
@json_option
@directory_option
def show(letter_id: str, json_form: bool, directory: str | None) -> None:
    """
    Show one letter: the event, the last error, and what happened before.

    With the id of an event, as the log has it: all letters of that event, one a handler. Exit code
    1 when there is none.

    \b
    Example:
      mesh dlq show 5c1f09a2b7d3-17/risk/on_order
      mesh dlq show 5c1f09a2b7d3-17
      mesh dlq show 5c1f09a2b7d3-17/risk/on_order --json | jq .event.data
    """  # noqa: D301

    async def read() -> list[DeadLetter]:
        async with opened_queue(Place.find(directory).rundir) as queue:
            if queue is None:
                return []
            return await queue.of_event(letter_id) or [await queue.show(letter_id)]

    letters = asyncio.run(read())
    if not letters:
        _end_with_nothing(json_form=False)
    elif json_form:
        found = [plain(each) for each in letters]
        say.as_json(found if len(found) > 1 else found[0])
    else:
        for letter in letters:
            views.show_letter(letter)


@dlq.command(short_help="Send letters back to the one handler that failed.")
@_selection
@_all_option
@_limit_option
@click.option(
    "--rate",
    metavar="N",
    type=click.FloatRange(min=0),
    callback=lambda _context, _option, rate: _finite(rate),
    default=100.0,
    show_default=True,
    help="At most so many a second; 0: as fast as it goes.",
)
@click.option("--ignore-expiry", is_flag=True, help="Also what has expired meanwhile.")
@click.option("--force", is_flag=True, help="Also of agents that nobody knows; they may come.")
@_dry_run_option
@json_option
@directory_option
def replay(
    everything: bool,
    limit: int | None,
    rate: float,
    ignore_expiry: bool,
    force: bool,
    dry_run: bool,
    json_form: bool,
    directory: str | None,
    **chosen: Any,
) -> None:
    """
    Send letters back to the one handler that failed, of the one agent; the oldest first.

    No other handler and no other agent hears them again. What no handler failed with (expired, in
    circles, an end of its process) goes to all handlers of its agent; a publish that failed is
    published. An agent that is down gets them when it starts; of one that stands neither in
    supervisord.conf nor in the journal they are refused (--force). A letter that fails again is
    back in the list, with its history; replaying one twice does nothing twice.

    Exit code 0 when all that was meant left, 1 when nothing was meant or some were refused.

    \b
    Example:
      mesh dlq replay --agent risk --handler on_order --dry-run
      mesh dlq replay --agent risk --error "ConnectionError" --rate 20
      mesh dlq replay --id 5c1f09a2b7d3-17/risk/on_order
      mesh dlq replay --all --json
    """  # noqa: D301
    query = _meant(everything, chosen)
    place = Place.find(directory)
    load_schemas(place.project)
    known = known_agents(place)

    async def send() -> ReplayReport:
        async with opened_queue(place.rundir, speaking=not dry_run) as queue:
            if queue is None:
                return ReplayReport(dry_run)
            if rate and not dry_run:
                _tell_time(min(limit or math.inf, await queue.count(query)), rate)
            return await queue.replay(
                query,
                rate_per_s=rate or math.inf,
                limit=limit,
                ignore_expiry=ignore_expiry,
                dry_run=dry_run,
                agents=None if force else known.names,
            )

    report = asyncio.run(send())
    if json_form:
        say.as_json(views.report_facts(report))
    else:
        views.show_report(report)
        if not dry_run:
            _tell_absent(place.rundir, known, report)
    sys.exit(EXIT_WRONG if report.refused or not report.matched else 0)


@dlq.command(short_help="Give a letter's event another payload.")
@click.argument("letter_id", metavar="ID")
@click.argument("data", metavar="[JSON]", required=False)
@json_option
@directory_option
def edit(letter_id: str, data: str | None, json_form: bool, directory: str | None) -> None:
    """
    Give a letter's event another payload; then `mesh dlq replay --id ID` sends it back.

    JSON is the whole new payload, an object, or - to read it from stdin; without it an editor opens
    with the present one. Bytes that were no event become one, and an expired event expires no more.
    The letter keeps its history, and what stood there first.

    Exit code 65 when the payload does not fit the type's schema in agents/payloads.py, 1 when there
    is no such letter.

    \b
    Example:
      mesh dlq edit 5c1f09a2b7d3-17/risk/on_order '{"price": 3.5, "symbol": "ABC"}'
      mesh dlq show ID --json | jq '.event.data + {"price": 3.5}' | mesh dlq edit ID -
    """  # noqa: D301
    place = Place.find(directory)
    load_schemas(place.project)
    text = sys.stdin.read() if data == "-" else data

    async def change() -> DeadLetter | None:
        async with opened_queue(place.rundir) as queue:
            if queue is None:
                return None
            payload = _edited(await queue.show(letter_id)) if text is None else text
            return await queue.edit(letter_id, parse_payload(payload))

    letter = asyncio.run(change())
    if letter is None:
        _end_with_nothing(json_form=False)
    elif json_form:
        say.as_json(plain(letter))
    else:
        say.line(f"edited {letter.id}; `mesh dlq replay --id {letter.id}` sends it back")


@dlq.command()
@_selection
@_all_option
@_limit_option
@click.option("--yes", is_flag=True, help="Do not ask; needed where nobody can answer.")
@_dry_run_option
@json_option
@directory_option
def purge(
    everything: bool,
    limit: int | None,
    yes: bool,
    dry_run: bool,
    json_form: bool,
    directory: str | None,
    **chosen: Any,
) -> None:
    """
    Throw letters away for good.

    Exit code 1 when nothing was meant, 2 when it would have to ask and there is nobody to answer.

    \b
    Example:
      mesh dlq purge --agent risk --reason expired
      mesh dlq purge --all --yes
    """  # noqa: D301
    query = _meant(everything, chosen)
    rundir = Place.find(directory).rundir

    async def throw(*, away: bool) -> int:
        async with opened_queue(rundir) as queue:
            if queue is None:
                return 0
            if away:
                return await queue.purge(query, limit=limit)
            count = await queue.count(query)
            return count if limit is None else min(count, limit)

    meant = asyncio.run(throw(away=False))
    if not meant:
        _end_with_nothing(json_form=json_form)
    if not dry_run and not yes:
        letters = say.counted(meant, "dead letter")
        if not say.is_terminal(sys.stdin):
            raise click.UsageError(f"{letters} would go for good; say --yes to mean it")
        click.confirm(f"Throw {letters} away for good?", abort=True)
    gone = meant if dry_run else asyncio.run(throw(away=True))
    if json_form:
        say.as_json({"dry_run": dry_run, "purged": gone})
    else:
        say.line(f"{'would throw' if dry_run else 'threw'} {say.counted(gone, 'dead letter')} away")


# -- what they share -----------------------------------------------------------------------------


def _query(ids: tuple[str, ...], **chosen: str | None) -> DeadQuery:
    return DeadQuery(ids=frozenset(ids) or None, **chosen)


def _meant(everything: bool, chosen: dict[str, Any]) -> DeadQuery:
    """Give the letters that are meant; forgetting to choose does not mean all of them."""
    query = _query(**chosen)
    if everything == (query != ALL_DEAD):
        raise click.UsageError(
            "either --all, or which letters: --agent, --handler, --type, --reason, --error, --id"
        )
    return query


async def _look(
    rundir: RunDir, query: DeadQuery, letters: int
) -> tuple[int, list[DeadGroup], list[DeadLetter]]:
    async with opened_queue(rundir) as queue:
        if queue is None:
            return 0, [], []
        groups = await queue.groups(query)
        found = await queue.ls(query, letters) if letters else []
        return sum(each.count for each in groups), groups, found


def _finite(rate: float) -> float:
    # NaN is neither below nor above any limit
    if not math.isfinite(rate):
        raise click.BadParameter(f"{rate} is no number of letters a second; 0 is without limit")
    return rate


def _edited(letter: DeadLetter) -> str:
    if not say.is_terminal(sys.stdin):
        raise click.UsageError("say the new payload as JSON, or - to read it from stdin")
    before = "{}" if letter.event is None else json.dumps(letter.event["data"], indent=2)
    after = click.edit(before, extension=".json")
    if after is None:
        raise click.Abort
    return after


def _end_with_nothing(*, json_form: bool) -> NoReturn:
    if json_form:
        say.as_json({"dry_run": False, "purged": 0})
    say.note("there is no such dead letter; `mesh dlq ls` shows what there is")
    sys.exit(EXIT_WRONG)


def _tell_time(count: float, rate: float) -> None:
    if count > rate * _LONG_S:
        took = say.duration(count / rate)
        letters = say.counted(int(count), "dead letter")
        say.note(f"sending {letters} at {rate:g} a second takes {took}; Ctrl-C stops")


def _tell_absent(rundir: RunDir, known: KnownAgents, report: ReplayReport) -> None:
    """Say who is not there: until it is, its letters wait."""
    there = {
        name.partition("@")[0] for name, card in read_cards(rundir).items() if card.state == "ready"
    }
    for agent in sorted({agent for agent, _ in report.sent} - there):
        where = f" and stands not in {known.conf}" if known.is_stray(agent) else ""
        say.note(f"{agent} is not running here{where}; it gets them when it starts", "yellow")
