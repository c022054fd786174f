"""
CPU-heavy work in processes of its own, so that the agent's loop keeps beating.

The one door to aiomultiprocess. What it does not do, this does: every call has a time limit (a
worker that dies in the middle of a task is awaited for ever otherwise), arguments are checked
before they are sent (an unpicklable one hangs the call), errors come back as errors, and neither
workers nor its manager process outlive a killed parent. A call costs about 15 ms: worth it above
20 ms of work.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import sys
import traceback
from multiprocessing.managers import SyncManager
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any, TypeVar

import aiomultiprocess  # type: ignore[import-untyped]
import aiomultiprocess.core  # type: ignore[import-untyped]

from mesh.process import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_ENDED = "its worker was ended before it came back"


class OffloadError(Exception):
    """
    The work failed in its worker process.

    Args:
        message: What the function raised.
        remote_traceback: Where, as text from the worker.
    """

    def __init__(self, message: str, remote_traceback: str = "") -> None:
        """Keep the worker's traceback beside the message."""
        self.remote_traceback = remote_traceback
        super().__init__(f"{message}\n{remote_traceback}" if remote_traceback else message)


class OffloadTimeoutError(OffloadError, TimeoutError):
    """The work did not come back within its limit; its worker may have died."""


class WorkerPool:
    """
    A pool that starts with its first call.

    Args:
        processes: How many workers; default one a core, at most 4.
    """

    def __init__(self, processes: int | None = None) -> None:
        """Start nothing yet."""
        self._processes = processes or min(4, os.cpu_count() or 1)
        self._crew: _Crew | None = None
        #: Those in which a worker is lost, while others of them are still at work.
        self._spent: set[_Crew] = set()
        self._closes = 0

    async def call(
        self, func: Callable[..., _Result], *args: Any, timeout_s: float = 30.0
    ) -> _Result:
        """
        Run a plain, importable function in a worker.

        Args:
            func: A module-level function.
            args: Its arguments; they travel to another process.
            timeout_s: Limit for the call, with the start of the pool and the wait for a worker.

        Returns:
            What the function returned.

        Raises:
            OffloadError: The function raised, or it or what it returned cannot travel.
            OffloadTimeoutError: It did not come back in time.
            ValueError: The limit makes no sense.
        """
        name = getattr(func, "__qualname__", func)
        if not 0 < timeout_s < float("inf"):
            raise ValueError(f"timeout_s={timeout_s!r}: must be seconds above 0")
        if inspect.iscoroutinefunction(func):
            raise OffloadError(
                f"{name!r} is a coroutine function; pass a plain one, which may call asyncio.run"
            )
        try:
            packed = bytes(ForkingPickler.dumps((func, args)))
        except Exception as error:
            raise OffloadError(
                f"{name!r} and its arguments cannot travel to a"
                f" worker: {error}; pass a module-level function and plain data"
            ) from error
        try:
            async with asyncio.timeout(timeout_s):
                value, trace = await self._run(packed)
        except TimeoutError:
            raise OffloadTimeoutError(f"{name} did not come back within {timeout_s:g} s") from None
        if isinstance(value, str):
            raise OffloadError(value, trace)
        try:
            result: _Result = ForkingPickler.loads(value)
        except Exception as error:
            raise OffloadError(f"what {name} returned cannot travel back: {error}") from error
        return result

    async def _run(self, packed: bytes) -> tuple[bytes | str, str]:
        closes = self._closes
        while True:
            if closes != self._closes:
                raise OffloadError(_ENDED)
            if self._crew is None:
                self._crew = _Crew(self._processes)
            crew = self._crew
            async with crew.room:
                if crew is not self._crew:
                    continue  # it was spent meanwhile
                try:
                    return await crew.run(packed)
                finally:
                    await self._let_go(crew)

    async def _let_go(self, crew: _Crew) -> None:
        """Do without a crew of which a worker is lost; what the others do comes to its end."""
        if not crew.is_spent:
            return
        if self._crew is crew:
            self._crew = None
        self._spent.add(crew)
        if not crew.calls:
            self._spent.discard(crew)
            await crew.close()

    async def close(self) -> None:
        """End the workers, and all calls; can be called twice."""
        self._closes += 1
        crews = [*self._spent, *filter(None, (self._crew,))]
        self._crew = None
        self._spent.clear()
        for crew in crews:
            await crew.close()


