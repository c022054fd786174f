"""
What others read in the ledgers of agents: one agent's counters as they stand, and how much is under
way in a mesh.
"""

from __future__ import annotations

import mmap
import os
import time
from typing import TYPE_CHECKING

from mesh.ledger import (
    BUCKETS,
    CELL_BYTES,
    CELL_OF,
    FILE_BYTES,
    HEADER_BYTES,
    HISTOGRAM_AT,
    IN,
    IN_EPOCH,
    IN_LAST,
    IN_RECEIVED,
    IN_SETTLED,
    MAGIC,
    OUT,
    OUT_SEQUENCE,
    RECORD_BYTES,
    SOURCES,
    STATES,
    records_in,
)
from mesh.values import Value

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mesh.ledger import Ledger


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
            raw = file.read(HEADER_BYTES)
            if len(raw) < HEADER_BYTES:
                return None
            # Records are dense: read on until the first empty one, not the whole sparse file
            while True:
                chunk = file.read(64 * RECORD_BYTES)
                raw += chunk
                if len(chunk) < 64 * RECORD_BYTES or chunk[-RECORD_BYTES] == 0:
                    break
            raw += bytes(RECORD_BYTES)
    except FileNotFoundError:
        return None
    return _view(path.name, raw)


def _view(name: str, raw: bytes) -> LedgerView | None:
    cells = memoryview(raw).cast("Q")
    if cells[0] != MAGIC:
        return None
    head = {key: cells[at] for key, at in CELL_OF.items()}
    out: dict[str, Out] = {}
    heard: dict[tuple[str, str], In] = {}
    counts: dict[str, int] = {}
    for kind, key, at in records_in(raw):
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
        histogram=tuple(cells[HISTOGRAM_AT : HISTOGRAM_AT + len(BUCKETS)].tolist()),
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
        os.pwrite(descriptor, (1).to_bytes(CELL_BYTES, "little"), CELL_OF["retired"] * CELL_BYTES)
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
        self._mapped: dict[str, MappedLedger] = {}
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
            if ledger.cells[CELL_OF["retired"]]:
                continue
            for kind, key, at in ledger.records():
                if kind == IN:
                    cells = ledger.cells
                    publisher, _, topic = key.partition("\0")
                    sequence = said.get((publisher, topic), 0)
                    if cells[at + IN_EPOCH]:
                        waiting += max(0, sequence - cells[at + IN_LAST])
                    waiting += cells[at + IN_RECEIVED] - cells[at + IN_SETTLED]
        return waiting

    def _refresh(self) -> None:
        for path in self._directory.iterdir():
            if path.name not in self._mapped:
                try:
                    self._mapped[path.name] = MappedLedger(path)
                except (OSError, ValueError):
                    continue  # being made right now; seen at the next refresh


class MappedLedger:
    """
    Another agent's ledger, mapped for reading.

    Args:
        path: Its file.

    Raises:
        OSError: There is none.
        ValueError: It is not whole yet.
    """

    def __init__(self, path: Path) -> None:
        """Map it."""
        with path.open("rb") as file:
            self._memory = mmap.mmap(file.fileno(), FILE_BYTES, prot=mmap.PROT_READ)
        self.cells = memoryview(self._memory).cast("Q")
        self._known: list[tuple[int, str, int]] = []

    def records(self) -> list[tuple[int, str, int]]:
        """Give kind, key and place of each record."""
        if self._memory[HEADER_BYTES + len(self._known) * RECORD_BYTES]:
            self._known = list(records_in(self._memory))
        return self._known
