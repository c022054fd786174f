"""The script of the sending agent."""

from __future__ import annotations

from benchmarks.agents import Sender as _Sender
from mesh import run


class Sender(_Sender):
    """Runs as a process of its own."""


if __name__ == "__main__":
    run(Sender)
