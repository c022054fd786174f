"""
Replicas of an agent: what they are called, and which of them gets which live event.

The first is called like the agent, the others ``features@2``, ``features@3``, ...: no agent of a
user's can be called so. Under this name a replica is a program, a log, a ledger, a lock and a
publisher; what it shares with the others - durable events, state, dead letters - goes by the
agent's name, its *group*.

A live event reaches every replica, and each key belongs to one of them. Keys lie in `SLOTS` slots;
a slot belongs to the member with the highest hash of both, so that a change of the members moves no
more slots than it must.
"""

from __future__ import annotations

import hashlib
import zlib
from typing import TYPE_CHECKING

from mesh.values import Value

if TYPE_CHECKING:
    from collections.abc import Iterable

MARK = "@"
#: More could get no durable work: see `mesh.journal.PARTITIONS`.
MAX_REPLICAS = 16
SLOTS = 256


def replica_name(group: str, number: int) -> str:
    """Give the name of a replica, counted from 1."""
    return group if number == 1 else f"{group}{MARK}{number}"


def replica_names(group: str, count: int) -> list[str]:
    """Give the names of all replicas of an agent, the first first."""
    return [replica_name(group, number) for number in range(1, count + 1)]


def group_of(name: str) -> str:
    """Give the agent of which a program is a replica: itself, mostly."""
    return name.partition(MARK)[0]


def number_of(name: str) -> int:
    """Give the number of a replica."""
    number = name.partition(MARK)[2]
    return int(number) if number.isdigit() else 1


def slot_of(key: str | bytes) -> int:
    """Give the slot of a key, of the id of an event without one, or of bytes that are no event."""
    return zlib.crc32(key.encode() if isinstance(key, str) else key) % SLOTS


def slots_of(member: str, members: Iterable[str]) -> frozenset[int]:
    """Give the slots of one of the members; the same answer in every process."""
    names = sorted(set(members))
    if member not in names:
        return frozenset()
    return frozenset(
        slot for slot in range(SLOTS) if max(names, key=lambda name: _weight(name, slot)) == member
    )


def _weight(name: str, slot: int) -> bytes:
    return hashlib.blake2b(f"{slot}/{name}".encode(), digest_size=8).digest()


class Roster(Value, frozen=True):
    """
    Who shares a group's live events, as the monitor says.

    A change has two steps, so that nobody handles an event twice: first each member keeps only what
    it had and will have; when all have said that they do, the new order holds.
    """

    #: Grows with each step.
    version: int
    #: Who shared before; the same as `after` when nothing is changing.
    before: tuple[str, ...]
    after: tuple[str, ...]

    def slots_of(self, member: str) -> frozenset[int]:
        """Give the slots that are a member's now."""
        mine = slots_of(member, self.after)
        return mine if self.before == self.after else mine & slots_of(member, self.before)
