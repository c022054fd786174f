"""
Measure other people's buses beside ours: one process, one event published to one handler.

They live in .venv-peers, never in .venv; `scripts/bench --peers` makes it when it is asked for the
first time. Each is measured in turns with our memory broker, which encodes and decodes every event;
blinker, lahja, nautilus-trader and pyee hand the object itself to the handler.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks import inside

_HERE = Path(__file__).parent
_HOME = _HERE.parent / ".venv-peers"
_PYTHON = _HOME / "bin" / "python"
_LIST = _HERE / "peers.txt"
_INSTALL_S = 600.0
_MEASURE_S = 120.0
#: So many events that a turn takes about a second; who is not named takes the largest number.
_COUNTS = {"autogen-core": 5000, "bubus": 500, "faststream": 3000, "lahja": 30_000, "pyee": 50_000}
_COUNT = 200_000


class PeerError(Exception):
    """A peer cannot be measured; the message is the reason."""


def measure_peers(rounds: int) -> None:
    """Print a row for every line of peers.txt."""
    print("\none event to one handler in one process   ours      peer    unit        ratio")
    for line in _LIST.read_text().splitlines():
        if line and not line.startswith("#"):
            print(f"{line:36}{_row(line, rounds)}", flush=True)


def _row(requirement: str, rounds: int) -> str:
    name = re.split(r"[\[=]", requirement)[0]
    ours, theirs = [], []
    try:
        _install(requirement)
        for _ in range(rounds):
            theirs.append(_measure(name))
            ours.append(inside.memory_broker())
    except PeerError as error:
        return f"not measured: {error}"
    mine, other = statistics.median(ours), statistics.median(theirs)
    return f"{mine:>10,.0f}{other:>10,.0f}    events/s{mine / other:>9.2f}"


def _install(requirement: str) -> None:
    """
    Install a peer unless it is there.

    Raises:
        PeerError: It cannot be had here.
    """
    done = _HOME / "installed" / requirement
    if done.exists():
        return
    if not _PYTHON.exists():
        _run(_INSTALL_S, sys.executable, "-m", "venv", str(_HOME))
    _run(_INSTALL_S, str(_PYTHON), "-m", "pip", "install", "--quiet", requirement)
    done.parent.mkdir(exist_ok=True)
    done.touch()


def _measure(name: str) -> float:
    script, count = str(_HERE / "bus_peer.py"), str(_COUNTS.get(name, _COUNT))
    said = _run(_MEASURE_S, str(_PYTHON), script, name, count)
    return float(json.loads(said.splitlines()[-1])["events_per_s"])


def _run(limit_s: float, *command: str) -> str:
    try:
        ended = subprocess.run(command, capture_output=True, check=True, text=True, timeout=limit_s)
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if line.strip()]
        raise PeerError(lines[-1] if lines else f"exit code {error.returncode}") from None
    except subprocess.TimeoutExpired:
        raise PeerError(f"it took more than {limit_s:g} s") from None
    return ended.stdout
