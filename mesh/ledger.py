r"""
Counters of one agent in a small memory-mapped file, so that they survive ``kill -9`` and anybody
on the host can read them at any time without asking the agent.

The file is the *loss ledger*: what each publisher has said (its last sequence number per type),
and what each consumer has received, lost and settled per publisher and type. A killed agent's
successor opens the same file and goes on counting, so a loss is counted to the event.

Layout, little endian, one writer (the agent), any number of readers::

    0      header: magic u64, version u64, then the cells named in `HEADER`, then the histogram
    4096   records of 256 bytes: kind u8, key length u8, key (198 bytes), pad to 200, 7 cells u64

Key of an OUT record: ``topic``. Key of an IN record: ``publisher\0topic``. Of a COUNT: a reason.
"""

from __future__ import annotations

import bisect
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mesh.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

MAGIC = 0x4C45_4749_4F4E_4C31
VERSION = 1
HEADER_BYTES = 4096
RECORD_BYTES = 256
_KEY_BYTES = 198
_RECORDS = 4096  # sparse: only touched pages take room
#: Kept free for what the agent itself says and counts, however many publishers it hears.
_RESERVED_RECORDS = 512
FILE_BYTES = HEADER_BYTES + _RECORDS * RECORD_BYTES
CELL_BYTES = 8

OUT, IN, COUNT = 1, 2, 3

#: The publisher of all durable events, as consumers count them.
JOURNAL = "(journal)"

#: Cells of the header, by position after magic and version.
HEADER = (
    "pid",
    "incarnation",
    "state",
    "ready_at_us",
    "beat_mono_ms",
    "failed",
    "sources",
    "queue",
    "started_mono_ms",
    "lag_us",
    "restarts",
    "frames",
    "rejected_frames",
    "retired",
    "shared",
    "boot",
)
CELL_OF = {name: 2 + index for index, name in enumerate(HEADER)}

STATES = ("absent", "starting", "ready", "draining", "stopped")
SOURCES = ("none", "waiting", "running", "done", "failed")

#: Upper bounds of the latency buckets in microseconds: 8 a doubling, 1 us to 67 s.
BUCKETS = tuple(round(2 ** (step / 8)) for step in range(8 * 26 + 1))
HISTOGRAM_AT = 64
_RECORDS_AT = HEADER_BYTES // CELL_BYTES
_RECORD_CELLS = RECORD_BYTES // CELL_BYTES
_VALUES_AT = 200 // CELL_BYTES

_OTHERS = "(others)"

# Values of an OUT record
OUT_EPOCH, OUT_SEQUENCE, OUT_BEGAN = 0, 1, 2
# Values of an IN record. Epoch 0: nothing was heard since one listens (anew), and nothing is under
# way. Durable events are counted under the publisher `JOURNAL`, without epoch, last and lost: the
# journal knows what is outstanding, and loses nothing.
IN_EPOCH, IN_LAST, IN_RECEIVED, IN_LOST, IN_SETTLED, IN_DROPPED = 0, 1, 2, 3, 4, 5
#: What other replicas handle, and - where events are shared - what was missed: the group's account
#: tells how much of that was lost.
IN_PASSED = 6


