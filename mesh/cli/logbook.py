"""`mesh logs`: the agents' logs and what they printed, merged by time."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING

import click

from mesh.cli import say
from mesh.cli.exits import NoMeshError
from mesh.cli.place import Place, directory_option
from mesh.cli.signals import stop_signals, unless

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_POLL_S = 0.2
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ")
_LOCAL_TIME = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) ")
_SUFFIXES = (".log", ".out")
_COLOURS: dict[str, say.Colour] = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A record with the lines that belong to it, or one printed line."""

    #: ISO 8601, so that text order is the order of time; of a printed line it is a guess.
    time: str
    name: str
    text: str


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME...]")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now on.")
@click.option(
    "-n", "--lines", default=50, show_default=True, type=click.IntRange(min=0),
    help="Begin with so many records and printed lines.",
)  # fmt: skip
@directory_option
def logs(names: tuple[str, ...], follow: bool, lines: int, directory: str | None) -> None:
    """
    Show and follow the agents' logs, and what they printed.

    The records of all agents, or of those named, merged by time; the same works when the mesh is
    down. Following goes on over rotations and restarts.

    What an agent printed carries no time: a line stands where its file was last written, or behind
    the last line in it that has a time. While following, that is when it was printed; looking back,
    it may stand too late among others' lines. Lines of one agent keep their order. To tell an error
    from one of an earlier start, name supervisord too, which logs every start.

    \b
    Example:
      mesh logs -n 20
      mesh logs -f risk execution
      mesh logs risk supervisord
    """  # noqa: D301
    folder = Place.find(directory).rundir.path / "log"
    found = {path.stem for path in _files(folder, ())}
    if not folder.is_dir():
        raise NoMeshError(f"no logs in {folder}; start a mesh with `mesh up`")
    unknown = [name for name in names if name not in found]
    if unknown and not follow:
        has = ", ".join(sorted(found)) or "none"
        raise click.UsageError(f"no log of {', '.join(unknown)}; there are: {has}")
    followed = {path: Followed(path) for path in _files(folder, names)}
    newest: deque[Entry] = deque(maxlen=lines)
    newest.extend(_merged(entry for each in followed.values() for entry in each.history()))
    _print(newest)
    try:
        if follow:
            asyncio.run(_follow(folder, names, followed))
    finally:
        for each in followed.values():
            each.close()


def warnings_since(path: Path, moment_s: float) -> list[str]:
    """Give the lines of a log that have warned of something since a moment."""
    followed = Followed(path)
    try:
        entries = followed.history()
    finally:
        followed.close()
    heads = [entry.text.partition("\n")[0] for entry in entries if entry.time >= _iso(moment_s)]
    return [head for head in heads if head.split(" ")[1:2] == ["WARNING"]]


