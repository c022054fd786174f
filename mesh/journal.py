"""
The contract of durable delivery: what was appended goes to every group until it is settled.

A *group* is an agent's name; its *consumers* are the agent's replicas (usually one). Engines live
in `mesh.journals`; each passes the same suite (tests/contract) as far as its `features` go.

**Order.** Every event belongs to one of `PARTITIONS` partitions, by its key (by its id when it has
none). A partition of a group belongs to one consumer at a time, which gets the partition's events
in the order of their appending: so a key is never handled twice at once, and keeps its order over
any number of replicas. Partitions move when a consumer joins, leaves, or dies; whoever gets one
sees it by the `tenure` of its deliveries, and loads the group's state anew before it acts on them.

**At least once.** What a consumer was handed stays its own until a `Step` settles it, it is given
back, or the consumer's lease ends. Whoever takes it over gets such events alone, one a `read`, with
`deliveries` counted in the journal before they are handed out: an event that kills its agent is
known by its count, and its neighbours are not blamed.

**Effects once.** A `Step` is applied whole or not at all: acks, appended events, state and parked
letters in one transaction, and only while the consumer still owns what the step settles. Appending
an id a second time changes nothing.
"""

from __future__ import annotations

import enum
import zlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Self

from mesh.errors import ConfigurationError, DamagedJournalError
from mesh.values import State, Value, field

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
    from types import TracebackType

    from mesh.deadletters import DeadLetter

#: Fixed for ever: the partition of a key is part of what is stored.
PARTITIONS = 16
#: A consumer holds at most so many events that it has not settled.
MAX_UNSETTLED = 512
#: A consumer that has not been heard of for so long owns nothing any more. Longer than it takes the
#: monitor to find and kill a hung agent, so that a lease ends only where no monitor watches.
LEASE_S = 30.0


class Feature(enum.Enum):
    """What an engine can do beyond the contract's core."""

    #: Outlives the process.
    PERSISTENT = "persistent"
    #: Processes share it.
    SHARED = "shared"
    #: Hosts share it.
    REMOTE = "remote"
    #: A step is one transaction; else its outputs are kept first, and known by their ids when it is
    #: repeated; state and acks are one transaction always.
    ATOMIC = "atomic"


def partition_of(key: str) -> int:
    """Give the partition of a key (or id): the same in every process, run and language (CRC-32)."""
    return zlib.crc32(key.encode()) % PARTITIONS


class Record(Value, frozen=True):
    """An event on its way into the journal."""

    topic: str
    #: Unique for ever; a second record of the same id is ignored.
    id: str
    #: One self-described CloudEvent.
    frame: bytes
    key: str | None = None

    @property
    def partition(self) -> int:
        """Tell the partition the event belongs to."""
        return partition_of(self.id if self.key is None else self.key)


class Delivery(Value, frozen=True, eq=False, gc=False):
    """An event handed to a consumer, which owes the journal a step for it."""

    #: The engine's own name of the place; grows within a partition and topic.
    position: int | str
    topic: str
    partition: int
    id: str
    frame: bytes
    #: How often it was handed out, this time included; above 1 after a consumer was lost with it.
    deliveries: int = 1
    #: Handlers that have settled it already (see `Step.done`).
    done: frozenset[str] = frozenset()
    #: Another than the last delivery's: partitions have come to the consumer meanwhile, and others
    #: may have changed the group's state. What was loaded before is to be loaded anew.
    tenure: int | str = 0


class Step(State, eq=False):
    """What handling one event changes; applied whole or not at all."""

    #: Settled for good, parked ones included.
    acks: list[Delivery] = field(default_factory=list)
    #: Settled by one handler of several; the delivery itself goes on.
    done: list[tuple[Delivery, str]] = field(default_factory=list)
    #: What the handler published.
    records: list[Record] = field(default_factory=list)
    #: What is put aside.
    dead: list[DeadLetter] = field(default_factory=list)
    #: State of the group by name; None removes.
    state: dict[str, bytes | None] = field(default_factory=dict)

    @property
    def settles(self) -> bool:
        """Say whether it settles an event, for all handlers or for one."""
        return bool(self.acks or self.done)


