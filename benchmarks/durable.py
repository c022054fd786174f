"""Between processes, durable: the mesh on its SQLite journal, everything on."""

from __future__ import annotations

import contextlib

from benchmarks.cross import percentiles, start_counters, start_sender
from benchmarks.processes import private_directory, process, wait_for, wait_state

#: The benchmarks' type is live unless the settings say otherwise; the same agents run both ways.
DURABLE = {"LEGION_DURABLE_EVENTS": "bench.*"}


def throughput(count: int = 100_000, settings: dict[str, str] | None = None) -> float:
    """Publish in batches of 1,000, each kept before the next; handled and settled; events/s."""
    given = {**DURABLE, **(settings or {})}
    with private_directory() as directory, contextlib.ExitStack() as running:
        start_counters(running, directory, ["counter"], given, count=count, size=200)
        start_sender(running, directory, given, count=count, size=200, batch=1000)
        return float(wait_for(directory / "counter")["events_per_s"])


def chain(count: int = 50_000) -> float:
    """The same over three durable agents: two of them hear and publish; events/s at the last."""
    with private_directory() as directory, contextlib.ExitStack() as running:
        environment = {
            **DURABLE,
            "MESH_DIR": str(directory),
            "MESH_PARAM_OUT": str(directory),
            "MESH_PARAM_COUNT": str(count),
        }
        for script in ("last", "relay"):
            running.enter_context(
                process("-m", "mesh.runtime", f"benchmarks/{script}.py", environment=environment)
            )
            wait_state(directory, script, "ready")
        start_sender(running, directory, DURABLE, count=count, size=200, batch=1000)
        return float(wait_for(directory / "last")["events_per_s"])


def latency(
    count: int = 2000, rate: float = 1000, settings: dict[str, str] | None = None
) -> tuple[float, float]:
    """From before `publish` to the handler in another process; p50 and p99 in microseconds."""
    given = {**DURABLE, **(settings or {})}
    with private_directory() as directory, contextlib.ExitStack() as running:
        start_counters(running, directory, ["counter"], given, "stopwatch", count=count)
        start_sender(running, directory, given, count=count, size=200, rate=rate, batch=1)
        return percentiles(wait_for(directory / "counter")["delays_us"])
