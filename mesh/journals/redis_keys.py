"""
The names under which the Redis journal keeps things; docs/decisions/0006 says what is in them.

What stands in braces decides the slot of a cluster: all that belongs to one stream lies together.
"""

from __future__ import annotations

from mesh.topics import check_topic


class Keys:
    """
    The keys of one mesh.

    Args:
        mesh: Its name.
        cluster: Whether what belongs to different streams may lie on different servers.
    """

    def __init__(self, mesh: str, *, cluster: bool) -> None:
        """Know the fixed ones."""
        self._prefix = f"legion:{mesh}:"
        #: What all of them begin with.
        self.prefix = self._prefix.encode()
        self._cluster = cluster
        self._streams: dict[tuple[str, int], bytes] = {}
        #: All topics that were ever appended to or declared, and all groups.
        self.topics = self._named("topics")
        self.groups = self._named("groups")
        #: Letters by id; ids by time; how many there ever were.
        self.dead = [self._named(f"{{dead}}{part}") for part in ("", ":times", ":count")]

    def stream(self, topic: str, partition: int) -> bytes:
        """Give the stream of a partition of a topic."""
        known = self._streams.get((topic, partition))
        if known is None:
            name = f"durable:{{{check_topic(topic)}:{partition}}}"
            known = self._streams[topic, partition] = self._named(name)
        return known

    def ids(self, stream: bytes) -> list[bytes]:
        """Give the two sets of ids that appends to a stream ask."""
        base = stream + b":ids" if self._cluster else self._named("ids")
        return [base, base + b":old"]

    def clock(self) -> bytes | None:
        """Give the key of the latest position of all streams, where they share one."""
        return None if self._cluster else self._named("clock")

    def channel(self, topic: str, partition: int) -> bytes:
        """Give the channel on which appends to a stream are told."""
        place = f"{{{topic}:{partition}}}" if self._cluster else topic
        return self._named(f"wake:{place}")

    def topic_of(self, channel: bytes) -> str:
        """Give the topic of a channel."""
        place = channel[len(self._prefix) + len("wake:") :].decode()
        return place[1:-1].rpartition(":")[0] if self._cluster else place

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

    def membership(self, group: str) -> list[bytes]:
        """Give all that decides who owns what: numbers, topics, members, owners."""
        return [
            self.numbers(group),
            self.topics_of(group),
            self.members(group),
            self.owners(group),
        ]

    def _named(self, name: str) -> bytes:
        return f"{self._prefix}{name}".encode()
