"""
Who owns which partitions of a group, in the file of the SQLite journal.

A group's `version` changes with its members, owners and topics; who knows the version knows that
what it owns is still its own. `incarnation` tells a consumer from its predecessor of the same name.

What a lost consumer may have been handed is worked out when it is buried. It read in the order of
`seq` over the partitions it had got together (a *cohort*) and held at most `MAX_UNSETTLED` at once:
so of each topic, it held none but the first `MAX_UNSETTLED` unsettled events of each cohort.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.errors import ClosedError
from mesh.journal import MAX_UNSETTLED, PARTITIONS, Delivery
from mesh.journals.consumers import Holding, pid_of
from mesh.journals.local import share_of
from mesh.journals.transaction import undeclared

if TYPE_CHECKING:
    from mesh.journals.consumers import Consumer, Place, Spot
    from mesh.journals.transaction import Transaction


def join(tx: Transaction, consumer: Consumer, lease_ms: int) -> None:
    """
    Let a consumer join or look again at what is its own.

    Raises:
        ConfigurationError: The group hears nothing.
        ClosedError: A successor of the same name has joined.
    """
    tx.flush()
    group_id = tx.group_id(consumer.group)
    topics = _topics(tx, group_id)
    if not topics:
        raise undeclared(consumer.group)
    fresh = _become_member(tx, group_id, consumer)
    lease_until_ms = tx.mono_ms + lease_ms
    tx.run(
        "INSERT OR REPLACE INTO members VALUES (?, ?, ?, ?)",
        (group_id, consumer.name, consumer.incarnation, lease_until_ms),
    )
    members = _living(tx, group_id, consumer.name, lease_ms)
    fair = share_of(consumer.name, members)
    owners = dict(tx.run("SELECT partition, consumer FROM owners WHERE group_id = ?", (group_id,)))
    mine = {partition for partition, name in owners.items() if name == consumer.name}
    tx.run(
        "UPDATE owners SET incarnation = ? WHERE group_id = ? AND consumer = ?",
        (consumer.incarnation, group_id, consumer.name),
    )
    in_work = set() if fresh else {partition for (_, partition), _ in consumer.held.values()}
    spare = mine - fair - in_work
    free = fair - owners.keys()
    if spare or free:
        cohort = tx.next_version(group_id)
        for partition in spare:
            tx.run("DELETE FROM owners WHERE group_id = ? AND partition = ?", (group_id, partition))
        for partition in free:
            tx.run(
                "INSERT INTO owners VALUES (?, ?, ?, ?, ?)",
                (group_id, partition, consumer.name, consumer.incarnation, cohort),
            )
    if fresh or spare:
        tx.topics.update(topics.values())
    owned = frozenset((mine - spare) | free)
    holding = _load(tx, group_id, topics, owned)
    holding.version, holding.fresh = tx.version(group_id), fresh
    holding.lease_until_ms, holding.surplus = lease_until_ms, owned - fair
    tx.after.append(lambda: consumer.take(holding))


def hand_out_suspect(tx: Transaction, consumer: Consumer) -> Delivery | None:
    """Give the oldest suspect with its count raised; None: look again at what is owned."""
    tx.flush()
    holding = consumer.holding
    group_id = tx.group_id(consumer.group)
    if holding is None or consumer.stale or tx.version(group_id) != holding.version:
        consumer.stale = True
        return None
    suspects = [spot for spot in holding.suspects if spot[1][1] not in holding.surplus]
    if not suspects:
        return None
    seq, place = suspects[0]
    (count,) = tx.run(
        "INSERT INTO attempts VALUES (?, ?, 2)"
        " ON CONFLICT DO UPDATE SET count = count + 1 RETURNING count",
        (group_id, seq),
    ).fetchone()
    name, frame = tx.run("SELECT id, frame FROM events WHERE seq = ?", (seq,)).fetchone()

    done = frozenset(holding.done.get(seq, ()))
    delivery = Delivery(
        seq, holding.topics[place[0]], place[1], name, frame, count, done, holding.version
    )

    def hold() -> None:
        with consumer.lock:
            consumer.held[seq] = place, delivery
            consumer.alone = seq
            holding.counted.add(seq)

    tx.after.append(hold)
    return delivery


def release(tx: Transaction, consumer: Consumer, deliveries: list[Delivery]) -> None:
    """Give events back as if they had never been handed out."""
    tx.flush()
    if consumer.holding is None:
        return
    group_id = tx.group_id(consumer.group)
    alone = consumer.alone
    if alone is not None and any(
        each.position == alone and consumer.holds(each) for each in deliveries
    ):
        _uncount(tx, group_id, alone)
    topics = consumer.holding.topics

    def give_back() -> None:
        consumer.give_back(deliveries)
        tx.local_topics.update(topics.values())

    tx.after.append(give_back)


def release_alone(tx: Transaction, consumer: Consumer) -> None:
    """Give back a suspect whose reader was cancelled before it got it."""
    tx.flush()
    if consumer.alone is not None:
        release(tx, consumer, [consumer.held[consumer.alone][1]])


def leave(tx: Transaction, consumer: Consumer) -> None:
    """End a consumer; what it holds is nobody's, and not suspect."""
    tx.flush()
    tx.after.append(consumer.forget)
    # (It may have joined in this very transaction, and not know what it owns)
    group_id = tx.group_id(consumer.group)
    row = tx.run(
        "SELECT incarnation FROM members WHERE group_id = ? AND consumer = ?",
        (group_id, consumer.name),
    ).fetchone()
    if row is None or row[0] != consumer.incarnation:
        return
    if consumer.alone is not None:
        _uncount(tx, group_id, consumer.alone)
    tx.keep_cursors(consumer, consumer.sweep(always=True))
    _remove(tx, group_id, consumer.name)
    tx.topics.update(_topics(tx, group_id).values())


