"""The script of the agent at the end of the chain."""

from __future__ import annotations

from benchmarks.agents import Last as _Last
from mesh import run


class Last(_Last):
    """Runs as a process of its own."""


if __name__ == "__main__":
    run(Last)
