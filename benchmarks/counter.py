"""The script of the counting agent."""

from __future__ import annotations

from benchmarks.agents import Counter as _Counter
from mesh import run


class Counter(_Counter):
    """Runs as a process of its own."""


if __name__ == "__main__":
    run(Counter)
