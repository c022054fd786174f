"""
Read market data from CSV files of ticks (timestamp, bid, ask) or bars (timestamp, open, high, low,
close, volume), with or without a header, however they were written.

A row that cannot be used is reported with its line number and skipped; the file is never held in
memory as a whole.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from mesh import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: A bar has no quotes: bid and ask are put so far below and above its close (1 basis point).
BAR_HALF_SPREAD = 0.0001

_TIME_NAMES = ("timestamp", "time", "datetime", "date", "ts", "open_time")
_TICK = ("bid", "ask")
_BAR = ("open", "high", "low", "close")
_DELIMITERS = ",;\t|"
#: How files begin that are no text, or none that is read here, and what they are.
_NO_TEXT = {
    b"\x1f\x8b": "is compressed by gzip; unpack it first",
    b"BZh91AY&SY": "is compressed by bzip2; unpack it first",
    b"\xfd7zXZ\x00": "is compressed by xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd; unpack it first",
    b"PK\x03\x04": "is a zip archive or a spreadsheet; unpack it, or save it as CSV",
    b"\xff\xfe": "is no text in UTF-8 but in UTF-16; save it as UTF-8",
    b"\xfe\xff": "is no text in UTF-8 but in UTF-16; save it as UTF-8",
}
_CONTROLS = frozenset(range(32)) - frozenset(b"\t\n\v\f\r")
_HEAD_BYTES = 4096
_MIN_PRICE, _MAX_PRICE = 1e-12, 1e12
#: So much of a file is shown in words about it.
_MAX_EXCERPT = 100
#: Seconds, milliseconds, microseconds, nanoseconds since 1970, told apart by size.
_EPOCH_UNITS = ((1e11, 1.0), (1e14, 1e3), (1e17, 1e6), (1e20, 1e9))


@dataclass(frozen=True, slots=True)
class Row:
    """One usable row."""

    line: int
    time: datetime
    bid: float
    ask: float


@dataclass(slots=True)
class Feed:
    """
    A CSV file of market data.

    Args:
        path: The file.
    """

    path: Path
    bad_rows: int = 0
    #: The first of them, in words.
    examples: list[str] = field(default_factory=list)
    _columns: dict[str, int] = field(default_factory=dict)
    _dialect: str = ","
    _has_header: bool = False

    MAX_EXAMPLES = 20

    def check(self) -> None:
        """
        Look at the start of the file.

        Raises:
            ConfigurationError: It is missing, empty, no text, or its columns are unknown.
        """
        try:
            if self.path.exists() and not self.path.is_file():
                # A pipe can be read once; this is not the last time
                raise ConfigurationError(f"{self.path}: is no regular file; write it to one first")
            with self.path.open("rb") as head:
                no_text = _why_no_text(head.read(_HEAD_BYTES))
            if no_text is not None:
                raise ConfigurationError(f"{self.path}: {no_text}")
            with self.path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
                first = next((line for line in file if line.strip()), None)
        except OSError as error:
            raise ConfigurationError(f"{self.path}: {error.strerror}") from error
        if first is None:
            raise ConfigurationError(f"{self.path}: the file is empty")
        self._dialect = max(_DELIMITERS, key=first.count)
        try:
            found = next(csv.reader([first], delimiter=self._dialect))
        except csv.Error as error:
            raise ConfigurationError(f"{self.path}: its first line: {error}") from None
        cells = [cell.strip().lower() for cell in found]
        self._has_header = not any(map(_is_value, cells))
        self._columns = self._by_header(cells) if self._has_header else self._by_count(cells)
        if not any(True for _ in self.rows()):
            example = f"; {self.examples[0]}" if self.examples else ""
            raise ConfigurationError(f"{self.path}: no usable row{example}")
        self.bad_rows, self.examples = 0, []

    def rows(self) -> Iterator[Row]:
        """Give the usable rows, in order; the others are counted."""
        with self.path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            skip_header = self._has_header
            for number, line in enumerate(file, 1):
                if not line.strip(f'{self._dialect}" \t\r\n'):
                    continue  # without any content
                if skip_header:
                    skip_header = False
                    continue
                try:
                    yield self._row(number, self._cells(line))
                except (ValueError, csv.Error) as error:
                    self._complain(number, str(error))

    def _cells(self, line: str) -> list[str]:
        """Read a line by itself: a quote that is not closed would swallow those after it."""
        if line.count('"') % 2:
            raise ValueError("a quote is not closed")
        return next(csv.reader((line,), delimiter=self._dialect))

    def _by_header(self, cells: list[str]) -> dict[str, int]:
        columns = {name: index for index, name in enumerate(cells)}
        time = next((name for name in _TIME_NAMES if name in columns), None)
        for wanted in (_TICK, _BAR):
            if time is not None and all(name in columns for name in wanted):
                twice = [name for name in (time, *wanted) if cells.count(name) > 1]
                if twice:
                    raise ConfigurationError(
                        f"{self.path}: more than one column is called {' and '.join(twice)}"
                    )
                return {"time": columns[time], **{name: columns[name] for name in wanted}}
        raise ConfigurationError(
            f"{self.path}: columns {_excerpt(', '.join(cells))} are neither ticks"
            " (timestamp,bid,ask) nor bars (timestamp,open,high,low,close,volume)"
        )

    def _by_count(self, cells: list[str]) -> dict[str, int]:
        names = {3: _TICK, 5: _BAR, 6: _BAR}.get(len(cells))
        if names is None:
            raise ConfigurationError(
                f"{self.path}: {len(cells)} columns without a header; ticks have 3"
                " (timestamp,bid,ask), bars have 6 (timestamp,open,high,low,close,volume)"
            )
        return {"time": 0, **{name: index for index, name in enumerate(names, 1)}}

    def _row(self, line: int, cells: list[str]) -> Row:
        columns = self._columns
        if len(cells) <= max(columns.values()):
            raise ValueError(f"{len(cells)} columns")
        time = parse_time(cells[columns["time"]])
        if "bid" in columns:
            bid = _price("bid", cells[columns["bid"]])
            ask = _price("ask", cells[columns["ask"]])
            if bid > ask:
                raise ValueError(f"bid {bid:g} above ask {ask:g}")
            return Row(line, time, bid, ask)
        low, high = (_price(name, cells[columns[name]]) for name in ("low", "high"))
        _price("open", cells[columns["open"]])
        close = _price("close", cells[columns["close"]])
        if high < low:
            raise ValueError(f"high {high:g} below low {low:g}")
        return Row(line, time, close * (1 - BAR_HALF_SPREAD), close * (1 + BAR_HALF_SPREAD))

    def _complain(self, line: int, why: str) -> None:
        self.bad_rows += 1
        if len(self.examples) < self.MAX_EXAMPLES:
            self.examples.append(f"line {line}: {why}")


def _why_no_text(head: bytes) -> str | None:
    """Say what a file is by its start; None where that is text."""
    known = next((words for mark, words in _NO_TEXT.items() if head.startswith(mark)), None)
    # Not beyond the first line: a row that was damaged is a bad row
    first = head.lstrip().partition(b"\n")[0]
    return known or ("is no text file" if _CONTROLS.intersection(first) else None)


def _excerpt(text: str) -> str:
    return text if len(text) <= _MAX_EXCERPT else f"{text[:_MAX_EXCERPT]}..."


def _is_value(text: str) -> bool:
    """Say whether a cell holds a number or a moment, and is no name of a column."""
    try:
        parse_time(text)
    except ValueError:
        try:
            float(text)
        except ValueError:
            return False
    return True


def parse_time(text: str) -> datetime:
    """
    Read a moment: ISO 8601 with or without zone (then UTC), or seconds, ms, us, ns since 1970.

    Raises:
        ValueError: It is neither.
    """
    text = text.strip()
    try:
        number = float(text)
    except ValueError:
        return _iso(text)
    for bound, unit in _EPOCH_UNITS:
        if 0 < number < bound:
            return datetime.fromtimestamp(number / unit, UTC)
    raise ValueError(f"time {_excerpt(text)!r} is no moment")


def _iso(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):  # in UTC it may lie beyond the calendar
        raise ValueError(f"time {_excerpt(text)!r} is no moment") from None


def _price(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name} {_excerpt(text)!r} is no number") from None
    # What follows computes with products and quotients of prices; this takes NaN as well
    if not _MIN_PRICE <= value <= _MAX_PRICE:
        raise ValueError(f"{name} {_excerpt(text.strip())} is no price")
    return value