class Followed:
    """
    One file that is written to; it may be renamed or cut by a rotation.

    Args:
        path: Where it is.
    """

    def __init__(self, path: Path) -> None:
        """Open nothing yet."""
        self.path = path
        self._file: IO[str] | None = None
        self._rest = ""

    def history(self) -> list[Entry]:
        """Read what is there, rotated files first; `new` goes on behind it."""
        older = sorted(self.path.parent.glob(f"{self.path.name}.[0-9]"), reverse=True)
        lines: list[tuple[str, str]] = []
        for path in older:
            try:
                lines += self._whole_lines(path.read_text(errors="replace"), _written_at(path))
            except OSError:
                continue  # rotated away in this moment
        return list(self._entries(lines + self._read()))

    def new(self) -> list[Entry]:
        """Read what was written since; of a file that took this one's place, everything."""
        lines = self._read()
        if self._was_replaced():
            self.close()
            lines += self._read()
        return list(self._entries(lines))

    def close(self) -> None:
        """Close the file; the next read opens it anew."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self) -> list[tuple[str, str]]:
        if self._file is None:
            try:
                self._file = self.path.open(errors="replace")
            except OSError:
                return []
        if self._file.seekable() and _size(self._file) < self._file.tell():
            self._file.seek(0)
        return self._whole_lines(self._file.read(), _written_at(self.path))

    def _whole_lines(self, text: str, written: str) -> list[tuple[str, str]]:
        """Give lines with the time their file was last written."""
        # A line that is being written is kept until its end comes
        whole, newline, self._rest = (self._rest + text).rpartition("\n")
        return [(line, written) for line in whole.split("\n")] if newline else []

    def _was_replaced(self) -> bool:
        if self._file is None:
            return False

        try:
            return self.path.stat().st_ino != os.fstat(self._file.fileno()).st_ino
        except OSError:
            return False  # renamed away; the new one is not there yet

    def _entries(self, lines: list[tuple[str, str]]) -> Iterator[Entry]:
        """Join lines to the record they belong to; a printed line is an entry of its own."""
        name = self.path.stem
        times = [_time_of(line) for line, _ in lines]
        first = next((each for each in times if each), None)
        at = ""
        record: list[str] = []
        for (line, written), found in zip(lines, times, strict=True):
            if record and found is None and self._goes_on(line):
                record.append(line)
                continue
            if record:
                yield Entry(at, name, "\n".join(record))
                record = []
            if found is None:
                # At the latest; within its file it stays where it was
                yield Entry(at or min(written, first or written), name, line)
            else:
                at = found
                # One clock in all lines, whatever zone supervisord wrote its own in
                record = [_LOCAL_TIME.sub(f"{at} ", line)]
        if record:
            yield Entry(at, name, "\n".join(record))

    def _goes_on(self, line: str) -> bool:
        """Say whether a line without a time, such as a traceback's, belongs to a record."""
        return self.path.suffix == ".log" or line[:1].isspace()


def _written_at(path: Path) -> str:
    try:
        return _iso(path.stat().st_mtime)
    except OSError:
        return _iso(time.time())


def _time_of(line: str) -> str | None:
    """Read the time a line begins with: ours, or supervisord's, which is local."""
    if ours := _TIME.match(line):
        return ours[0].strip()
    if theirs := _LOCAL_TIME.match(line):
        seconds = time.mktime(time.strptime(theirs[1], "%Y-%m-%d %H:%M:%S"))
        return _iso(seconds + int(theirs[2]) / 1000)
    return None


def _iso(seconds: float) -> str:
    moment = datetime.fromtimestamp(seconds, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


async def _follow(folder: Path, names: tuple[str, ...], followed: dict[Path, Followed]) -> None:
    async def read_on() -> None:
        # Files tell nobody of their growth without inotify, which the standard library lacks
        while True:
            for path in _files(folder, names):
                followed.setdefault(path, Followed(path))
            _print(_merged(entry for each in followed.values() for entry in each.new()))
            await asyncio.sleep(_POLL_S)

    with stop_signals() as stop:
        await unless(stop, read_on())


def _files(folder: Path, names: Iterable[str]) -> list[Path]:
    wanted = set(names)
    return [
        path
        for path in sorted(folder.glob("*"))
        if path.suffix in _SUFFIXES and (not wanted or path.stem in wanted)
    ]


def _merged(entries: Iterable[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: entry.time)


def _print(entries: Iterable[Entry]) -> None:
    for entry in entries:
        head, *more = entry.text.split("\n")
        level = next((word for word in head.split(" ")[1:2] if word in _COLOURS), "")
        # Records name their agent themselves; tracebacks and bare output do not
        named = head if f"agent={entry.name} " in head else f"{entry.name}: {head}"
        say.line(named, _COLOURS.get(level, ""))
        for line in more:
            say.line(f"{entry.name}: {line}", "dim")
    sys.stdout.flush()


def _size(file: IO[str]) -> int:
    return os.fstat(file.fileno()).st_size
