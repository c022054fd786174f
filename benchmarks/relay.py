"""The script of the agent in the middle of the chain."""

from __future__ import annotations

from benchmarks.agents import Relay as _Relay
from mesh import run


class Relay(_Relay):
    """Runs as a process of its own."""


if __name__ == "__main__":
    run(Relay)
