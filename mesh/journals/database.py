"""The file of the SQLite journal: its tables, how it is opened, what its errors mean."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import stat
import time
from typing import TYPE_CHECKING, Literal, TypeVar

from mesh.errors import (
    BackpressureError,
    BrokerUnavailableError,
    ConfigurationError,
    DamagedJournalError,
    MeshError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Synchronous = Literal["NORMAL", "FULL"]
Value = TypeVar("Value")

#: "LGNJ", so that another program's database is never taken for ours.
_APPLICATION_ID = 0x4C474E4A
_SCHEMA_VERSION = 1
#: RETURNING and INSERT ... ON CONFLICT of several rows.
_MIN_SQLITE = (3, 35, 0)
# Of pages of 4 KiB: how far the write-ahead log grows before it is copied back, and what is cached
_CHECKPOINT_PAGES = 2000
_CACHE_KIB = 16 * 1024
_WAL_BYTES = 64 * 1024 * 1024
# SQLite's own busy handler sleeps up to 100 ms at a time; a transaction here takes one
_BUSY_STEP_S = 0.0005

_SCHEMA = """
CREATE TABLE topics (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, topic INTEGER NOT NULL, partition INTEGER NOT NULL,
    id TEXT NOT NULL UNIQUE, frame BLOB NOT NULL, at_ms INTEGER NOT NULL);
CREATE INDEX events_by_topic ON events (topic, seq, partition);
CREATE TABLE groups (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, version INTEGER NOT NULL);
CREATE TABLE cursors (
    group_id INTEGER NOT NULL, topic INTEGER NOT NULL, partition INTEGER NOT NULL,
    seq INTEGER NOT NULL, suspect_to INTEGER NOT NULL,
    PRIMARY KEY (group_id, topic, partition)) WITHOUT ROWID;
CREATE TABLE members (
    group_id INTEGER NOT NULL, consumer TEXT NOT NULL, incarnation INTEGER NOT NULL,
    lease_until_ms INTEGER NOT NULL, PRIMARY KEY (group_id, consumer)) WITHOUT ROWID;
CREATE TABLE owners (
    group_id INTEGER NOT NULL, partition INTEGER NOT NULL, consumer TEXT NOT NULL,
    incarnation INTEGER NOT NULL, cohort INTEGER NOT NULL,
    PRIMARY KEY (group_id, partition)) WITHOUT ROWID;
CREATE TABLE acked (
    group_id INTEGER NOT NULL, topic INTEGER NOT NULL, partition INTEGER NOT NULL,
    seq INTEGER NOT NULL, PRIMARY KEY (group_id, topic, partition, seq)) WITHOUT ROWID;
CREATE TABLE attempts (
    group_id INTEGER NOT NULL, seq INTEGER NOT NULL, count INTEGER NOT NULL,
    PRIMARY KEY (group_id, seq)) WITHOUT ROWID;
CREATE TABLE done (
    group_id INTEGER NOT NULL, seq INTEGER NOT NULL, handler TEXT NOT NULL,
    PRIMARY KEY (group_id, seq, handler)) WITHOUT ROWID;
CREATE TABLE state (
    group_id INTEGER NOT NULL, name TEXT NOT NULL, value BLOB NOT NULL,
    PRIMARY KEY (group_id, name)) WITHOUT ROWID;
CREATE TABLE dead (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, at_s REAL NOT NULL,
    topic TEXT NOT NULL, agent TEXT NOT NULL, handler TEXT NOT NULL, reason TEXT NOT NULL,
    error TEXT NOT NULL, error_line TEXT NOT NULL, letter BLOB NOT NULL);
