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
import time
from typing import TYPE_CHECKING

from mesh.errors import ConfigurationError
from mesh.values import Value

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

MAGIC = 0x4C45_4749_4F4E_4C31
VERSION = 1
_HEADER_BYTES = 4096
_RECORD_BYTES = 256
_KEY_BYTES = 198
_RECORDS = 4096  # sparse: only touched pages take room
#: Kept free for what the agent itself says and counts, however many publishers it hears.
_RESERVED_RECORDS = 512
_FILE_BYTES = _HEADER_BYTES + _RECORDS * _RECORD_BYTES
_CELL = 8

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
)
_AT = {name: 2 + index for index, name in enumerate(HEADER)}

STATES = ("absent", "starting", "ready", "draining", "stopped")
SOURCES = ("none", "waiting", "running", "done", "failed")

#: Upper bounds of the latency buckets in microseconds: 8 a doubling, 1 us to 67 s.
BUCKETS = tuple(round(2 ** (step / 8)) for step in range(8 * 26 + 1))
_HISTOGRAM_AT = 64
_RECORDS_AT = _HEADER_BYTES // _CELL
_RECORD_CELLS = _RECORD_BYTES // _CELL
_VALUES_AT = 200 // _CELL

_OTHERS = "(others)"

# Values of an OUT record
OUT_EPOCH, OUT_SEQUENCE, OUT_BEGAN = 0, 1, 2
# Values of an IN record. Durable events are counted under the publisher `JOURNAL`, without epoch,
# last and lost: the journal knows what is outstanding, and loses nothing.
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
        for kind, key, at in _records(self._memory):
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
            if size not in (0, _FILE_BYTES):
                raise ConfigurationError(f"{path} is no ledger ({size} bytes); remove it")
            if size == 0:
                os.ftruncate(descriptor, _FILE_BYTES)
            memory = mmap.mmap(descriptor, _FILE_BYTES)
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
        ledger = cls(mmap.mmap(-1, _FILE_BYTES))
        ledger.cells[0], ledger.cells[1] = MAGIC, VERSION
        ledger._begin_incarnation()
        return ledger

    def close(self) -> None:
        """Give the memory back; the ledger cannot be used afterwards."""
        self.cells.release()
        self._memory.close()

    def set(self, name: str, value: int) -> None:
        """Set a header cell."""
        self.cells[_AT[name]] = value

    def get(self, name: str) -> int:
        """Read a header cell."""
        return self.cells[_AT[name]]

    @staticmethod
    def at(name: str) -> int:
        """Give the index of a header cell in `cells`, for hot paths."""
        return _AT[name]

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

    def record_latency(self, latency_us: float) -> None:
        """Count one delivery's latency in its bucket."""
        bucket = bisect.bisect_left(BUCKETS, latency_us)
        self.cells[_HISTOGRAM_AT + min(bucket, len(BUCKETS) - 1)] += 1

    def published(self, topic: str) -> int:
        """Tell how many events this agent's name has published on a topic, ever."""
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
        return self._memory[: _HEADER_BYTES + (self._used + 1) * _RECORD_BYTES]

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
        start = _HEADER_BYTES + self._used * _RECORD_BYTES
        self._memory[start + 2 : start + 2 + len(raw)] = raw
        self._memory[start + 1] = len(raw)
        self._memory[start] = kind  # last: a reader sees the record whole or not at all
        self._used += 1
        at = start // _CELL + _VALUES_AT
        self._index[kind, key] = at
        return at

    def _begin_incarnation(self) -> None:
        cells = self.cells
        cells[_AT["incarnation"]] += 1
        # Before the pid: who reads it must not take the predecessor's READY for ours
        for name in ("state", "sources", "beat_mono_ms"):
            cells[_AT[name]] = 0
        cells[_AT["pid"]] = os.getpid()
        was_retired, cells[_AT["retired"]] = cells[_AT["retired"]], 0
        if was_retired:
            cells[_AT["ready_at_us"]] = 0
        for (kind, key), at in self._index.items():
            if kind != IN:
                continue
            # What the dead incarnation had received and not finished went with its inbox; durable
            # events come again
            unsettled = cells[at + IN_RECEIVED] - cells[at + IN_SETTLED]
            if not key.startswith(JOURNAL):
                cells[at + IN_LOST] += unsettled
            cells[at + IN_RECEIVED] -= unsettled
            if was_retired:
                cells[at + IN_EPOCH] = cells[at + IN_LAST] = 0


