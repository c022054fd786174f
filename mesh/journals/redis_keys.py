"""
The names under which the Redis journal keeps things; docs/decisions/0006 says what is in them.

What stands in braces decides the slot of a cluster: all that belongs to one partition lies
together, whichever the topic, so that its events have one order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.topics import check_topic

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mesh.journal import Record

_KNOWN_KEYS = 10_000


class Keys:
    """
    The keys of one mesh.

    Args:
        mesh: Its name.
        cluster: Whether partitions may lie on different servers.
    """

    def __init__(self, mesh: str, *, cluster: bool) -> None:
        """Know the fixed ones."""
        self._mesh = mesh
        self._prefix = f"legion:{mesh}:"
        #: What all of them begin with.
        self.prefixes = [self._prefix.encode(), f"legion:{{{mesh}:".encode()]
        self.cluster = cluster
        self._streams: dict[tuple[str, int], bytes] = {}
        self._partitions: dict[str, int] = {}
        #: All topics that were ever appended to or declared, and all groups.
        self.topics = self._named("topics")
        self.groups = self._named("groups")
        #: Letters by id; ids by time; how many there ever were.
        self.dead = [self._named(f"{{dead}}{part}") for part in ("", ":times", ":count")]

    def stream(self, topic: str, partition: int) -> bytes:
        """Give the stream of a partition of a topic."""
        known = self._streams.get((topic, partition))
        if known is None:
            name = f"legion:{{{self._mesh}:{partition}}}:durable:{check_topic(topic)}"
            known = self._streams[topic, partition] = name.encode()
        return known

    def partition_of(self, record: Record) -> int:
        """Give the partition of a record; those of keys are remembered for a while."""
        key = record.key
        if key is None:
            return record.partition
        known = self._partitions.get(key)
        if known is None:
            if len(self._partitions) >= _KNOWN_KEYS:
                self._partitions.clear()
            known = self._partitions[key] = record.partition
        return known

    def memory(self, partition: int) -> list[bytes]:
        """Give the two sets of ids that appends to a partition ask: on one server, all the same."""
        return [self._shared(partition, "ids"), self._shared(partition, "ids:old")]

    def clock(self, partition: int) -> bytes:
        """Give the key of the latest position in a partition: on one server, of all."""
        return self._shared(partition, "clock")

    def channel(self, topic: str, partition: int) -> bytes:
        """Give the channel on which appends to a stream are told: on one server, to any."""
        return self._shared(partition, f"wake:{topic}")

    def topic_of(self, channel: bytes) -> str:
        """Give the topic of a channel."""
        return channel.decode().partition(":wake:")[2]

    def parts(self, keys: Iterable[bytes]) -> list[list[bytes]]:
        """Give streams in lists that one call may have: on a cluster those of a partition."""
        if not self.cluster:
            whole = list(keys)
            return [whole] if whole else []
        parts: dict[bytes, list[bytes]] = {}
        for key in keys:
            parts.setdefault(key.partition(b"}")[0], []).append(key)
        return list(parts.values())

    def probe(self) -> bytes:
        """Give a channel that nobody listens to."""
        return self._named("wake:_probe")

    def numbers(self, group: str) -> bytes:
        """Give the version and the latest token of a group."""
        return self._named(f"group:{{{group}}}")

    def topics_of(self, group: str) -> bytes:
        """Give the topics that a group hears."""
        return self.numbers(group) + b":topics"

    def members(self, group: str) -> bytes:
        """Give the living consumers of a group."""
        return self.numbers(group) + b":members"

    def owners(self, group: str) -> bytes:
        """Give who owns which partition."""
        return self.numbers(group) + b":owners"

    def state(self, group: str) -> bytes:
        """Give the state of a group."""
        return self.numbers(group) + b":state"

    def steps(self, group: str) -> bytes:
        """Give the number of each consumer's last step that changed the state."""
        return self.numbers(group) + b":steps"

    def decisions(self, group: str) -> bytes:
        """Give what was decided last about each partition, and may not be settled there yet."""
        return self.numbers(group) + b":decisions"

    def membership(self, group: str) -> list[bytes]:
        """Give all that decides who owns what: numbers, topics, members, owners, decisions."""
        return [
            self.numbers(group),
            self.topics_of(group),
            self.members(group),
            self.owners(group),
            self.decisions(group),
        ]

    def all_of(self, group: str) -> list[bytes]:
        """Give all keys of a group beside its streams."""
        return [*self.membership(group), self.state(group), self.steps(group)]

    def _shared(self, partition: int, name: str) -> bytes:
        return (
            f"legion:{{{self._mesh}:{partition}}}:{name}".encode()
            if self.cluster
            else self._named(name)
        )

    def _named(self, name: str) -> bytes:
        return f"{self._prefix}{name}".encode()
