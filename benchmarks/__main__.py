"""
Measure the mesh against bare peers, in turns, and print the ratios of the medians.

``scripts/bench`` runs all; ``scripts/bench --rounds 5 --only latency`` runs what has the word in
its name; ``scripts/bench --peers`` measures other people's buses instead (benchmarks/peers.py).
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import (
    cross,
    durable,
    inside,
    journal,
    journal_redis,
    over_redis,
    peers,
    startup,
)

Measure = Callable[[], float]


@dataclass(frozen=True)
class Comparison:
    """One row: ours against a peer."""

    name: str
    ours: Measure
    peer: Measure
    unit: str
    target: str


COMPARISONS = [
    Comparison(
        "throughput 200 B, publish_batch / raw pyzmq",
        lambda: cross.mesh_throughput(300_000, 200),
        lambda: cross.raw_throughput(300_000, 200),
        "events/s",
        ">= 1.0",
    ),
    Comparison(
        "throughput 200 B, one by one / raw pyzmq",
        lambda: cross.mesh_throughput(300_000, 200, batch=1),
        lambda: cross.raw_throughput(300_000, 200),
        "events/s",
        ">= 0.7",
    ),
    Comparison(
        "throughput 200 B / unix socket limit",
        lambda: cross.mesh_throughput(300_000, 200),
        lambda: cross.socket_throughput(300_000, 200),
        "events/s",
        "-",
    ),
    Comparison(
        "throughput 4 KiB / raw pyzmq",
        lambda: cross.mesh_throughput(50_000, 4096),
        lambda: cross.raw_throughput(50_000, 4096),
        "events/s",
        ">= 1.0",
    ),
    Comparison(
        "fan-out to 8 / raw pyzmq",
        lambda: cross.mesh_throughput(50_000, 200, 8),
        lambda: cross.raw_throughput(50_000, 200, 8),
        "delivered/s",
        ">= 1.0",
    ),
    Comparison(
        "fan-out to 8 / to 2, delivered",
        lambda: cross.mesh_throughput(50_000, 200, 8),
        lambda: cross.mesh_throughput(50_000, 200, 2),
        "delivered/s",
        "~ 1",
    ),
    Comparison(
        "fan-out to 32 / to 8, delivered",
        lambda: cross.mesh_throughput(20_000, 200, 32),
        lambda: cross.mesh_throughput(20_000, 200, 8),
        "delivered/s",
        "~ 1",
    ),
    Comparison(
        "latency p50 at 1,000/s / raw pyzmq on a loop",
        lambda: cross.mesh_latency(3000, 1000)[0],
        lambda: cross.raw_latency(3000, 1000)[0],
        "us",
        "<= 1.15",
    ),
    Comparison(
        "latency p99 at 1,000/s / raw pyzmq on a loop",
        lambda: cross.mesh_latency(3000, 1000)[1],
        lambda: cross.raw_latency(3000, 1000)[1],
        "us",
        "<= 1.3",
    ),
    Comparison(
        "redis live 200 B / redis-py, 100 a pipeline",
        lambda: over_redis.mesh_throughput(300_000, 200),
        lambda: over_redis.peer_throughput(100_000, 200),
        "events/s",
        ">= 3",
    ),
    Comparison(
        "redis live p50 at 1,000/s / redis-py latency",
        lambda: over_redis.mesh_latency(3000, 1000),
        lambda: over_redis.peer_latency(3000, 1000),
        "us",
        "<= 1.2",
    ),
    Comparison("dispatch / bare await", inside.dispatch, inside.bare_await, "calls/s", ">= 0.25"),
    Comparison(
        "memory broker / event made and awaited bare",
        inside.memory_broker,
        inside.bare_await_with_event,
        "events/s",
        ">= 0.1",
    ),
    Comparison(
        "dispatch with 1,000 other handlers / with 10",
        lambda: inside.dispatch(1000),
        lambda: inside.dispatch(10),
        "calls/s",
        "~ 1",
    ),
    Comparison(
        "dispatch with 10,000 other handlers / with 10",
        lambda: inside.dispatch(10_000),
        lambda: inside.dispatch(10),
        "calls/s",
        "~ 1",
    ),
    Comparison(
        "dispatch to 1,000 handlers / to 10, each",
        lambda: inside.dispatch_to(1000),
        lambda: inside.dispatch_to(10),
        "calls/s",
        "~ 1",
    ),
    Comparison(
        "dispatch to 10,000 handlers / to 10, each",
        lambda: inside.dispatch_to(10_000),
        lambda: inside.dispatch_to(10),
        "calls/s",
        "~ 1",
    ),
    Comparison(
        "SQLite append 100 a batch / bare insert, 100 a commit",
        journal.append_batches,
        journal.bare_batches,
        "events/s",
        "-",
    ),
    Comparison(
        "SQLite append, read, settle / bare insert",
        journal.end_to_end,
        journal.bare_batches,
        "events/s",
        "-",
    ),
    Comparison(
        "SQLite durable between processes / bare insert",
        durable.throughput,
        journal.bare_batches,
        "events/s",
        ">= 0.22",
    ),
    Comparison(
        "SQLite chain of three agents / one link",
        durable.chain,
        durable.throughput,
        "events/s",
        ">= 0.33",
    ),
    Comparison(
        "SQLite durable p50 at 1,000/s / 1.5 ms",
        lambda: durable.latency()[0],
        lambda: 1500.0,
        "us",
        "<= 1.0",
    ),
    Comparison(
        "publish_batch of 1,000 / bare insert of 1,000",
        journal.publish_thousand,
        journal.bare_thousand,
        "us",
        "<= 2",
    ),
    Comparison(
        "SQLite backlog 1,000,000 / 1,000: start to append",
        lambda: journal.first_touch(1_000_000),
        lambda: journal.first_touch(1_000),
        "ms",
        "<= 1.5",
    ),
    Comparison(
        "Redis append, read, settle / redis-py streams",
        journal_redis.end_to_end,
        journal_redis.peer_end_to_end,
        "events/s",
        ">= 2",
    ),
    Comparison(
        "Redis publish_batch of 1,000 / one bare pipeline",
        journal_redis.publish_thousand,
        journal_redis.peer_thousand,
        "us",
        "<= 2",
    ),
    Comparison(
        "Redis backlog 1,000,000 / 1,000: start to append",
        lambda: journal_redis.first_touch(1_000_000),
        lambda: journal_redis.first_touch(1_000),
        "ms",
        "<= 1.5",
    ),
    Comparison(
        "agent start to READY / three bare imports",
        startup.agent_start,
        startup.bare_start,
        "s",
        "<= 1.5",
    ),
]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each pair (default 3)")
    parser.add_argument("--only", default="", help="only rows whose name holds this word")
    parser.add_argument("--peers", action="store_true", help="measure other people's buses")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}")
    if options.peers:
        peers.measure_peers(options.rounds)
        return
    print(f"{'':46}{'ours':>12}{'peer':>12}  {'unit':<12}{'ratio':>7}{'spread':>14}  target")
    for row in COMPARISONS:
        if options.only in row.name:
            _measure(row, options.rounds)
    journal.forget_backlogs()
    if options.only in "memory and idling of an agent":
        resident, share = startup.memory_and_idling()
        print(
            f"{'an idle agent: resident MiB, per cent of a core':46}{resident:>12.1f}{share:>12.2f}"
        )


def _measure(row: Comparison, rounds: int) -> None:
    ours, peer = [], []
    for _ in range(rounds):
        peer.append(row.peer())
        ours.append(row.ours())
    ratios = [one / other for one, other in zip(ours, peer, strict=True)]
    ratio = statistics.median(ours) / statistics.median(peer)
    print(
        f"{row.name:46}{_short(statistics.median(ours)):>12}{_short(statistics.median(peer)):>12}"
        f"  {row.unit:<12}{ratio:>7.2f}{f'{min(ratios):.2f}-{max(ratios):.2f}':>14}  {row.target}",
        flush=True,
    )


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3f}"


if __name__ == "__main__":
    main()