def _records(memory: mmap.mmap | bytes) -> Iterator[tuple[int, str, int]]:
    for number in range(_RECORDS):
        start = _HEADER_BYTES + number * _RECORD_BYTES
        kind = memory[start]
        if kind == 0:
            return
        length = memory[start + 1]
        yield (
            kind,
            memory[start + 2 : start + 2 + length].decode(),
            start // _CELL + _VALUES_AT,
        )


class Out(Value, frozen=True):
    """What an agent has published on one topic."""

    #: When the numbering began (ns since 1970); 0: durable events are not numbered.
    epoch: int
    sequence: int
    #: When the first was said (ns since 1970).
    began: int


class In(Value, frozen=True):
    """What an agent has heard from one publisher on one topic."""

    epoch: int
    last: int
    received: int
    lost: int
    settled: int
    dropped: int
    passed: int = 0


class LedgerView(Value, frozen=True):
    """One agent's counters as they stood when they were read."""

    name: str
    pid: int
    incarnation: int
    state: str
    ready_at_s: float
    beat_mono_s: float
    started_mono_s: float
    handled: int
    failed: int
    queue: int
    lag_s: float
    #: Frames that came, and those of them that were no frames.
    frames: int
    rejected_frames: int
    sources: str
    #: Nobody goes on with it.
    retired: bool
    #: It shares live events with other replicas.
    shared: bool
    dropped: Mapping[str, int]
    out: Mapping[str, Out]
    in_: Mapping[tuple[str, str], In]
    histogram: tuple[int, ...]

    def latency_us(self, percentile: float) -> float | None:
        """Give a percentile (0..100) of the delivery latency in microseconds; None without any."""
        return percentile_us(self.histogram, percentile)


def percentile_us(histogram: tuple[int, ...], percentile: float) -> float | None:
    """Read a percentile (0..100) out of latency buckets: the upper bound of the bucket it is in."""
    total = sum(histogram)
    if not total:
        return None
    wanted, seen = total * percentile / 100, 0
    for bound, amount in zip(BUCKETS, histogram, strict=True):
        seen += amount
        if seen >= wanted and amount:
            return float(bound)
    return float(BUCKETS[-1])


def read_ledger(path: Path) -> LedgerView | None:
    """Read one agent's file; None when it is not (yet) a ledger."""
    try:
        with path.open("rb") as file:
            raw = file.read(_HEADER_BYTES)
            if len(raw) < _HEADER_BYTES:
                return None
            # Records are dense: read on until the first empty one, not the whole sparse file
            while True:
                chunk = file.read(64 * _RECORD_BYTES)
                raw += chunk
                if len(chunk) < 64 * _RECORD_BYTES or chunk[-_RECORD_BYTES] == 0:
                    break
            raw += bytes(_RECORD_BYTES)
    except FileNotFoundError:
        return None
    return _view(path.name, raw)


