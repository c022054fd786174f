"""Between processes: throughput, fan-out and latency, the mesh against its bare peers."""

from __future__ import annotations

import contextlib
import statistics
from typing import TYPE_CHECKING

from benchmarks.processes import private_directory, process, wait_for, wait_state

if TYPE_CHECKING:
    from pathlib import Path

AGENT = ("-m", "mesh.runtime")


def raw_throughput(count: int, size: int, subscribers: int = 1) -> float:
    """Raw pyzmq through a proxy, one event a frame, synchronous; events/s delivered in all."""
    with private_directory() as directory, contextlib.ExitStack() as running:
        where = str(directory)
        running.enter_context(process("-m", "benchmarks.raw", "proxy", where))
        names = [f"sub-{number}" for number in range(subscribers)]
        for name in names:
            running.enter_context(
                process("-m", "benchmarks.raw", "subscribe", where, str(count), name)
            )
        running.enter_context(
            process(
                "-m",
                "benchmarks.raw",
                "publish",
                where,
                str(count),
                str(size),
                "0",
                str(subscribers),
            )
        )
        return sum(float(wait_for(directory / name)["events_per_s"]) for name in names)


def socket_throughput(count: int, size: int) -> float:
    """A Unix socket with 64 KiB writes and typed decoding: the limit; events/s."""
    with private_directory() as directory, contextlib.ExitStack() as running:
        where = str(directory)
        running.enter_context(
            process("-m", "benchmarks.raw", "socket-receive", where, str(count), "limit")
        )
        while not (directory / "ready-limit").exists():
            pass
        running.enter_context(
            process("-m", "benchmarks.raw", "socket-send", where, str(count), str(size))
        )
        return float(wait_for(directory / "limit")["events_per_s"])


def mesh_throughput(count: int, size: int, subscribers: int = 1, batch: int = 1000) -> float:
    """The mesh on ZeroMQ, everything on; events/s delivered in all."""
    with private_directory() as directory, contextlib.ExitStack() as running:
        names = [f"counter-{number}" for number in range(subscribers)]
        start_counters(running, directory, names, {}, count=count, size=size)
        start_sender(running, directory, {}, count=count, size=size, batch=batch)
        return sum(float(wait_for(directory / name)["events_per_s"]) for name in names)


def raw_latency(count: int, rate: float) -> tuple[float, float]:
    """Raw pyzmq through a proxy, watched on a loop; p50 and p99 in microseconds."""
    with private_directory() as directory, contextlib.ExitStack() as running:
        where = str(directory)
        running.enter_context(process("-m", "benchmarks.raw", "proxy", where))
        running.enter_context(
            process("-m", "benchmarks.raw", "subscribe-loop", where, str(count), "sub")
        )
        running.enter_context(
            process("-m", "benchmarks.raw", "publish", where, str(count), "200", str(rate), "1")
        )
        return percentiles(wait_for(directory / "sub")["delays_us"])


def mesh_latency(count: int, rate: float) -> tuple[float, float]:
    """The mesh on ZeroMQ, everything on; p50 and p99 in microseconds."""
    with private_directory() as directory, contextlib.ExitStack() as running:
        start_counters(running, directory, ["counter"], {}, "stopwatch", count=count)
        start_sender(running, directory, {}, count=count, size=200, rate=rate, batch=1)
        return percentiles(wait_for(directory / "counter")["delays_us"])


def start_counters(
    running: contextlib.ExitStack,
    directory: Path,
    names: list[str],
    settings: dict[str, str],
    script: str = "counter",
    **params: float,
) -> None:
    """Start counting agents; returns when they are READY."""
    for name in names:
        running.enter_context(
            process(
                *AGENT,
                f"benchmarks/{script}.py",
                "--name",
                name,
                environment={**_environment(directory, params), **settings},
            )
        )
    for name in names:
        wait_state(directory, name, "ready")


def start_sender(
    running: contextlib.ExitStack, directory: Path, settings: dict[str, str], **params: float
) -> None:
    """Start the sending agent."""
    given = {**_environment(directory, params), **settings}
    running.enter_context(process(*AGENT, "benchmarks/sender.py", environment=given))


def _environment(directory: Path, params: dict[str, float]) -> dict[str, str]:
    given = {f"MESH_PARAM_{name.upper()}": str(value) for name, value in params.items()}
    return {"MESH_DIR": str(directory), "MESH_PARAM_OUT": str(directory), **given}


def percentiles(delays_us: list[float]) -> tuple[float, float]:
    """Give p50 and p99 of what was noted."""
    # The first moments belong to the start, on both sides
    settled = delays_us[len(delays_us) // 10 :]
    cuts = statistics.quantiles(settled, n=100)
    return cuts[49], cuts[98]
