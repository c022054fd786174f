"""`mesh status` and `mesh agents`: how the mesh is, and who says and hears what."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import click

from mesh.card import Card, read_cards
from mesh.cli.common import NoMeshError, echo_json, print_table, rundir
from mesh.ledger import Account, LedgerView, account, read_ledgers
from mesh.supervision.boot import program_state
from mesh.supervision.supervisord import SupervisorClient, SupervisorUnavailableError

if TYPE_CHECKING:
    from mesh.rundir import RunDir
    from mesh.supervision.supervisord import ProcessInfo

#: An agent that was not heard for so long is shown as silent.
_SILENT_S = 5.0


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def status(*, as_json: bool) -> int:
    """
    Show every program: state, beat, counters; and the links that lost something.

    Exits 0 when all is well, 1 when not, 3 when no mesh runs here.
    """
    where = rundir()
    try:
        programs = asyncio.run(SupervisorClient(where.socket("supervisor")).processes())
    except SupervisorUnavailableError:
        raise NoMeshError(where) from None
    views = read_ledgers(where.ledgers)
    rows = [_row(where, program, views.get(program.name)) for program in programs]
    joined = account_of(where)
    if as_json:
        echo_json(
            {
                "dir": str(where.path),
                "programs": rows,
                "lost": joined.lost,
                "lost_by_link": joined.lost_by_link,
                "in_flight": joined.in_flight,
            }
        )
    else:
        _show(rows, joined)
    return 0 if all(row["state"] == "ready" for row in rows) else 1


def account_of(where: RunDir, *, settled: bool = False) -> Account:
    """Give the account of all events of a mesh."""
    hears = {name: frozenset(card.hears) for name, card in read_cards(where).items()}
    return account(read_ledgers(where.ledgers), hears, settled=settled)


def _row(where: RunDir, program: ProcessInfo, view: LedgerView | None) -> dict[str, Any]:
    state = program_state(where, program)
    row: dict[str, Any] = {
        "name": program.name,
        "state": state.verdict,
        "pid": program.pid,
        "supervisor_state": program.state,
        "uptime_s": round(time.time() - program.started_at_s, 1) if program.pid else 0,
        "last_words": state.last_words,
    }
    if view is None:
        return row
    age_s = time.monotonic() - view.beat_mono_s
    if state.verdict == "ready" and age_s > _SILENT_S:
        row["state"] = "silent"
    return row | {
        "beat_age_s": round(age_s, 1),
        "handled": view.handled,
        "failed": view.failed,
        "lost": sum(link.lost for link in view.in_.values()),
        "counts": dict(view.dropped),
        "queue": view.queue,
        "lag_ms": round(view.lag_s * 1e3, 1),
        "latency_us": {"p50": view.latency_us(50), "p99": view.latency_us(99)},
        "incarnation": view.incarnation,
        "sources": view.sources,
    }


def _show(rows: list[dict[str, Any]], joined: Account) -> None:
    columns = ["agent", "state", "pid", "beat", "handled", "failed", "lost", "queue", "p50", "p99"]
    print_table(columns, [_cells(row) for row in rows])
    for row in rows:
        if row["last_words"]:
            click.echo(f"{row['name']}: {row['last_words']}")
        counts = {k: n for k, n in row.get("counts", {}).items() if k != "frames" and n}
        if counts:
            click.echo(f"{row['name']}: " + ", ".join(f"{k}={n}" for k, n in counts.items()))
    for link, lost in joined.lost_by_link.items():
        click.echo(f"lost on {link}: {lost}")


def _cells(row: dict[str, Any]) -> list[str]:
    latency = row.get("latency_us", {})
    return [
        row["name"],
        row["state"],
        str(row["pid"] or "-"),
        f"{row['beat_age_s']:.1f}s" if "beat_age_s" in row else "-",
        *(str(row.get(key, "-")) for key in ("handled", "failed", "lost", "queue")),
        *(_in_units(latency.get(key)) for key in ("p50", "p99")),
    ]


def _in_units(micros: float | None) -> str:
    if micros is None:
        return "-"
    return f"{micros:.0f}us" if micros < 10_000 else f"{micros / 1000:.0f}ms"


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def agents(*, as_json: bool) -> int:
    """Show what each agent hears and says, and the topics that meet nobody."""
    where = rundir()
    cards = read_cards(where)
    if not cards:
        raise NoMeshError(where)
    says = says_of(where, cards)
    unheard, unsaid = orphans(cards, says)
    if as_json:
        echo_json(
            {
                "agents": {
                    name: {"hears": card.hears, "says": says[name], "script": card.script}
                    for name, card in cards.items()
                },
                "said_never_heard": unheard,
                "heard_never_said": unsaid,
            }
        )
        return 0
    print_table(
        ["agent", "hears", "says"],
        [
            [name, " ".join(c.hears) or "-", " ".join(says[name]) or "-"]
            for name, c in cards.items()
        ],
    )
    if unheard:
        click.echo("said but never heard: " + " ".join(unheard))
    if unsaid:
        click.echo("heard but never said: " + " ".join(unsaid))
    return 0


def says_of(where: RunDir, cards: dict[str, Card]) -> dict[str, list[str]]:
    """Give what each agent has said so far, without its own life signs."""
    views = read_ledgers(where.ledgers)
    return {
        name: sorted(
            topic
            for topic in (views[name].out if name in views else ())
            if not topic.startswith("agent.")
        )
        for name in cards
    }


def orphans(cards: dict[str, Card], says: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    """Give the topics that are said and never heard, and heard and never said."""
    heard = {topic for card in cards.values() for topic in card.hears}
    said = {topic for topics in says.values() for topic in topics}
    return sorted(said - heard), sorted(heard - said)