def _view(name: str, raw: bytes) -> LedgerView | None:
    cells = memoryview(raw).cast("Q")
    if cells[0] != MAGIC:
        return None
    head = {key: cells[at] for key, at in _AT.items()}
    out: dict[str, Out] = {}
    heard: dict[tuple[str, str], In] = {}
    counts: dict[str, int] = {}
    for kind, key, at in _records(raw):
        if kind == OUT:
            out[key] = Out(*cells[at : at + 3].tolist())
        elif kind == IN:
            publisher, _, topic = key.partition("\0")
            heard[publisher, topic] = In(*cells[at : at + 7].tolist())
        else:
            counts[key] = cells[at]
    return LedgerView(
        name=name,
        pid=head["pid"],
        incarnation=head["incarnation"],
        state=STATES[head["state"]],
        ready_at_s=head["ready_at_us"] / 1e6,
        beat_mono_s=head["beat_mono_ms"] / 1e3,
        started_mono_s=head["started_mono_ms"] / 1e3,
        handled=sum(each.settled - each.dropped for each in heard.values()),
        failed=head["failed"],
        queue=head["queue"],
        lag_s=head["lag_us"] / 1e6,
        frames=head["frames"],
        rejected_frames=head["rejected_frames"],
        sources=SOURCES[head["sources"]],
        retired=bool(head["retired"]),
        shared=bool(head["shared"]),
        dropped=counts,
        out=out,
        in_=heard,
        histogram=tuple(cells[_HISTOGRAM_AT : _HISTOGRAM_AT + len(BUCKETS)].tolist()),
    )


def view_of(name: str, ledger: Ledger) -> LedgerView:
    """Give the view of a ledger of this process."""
    view = _view(name, ledger.snapshot())
    assert view is not None
    return view


def retire(path: Path) -> None:
    """
    Note that nobody will go on with a ledger: what its agent does not hear any more is no loss.

    Its agent has ended. A successor all the same begins to listen anew.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.pwrite(descriptor, (1).to_bytes(_CELL, "little"), _AT["retired"] * _CELL)
    finally:
        os.close(descriptor)


def read_ledgers(directory: Path) -> dict[str, LedgerView]:
    """Read the ledgers of all agents of a mesh, by agent name."""
    views: dict[str, LedgerView] = {}
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        view = read_ledger(path)
        if view is not None:
            views[path.name] = view
    return views


class Backlog:
    """
    How many events are under way in a mesh, read from the ledgers of all its agents.

    Args:
        directory: Where the ledgers are.
    """

    _REFRESH_S = 1.0

    def __init__(self, directory: Path) -> None:
        """Open nothing yet."""
        self._directory = directory
        self._mapped: dict[str, _Mapped] = {}
        self._refreshed_s = -self._REFRESH_S

    def under_way(self) -> int:
        """Count what was published and has neither been settled nor lost, over all links."""
        now = time.monotonic()
        if now - self._refreshed_s >= self._REFRESH_S:
            self._refreshed_s = now
            self._refresh()
        said = {}
        for name, ledger in self._mapped.items():
            for kind, key, at in ledger.records():
                if kind == OUT:
                    said[name, key] = ledger.cells[at + OUT_SEQUENCE]
        waiting = 0
        for ledger in self._mapped.values():
            if ledger.cells[_AT["retired"]]:
                continue
            for kind, key, at in ledger.records():
                if kind == IN:
                    cells = ledger.cells
                    publisher, _, topic = key.partition("\0")
                    sequence = said.get((publisher, topic), 0)
                    waiting += max(0, sequence - cells[at + IN_LAST])
                    waiting += cells[at + IN_RECEIVED] - cells[at + IN_SETTLED]
        return waiting

    def _refresh(self) -> None:
        for path in self._directory.iterdir():
            if path.name not in self._mapped:
                try:
                    self._mapped[path.name] = _Mapped(path)
                except (OSError, ValueError):
                    continue  # being made right now; seen at the next refresh


class _Mapped:
    """Another agent's ledger, mapped for reading."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._memory = mmap.mmap(file.fileno(), _FILE_BYTES, prot=mmap.PROT_READ)
        self.cells = memoryview(self._memory).cast("Q")
        self._known: list[tuple[int, str, int]] = []

    def records(self) -> list[tuple[int, str, int]]:
        if self._memory[_HEADER_BYTES + len(self._known) * _RECORD_BYTES]:
            self._known = list(_records(self._memory))
        return self._known