CREATE INDEX dead_by_time ON dead (at_s);
"""


class Database:
    """
    One connection to the file, used by the thread that opens it.

    Args:
        path: The file; made with mode 0600.
        synchronous: NORMAL survives the death of any process, FULL also a power cut.
        busy_s: How long to wait for other processes' transactions.
    """

    def __init__(self, path: Path, synchronous: Synchronous, busy_s: float) -> None:
        """Open nothing."""
        self.path = path
        self._synchronous = synchronous
        self._busy_s = busy_s
        self._file = (0, 0)
        self._looked_s = 0.0
        self.connection: sqlite3.Connection

    def open(self) -> None:
        """
        Open the file, and make it ready when it is new.

        Raises:
            ConfigurationError: It can be no journal, and why.
            BrokerUnavailableError: It is locked, or the disk is full.
        """
        try:
            self._make_private()
            self.connection = sqlite3.connect(
                self.path, timeout=0, isolation_level=None, cached_statements=256
            )
            try:
                self.patiently(self._prepare)
            except BaseException:
                self.connection.close()
                raise
        except sqlite3.Error as error:
            raise self.translate(error, opening=True) from error
        except OSError as error:
            raise ConfigurationError(
                f"the journal {self.path} cannot be opened: {error.strerror};"
                " its directory must be there and belong to this user"
            ) from error

    def close(self) -> None:
        """Close the connection; the last one of all processes folds the write-ahead log in."""
        self.connection.close()

    def begin(self) -> None:
        """Take the right to write, waiting for other processes in short steps."""
        self._require_same_file()
        self.patiently(lambda: self.connection.execute("BEGIN IMMEDIATE"))

    def patiently(self, work: Callable[[], Value]) -> Value:
        """Do something again while another process is in the way."""
        ends_s = time.monotonic() + self._busy_s
        while True:
            try:
                return work()
            except sqlite3.OperationalError as error:
                busy = error.sqlite_errorcode & 0xFF in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
                if not busy or time.monotonic() > ends_s:
                    raise
            # Not in step with the others that wait
            time.sleep(_BUSY_STEP_S * (0.5 + random.random()))  # noqa: S311 - no secret

    def fold_log(self) -> None:
        """Shorten a write-ahead log that readers have kept from being folded in by itself."""
        try:
            if self.path.with_name(f"{self.path.name}-wal").stat().st_size > _WAL_BYTES:
                self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except (OSError, sqlite3.Error):
            return  # the next one will do; a broken disk shows at the next transaction

    def translate(self, error: sqlite3.Error, *, opening: bool = False) -> MeshError:
        """Give an error of SQLite as one of the mesh: the path, the cause, what to do."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        where = f"the journal {self.path}"
        if code == sqlite3.SQLITE_FULL:
            return BackpressureError(
                f"{where} cannot grow: the disk is full; free some space, nothing else is needed"
            )
        if code in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            return BrokerUnavailableError(
                f"{where} was locked by another process for {self._busy_s:g} s;"
                " is one stopped, or a database tool open on it?"
            )
        if code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
            damaged = ConfigurationError if opening else DamagedJournalError
            return damaged(
                f"{where} is damaged or no database ({error}); stop the mesh, move the file away"
                " together with its -wal and -shm, and restore it from a copy or start anew"
            )
        if code in {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN}:
            kind = ConfigurationError if opening else BrokerUnavailableError
            return kind(
                f"{where} cannot be written ({error});"
                " the file and its directory must belong to this user and be writable"
            )
        return BrokerUnavailableError(
            f"{where} failed: {error}; is a quota or a limit of file sizes reached, or the disk"
            " broken? See its own log"
        )

    @staticmethod
    def may_pass(error: Exception) -> bool:
        """Say whether an error that `translate` gave may pass by itself: somebody frees space."""
        code = getattr(error.__cause__, "sqlite_errorcode", 0) & 0xFF
        # A quota or a limit of file sizes is "disk I/O error" to SQLite
        return code in {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}

    def _make_private(self) -> None:
        # Never by opening it: closing any descriptor of the file takes away the locks that SQLite
        # holds on it in this process, and another process would then fold in a log still in use
        with contextlib.suppress(FileExistsError):
            os.mknod(self.path, stat.S_IFREG | 0o600)
        found = self.path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise ConfigurationError(
                f"the journal {self.path} is no regular file; give it a path of its own"
            )
        self.path.chmod(0o600)
        self._file = (found.st_dev, found.st_ino)

    def _require_same_file(self) -> None:
        """Write nothing into a file that was removed: nobody would ever read it."""
        now_s = time.monotonic()
        if now_s - self._looked_s < 1.0:
            return
        try:
            found = self.path.stat()
            same = (found.st_dev, found.st_ino) == self._file
        except OSError:
            same = False
        if not same:
            raise BrokerUnavailableError(
                f"the journal {self.path} was removed or replaced while in use; restart the mesh"
            )
        self._looked_s = now_s

    def _prepare(self) -> None:
        run = self.connection.execute
        if sqlite3.sqlite_version_info < _MIN_SQLITE:
            raise ConfigurationError(
                f"SQLite {sqlite3.sqlite_version} is too old for a journal; use"
                f" {'.'.join(map(str, _MIN_SQLITE))} or later (it comes with Python)"
            )
        run("PRAGMA auto_vacuum = INCREMENTAL")  # in force only while the file is empty
        (mode,) = run("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise ConfigurationError(
                f"the journal {self.path} lies on a file system without shared memory"
                f" (journal mode {mode!r}); keep it on a local disk"
            )
        run(f"PRAGMA synchronous = {self._synchronous}")
        run(f"PRAGMA cache_size = -{_CACHE_KIB}")
        run(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        run(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
        run("BEGIN IMMEDIATE")
        try:
            self._make_tables()
            run("COMMIT")
        finally:
            if self.connection.in_transaction:
                run("ROLLBACK")

    def _make_tables(self) -> None:
        run = self.connection.execute
        (version,) = run("PRAGMA user_version").fetchone()
        (application,) = run("PRAGMA application_id").fetchone()
        (tables,) = run("SELECT count(*) FROM sqlite_master").fetchone()
        if not tables and not version and not application:
            for statement in _SCHEMA.split(";"):
                run(statement)
            run(f"PRAGMA application_id = {_APPLICATION_ID}")
            run(f"PRAGMA user_version = {_SCHEMA_VERSION}")
        elif application != _APPLICATION_ID:
            raise ConfigurationError(
                f"{self.path} is another program's database; give the journal a path of its own"
            )
        elif version != _SCHEMA_VERSION:
            raise ConfigurationError(
                f"the journal {self.path} has format {version}, this mesh reads"
                f" {_SCHEMA_VERSION}; use the version of the mesh that wrote it"
            )
