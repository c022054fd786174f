"""The script of the timing agent."""

from __future__ import annotations

from benchmarks.agents import Stopwatch as _Stopwatch
from mesh import run


class Stopwatch(_Stopwatch):
    """Runs as a process of its own."""


if __name__ == "__main__":
    run(Stopwatch)
