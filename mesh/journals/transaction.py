"""
One write transaction of the SQLite journal: what many callers change, gathered into few statements.

Statements are few because each one costs a crossing between Python and SQLite, and because other
processes wait for the transaction's end.
"""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mesh.deadletters import encode_letter
from mesh.errors import ConfigurationError
from mesh.journal import PARTITIONS
from mesh.journals.views import MAX_TOPICS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from mesh.deadletters import DeadLetter
    from mesh.journal import Record, Step
    from mesh.journals.consumers import Consumer, Moves

# Rows a statement: any number is made of few of them, and SQLite compiles each only once
_LENGTHS = (256, 128, 64, 32, 16, 8, 4, 2, 1)
_ERASED = ("events", "cursors", "members", "owners", "acked", "attempts", "done", "state", "dead")
_IF_NEW = " ON CONFLICT DO NOTHING"


@dataclass(slots=True, eq=False)
class Inserted:
    """How many events of one append were new; known when the transaction is over."""

    records: Sequence[Record]
    new: int = 0


class Names:
    """The numbers of topics and groups, remembered by the writer."""

    def __init__(self) -> None:
        """Know none."""
        self.topics: dict[str, int] = {}
        self.groups: dict[str, int] = {}

    def forget(self) -> None:
        """Know none any more: a transaction that made some was undone."""
        self.topics.clear()
        self.groups.clear()


