"""`mesh status`."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import click

from mesh.cli import say
from mesh.cli.elsewhere import listen
from mesh.cli.exits import EXIT_WRONG
from mesh.cli.facts import look
from mesh.cli.kept import look_at_kept
from mesh.cli.place import Place, directory_option, json_option
from mesh.config import MessageBusConfig
from mesh.errors import MeshError
from mesh.supervision.conf import has_own_redis

if TYPE_CHECKING:
    from mesh.cli.elsewhere import AgentElsewhere
    from mesh.cli.facts import MeshFacts, ProgramFacts
    from mesh.cli.kept import KeptFacts
    from mesh.rundir import RunDir

_COLUMNS = (
    "program", "state", "pid", "up", "supervisor", "beat", "restarts", "handled", "failed", "lost",
    "dropped", "queue", "lag", "p50", "p99",
)  # fmt: skip
_ELSEWHERE = ("host", "directory", "name", "state", "pid", "handled", "failed", "lost")
#: Columns that a terminal shows only when one of their cells is something else.
_QUIET: dict[str, object] = {
    "supervisor": "RUNNING", "restarts": 0, "failed": 0, "lost": 0, "dropped": 0, "queue": 0
}  # fmt: skip
#: Columns that a terminal leaves out, in this order, until it holds the rest.
_SPARE = ("lag", "p50", "queue", "p99", "up", "restarts", "beat", "supervisor", "dropped", "pid")


@click.command()
@json_option
@directory_option
def status(json_form: bool, directory: str | None) -> None:
    """
    Show how every agent is doing, and what was lost.

    Everything is read from supervisord and from the agents' counters in shared memory; no agent is
    asked, so a hung one cannot hold this up. Exit code 0 when every program is READY and beats, 1
    when one is not, 3 when no mesh runs here. Losses are shown, and do not change the exit code;
    nor do types that are durable for one agent and live for another, which never hears them.

    Durable events that a group has not settled, and dead letters, are counted in the journal, where
    there is one; they do not change the exit code either.

    On a fabric that joins hosts (Redis), agents of other run directories are listed by what their
    heartbeats say; that takes a second of listening.

    \b
    Example:
      mesh status
      mesh status --json | python -m json.tool
    """  # noqa: D301
    rundir = Place.find(directory).rundir
    facts = asyncio.run(look(rundir))
    kept = asyncio.run(look_at_kept(rundir))
    others, unknown = _elsewhere(rundir)
    if json_form:
        elsewhere = [each.to_dict() for each in others]
        say.as_json({**facts.to_dict(), **kept.to_dict(), "elsewhere": elsewhere})
    else:
        show(facts, kept)
        _show_elsewhere(others, unknown)
    sys.exit(EXIT_WRONG if facts.problems else 0)


def show(facts: MeshFacts, journal: KeptFacts) -> None:
    """Print it: a table in a terminal, as much of it as there is room for."""
    say.line(f"mesh in {facts.directory}, supervisord {facts.supervisor_pid}")
    rows = [_row(each) for each in facts.programs]
    kept = list(range(len(_COLUMNS)))
    if say.is_terminal():
        kept = _that_fit(_worth_showing(rows), rows)
    say.table(
        [_COLUMNS[at] for at in kept],
        [[row[at] for at in kept] for row in rows],
        [_colour(each) for each in facts.programs],
    )
    for name, group in facts.groups.items():
        say.line(
            f"{name}: {group.ready} of {group.replicas} replicas READY,"
            f" {group.handled} handled, {group.lost} lost"
        )
    losing = {name: link for name, link in facts.links.items() if link.lost}
    if losing:
        say.table(
            ("link", "published", "received", "lost"),
            [(name, each.published, each.received, each.lost) for name, each in losing.items()],
            ["yellow"] * len(losing),
        )
    else:
        say.line(f"{say.counted(len(facts.links), 'link')}, nothing lost")
    _show_kept(journal)
    if facts.downgraded:
        say.line(
            "declared durable, and live by LEGION_ALLOW_DOWNGRADE (can be lost):"
            f" {', '.join(facts.downgraded)}",
            "yellow",
        )
    for topic, words in facts.disagreements.items():
        say.line(f"{topic} is {words}: import one declaration", "red")
    for each in facts.programs:
        if each.last_words:
            say.line(f"{each.name}: {each.last_words}", "red")
    for problem in facts.problems:
        say.line(problem, "red")
    waiting = [each.name for each in facts.programs if each.waits_to_speak]
    if waiting:
        say.line(f"sources begin when all agents are READY: {', '.join(waiting)}", "yellow")
    if not facts.problems:
        say.line(*closing(facts, journal))


def closing(facts: MeshFacts, kept: KeptFacts) -> tuple[str, say.Colour]:
    """Sum up a mesh whose programs are all well, and the colour of it."""
    but = []
    if facts.lost:
        but.append(
            f"{say.counted(facts.lost, 'event')} {'was' if facts.lost == 1 else 'were'} lost"
        )
    if kept.dead_letters:
        letters = say.counted(kept.dead_letters, "dead letter")
        but.append(f"{letters} {'waits' if kept.dead_letters == 1 else 'wait'}")
    if facts.disagreements:
        but.append(f"{say.counted(len(facts.disagreements), 'type')} without one delivery class")
    if kept.trouble:
        but.append("what the journal keeps is not known")
    if not but:
        return "all is well", "green"
    return "; ".join(["all agents are well", *but]), "yellow"


def _show_kept(kept: KeptFacts) -> None:
    if kept.behind:
        say.table(
            ("group", "pending", "oldest"),
            [(name, count, say.duration(age_s)) for name, (count, age_s) in kept.behind.items()],
        )
    if kept.trouble:
        say.line(kept.trouble, "yellow")
    elif kept.dead_letters:
        say.line(
            f"{say.counted(kept.dead_letters, 'dead letter')}; `mesh dlq ls` shows them", "yellow"
        )
    elif kept.dead_letters == 0:
        say.line("no dead letters")


def _elsewhere(rundir: RunDir) -> tuple[list[AgentElsewhere], str]:
    """Listen to other hosts where there can be some; gives them, or why they are unknown."""
    # The mesh's own redis-server is nobody else's
    if has_own_redis(rundir):
        return [], ""
    try:
        config = MessageBusConfig.from_env()
        if config.broker_type != "redis":
            return [], ""
        return asyncio.run(listen(config, rundir)), ""
    except MeshError as error:
        return [], str(error)


def _show_elsewhere(others: list[AgentElsewhere], unknown: str) -> None:
    if unknown:
        say.line(unknown, "yellow")
    if others:
        say.table(
            ("elsewhere", *_ELSEWHERE[1:]),
            [[getattr(each, name) for name in _ELSEWHERE] for each in others],
        )


def _worth_showing(rows: list[tuple[object, ...]]) -> list[int]:
    """Leave out columns that say nothing."""
    return [
        at
        for at, name in enumerate(_COLUMNS)
        if name not in _QUIET or any(row[at] != _QUIET[name] for row in rows)
    ]


def _that_fit(kept: list[int], rows: list[tuple[object, ...]]) -> list[int]:
    """Leave out what a terminal has no room for, so that no name and no state is broken."""
    for spare in _SPARE:
        if say.has_room([_COLUMNS[at] for at in kept], [[row[at] for at in kept] for row in rows]):
            break
        kept = [at for at in kept if _COLUMNS[at] != spare]
    return kept


def _row(each: ProgramFacts) -> tuple[object, ...]:
    return (
        each.name if each.name == each.group else f"  {each.name}",
        each.state,
        each.pid,
        None if each.uptime_s is None else say.duration(each.uptime_s),
        each.supervisor_state,
        None if each.beat_age_s is None else say.duration(each.beat_age_s),
        each.restarts,
        each.handled,
        each.failed,
        each.lost,
        " ".join(f"{reason}={amount}" for reason, amount in each.dropped.items()) or 0,
        each.queue,
        f"{each.lag_ms:.1f}ms",
        say.micros(each.latency_us["p50"]),
        say.micros(each.latency_us["p99"]),
    )


def _colour(each: ProgramFacts) -> say.Colour:
    if each.problems:
        return "red"
    return "yellow" if each.lost or each.failed else ""
