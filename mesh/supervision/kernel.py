"""What the kernel says of a process, read from /proc."""

from __future__ import annotations

import os
from pathlib import Path


def process_state(pid: int) -> tuple[str, bool]:
    """Read a process's state letter, and whether a debugger holds it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return "?", False
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    return facts.get("State", "?").strip()[:1], facts.get("TracerPid", "0").strip() != "0"


def waited_s(pid: int) -> float | None:
    """
    Tell how long a process's main thread could have run and had to wait for a CPU, in its life.

    Returns:
        Seconds; None where the kernel does not keep account of it.
    """
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return None


def lives(pid: int) -> bool:
    """Say whether there is such a process, if only as a zombie."""
    return Path(f"/proc/{pid}").exists()


def environment_of(pid: int) -> dict[str, str]:
    """Give the environment that a process of ours was started with; empty when it is gone."""
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(os.fsdecode(pair).split("=", 1) for pair in pairs if b"=" in pair)