class _Crew:
    """Workers that were started together; each has one call at a time."""

    def __init__(self, processes: int) -> None:
        _take_manager()
        self._pool = aiomultiprocess.Pool(
            processes=processes,
            # One task at a time: more would let one worker hoard CPU work
            childconcurrency=1,
            initializer=die_with_parent,
            initargs=(os.getpid(),),
        )
        # Who waits here can still go elsewhere
        self.room = asyncio.Semaphore(processes)
        self.calls: set[asyncio.Task[Any]] = set()
        #: A worker did not come back: it is dead or busy, and must not be handed the next call.
        self.is_spent = False
        self._closed = False

    async def run(self, packed: bytes) -> tuple[bytes | str, str]:
        call = asyncio.create_task(self._pool.apply(_run_packed, (packed,)), name="offload")
        self.calls.add(call)
        try:
            await asyncio.wait([call])
        except asyncio.CancelledError:
            self.is_spent = True
            raise
        finally:
            self.calls.discard(call)
            call.cancel()
        if call.cancelled():
            raise OffloadError(_ENDED)
        outcome: tuple[bytes | str, str] = call.result()
        return outcome

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = self.is_spent = True
        for call in self.calls:
            call.cancel()
        pool = self._pool
        workers, queues = list(pool.processes), list(pool.queues.values())
        pool.terminate()
        with contextlib.suppress(Exception):
            await asyncio.wait_for(pool.join(), 5)
        for worker in workers:
            # Its pipe would stay open until the collector comes by; a living one refuses
            with contextlib.suppress(ValueError):
                worker.aio_process.close()
        for queue in (each for pair in queues for each in pair):
            queue.close()
            await asyncio.to_thread(queue.join_thread)
        await give_manager_back()


#: How many pools and processes use aiomultiprocess's one manager process.
_manager_users = 0


def _take_manager() -> None:
    """Start aiomultiprocess's manager process, so that it dies with us."""
    global _manager_users
    if aiomultiprocess.core._manager is None:
        manager = SyncManager(ctx=aiomultiprocess.core.context)
        manager.start(die_with_parent, (os.getpid(),))
        aiomultiprocess.core._manager = manager
    _manager_users += 1


async def give_manager_back() -> None:
    """End the manager process with its last user: a pool, or a process that has ended."""
    global _manager_users
    _manager_users -= 1
    if not _manager_users:
        manager, aiomultiprocess.core._manager = aiomultiprocess.core._manager, None
        await asyncio.to_thread(manager.shutdown)


def start_process(main: Callable[..., int], *args: Any, name: str) -> aiomultiprocess.Process:
    """
    Start a process that dies with us and ends with the exit code that `main` returns.

    Args:
        main: A module-level function; it brings an event loop of its own if it needs one.
        args: Plain data; it travels to the other process.
        name: Shown by the operating system's tools for multiprocessing.
    """
    _take_manager()
    process = aiomultiprocess.Process(
        args=(main, os.getpid(), *args), name=name, process_target=_run_main
    )
    process.start()
    return process


def sentinel_of(process: aiomultiprocess.Process) -> int:
    """Give the descriptor that becomes readable when a process ends."""
    sentinel: int = process.aio_process.sentinel
    return sentinel


def _run_main(unit: Any) -> None:
    main, parent, *args = unit.args
    die_with_parent(parent)
    sys.exit(main(*args))


async def _run_packed(packed: bytes) -> tuple[bytes | str, str]:
    """
    Run in the worker: everything comes back as data, so that no error is lost on the way.

    Returns:
        What the function returned, pickled; or what went wrong in words, and where.
    """
    try:
        func, args = ForkingPickler.loads(packed)
        value = func(*args)
    except BaseException as error:  # noqa: BLE001 - goes back to the caller as text
        return f"{type(error).__name__}: {error}", traceback.format_exc()
    try:
        return bytes(ForkingPickler.dumps(value)), ""
    except Exception as error:  # noqa: BLE001 - so does this
        what = type(value).__name__
        return f"what it returned, a {what}, cannot travel back: {error}", traceback.format_exc()
