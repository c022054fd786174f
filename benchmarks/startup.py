"""What an agent process costs: its start, its memory, its idling."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.processes import private_directory, process, wait_state

if TYPE_CHECKING:
    from collections.abc import Iterator

_TICKS = os.sysconf("SC_CLK_TCK")


def bare_start() -> float:
    """Start Python with the three imports no agent can do without; seconds."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import asyncio, msgspec, zmq"], check=True)
    return time.perf_counter() - begun


@contextlib.contextmanager
def _forwarder(directory: Path) -> Iterator[None]:
    with process("-m", "mesh.brokers.forwarder", environment={"MESH_DIR": str(directory)}):
        while not (directory / "run" / "out.sock").exists():
            time.sleep(0.005)
        yield


def agent_start() -> float:
    """Start an agent until it is READY, beside a running forwarder; seconds."""
    with private_directory() as directory, _forwarder(directory):
        begun = time.perf_counter()
        with process(*_AGENT, environment=_environment(directory)):
            wait_state(directory, "counter", "ready")
            return time.perf_counter() - begun


def memory_and_idling(watch_s: float = 5.0) -> tuple[float, float]:
    """Give an idle agent's resident MiB and its share of a core in per cent."""
    with private_directory() as directory, _forwarder(directory):
        with process(*_AGENT, environment=_environment(directory)) as agent:
            wait_state(directory, "counter", "ready")
            time.sleep(1)
            before = _cpu_s(agent.pid)
            time.sleep(watch_s)
            share = (_cpu_s(agent.pid) - before) / watch_s * 100
            pages = int(Path(f"/proc/{agent.pid}/statm").read_text().split()[1])
            return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, share


_AGENT = ("-m", "mesh.runtime", "benchmarks/counter.py")


def _environment(directory: Path) -> dict[str, str]:
    return {"MESH_DIR": str(directory), "MESH_PARAM_COUNT": "1", "MESH_PARAM_OUT": str(directory)}


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS
