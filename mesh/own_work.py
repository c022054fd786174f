"""What an agent does without an event: its sources and its timers."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, TypeAlias

from mesh.cancelling import shed
from mesh.errors import first_leaf, is_outage
from mesh.ledger import SOURCES
from mesh.logs import Sparing
from mesh.retry import OUTAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from mesh.clock import Clock
    from mesh.ledger import Ledger

#: A source or timer: a bound method that takes nothing.
Call: TypeAlias = "Callable[[], Coroutine[Any, Any, None]]"

#: A source that ran for so long had found the fabric well.
_STEADY_S = 30.0


class OwnWork:
    """
    Runs one agent's sources and timers, in tasks below the one in which it is made.

    Args:
        ledger: Where the sources' state, and what failed, is noted.
        clock: When timers are due.
        log: The agent's.
    """

    def __init__(self, ledger: Ledger, clock: Clock, log: logging.Logger) -> None:
        """Run nothing yet."""
        self._ledger = ledger
        self._clock = clock
        self._log = log
        self._sparing = Sparing(log)
        #: Runs nobody's code, so it is cancelled only when all this is to end.
        self._parent = asyncio.current_task()

    async def run_sources(self, sources: Sequence[Call], flush: Call) -> None:
        """
        Run all sources to their end, at the same time.

        Args:
            sources: Which.
            flush: Called at the end, for what they have said to leave.

        Raises:
            ExceptionGroup: One has failed.
        """
        self._ledger.set("sources", SOURCES.index("running"))
        parent = asyncio.current_task()
        try:
            async with asyncio.TaskGroup() as tasks:
                for source in sources:
                    tasks.create_task(self._run(source, parent), name=source.__name__)
            await flush()
        except Exception:
            self._ledger.set("sources", SOURCES.index("failed"))
            raise
        self._ledger.set("sources", SOURCES.index("done"))

    async def repeat(self, call: Call, seconds: float) -> None:
        """Call a timer for ever; one that fails is called again."""
        due_s = self._clock.mono_s() + seconds
        while True:
            await self._clock.sleep(max(0.0, due_s - self._clock.mono_s()))
            try:
                await call()
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and _is_cancelled(self._parent):
                    raise
                self._ledger.count("timer_failed")
                words = f"timer {call.__name__} failed; it is called again"
                if is_outage(error):
                    self._say_outage(call.__name__, words, error)
                else:
                    self._log.exception("%s", words)
            await _end_or_shed(self._parent)
            # A call that took too long skips the beats it missed instead of hurrying after them
            due_s = max(due_s + seconds, self._clock.mono_s())

    async def _run(self, source: Call, parent: asyncio.Task[Any] | None) -> None:
        """Call a source, again after an outage: to start the process anew would not end that."""
        name, tries = source.__name__, 0
        while True:
            begun_s = self._clock.mono_s()
            try:
                await source()
            except asyncio.CancelledError as error:
                if _is_cancelled(parent):
                    raise
                # A task group takes a task that ends so for one that was to end
                raise RuntimeError(f"{name} awaited what was cancelled") from error
            except Exception as error:
                if not is_outage(error) or _is_cancelled(parent):
                    raise
                tries = tries + 1 if self._clock.mono_s() - begun_s < _STEADY_S else 1
                self._say_outage(name, f"{name} waits, and is then called again", error)
                await _end_or_shed(parent)
                await self._clock.sleep(OUTAGE.delay_s(tries))
            else:
                return

    def _say_outage(self, kind: str, words: str, error: BaseException) -> None:
        self._ledger.count("outages_met")
        self._sparing.say(kind, logging.WARNING, f"{words}: {first_leaf(error)}")


async def _end_or_shed(parent: asyncio.Task[Any] | None) -> None:
    """End with the parent; else let nothing be left of a task's cancellation of itself."""
    task = asyncio.current_task()
    if task is None or not task.cancelling():
        return
    if not _is_cancelled(parent):
        await shed(task)
    # It may have been cancelled in this very moment
    if _is_cancelled(parent):
        raise asyncio.CancelledError


def _is_cancelled(task: asyncio.Task[Any] | None) -> bool:
    return task is not None and task.cancelling() > 0