class GroupView(Value, frozen=True):
    """How far one group is with one topic."""

    group: str
    topic: str
    #: Events that are not settled, handed out or not.
    pending: int
    #: Age of the oldest of them in seconds; 0 without any.
    oldest_s: float


class Stored(Value, frozen=True):
    """An event of the past, for `scan`."""

    position: int | str
    topic: str
    id: str
    frame: bytes
    #: Seconds since 1970 when it was kept.
    at_s: float


class Size(Value, frozen=True):
    """How much a journal keeps."""

    events: int
    #: As `Journal.trim` counts them.
    bytes: int


class DeadQuery(Value, frozen=True):
    """Which dead letters are meant; what is None does not choose."""

    ids: frozenset[str] | None = None
    topic: str | None = None
    agent: str | None = None
    handler: str | None = None
    reason: str | None = None
    #: The start of the error's words.
    error: str | None = None

    def chooses(self, letter: DeadLetter) -> bool:
        """Say whether a letter is meant."""
        return (
            (self.ids is None or letter.id in self.ids)
            and (self.topic is None or letter.topic == self.topic)
            and (self.agent is None or letter.agent == self.agent)
            and (self.handler is None or letter.handler == self.handler)
            and (self.reason is None or letter.reason == self.reason)
            and (self.error is None or letter.error.startswith(self.error))
        )


class DeadCount(Value, frozen=True):
    """Dead letters that failed alike."""

    count: int
    #: When the first and the last of them failed last, in seconds since 1970.
    oldest_s: float
    newest_s: float


#: Chooses every dead letter.
ALL_DEAD = DeadQuery()


def cannot_keep(
    topics: Collection[str], fabric: str, error: ConfigurationError | DamagedJournalError
) -> ConfigurationError:
    """Say for the sake of which types a journal was wanted that cannot be one."""
    problems = error.problems if isinstance(error, ConfigurationError) else (str(error),)
    if not topics:
        return ConfigurationError(problems)
    names = ", ".join(sorted(topics))
    verb = "is" if len(topics) == 1 else "are"
    return ConfigurationError(
        f"{names} {verb} durable, and {fabric} cannot keep that: {problem}; or let it go:"
        f" LEGION_ALLOW_DOWNGRADE={names.replace(' ', '')}"
        for problem in problems
    )