def free(tx: Transaction, group: str, consumer: str, pid: int | None = None) -> None:
    """Take everything from a dead consumer; if it is another process than `pid`, it lives."""
    tx.flush()
    group_id = tx.group_id(group)
    found = tx.run(
        "SELECT incarnation FROM members WHERE group_id = ? AND consumer = ?", (group_id, consumer)
    ).fetchone()
    if found and pid in (None, pid_of(found[0])):
        suspect(tx, group_id, consumer)
        _remove(tx, group_id, consumer)
        tx.topics.update(_topics(tx, group_id).values())


def renew(tx: Transaction, consumer: Consumer, lease_ms: int) -> None:
    """Prolong a lease, and bring cursors forward that nothing else moves."""
    tx.flush()
    if consumer.holding is None:
        return
    group_id = tx.group_id(consumer.group)
    renewed = tx.run(
        "UPDATE members SET lease_until_ms = ?"
        " WHERE group_id = ? AND consumer = ? AND incarnation = ?",
        (tx.mono_ms + lease_ms, group_id, consumer.name, consumer.incarnation),
    ).rowcount
    if renewed:
        consumer.holding.lease_until_ms = tx.mono_ms + lease_ms
        if tx.version(group_id) == consumer.holding.version:
            moves = consumer.sweep(always=True)
            tx.keep_cursors(consumer, moves)
            tx.after.append(lambda: consumer.swept(moves))


def suspect(tx: Transaction, group_id: int, consumer: str) -> None:
    """Note in the cursors what a lost consumer may have been handed."""
    cohorts: dict[int, set[int]] = {}
    for partition, cohort in tx.run(
        "SELECT partition, cohort FROM owners WHERE group_id = ? AND consumer = ?",
        (group_id, consumer),
    ):
        cohorts.setdefault(cohort, set()).add(partition)
    for topic in _topics(tx, group_id):
        for partitions in cohorts.values():
            _suspect_first(tx, group_id, topic, partitions)


def _suspect_first(tx: Transaction, group_id: int, topic: int, partitions: set[int]) -> None:
    """Suspect the first unsettled events of some partitions and a topic, in the order of `seq`."""
    rows = tx.run(
        "SELECT partition, seq, suspect_to FROM cursors WHERE group_id = ? AND topic = ?",
        (group_id, topic),
    )
    # Where suspects are left from before, nothing newer was handed out
    cursors = {
        partition: seq for partition, seq, to in rows if partition in partitions and to <= seq
    }
    if not cursors:
        return
    acked = {
        seq
        for (seq,) in tx.run(
            "SELECT seq FROM acked WHERE group_id = ? AND topic = ?", (group_id, topic)
        )
    }
    last: dict[int, int] = {}
    left = MAX_UNSETTLED
    events = tx.run(
        "SELECT seq, partition FROM events WHERE topic = ? AND seq > ? ORDER BY seq",
        (topic, min(cursors.values())),
    )
    for seq, partition in events:
        if seq > cursors.get(partition, seq) and seq not in acked:
            last[partition] = seq
            left -= 1
            if not left:
                break
    for partition, seq in last.items():
        tx.run(
            "UPDATE cursors SET suspect_to = ? WHERE group_id = ? AND topic = ? AND partition = ?",
            (seq, group_id, topic, partition),
        )


