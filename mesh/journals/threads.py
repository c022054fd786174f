"""Database work off the loop: a thread with a queue, which does together what came meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from mesh.journals.database import Database

#: How long a thread may hold the interpreter while another waits for it. SQLite gives it back at
#: every row; at the default of 5 ms a busy loop and a thread that fetches rows cost each other half
#: of the throughput (decision 0005).
_SWITCH_S = 0.0002
_MAX_JOBS = 1000
_MAX_WEIGHT_BYTES = 4 * 1024 * 1024


@dataclass(slots=True, eq=False)
class Job:
    """Something to do with the database, and where its outcome is awaited."""

    #: Gets what the thread works with: a `Transaction`, or the `Database`.
    work: Callable[[Any], Any]
    future: asyncio.Future[Any]
    weight_bytes: int = 0
    outcome: Any = None
    error: BaseException | None = None


class DatabaseThread:
    """
    A thread with a connection of its own.

    Args:
        name: Of the thread.
        database: Opened and closed in the thread.
        perform: Does some jobs, filling in their outcomes; gives what `deliver` shall know.
        deliver: Called on the loop, once for all jobs that were done together.
    """

    def __init__(
        self,
        name: str,
        database: Database,
        perform: Callable[[Database, list[Job]], Any],
        deliver: Callable[[list[Job], Any], None],
    ) -> None:
        """Start nothing."""
        self._database = database
        self._perform = perform
        self._deliver = deliver
        self._loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        # A daemon: an interpreter that ends without close() must not wait for it
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    async def start(self) -> None:
        """Open the database; raises what stands in the way."""
        if sys.getswitchinterval() > _SWITCH_S:
            sys.setswitchinterval(_SWITCH_S)
        self._thread.start()
        await asyncio.shield(self._opened)

    def put(self, job: Job) -> None:
        """Queue a job."""
        self._jobs.put(job)

    async def stop(self) -> None:
        """Do what is queued, close the database and end."""
        self._jobs.put(None)
        await asyncio.shield(self._ended)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._database.open()
        except BaseException as error:  # noqa: BLE001 - carried to who awaits it
            self._call(self._settle, self._opened, error)
            self._call(self._settle, self._ended, None)
            return
        self._call(self._settle, self._opened, None)
        try:
            while jobs := self._next():
                self._call(self._deliver, jobs, self._do(jobs))
                del jobs  # what was delivered is not kept while nothing comes
        finally:
            self._database.close()
            self._call(self._settle, self._ended, None)

    def _do(self, jobs: list[Job]) -> Any:
        try:
            return self._perform(self._database, jobs)
        except BaseException as error:  # noqa: BLE001 - or who awaits them would wait for ever
            for job in jobs:
                job.error = error
            return None

    def _next(self) -> list[Job]:
        """Wait for a job and give it with those that came meanwhile; none: the end."""
        first = self._jobs.get()
        if first is None:
            return []
        jobs, weight_bytes = [first], first.weight_bytes
        while len(jobs) < _MAX_JOBS and weight_bytes < _MAX_WEIGHT_BYTES:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                self._jobs.put(None)
                break
            jobs.append(job)
            weight_bytes += job.weight_bytes
        return jobs

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, *args)

    def _settle(self, future: asyncio.Future[None], error: BaseException | None) -> None:
        if not future.done():
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
                # Whoever waited for it may have been cancelled, and a shield does not ask then
                future.exception()
