"""Between processes over Redis: throughput and latency, the mesh against bare redis-py."""

from __future__ import annotations

import contextlib
import subprocess
import time
from typing import TYPE_CHECKING, Any

from benchmarks.cross import percentiles, start_counters, start_sender
from benchmarks.processes import private_directory, process, program, wait_for
from benchmarks.redis_peer import serve_command, socket_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PEER = ("-m", "benchmarks.redis_peer")


def mesh_throughput(count: int, size: int) -> float:
    """The mesh on Redis, everything on; events/s."""
    with _server() as directory, contextlib.ExitStack() as running:
        settings = _settings(directory)
        start_counters(running, directory, ["counter"], settings, count=count, size=size)
        start_sender(running, directory, settings, count=count, size=size, batch=1000)
        return float(wait_for(directory / "counter")["events_per_s"])


def peer_throughput(count: int, size: int) -> float:
    """redis-py, 100 events a pipeline, typed decoding; events/s."""
    with _server() as directory, contextlib.ExitStack() as running:
        return float(_peer(running, directory, count, size, 0)["events_per_s"])


def mesh_latency(count: int, rate: float) -> float:
    """The mesh on Redis, everything on; p50 in microseconds."""
    with _server() as directory, contextlib.ExitStack() as running:
        settings = _settings(directory)
        start_counters(running, directory, ["counter"], settings, "stopwatch", count=count)
        start_sender(running, directory, settings, count=count, size=200, rate=rate, batch=1)
        return percentiles(wait_for(directory / "counter")["delays_us"])[0]


def peer_latency(count: int, rate: float) -> float:
    """redis-py, one PUBLISH an event; p50 in microseconds."""
    with _server() as directory, contextlib.ExitStack() as running:
        return percentiles(_peer(running, directory, count, 200, rate)["delays_us"])[0]


def _peer(
    running: contextlib.ExitStack, directory: Path, count: int, size: int, rate: float
) -> Any:
    where = str(directory)
    running.enter_context(process(*_PEER, "subscribe", where, str(count), "sub"))
    while not (directory / "ready-sub").exists():
        time.sleep(0.005)
    running.enter_context(process(*_PEER, "publish", where, str(count), str(size), str(rate)))
    return wait_for(directory / "sub")


@contextlib.contextmanager
def _server() -> Iterator[Path]:
    with (
        private_directory() as directory,
        program(*serve_command(directory), stdout=subprocess.DEVNULL),
    ):
        while not socket_of(directory).exists():
            time.sleep(0.005)
        yield directory


def _settings(directory: Path) -> dict[str, str]:
    return {"LEGION_BROKER_TYPE": "redis", "REDIS_SOCKET": str(socket_of(directory))}