class Ledger:
    """
    The writing side; hot paths add to `cells` directly, by the index that `out` and `link` give.

    Make one with `Ledger.open(path)` or `Ledger.in_memory()`.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        """Take over mapped memory that has the layout above."""
        self._memory = memory
        self.cells = memoryview(memory).cast("Q")
        self._index: dict[tuple[int, str], int] = {}
        self._used = 0
        for kind, key, at in records_in(self._memory):
            self._index[kind, key] = at
            self._used += 1

    @classmethod
    def open(cls, path: Path) -> Ledger:
        """
        Open an agent's file, or make it; what an earlier incarnation counted is kept.

        Raises:
            ConfigurationError: The file is something else.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            if size not in (0, FILE_BYTES):
                raise ConfigurationError(f"{path} is no ledger ({size} bytes); remove it")
            if size == 0:
                os.ftruncate(descriptor, FILE_BYTES)
            memory = mmap.mmap(descriptor, FILE_BYTES)
        finally:
            os.close(descriptor)
        ledger = cls(memory)
        if ledger.cells[0] not in (0, MAGIC):
            raise ConfigurationError(f"{path} is no ledger; remove it")
        ledger.cells[0], ledger.cells[1] = MAGIC, VERSION
        ledger._begin_incarnation()
        return ledger

    @classmethod
    def in_memory(cls) -> Ledger:
        """Make one that nobody else can read, for use outside a mesh directory."""
        ledger = cls(mmap.mmap(-1, FILE_BYTES))
        ledger.cells[0], ledger.cells[1] = MAGIC, VERSION
        ledger._begin_incarnation()
        return ledger

    def close(self) -> None:
        """Give the memory back; the ledger cannot be used afterwards."""
        self.cells.release()
        self._memory.close()

    def set(self, name: str, value: int) -> None:
        """Set a header cell."""
        self.cells[CELL_OF[name]] = value

    def get(self, name: str) -> int:
        """Read a header cell."""
        return self.cells[CELL_OF[name]]

    @staticmethod
    def at(name: str) -> int:
        """Give the index of a header cell in `cells`, for hot paths."""
        return CELL_OF[name]

    def count(self, reason: str, amount: int = 1) -> None:
        """Add to a named counter such as ``undecodable``."""
        self.cells[self._record(COUNT, reason)] += amount

    def counts(self) -> dict[str, int]:
        """Read all named counters."""
        return {key: self.cells[at] for (kind, key), at in self._index.items() if kind == COUNT}

    def out(self, topic: str) -> int:
        """Give the index of the first value of what this agent publishes on a topic."""
        return self._record(OUT, topic)

    def count_said(self, topic: str, amount: int, now_s: float) -> None:
        """Count durable events that are kept; they have no epoch, for nothing of them is lost."""
        at = self.out(topic)
        if not self.cells[at + OUT_BEGAN]:
            self.cells[at + OUT_BEGAN] = int(now_s * 1e9)
        self.cells[at + OUT_SEQUENCE] += amount

    def link(self, publisher: str, topic: str) -> int:
        """Give the index of the first value of what this agent hears from a publisher."""
        return self._record(IN, f"{publisher}\0{topic}")

    def is_shared(self, at: int) -> bool:
        """Say whether an index of `link` stands for many links, for which there is no room."""
        return at == self._index.get((IN, _OTHERS))

    def listen_to(self, topics: Collection[str]) -> None:
        """Note that only these topics are heard: on links of others nothing is under way."""
        for (kind, key), at in self._index.items():
            if kind == IN and key.partition("\0")[2] not in topics:
                self._listen_anew(at)

    def record_latency(self, latency_us: float) -> None:
        """Count one delivery's latency in its bucket."""
        bucket = bisect.bisect_left(BUCKETS, latency_us)
        self.cells[HISTOGRAM_AT + min(bucket, len(BUCKETS) - 1)] += 1

    def published(self, topic: str) -> int:
        """Tell how many events this name has published on a topic since the machine began."""
        at = self._index.get((OUT, topic))
        return 0 if at is None else self.cells[at + OUT_SEQUENCE]

    def handled(self) -> int:
        """Count the events whose handlers have finished, on all links."""
        return sum(
            self.cells[at + IN_SETTLED] - self.cells[at + IN_DROPPED]
            for (kind, _), at in self._index.items()
            if kind == IN
        )

    def topics_said(self) -> list[str]:
        """List the topics this agent's name has published on."""
        return [key for kind, key in self._index if kind == OUT]

    def lost(self) -> int:
        """Sum up what was lost on all links to this agent."""
        return sum(self.cells[at + IN_LOST] for (kind, _), at in self._index.items() if kind == IN)

    def snapshot(self) -> bytes:
        """Give the used part of the file as it stands."""
        return self._memory[: HEADER_BYTES + (self._used + 1) * RECORD_BYTES]

    def _record(self, kind: int, key: str) -> int:
        known = self._index.get((kind, key))
        return known if known is not None else self._add(kind, key)

    def _add(self, kind: int, key: str) -> int:
        raw = key.encode()
        room = _RECORDS - 3 - (_RESERVED_RECORDS if kind == IN else 0)
        if self._used >= room or len(raw) > _KEY_BYTES:
            # Counted all the same: everything that has no room of its own shares one record a kind
            raw, key = _OTHERS.encode(), _OTHERS
            shared = self._index.get((kind, key))
            if shared is not None:
                return shared
        start = HEADER_BYTES + self._used * RECORD_BYTES
        self._memory[start + 2 : start + 2 + len(raw)] = raw
        self._memory[start + 1] = len(raw)
        self._memory[start] = kind  # last: a reader sees the record whole or not at all
        self._used += 1
        at = start // CELL_BYTES + _VALUES_AT
        self._index[kind, key] = at
        return at

    def _begin_incarnation(self) -> None:
        cells = self.cells
        cells[CELL_OF["incarnation"]] += 1
        # Before the pid: who reads it must not take the predecessor's READY for ours
        for name in ("state", "sources", "beat_mono_ms"):
            cells[CELL_OF[name]] = 0
        cells[CELL_OF["pid"]] = os.getpid()
        was_retired, cells[CELL_OF["retired"]] = cells[CELL_OF["retired"]], 0
        if was_retired:
            cells[CELL_OF["ready_at_us"]] = 0
        boot, before = boot_id(), cells[CELL_OF["boot"]]
        cells[CELL_OF["boot"]] = boot
        for (kind, key), at in self._index.items():
            if kind == OUT and before not in {0, boot}:
                # What the last moments before a power cut said may be missing here: numbers that
                # were used must not come again in the same epoch
                cells[at + OUT_EPOCH] = cells[at + OUT_SEQUENCE] = 0
            if kind != IN:
                continue
            # What the dead incarnation had received and not finished went with its inbox; durable
            # events come again
            unsettled = cells[at + IN_RECEIVED] - cells[at + IN_SETTLED]
            if not key.startswith(JOURNAL):
                cells[at + IN_LOST] += unsettled
            cells[at + IN_RECEIVED] -= unsettled
            if was_retired:
                self._listen_anew(at)

    def _listen_anew(self, at: int) -> None:
        """Let the next number on a link be the first: epoch 0 says that nothing is under way."""
        self.cells[at + IN_EPOCH] = self.cells[at + IN_LAST] = 0


def boot_id() -> int:
    """Give a number that changes when the machine starts anew; 0: nobody knows."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return 0
    return int(text.strip().replace("-", "")[:16], 16)


def records_in(memory: mmap.mmap | bytes) -> Iterator[tuple[int, str, int]]:
    """Give the records of a ledger: kind, key, index of the first value."""
    for number in range(_RECORDS):
        start = HEADER_BYTES + number * RECORD_BYTES
        kind = memory[start]
        if kind == 0:
            return
        length = memory[start + 1]
        yield (
            kind,
            memory[start + 2 : start + 2 + length].decode(),
            start // CELL_BYTES + _VALUES_AT,
        )
