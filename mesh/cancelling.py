"""
Cancellations of a task that nobody outside of it has asked for.

Where a child of an `asyncio.TaskGroup` fails after the body has ended, Python 3.11 and 3.12 leave
the task that waited counted as being cancelled, for good
(https://github.com/python/cpython/issues/116720); and code may cancel the very task it runs in. So
`Task.cancelling` does not tell whoever runs other people's code whether somebody wants his task to
end: that he has to know by himself, and what is left of such a cancellation is forgotten, or the
next task group in this task takes it for one of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any


async def shed(task: asyncio.Task[Any]) -> None:
    """
    Forget the cancellations of the running task; one that has not reached it does so here.

    So does a wish that it end which comes in this very moment: whoever calls this looks again
    afterwards whether there is one.
    """
    while task.cancelling():
        task.uncancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
