"""`mesh run`: start the pipeline, feed it, wait until all is done, report, stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from mesh.cli.common import echo_json, print_table, project, rundir
from mesh.cli.life import parse_params
from mesh.cli.look import account_of
from mesh.config import MessageBusConfig
from mesh.errors import EXIT_BUG, ConfigurationError, MeshError
from mesh.events import EventType
from mesh.factory import make_broker
from mesh.inprocess import InProcessMesh
from mesh.ledger import Account, LedgerView, percentile_us, read_ledgers
from mesh.publisher import EventPublisher, PublisherConfig
from mesh.requests import Requester
from mesh.supervision import boot

if TYPE_CHECKING:
    from collections.abc import Callable

    from mesh.rundir import RunDir

REPORT = "portfolio.report.requested"
_LOOK_S = 0.05
#: Nothing moved for so long although events are missing: they are lost.
_STILL_S = 2.0


@click.command()
@click.option("--csv", metavar="FILE", help="Ticks or bars; without it a synthetic market.")
@click.option(
    "--speed", metavar="1|N|max", help="Real time, N times faster, or as fast as it goes."
)
@click.option("--bars", type=click.IntRange(min=1), help="End the synthetic market after so many.")
@click.option("--memory", is_flag=True, help="All agents in this process, no supervisord.")
@click.option("--agents", metavar="A,B", help="Only these agents (default: all).")
@click.option("--param", "pairs", multiple=True, metavar="KEY=VALUE", help="For the agents.")
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON object on stdout.")
def run(
    *,
    csv: str | None,
    speed: str | None,
    bars: int | None,
    memory: bool,
    agents: str | None,
    pairs: tuple[str, ...],
    as_json: bool,
) -> int:
    r"""
    Run the mesh on market data to its end, print a report, stop cleanly.

    \b
    mesh run --csv bars.csv --speed max
    mesh run --bars 10000 --speed max --memory --json
    """
    MessageBusConfig.from_env()
    params = parse_params(pairs)
    if csv is not None:
        path = Path(csv)
        if not path.is_file():
            raise ConfigurationError(f"--csv {csv}: no such file")
        params["csv"] = str(path.absolute())
    if speed is not None:
        params["speed"] = speed
    if bars is not None:
        params["bars"] = str(bars)
    names = agents.split(",") if agents else None
    run_it = _in_memory if memory else _supervised
    report = asyncio.run(run_it(params, names))
    if as_json:
        echo_json(report)
    else:
        _show(report)
    return EXIT_BUG if report["failed_agents"] else 0


async def _in_memory(params: dict[str, str], names: list[str] | None) -> dict[str, Any]:
    home = project()
    scripts = [
        home / script
        for name in boot.programs_of(home)
        if (script := boot.script_of(home, name)) and (names is None or name in names)
    ]
    with contextlib.chdir(home):
        mesh = InProcessMesh(_upstream_first(scripts), params=params)
    stop = _stop_on_signal()
    started_s = time.perf_counter()
    async with mesh:
        await _first(stop, mesh.sources_done())
        await mesh.quiet()
        took_s = time.perf_counter() - started_s
        result = await mesh.request(REPORT, {}) if "portfolio" in mesh.agents else {}
    return _report(mesh.account(), mesh.views(), result, took_s, [])


def _upstream_first(scripts: list[Path]) -> list[Path]:
    """Order sources first, as they are stopped; supervisord.conf starts consumers first."""
    return list(reversed(scripts))


async def _supervised(params: dict[str, str], names: list[str] | None) -> dict[str, Any]:
    where = rundir()
    chosen = None if names is None else [*names, *boot.INFRASTRUCTURE]
    await boot.up(project(), where, params=params, agents=chosen)
    stop = _stop_on_signal()
    try:
        states = await boot.wait_ready(where)
        failed = {s.name: s.last_words for s in states if s.verdict == "failed"}
        for name, words in failed.items():
            click.echo(f"{name} failed: {words}", err=True)
        if all(
            state.verdict == "failed" for state in states if state.name not in boot.INFRASTRUCTURE
        ):
            raise ConfigurationError([f"{name}: {words}" for name, words in failed.items()])
        started_s = time.perf_counter()
        await _first(stop, _until_done(where))
        took_s = time.perf_counter() - started_s
        result = await _ask_portfolio(where) if "portfolio" not in failed else {}
    finally:
        await boot.down(where)
    joined = account_of(where, settled=True)
    return _report(joined, read_ledgers(where.ledgers), result, took_s, sorted(failed))


def _stop_on_signal() -> asyncio.Event:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    return stop


async def _first(stop: asyncio.Event, work: Any) -> None:
    """Return when the work is done, or when told to stop."""
    working, stopping = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    for task in (working, stopping):
        task.cancel()
    outcomes = await asyncio.gather(working, stopping, return_exceptions=True)
    if isinstance(outcomes[0], Exception):
        raise outcomes[0]


async def _until_done(where: RunDir) -> None:
    """
    Return when all sources have ended and what they caused has been handled.

    The counters are other processes' memory: they cannot wake us, and the picture moves anyway.
    """
    console = Console(stderr=True)
    live: Any = Live(console=console) if console.is_terminal else contextlib.nullcontext()
    before: tuple[int, int] | None = None
    moved_s = time.monotonic()
    with live as screen:
        while True:
            views, joined = read_ledgers(where.ledgers), account_of(where)
            if screen is not None:
                screen.update(_progress(views, joined))
            now = (_said(joined), joined.in_flight)
            if now != before:
                before, moved_s = now, time.monotonic()
            elif _sources_ended(views):
                # Ledgers are read one after the other: only what two looks agree upon is true
                if joined.in_flight == 0 or time.monotonic() - moved_s > _STILL_S:
                    return
            await asyncio.sleep(_LOOK_S)


def _said(joined: Account) -> int:
    """Count what was published; life signs go on for ever."""
    return sum(n for topic, n in joined.published.items() if not topic.startswith("agent."))


def _sources_ended(views: dict[str, LedgerView]) -> bool:
    return all(
        view.sources in ("none", "done") for view in views.values() if view.state != "absent"
    )


def _progress(views: dict[str, LedgerView], joined: Account) -> Text:
    lines = [
        f"{name:<14}{view.state:<10}{view.handled:>12,} handled {view.queue:>8,} waiting"
        for name, view in views.items()
    ]
    return Text("\n".join([*lines, f"{_said(joined):,} events said, {joined.lost:,} lost"]))


async def _ask_portfolio(where: RunDir) -> dict[str, Any]:
    async with make_broker(MessageBusConfig.from_env(), where.path) as broker:
        publisher = EventPublisher(PublisherConfig(agent_name="run", broker=broker))
        requester = Requester(broker, publisher)
        try:
            reply = await requester.request(REPORT, {}, timeout_s=10.0)
        except MeshError as error:
            click.echo(f"no report from the portfolio: {error}", err=True)
            return {}
        finally:
            await requester.close()
            await publisher.close()
        return reply.data


def _report(
    joined: Account,
    views: dict[str, LedgerView],
    result: dict[str, Any],
    took_s: float,
    failed: list[str],
) -> dict[str, Any]:
    events = {t: n for t, n in sorted(joined.published.items()) if not t.startswith("agent.")}
    buckets = [view.histogram for view in views.values()]
    merged = tuple(map(sum, zip(*buckets, strict=True))) if buckets else ()
    return {
        "market_events": events.get(EventType.MARKET_DATA_RECEIVED, 0),
        "events_by_type": events,
        "orders": events.get(EventType.TRADE_APPROVED, 0),
        "fills": result.get("fills", 0),
        "fills_digest": result.get("fills_digest"),
        **{key: result.get(key) for key in ("realised_pnl", "unrealised_pnl", "fees", "net_pnl")},
        "positions": result.get("positions", {}),
        "lost": joined.lost,
        "lost_by_link": joined.lost_by_link,
        "bad_rows": sum(view.dropped.get("bad_rows", 0) for view in views.values()),
        "took_s": round(took_s, 3),
        "events_per_s": round(sum(events.values()) / took_s) if took_s else 0,
        "latency_us": {name: percentile_us(merged, at) for name, at in (("p50", 50), ("p99", 99))},
        "failed_agents": failed,
    }


def _show(report: dict[str, Any]) -> None:
    print_table(["event", "said"], [[t, f"{n:,}"] for t, n in report["events_by_type"].items()])
    click.echo(f"orders {report['orders']:,}, fills {report['fills']:,}")
    if report["fills_digest"]:
        money: Callable[[str], str] = lambda key: f"{report[key]:,.2f}"  # noqa: E731
        click.echo(
            f"net {money('net_pnl')} = realised {money('realised_pnl')}"
            f" + unrealised {money('unrealised_pnl')} - fees {money('fees')}"
        )
        click.echo(f"fills digest {report['fills_digest']}")
    latency = report["latency_us"]
    click.echo(
        f"{report['events_per_s']:,} events/s over {report['took_s']:.2f} s;"
        f" latency p50 {latency['p50']} us, p99 {latency['p99']} us"
    )
    if report["bad_rows"]:
        click.echo(f"bad rows skipped: {report['bad_rows']}")
    click.echo(f"lost {report['lost']}")
    for link, lost in report["lost_by_link"].items():
        click.echo(f"  {link}: {lost}")
