"""What the SQLite journal reads: events for consumers, and views for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mesh.deadletters import DeadLetter, decode_letter
from mesh.errors import ConfigurationError
from mesh.journal import (
    MAX_UNSETTLED,
    PARTITIONS,
    DeadCount,
    DeadQuery,
    Delivery,
    GroupView,
    Size,
    Stored,
)

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Sequence

    from mesh.journals.consumers import Consumer

#: seq, topic, partition, id, frame
Row = tuple[int, int, int, str, bytes]
#: A read hands out no more than so many bytes, and at least one event.
_MAX_READ_BYTES = 4 * 1024 * 1024
#: So many topics one SELECT reads side by side; SQLite allows 500 terms.
MAX_TOPICS = 400


def hand_out(
    connection: sqlite3.Connection, consumer: Consumer, limit: int, mono_ms: int, lease_ms: int
) -> list[Delivery]:
    """
    Hand a consumer its next events, as far as it may hold more.

    Nothing is written: where it was is known from the cursors, what it holds from memory. When the
    group has changed meanwhile, the consumer becomes stale and gets nothing.
    """
    while True:
        with consumer.lock:
            holding = consumer.holding
            room = min(limit, MAX_UNSETTLED - len(consumer.held))
            if holding is None or consumer.stale or consumer.alone is not None or room <= 0:
                return []
            turn = consumer.turn
            partitions = holding.owned - holding.surplus
            begins = {topic: consumer.positions.get(topic, 0) for topic in holding.topics}
        # One transaction, or the version would be of another moment than the events
        connection.execute("BEGIN")
        try:
            stale, last = _look_at_group(connection, holding.version, consumer, mono_ms, lease_ms)
            rows: list[Row] = []
            ended = True
            if not stale:
                rows, ended = _next_rows(connection, begins, partitions, room)
        finally:
            connection.execute("COMMIT")
        with consumer.lock:
            if stale:
                consumer.stale = True
                return []
            if turn != consumer.turn or consumer.holding is not holding:
                continue
            reached = last if ended else rows[-1][0]
            for topic in begins:
                consumer.positions[topic] = max(begins[topic], reached)
            handed = []
            for seq, topic, partition, name, frame in rows:
                place = topic, partition
                if (
                    seq <= holding.cursors[place]
                    or seq in consumer.held
                    or seq in holding.acked.get(place, ())
                ):
                    continue  # met again after looking anew
                done = frozenset(holding.done[seq]) if seq in holding.done else frozenset()
                delivery = Delivery(
                    seq, holding.topics[topic], partition, name, frame, 1, done, holding.version
                )
                consumer.held[seq] = place, delivery
                handed.append(delivery)
            if handed or ended:
                return handed


def _look_at_group(
    connection: sqlite3.Connection, version: int, consumer: Consumer, mono_ms: int, lease_ms: int
) -> tuple[bool, int]:
    """Say whether a consumer must look anew at its group, and the number of the last event."""
    found, lapsed, last = connection.execute(
        "SELECT version, (SELECT count(*) FROM members WHERE group_id = groups.id"
        " AND consumer != ? AND lease_until_ms NOT BETWEEN ? AND ?),"
        " (SELECT seq FROM sqlite_sequence WHERE name = 'events') FROM groups WHERE name = ?",
        (consumer.name, mono_ms, mono_ms + lease_ms, consumer.group),
    ).fetchone()
    return found != version or lapsed > 0, last or 0


def _next_rows(
    connection: sqlite3.Connection,
    begins: dict[int, int],
    partitions: Collection[int],
    room: int,
) -> tuple[list[Row], bool]:
    """Give the next events of several topics in one order, and whether there are no more."""
    if not partitions:
        return [], True
    wanted = "" if len(partitions) == PARTITIONS else f" AND partition IN ({_list(partitions)})"
    cursor = connection.execute(
        merged("seq, topic, partition, id, frame", len(begins), wanted),
        [value for place in begins.items() for value in place] + [room],
    )
    rows: list[Row] = []
    size = 0
    for row in cursor:
        rows.append(row)
        size += len(row[4])
        if size >= _MAX_READ_BYTES:
            cursor.close()
            return rows, False
    return rows, len(rows) < room


def merged(columns: str, topics: int, condition: str = "") -> str:
    """
    Give a SELECT of some topics' events in the order of `seq`: (topic, after) each, then a limit.

    SQLite walks one index range a topic side by side; `topic IN (...)` would read and sort all of
    a backlog for the first page of it.
    """
    one = f"SELECT {columns} FROM events WHERE topic = ? AND seq > ?{condition}"  # noqa: S608
    return f"{' UNION ALL '.join([one] * topics)} ORDER BY seq LIMIT ?"


def group_views(connection: sqlite3.Connection, now_ms: int) -> list[GroupView]:
    """Count what every group has not settled."""
    places = connection.execute(
        "SELECT groups.name, topics.name, group_id, topic, min(seq) FROM cursors"
        " JOIN groups ON groups.id = group_id JOIN topics ON topics.id = topic"
        " GROUP BY group_id, topic ORDER BY 1, 2"
    ).fetchall()
    views = []
    for group, topic, group_id, topic_id, floor in places:
        pending, oldest_ms = connection.execute(
            "SELECT count(*), min(at_ms) FROM events JOIN cursors"
            " ON group_id = :group AND cursors.topic = :topic"
            " AND cursors.partition = events.partition"
            " WHERE events.topic = :topic AND events.seq > :floor AND events.seq > cursors.seq"
            " AND NOT EXISTS"
            " (SELECT 1 FROM acked WHERE acked.group_id = :group AND acked.topic = :topic"
            "  AND acked.partition = events.partition AND acked.seq = events.seq)",
            {"group": group_id, "topic": topic_id, "floor": floor},
        ).fetchone()
        age_ms = 0 if oldest_ms is None else max(0, now_ms - oldest_ms)
        views.append(GroupView(group, topic, pending, age_ms / 1000))
    return views


def load_state(connection: sqlite3.Connection, group: str) -> dict[str, bytes]:
    """Give the state of a group."""
    rows = connection.execute(
        "SELECT state.name, value FROM state JOIN groups ON groups.id = group_id"
        " WHERE groups.name = ?",
        (group,),
    )
    return dict(rows.fetchall())


def scan(
    connection: sqlite3.Connection, topics: Collection[str] | None, after: int, limit: int
) -> list[Stored]:
    """Give kept events, the oldest first."""
    names = dict(connection.execute("SELECT id, name FROM topics").fetchall())
    columns = "seq, topic, id, frame, at_ms"
    if topics is None:
        rows = connection.execute(
            f"SELECT {columns} FROM events WHERE seq > ? ORDER BY seq LIMIT ?",  # noqa: S608
            (after, limit),
        )
    else:
        wanted = [number for number, name in names.items() if name in topics]
        if not wanted:
            return []
        if len(wanted) > MAX_TOPICS:
            raise ConfigurationError(
                f"a scan of {len(wanted)} topics; name at most {MAX_TOPICS}, or none for all"
            )
        places = [value for number in wanted for value in (number, after)]
        rows = connection.execute(merged(columns, len(wanted)), [*places, limit])
    return [
        Stored(seq, names[topic], name, frame, at_ms / 1000)
        for seq, topic, name, frame, at_ms in rows
    ]


def newest(connection: sqlite3.Connection) -> int | None:
    """Give the number of the newest event."""
    row = connection.execute("SELECT max(seq) FROM events").fetchone()
    return None if row is None else row[0]


def size(connection: sqlite3.Connection) -> Size:
    """Count events and bytes."""
    (events,) = connection.execute("SELECT count(*) FROM events").fetchone()
    return Size(events, used_bytes(connection))


def used_bytes(connection: sqlite3.Connection) -> int:
    """Give what the file holds, without the pages that are free."""
    pages, free, page = (
        int(connection.execute(f"PRAGMA {name}").fetchone()[0])
        for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * page


def dead(connection: sqlite3.Connection, query: DeadQuery, limit: int) -> list[DeadLetter]:
    """Give dead letters, the newest first."""
    condition, values = _chosen(query)
    rows = connection.execute(
        f"SELECT letter FROM dead{condition} ORDER BY at_s DESC, number DESC LIMIT ?",  # noqa: S608
        [*values, limit],
    )
    return [decode_letter(stored) for (stored,) in rows]


def count_dead(
    connection: sqlite3.Connection, query: DeadQuery
) -> dict[tuple[str, str, str, str], DeadCount]:
    """Count dead letters by agent, handler, reason and the first line of the error."""
    condition, values = _chosen(query)
    columns = "agent, handler, reason, error_line"
    rows = connection.execute(
        f"SELECT {columns}, count(*), min(at_s), max(at_s)"  # noqa: S608
        f" FROM dead{condition} GROUP BY {columns}",
        values,
    )
    return {
        (agent, handler, reason, line): DeadCount(count, oldest_s, newest_s)
        for agent, handler, reason, line, count, oldest_s, newest_s in rows
    }


def _chosen(query: DeadQuery) -> tuple[str, Sequence[Any]]:
    terms, values = [], []
    for column in ("topic", "agent", "handler", "reason"):
        if (wanted := getattr(query, column)) is not None:
            terms.append(f"{column} = ?")
            values.append(wanted)
    if query.error is not None:
        terms.append("substr(error, 1, length(?)) = ?")
        values += [query.error, query.error]
    if query.ids is not None:
        terms.append(f"id IN ({', '.join('?' * len(query.ids))})")
        values += sorted(query.ids)
    return (f" WHERE {' AND '.join(terms)}" if terms else "", values)


def _list(numbers: Collection[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
