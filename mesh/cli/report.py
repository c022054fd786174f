"""The report of a run: counted from the ledgers, with the portfolio's account beside it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from mesh.account import account
from mesh.cli import say
from mesh.ledger_views import LedgerView, percentile_us
from mesh.topic_map import LIFE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mesh.dead_letter_queue import DeadGroup

MARKET_DATA = "market.data.received"
APPROVED = "trade.approved"


def work_published(views: Mapping[str, LedgerView]) -> dict[str, int]:
    """Count the events by type, without those of the agents' own lives: they come with time."""
    published = account(views).published
    return {topic: published[topic] for topic in sorted(published) if not topic.startswith(LIFE)}


def began_at_s(views: Mapping[str, LedgerView]) -> float | None:
    """Tell when the first event was said, in seconds since 1970."""
    epochs = [
        out.began
        for view in views.values()
        for topic, out in view.out.items()
        if out.began and not topic.startswith(LIFE)
    ]
    return min(epochs) / 1e9 if epochs else None


def make_report(
    views: Mapping[str, LedgerView],
    hears: Mapping[str, frozenset[str]],
    portfolio: Mapping[str, Any],
    *,
    seconds: float,
    settled: bool,
    problems: Mapping[str, str],
) -> dict[str, Any]:
    """
    Join everything into the object that `mesh run --json` prints.

    Args:
        views: The agents' ledgers.
        hears: Topics by agent.
        portfolio: Its account; empty when there is none.
        seconds: From the first event to the last.
        settled: What no subscriber has seen by now is lost.
        problems: How agents have failed. That a handler did is none: its event was put aside.
    """
    joined = account(views, hears, settled=settled)
    by_type = work_published(views)
    events = sum(by_type.values())
    merged = tuple(map(sum, zip(*(each.histogram for each in views.values()), strict=True)))
    return {
        "market_events": by_type.get(MARKET_DATA, 0),
        "events": events,
        "events_by_type": by_type,
        "seconds": round(seconds, 3),
        "events_per_s": round(events / seconds) if seconds > 0 else 0,
        "latency_us": {"p50": percentile_us(merged, 50), "p99": percentile_us(merged, 99)},
        "orders": portfolio.get("orders", by_type.get(APPROVED, 0)),
        "fills": portfolio.get("fills", 0),
        "fills_digest": portfolio.get("fills_digest"),
        "realised_pnl": portfolio.get("realised_pnl"),
        **{key: value for key, value in portfolio.items() if key not in ("orders", "fills")},
        "bad_rows": sum(view.dropped.get("bad_rows", 0) for view in views.values()),
        "lost": joined.lost,
        "lost_by_link": joined.lost_by_link,
        "failed_agents": sorted(problems),
        "agents": {name: _agent(view, problems.get(name)) for name, view in views.items()},
    }


def by_reason(groups: Iterable[DeadGroup]) -> dict[str, int]:
    """Count dead letters by reason, the most frequent first."""
    counts: Counter[str] = Counter()
    for group in groups:
        counts[group.reason] += group.count
    return dict(counts.most_common())


def show_report(report: Mapping[str, Any]) -> None:
    """Print a report for people."""
    say.table(("type", "events"), report["events_by_type"].items())
    latency = report["latency_us"]
    rows = [
        ("market events", report["market_events"]),
        ("orders", report["orders"]),
        ("fills", report["fills"]),
        *((_words(key), report[key]) for key in _MONEY if report.get(key) is not None),
        ("positions", _positions(report.get("positions"))),
        ("bad rows skipped", report["bad_rows"] or None),
        ("seconds", report["seconds"]),
        ("events/s", f"{report['events_per_s']:,}"),
        ("latency p50", say.micros(latency["p50"])),
        ("latency p99", say.micros(latency["p99"])),
        ("lost", report["lost"]),
        ("dead letters", _reasons(report["dead_letters"])),
    ]
    say.line()
    say.table(("figure", "value"), [row for row in rows if row[1] is not None])
    if report["fills_digest"]:
        # Not in the table: to be compared it has to stand in one line of any terminal
        say.line()
        say.line(f"fills digest  {report['fills_digest']}")
    if report["lost_by_link"]:
        say.line()
        say.table(("link", "lost"), report["lost_by_link"].items())
    for name, agent in report["agents"].items():
        if agent["problem"]:
            say.line(f"{name}: {agent['problem']}", "red")
    if report["interrupted"]:
        say.line("interrupted: this is of what there was until then", "yellow")


_MONEY = ("realised_pnl", "unrealised_pnl", "fees", "net_pnl")


def _words(key: str) -> str:
    return key.replace("_pnl", " P&L").replace("_", " ")


def _reasons(dead_letters: Mapping[str, int] | None) -> str | None:
    if dead_letters is None:
        return "unknown"
    return ", ".join(f"{count} {reason}" for reason, count in dead_letters.items()) or None


def _positions(positions: object) -> str | None:
    if not isinstance(positions, dict):
        return None
    return ", ".join(f"{symbol} {quantity:+g}" for symbol, quantity in positions.items()) or "none"


def _agent(view: LedgerView, problem: str | None) -> dict[str, Any]:
    if problem is None and view.failed:
        problem = f"{say.counted(view.failed, 'event')} could not be handled"
    return {
        "state": view.state,
        "restarts": max(0, view.incarnation - 1),
        "handled": view.handled,
        "failed": view.failed,
        "lost": sum(link.lost for link in view.in_.values()),
        "dropped": {reason: amount for reason, amount in view.dropped.items() if amount},
        "problem": problem,
    }
