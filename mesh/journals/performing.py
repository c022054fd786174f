"""What the threads of the SQLite journal do with the jobs that they are given together."""

from __future__ import annotations

import sqlite3
from functools import partial
from typing import TYPE_CHECKING

from mesh.journals.transaction import Names, Transaction

if TYPE_CHECKING:
    from mesh.clock import Clock
    from mesh.journals.database import Database
    from mesh.journals.threads import Job


class Writing:
    """Does jobs with a `Transaction`; gives the topics to tell of, and those heard in here."""

    def __init__(self, clock: Clock) -> None:
        """Know no name yet."""
        self._clock = clock
        self._names = Names()

    def __call__(self, database: Database, jobs: list[Job]) -> tuple[set[str], set[str]]:
        """Do jobs in one transaction; when that fails, each in one of its own."""
        try:
            database.begin()
        except Exception as error:  # noqa: BLE001 - carried to whoever awaits a job
            # Others hold the file: to wait for them again for each job would take as many times
            for job in jobs:
                job.error = _translated(database, error)
            return set(), set()
        try:
            tx = self._transact(database, jobs)
        except Exception as error:  # noqa: BLE001 - carried to whoever awaits the job
            topics: tuple[set[str], set[str]] = set(), set()
            if len(jobs) == 1:
                jobs[0].error = _translated(database, error)
                return topics
            for job in jobs:
                for found, more in zip(topics, self(database, [job]), strict=True):
                    found |= more
            return topics
        for settle in tx.after:
            settle()
        database.fold_log()
        return tx.topics, tx.local_topics

    def _transact(self, database: Database, jobs: list[Job]) -> Transaction:
        try:
            tx = Transaction(
                database.connection, self._names, self._clock.time_s(), self._clock.mono_s()
            )
            for job in jobs:
                job.outcome = job.work(tx)
            tx.flush()
            database.connection.execute("COMMIT")
        except BaseException:
            if database.connection.in_transaction:
                database.connection.execute("ROLLBACK")
            self._names.forget()
            raise
        return tx


def reading(database: Database, jobs: list[Job]) -> None:
    """Do jobs with the `Database`, each for itself."""
    for job in jobs:
        try:
            job.outcome = database.patiently(partial(job.work, database))
        except Exception as error:  # noqa: BLE001 - carried to whoever awaits the job
            job.error = _translated(database, error)


def _translated(database: Database, error: Exception) -> Exception:
    """Give SQLite's own errors as the mesh's; a caller's mistake stays what it is."""
    if not isinstance(error, sqlite3.Error) or not hasattr(error, "sqlite_errorcode"):
        return error
    translated = database.translate(error)
    translated.__cause__ = error
    return translated