class Transaction:
    """
    What one transaction changes; `flush` writes it.

    Args:
        connection: In a transaction.
        names: Known numbers.
        at_s: The wall clock.
        mono_s: The clock of leases.
    """

    def __init__(
        self, connection: sqlite3.Connection, names: Names, at_s: float, mono_s: float
    ) -> None:
        """Change nothing yet."""
        self.run = connection.execute
        self.connection = connection
        self._names = names
        self.at_ms = int(at_s * 1000)
        self.mono_ms = int(mono_s * 1000)
        #: Called in the writer's thread when the transaction is kept.
        self.after: list[Callable[[], object]] = []
        #: Topics whose readers, here and elsewhere, have something new.
        self.topics: set[str] = set()
        #: Topics whose readers in this process may go on.
        self.local_topics: set[str] = set()
        self._inserted: list[Inserted] = []
        self._settled: dict[Consumer, set[int]] = {}
        self._done: list[tuple[int, int, str]] = []
        self._letters: list[DeadLetter] = []
        self._state: dict[tuple[int, str], bytes | None] = {}

    # -- what callers change -------------------------------------------------------------------

    def insert(self, records: Sequence[Record]) -> Inserted:
        """Keep events."""
        inserted = Inserted(records)
        if records:
            self._inserted.append(inserted)
            self.topics.update(record.topic for record in records)
        return inserted

    def bury(self, letters: Iterable[DeadLetter]) -> None:
        """Keep dead letters."""
        self._letters.extend(letters)

    def commit(self, group: str, consumer: Consumer | None, steps: Sequence[Step]) -> list[Step]:
        """Apply steps; gives those that were refused."""
        group_id = self.group_id(group)
        settled: set[int] = set()
        if consumer is not None:
            self._check_ownership(consumer, group_id)
            settled = self._settled.setdefault(consumer, set())
        refused: list[Step] = []
        is_untrue = False
        for step in steps:
            if is_untrue and step.settles:
                refused.append(step)
                continue
            if len(step.acks) == 1 and not step.done:
                # As nearly all are: without sets
                seq = int(step.acks[0].position)
                if consumer is None or not consumer.holds(step.acks[0]) or seq in settled:
                    refused.append(step)
                    is_untrue = is_untrue or bool(step.state)
                    continue
                settled.add(seq)
            elif step.acks or step.done:
                seqs = {int(delivery.position) for delivery in step.acks}
                marked = {int(delivery.position) for delivery, _ in step.done}
                owed = [*step.acks, *(delivery for delivery, _ in step.done)]
                is_held = consumer is not None and all(map(consumer.holds, owed))
                if not is_held or not settled.isdisjoint(seqs | marked):
                    refused.append(step)
                    is_untrue = is_untrue or bool(step.state)
                    continue
                settled |= seqs
                self._done += [(group_id, int(each.position), name) for each, name in step.done]
                if consumer is not None and marked:
                    self._mark_after(consumer, step)
            if step.records:
                self.insert(step.records)
            if step.dead:
                self.bury(step.dead)
            for name, value in step.state.items():
                self._state[group_id, name] = value
        return refused

    def exhume(self, letters: Sequence[DeadLetter]) -> int:
        """Remove dead letters as they were read; gives how many."""
        self.flush()
        statement = "DELETE FROM dead WHERE id = ? AND at_s = ?"
        return sum(self.run(statement, (each.id, each.at_s)).rowcount for each in letters)

    def delete_events(self, seqs: Sequence[tuple[int]]) -> None:
        """Forget events."""
        self.connection.executemany("DELETE FROM events WHERE seq = ?", seqs)

    def give_pages_back(self, count: int) -> None:
        """Make the file shorter by pages that hold nothing, once the transaction is over."""

        def shorten() -> None:
            # A script, because `execute` stops after the first page; what another process's
            # transaction prevents is done the next time
            with contextlib.suppress(sqlite3.OperationalError):
                self.connection.executescript(f"PRAGMA incremental_vacuum({count})")

        self.after.append(shorten)

    # -- names and groups ----------------------------------------------------------------------

    def topic_id(self, name: str) -> int:
        """Give a topic's number; a new one gets one."""
        return self._number("topics", "name", name, self._names.topics)

    def group_id(self, name: str) -> int:
        """Give a group's number; a new one gets one."""
        return self._number("groups", "name, version", name, self._names.groups)

    def version(self, group_id: int) -> int:
        """Give the number that changes with a group's members, owners and topics."""
        row = self.run("SELECT version FROM groups WHERE id = ?", (group_id,)).fetchone()
        return int(row[0])

    def next_version(self, group_id: int) -> int:
        """Let every consumer of a group look again at what it owns."""
        self.run("UPDATE groups SET version = version + 1 WHERE id = ?", (group_id,))
        return self.version(group_id)

    def last_seq(self) -> int:
        """Give the number of the last event."""
        row = self.run("SELECT seq FROM sqlite_sequence WHERE name = 'events'").fetchone()
        return 0 if row is None else int(row[0])

    def declare(self, group: str, topics: Collection[str], start: str) -> None:
        """Give a group cursors for topics it does not hear yet."""
        self.flush()
        group_id = self.group_id(group)
        seq = self.last_seq() if start == "now" else 0
        rows = [
            (group_id, self.topic_id(topic), partition, seq)
            for topic in topics
            for partition in range(PARTITIONS)
        ]
        added = self.connection.executemany(
            "INSERT INTO cursors VALUES (?, ?, ?, ?, 0) ON CONFLICT DO NOTHING", rows
        ).rowcount
        (heard,) = self.run(
            "SELECT count(*) FROM cursors WHERE group_id = ? AND partition = 0", (group_id,)
        ).fetchone()
        if heard > MAX_TOPICS:
            raise ConfigurationError(
                f"group {group!r} would hear {heard} topics; a group hears at most {MAX_TOPICS}"
            )
        if added > 0:
            self.next_version(group_id)

    def keep_cursors(self, consumer: Consumer, moves: Moves) -> None:
        """Write what settling changed."""
        group_id = self.group_id(consumer.group)
        if moves.cursors:
            _insert(
                self.connection,
                "INSERT INTO cursors VALUES",
                5,
                [
                    value
                    for place, seq in moves.cursors.items()
                    for value in (group_id, *place, seq, 0)
                ],
                " ON CONFLICT DO UPDATE SET seq = excluded.seq WHERE excluded.seq > seq",
            )
        if moves.acked:
            _insert(
                self.connection,
                "INSERT INTO acked VALUES",
                4,
                [value for seq, place in moves.acked for value in (group_id, *place, seq)],
                _IF_NEW,
            )
        for place in moves.passed:
            self.run(
                "DELETE FROM acked WHERE group_id = ? AND topic = ? AND partition = ? AND seq <= ?",
                (group_id, *place, moves.cursors[place]),
            )

    # -- writing -------------------------------------------------------------------------------

    def flush(self) -> None:
        """Write all that was gathered."""
        if self._inserted:
            self._insert_events()
        if self._done:
            values = [value for mark in self._done for value in mark]
            _insert(self.connection, "INSERT INTO done VALUES", 3, values, _IF_NEW)
        for consumer, settled in self._settled.items():
            self._settle(consumer, settled)
        if self._letters:
            self._insert_letters()
        for (group_id, name), value in self._state.items():
            if value is None:
                self.run("DELETE FROM state WHERE group_id = ? AND name = ?", (group_id, name))
            else:
                self.run("INSERT OR REPLACE INTO state VALUES (?, ?, ?)", (group_id, name, value))
        self._inserted, self._settled, self._done = [], {}, []
        self._letters, self._state = [], {}

    def erase(self) -> None:
        """Forget everything but names."""
        for table in _ERASED:
            self.run(f"DELETE FROM {table}")  # noqa: S608 - names of our own

    def _insert_events(self) -> None:
        before = self.last_seq()
        records = [record for inserted in self._inserted for record in inserted.records]
        topics = {topic: self.topic_id(topic) for topic in {record.topic for record in records}}
        at_ms = self.at_ms
        values: list[Any] = []
        for record in records:
            values += (topics[record.topic], record.partition, record.id, record.frame, at_ms)
        new = _insert(
            self.connection,
            "INSERT INTO events (topic, partition, id, frame, at_ms) VALUES",
            5,
            values,
            " ON CONFLICT (id) DO NOTHING",
        )
        if new == len(records):
            for inserted in self._inserted:
                inserted.new = len(inserted.records)
            return
        # Some were known: whoever said an id first has it counted
        kept = {str(row[0]) for row in self.run("SELECT id FROM events WHERE seq > ?", (before,))}
        for inserted in self._inserted:
            ids = {record.id for record in inserted.records} & kept
            inserted.new = len(ids)
            kept -= ids

    def _settle(self, consumer: Consumer, settled: set[int]) -> None:
        holding = consumer.holding
        if holding is None or not settled:
            return
        moves = consumer.moves(settled)
        self.keep_cursors(consumer, moves)
        swept = consumer.sweep(always=False)
        self.keep_cursors(consumer, swept)
        group_id = self.group_id(consumer.group)
        for seq in settled & holding.counted:
            self.run("DELETE FROM attempts WHERE group_id = ? AND seq = ?", (group_id, seq))
        marked = {seq for _, seq, _ in self._done} | holding.done.keys()
        for seq in settled & marked:
            self.run("DELETE FROM done WHERE group_id = ? AND seq = ?", (group_id, seq))

        def let_go() -> None:
            consumer.swept(swept)
            if consumer.settle(settled, moves):
                self.local_topics.update(holding.topics.values())

        self.after.append(let_go)

    def _insert_letters(self) -> None:
        for letter in self._letters:
            self.run(
                "INSERT OR REPLACE INTO dead"
                " (id, at_s, topic, agent, handler, reason, error, error_line, letter)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    letter.id,
                    letter.at_s,
                    letter.topic,
                    letter.agent,
                    letter.handler or "",
                    letter.reason,
                    letter.error,
                    letter.error.partition("\n")[0],
                    encode_letter(letter),
                ),
            )

    def _check_ownership(self, consumer: Consumer, group_id: int) -> None:
        """Let the consumer forget what is another's by now, before it settles any of it."""
        holding = consumer.holding
        if holding is None or self.version(group_id) == holding.version:
            return
        rows = self.run(
            "SELECT partition FROM owners WHERE group_id = ? AND consumer = ? AND incarnation = ?",
            (group_id, consumer.name, consumer.incarnation),
        )
        owned = {partition for (partition,) in rows}
        if lost := holding.owned - owned:
            consumer.lose(lost)

    def _mark_after(self, consumer: Consumer, step: Step) -> None:
        def mark() -> None:
            if consumer.holding is not None:
                for delivery, handler in step.done:
                    seq = int(delivery.position)
                    if seq in consumer.held:
                        consumer.holding.done.setdefault(seq, set()).add(handler)

        self.after.append(mark)

    def _number(self, table: str, columns: str, name: str, known: dict[str, int]) -> int:
        if (number := known.get(name)) is not None:
            return number
        values = "?, 1" if "," in columns else "?"
        self.run(
            f"INSERT INTO {table} ({columns}) VALUES ({values}) ON CONFLICT DO NOTHING",  # noqa: S608
            (name,),
        )
        row = self.run(f"SELECT id FROM {table} WHERE name = ?", (name,)).fetchone()  # noqa: S608
        known[name] = int(row[0])
        return known[name]


def undeclared(group: str) -> ConfigurationError:
    """Give the error for a group that hears nothing."""
    return ConfigurationError(
        f"group {group!r} was never declared; call `await journal.declare(group, topics)`"
    )


def _insert(
    connection: sqlite3.Connection, head: str, width: int, values: Sequence[Any], tail: str
) -> int:
    """Insert rows, many a statement; gives how many were inserted or changed."""
    count, at, left = 0, 0, len(values) // width
    one = f"({', '.join('?' * width)})"
    while left:
        length = next(length for length in _LENGTHS if length <= left)
        statement = f"{head} {', '.join([one] * length)}{tail}"
        count += connection.execute(statement, values[at : at + length * width]).rowcount
        at += length * width
        left -= length
    return count