class Journal(ABC):
    """
    Durable append, read and settle.

    All calls are coroutines that never block the loop. Raises of every call:
    NotConnectedError before `connect`, ClosedError after `close`, BrokerUnavailableError when the
    store does not answer or is full (BackpressureError when waiting was tried and did not help).
    """

    #: The name of the fabric it belongs to, as in the configuration.
    fabric: ClassVar[str]
    features: frozenset[Feature]

    #: Called (on the loop) with the topics of what was just appended or freed here, so that whoever
    #: joins the parts can wake the readers of other processes. Readers here wake by themselves.
    on_append: Callable[[Collection[str]], None] | None = None

    @abstractmethod
    async def connect(self) -> None:
        """
        Open the store.

        Raises:
            ConfigurationError: It cannot keep what the contract promises, and why.
            BrokerUnavailableError: It does not answer.
        """

    @abstractmethod
    async def close(self) -> None:
        """Leave; can be called twice. What consumers of this journal hold is given back."""

    @abstractmethod
    async def declare(self, group: str, topics: Collection[str], *, start: str = "now") -> None:
        """
        Make a group hear topics. Those it hears already keep their place.

        Args:
            group: The agent's name.
            topics: What it hears.
            start: ``now``: only what comes later; ``earliest``: all that is kept.
        """

    @abstractmethod
    async def append(self, records: Sequence[Record]) -> int:
        """
        Keep events; returns when they are kept.

        Returns:
            How many were new.
        """

    @abstractmethod
    async def read(
        self, group: str, consumer: str, *, limit: int = 256, wait_s: float = 0.0
    ) -> list[Delivery]:
        """
        Hand out events, the oldest first; the first read of a consumer joins it to its group.

        Args:
            group: A declared group.
            consumer: One replica; the same name again means that its predecessor is dead, and takes
                over what that one held.
            limit: At most so many, and never more than `MAX_UNSETTLED` in all.
            wait_s: Wait so long for the first; woken by `append`, `wake` and freed partitions.

        Raises:
            ConfigurationError: The group was never declared.
            ClosedError: A successor of the same name has joined through another journal.
        """

    @abstractmethod
    async def commit(self, group: str, consumer: str, steps: Sequence[Step]) -> list[Step]:
        """
        Apply steps, many in one transaction where the engine can.

        A step without acks and done marks (a source's) is applied without asking who owns what.

        Returns:
            The steps that were refused, because their events belong to another consumer by now, or
            were given back since they were handed out; also when they were handed out anew. When
            such a step changes the state, those after it that settle something are refused as well:
            their handlers may have read what it changed. Release what they would have settled.
        """

    @abstractmethod
    async def release(self, group: str, consumer: str, deliveries: Iterable[Delivery]) -> None:
        """Give unhandled events back, as if they had never been handed out."""

    @abstractmethod
    async def renew(self, group: str, consumer: str) -> None:
        """Say that the consumer lives; called well within `LEASE_S`."""

    @abstractmethod
    async def leave(self, group: str, consumer: str) -> None:
        """End a consumer in good order; what it holds goes to the others as not handed out."""

    @abstractmethod
    async def free(self, group: str, consumer: str) -> None:
        """
        Say that a consumer is dead, from outside.

        Its events are handed to the next that reads, counted as deliveries.
        """

    async def free_process(self, group: str, consumer: str, pid: int) -> None:  # noqa: B027
        """
        Say that the process of a consumer is dead; a successor that has joined keeps what it owns.

        An engine that cannot tell the two apart does nothing: the successor takes over when it
        joins, and others when the lease ends.

        Args:
            group: Its group.
            consumer: Its name.
            pid: The process that called `read`, on this host.
        """

    @abstractmethod
    def wake(self, topics: Collection[str] = ()) -> None:
        """Let waiting reads look again: another process appended (or freed) something."""

    @abstractmethod
    async def load_state(self, group: str) -> dict[str, bytes]:
        """Give the state of a group by name."""

    @abstractmethod
    async def bury(self, letters: Sequence[DeadLetter]) -> None:
        """Keep dead letters that belong to no step: of live events, broken frames, publishes."""

    @abstractmethod
    async def dead(self, query: DeadQuery = ALL_DEAD, limit: int = 1000) -> list[DeadLetter]:
        """Give dead letters, the newest first."""

    @abstractmethod
    async def count_dead(
        self, query: DeadQuery = ALL_DEAD
    ) -> Mapping[tuple[str, str, str, str], DeadCount]:
        """Count dead letters by (agent, handler or "", reason, error's first line)."""

    @abstractmethod
    async def exhume(self, letters: Iterable[DeadLetter]) -> int:
        """
        Remove dead letters as they were read: one that has failed anew since then stays.

        Returns:
            How many were removed.
        """

    @abstractmethod
    async def groups(self) -> list[GroupView]:
        """Tell how far every group is."""

    @abstractmethod
    async def scan(
        self,
        topics: Collection[str] | None = None,
        *,
        after: int | str | None = None,
        limit: int = 1000,
    ) -> list[Stored]:
        """Give kept events, settled or not, the oldest first."""

    @abstractmethod
    async def newest(self) -> int | str | None:
        """Give the place of the newest event, for a `scan` of what comes later; None: none."""

    @abstractmethod
    async def size(self) -> Size:
        """Tell how much is kept, settled or not."""

    @abstractmethod
    async def trim(self, *, max_age_s: float | None = None, max_bytes: int | None = None) -> int:
        """
        Forget old events that every group of their topic has settled; gives how many.

        Args:
            max_age_s: Forget what is older.
            max_bytes: Forget the oldest until the store is smaller.
        """

    @abstractmethod
    async def forget(self, group: str, topic: str | None = None) -> bool:
        """
        Forget a group that is gone for good, with its state and all it has not settled.

        What only it had not settled can then be trimmed. Refused, it changes nothing.

        Args:
            group: Its name.
            topic: Forget only that it hears this one, with what it has not settled of it.

        Returns:
            Whether there was such a group, and it heard the topic.

        Raises:
            ConfigurationError: A consumer of it lives.
        """

    @abstractmethod
    async def erase(self) -> None:
        """Forget events, groups, state and dead letters; when nobody else uses the store."""

    async def __aenter__(self) -> Self:
        """Connect."""
        await self.connect()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        await self.close()
