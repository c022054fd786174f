"""What a test may not leave behind in its own process: tasks, open files, children."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from collections import Counter

# Opened once by somebody and kept: random numbers, terminals, zones, databases of examples
_KEPT = ("/dev/", "/proc/", "/usr/share/zoneinfo", "/etc/")
_KEPT_INSIDE = ("/.hypothesis/", "/.coverage", "/.pytest_cache/", "(deleted)")


def open_files() -> Counter[str]:
    """Count the open descriptors of this process by what they point to."""
    targets: list[str] = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            targets.append(os.readlink(f"/proc/self/fd/{name}"))
    return Counter(
        target
        for target in targets
        if not target.startswith(_KEPT) and not any(word in target for word in _KEPT_INSIDE)
    )


def new_open_files(before: Counter[str]) -> list[str]:
    """Give the descriptors that are open now and were not before."""
    if not (grown := open_files() - before):
        return []
    # Something that only waits for the collector is no leak of the program
    gc.collect()
    return sorted((open_files() - before).elements()) if grown else []


async def new_tasks(before: set[asyncio.Task[object]]) -> list[str]:
    """Give the tasks that run now and did not before; those being cancelled get a few turns."""
    for _ in range(5):
        await asyncio.sleep(0)
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    return sorted(repr(task) for task in left)
