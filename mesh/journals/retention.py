"""
What the SQLite journal forgets: old events, a few at a time, so that nobody waits for it; groups
that are gone for good.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mesh.journals.local import still_lives
from mesh.journals.views import MAX_TOPICS, merged, used_bytes

if TYPE_CHECKING:
    from mesh.journals.transaction import Transaction

_BATCH = 500
_FREED_PAGES = 4000
# What an event takes beside its frame, in the table and its indexes
_ROW_BYTES = 100
#: The tables of what is noted of groups.
_OF_GROUPS = ("cursors", "members", "owners", "acked", "attempts", "done", "state")


@dataclass(slots=True)
class Sweep:
    """One `trim`, over several transactions."""

    #: Forget what is older, in milliseconds since 1970.
    before_ms: int | None
    #: Forget the oldest until the file is smaller.
    max_bytes: int | None
    gone: int = 0
    finished: bool = False
    #: So many topics are finished: one SELECT reads only so many side by side.
    passed: int = 0
    #: Looked at already, by topic.
    reached: dict[int, int] = field(default_factory=dict)

    def forget_some(self, tx: Transaction) -> None:
        """Forget the next few events."""
        tx.flush()
        excess = 0 if self.max_bytes is None else used_bytes(tx.connection) - self.max_bytes
        settled, ends = _settled_up_to(tx)
        topics = [
            topic
            for (topic,) in tx.run(
                "SELECT id FROM topics ORDER BY id LIMIT ? OFFSET ?", (MAX_TOPICS, self.passed)
            )
        ]
        rows: list[tuple[int, int, int, int, int]] = []
        if topics and (excess > 0 or self.before_ms is not None):
            places = [value for topic in topics for value in (topic, self.reached.get(topic, 0))]
            rows = tx.run(
                merged("seq, topic, partition, at_ms, length(frame)", len(topics)),
                [*places, _BATCH],
            ).fetchall()
        gone = []
        is_over = len(rows) < _BATCH
        for seq, topic, partition, at_ms, size in rows:
            if excess <= 0 and (self.before_ms is None or at_ms >= self.before_ms):
                is_over = True
                break
            # Behind the furthest cursor there is nothing to forget, however much there is
            self.reached[topic] = seq if seq < ends.get(topic, seq + 1) else 2**62
            if seq <= settled.get((topic, partition), seq):
                gone.append((seq,))
                excess -= size + _ROW_BYTES
        tx.delete_events(gone)
        tx.give_pages_back(_FREED_PAGES)
        self.gone += len(gone)
        if is_over:
            self.passed += MAX_TOPICS
            self.finished = len(topics) < MAX_TOPICS


def forget_group(tx: Transaction, group: str, topic: str | None, lease_ms: int) -> bool:
    """
    Remove a group and all that is noted of it, or one topic of it; False when there is none.

    Raises:
        ConfigurationError: A consumer of it lives.
    """
    tx.flush()
    found = tx.run("SELECT id FROM groups WHERE name = ?", (group,)).fetchone()
    if found is None:
        return False
    group_id: int = found[0]
    rows = tx.run("SELECT consumer, lease_until_ms FROM members WHERE group_id = ?", (group_id,))
    living = [name for name, until_ms in rows if tx.mono_ms <= until_ms <= tx.mono_ms + lease_ms]
    if living:
        raise still_lives(group, living)
    known = _remove_all(tx, group_id) if topic is None else _remove_topic(tx, group_id, topic)
    # Its number stays: other processes have noted it
    tx.next_version(group_id)
    return known


def _remove_all(tx: Transaction, group_id: int) -> bool:
    rows = [
        tx.run(f"DELETE FROM {table} WHERE group_id = ?", (group_id,)).rowcount  # noqa: S608
        for table in _OF_GROUPS
    ]
    return any(rows)


def _remove_topic(tx: Transaction, group_id: int, topic: str) -> bool:
    found = tx.run("SELECT id FROM topics WHERE name = ?", (topic,)).fetchone()
    if found is None:
        return False
    place = group_id, found[0]
    for table in ("attempts", "done"):
        tx.run(
            f"DELETE FROM {table} WHERE group_id = ? AND EXISTS"  # noqa: S608 - names of our own
            f" (SELECT 1 FROM events WHERE events.seq = {table}.seq AND events.topic = ?)",
            place,
        )
    tx.run("DELETE FROM acked WHERE group_id = ? AND topic = ?", place)
    return tx.run("DELETE FROM cursors WHERE group_id = ? AND topic = ?", place).rowcount > 0


def _settled_up_to(tx: Transaction) -> tuple[dict[tuple[int, int], int], dict[int, int]]:
    """Tell how far all groups are: by (topic, partition), and at most by topic."""
    settled: dict[tuple[int, int], int] = {}
    ends: dict[int, int] = {}
    for topic, partition, seq in tx.run(
        "SELECT topic, partition, min(seq) FROM cursors GROUP BY topic, partition"
    ):
        settled[topic, partition] = seq
        ends[topic] = max(seq, ends.get(topic, 0))
    return settled, ends