def _become_member(tx: Transaction, group_id: int, consumer: Consumer) -> bool:
    """Make a member of who is none, in the place of a predecessor; False: it was one already."""
    row = tx.run(
        "SELECT incarnation FROM members WHERE group_id = ? AND consumer = ?",
        (group_id, consumer.name),
    ).fetchone()
    if row is not None:
        if row[0] == consumer.incarnation:
            return False
        if consumer.was_member:
            raise ClosedError(
                f"consumer {consumer.name!r} of group {consumer.group!r}: a successor of this name"
                " has taken over; this one must stop"
            )
        suspect(tx, group_id, consumer.name)
    tx.next_version(group_id)
    return True


def _living(tx: Transaction, group_id: int, me: str, lease_ms: int) -> list[str]:
    """Give the members whose lease runs; the others are buried."""
    living = []
    rows = tx.run("SELECT consumer, lease_until_ms FROM members WHERE group_id = ?", (group_id,))
    for name, until_ms in rows.fetchall():
        # A lease from far ahead was given before the machine, and with it this clock, began anew
        if name == me or tx.mono_ms <= until_ms <= tx.mono_ms + lease_ms:
            living.append(name)
        else:
            suspect(tx, group_id, name)
            _remove(tx, group_id, name)
    return living


def _remove(tx: Transaction, group_id: int, consumer: str) -> None:
    for table in ("owners", "members"):
        tx.run(
            f"DELETE FROM {table} WHERE group_id = ? AND consumer = ?",  # noqa: S608 - no input
            (group_id, consumer),
        )
    tx.next_version(group_id)


def _uncount(tx: Transaction, group_id: int, seq: int) -> None:
    tx.run("UPDATE attempts SET count = count - 1 WHERE group_id = ? AND seq = ?", (group_id, seq))


def _topics(tx: Transaction, group_id: int) -> dict[int, str]:
    rows = tx.run(
        "SELECT id, name FROM topics"
        " WHERE id IN (SELECT topic FROM cursors WHERE group_id = ? AND partition = 0)",
        (group_id,),
    )
    return dict(rows.fetchall())


def _load(tx: Transaction, group_id: int, topics: dict[int, str], owned: frozenset[int]) -> Holding:
    """Look up how far owned partitions are."""
    cursors: dict[Place, int] = {}
    bounds: dict[Place, int] = {}
    for topic, partition, seq, suspect_to in tx.run(
        "SELECT topic, partition, seq, suspect_to FROM cursors WHERE group_id = ?", (group_id,)
    ):
        if partition in owned:
            cursors[topic, partition] = seq
            if suspect_to > seq:
                bounds[topic, partition] = suspect_to
    acked: dict[Place, set[int]] = {}
    for topic, partition, seq in tx.run(
        "SELECT topic, partition, seq FROM acked WHERE group_id = ?", (group_id,)
    ):
        if (topic, partition) in cursors:
            acked.setdefault((topic, partition), set()).add(seq)
    done: dict[int, set[str]] = {}
    for seq, handler in tx.run("SELECT seq, handler FROM done WHERE group_id = ?", (group_id,)):
        done.setdefault(seq, set()).add(handler)
    counted = {seq for (seq,) in tx.run("SELECT seq FROM attempts WHERE group_id = ?", (group_id,))}
    suspects: list[Spot] = []
    for topic in {place[0] for place in bounds}:
        suspects += _find_suspects(tx, topic, cursors, bounds, acked)
    return Holding(
        version=0,
        fresh=False,
        lease_until_ms=0,
        topics=topics,
        owned=owned,
        surplus=frozenset(),
        cursors=cursors,
        bounds=bounds,
        acked=acked,
        done=done,
        suspects=sorted(suspects),
        counted=counted,
    )


def _find_suspects(
    tx: Transaction,
    topic: int,
    cursors: dict[Place, int],
    bounds: dict[Place, int],
    acked: dict[Place, set[int]],
) -> list[Spot]:
    places = {(topic, partition) for partition in range(PARTITIONS) if (topic, partition) in bounds}
    rows = tx.run(
        "SELECT seq, partition FROM events WHERE topic = ? AND seq > ? AND seq <= ? ORDER BY seq",
        (topic, min(cursors[place] for place in places), max(bounds[place] for place in places)),
    )
    return [
        (seq, (topic, partition))
        for seq, partition in rows
        if (topic, partition) in places
        and cursors[topic, partition] < seq <= bounds[topic, partition]
        and seq not in acked.get((topic, partition), ())
    ]
