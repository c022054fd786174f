"""
Logging of one process: to a file of its own, through a bounded queue.

Agents do not log to stdout: supervisord reads that pipe, and a stopped supervisord would block
every agent that prints. The queue is bounded and never waits: what does not fit is counted.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MAX_QUEUED = 10_000
MAX_FILE_BYTES = 5 * 1024 * 1024
_KEPT_FILES = 2

# A trouble that lasts is said after so long, then after twice as long, and so on
_FIRST_GAP_S = 10.0
_LAST_GAP_S = 600.0
#: A trouble that has not shown for so long is a new one.
_OVER_S = 60.0

_once: set[str] = set()


def say_once(logger: logging.Logger, key: str, message: str, *values: object) -> None:
    """Log a warning the first time a key is seen in this process."""
    if key not in _once:
        _once.add(key)
        logger.warning(message, *values)


class Sparing:
    """
    Says a trouble at once, and ever more seldom while it lasts; what is not said is counted.

    Args:
        logger: Where to.
    """

    def __init__(self, logger: logging.Logger) -> None:
        """Nothing was said yet."""
        self._logger = logger
        self._kinds: dict[str, _Trouble] = {}

    def say(self, kind: str, level: int, words: str) -> None:
        """Log it, or count it."""
        now_s = time.monotonic()
        trouble = self._kinds.get(kind)
        if trouble is None or (now_s - trouble.seen_s > _OVER_S and now_s >= trouble.next_s):
            trouble = self._kinds[kind] = _Trouble()
        trouble.seen_s = now_s
        if now_s < trouble.next_s:
            trouble.unsaid += 1
            return
        trouble.next_s = now_s + trouble.gap_s
        trouble.gap_s = min(2 * trouble.gap_s, _LAST_GAP_S)
        unsaid, trouble.unsaid = trouble.unsaid, 0
        more = f" ({unsaid} more like this)" if unsaid else ""
        self._logger.log(level, "%s%s", words, more)


class _Trouble:
    """How a kind of trouble was said so far."""

    def __init__(self) -> None:
        self.next_s = 0.0
        self.gap_s = _FIRST_GAP_S
        self.seen_s = 0.0
        self.unsaid = 0


class _Line(logging.Formatter):
    """One line a record; newlines in a message cannot forge a second record."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def format(self, record: logging.LogRecord) -> str:
        record.message = record.getMessage().replace("\n", "\\n").replace("\r", "\\r")
        text = self.formatMessage(record)
        if record.exc_info:
            text += "\n" + "\n".join(
                f"    {line}" for line in self.formatException(record.exc_info).splitlines()
            )
        return text

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.asctime = self.formatTime(record)
        return super().formatMessage(record)


class LineFile:
    """
    Append lines to a rotating file from a thread; `put` never blocks.

    Args:
        path: The file; older ones are kept beside it as ``.1`` and ``.2``.
        max_queued: Lines that may wait for the disk; more are dropped and counted.
    """

    def __init__(self, path: Path, *, max_queued: int = MAX_QUEUED) -> None:
        """Start the thread; the file is opened with the first line."""
        self._path = path
        self._queue: queue.Queue[str | None] = queue.Queue(max_queued)
        self.dropped = 0
        self._thread = threading.Thread(target=self._write_all, name=path.name, daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Queue a line, or count it as dropped."""
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what is queued and end the thread."""
        if self._thread.is_alive():
            try:
                self._queue.put(None, timeout=1)
            except queue.Full:
                self.dropped += 1
            self._thread.join(timeout=2)

    def _write_all(self) -> None:
        while True:
            line = self._queue.get()
            if line is None:
                return
            lines = [line]
            ended = False
            while not self._queue.empty() and len(lines) < 1000:
                more = self._queue.get()
                if more is None:
                    ended = True
                    break
                lines.append(more)
            self._write(lines)
            if ended:
                return

    def _write(self, lines: list[str]) -> None:
        text = "\n".join(lines) + "\n"
        try:
            if self._path.exists() and self._path.stat().st_size + len(text) > MAX_FILE_BYTES:
                self._rotate()
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError:
            # A full or vanished disk must not stop an agent: counted, and shown by its beat
            self.dropped += len(lines)

    def _rotate(self) -> None:
        for number in range(_KEPT_FILES, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            newer = (
                self._path.with_name(f"{self._path.name}.{number - 1}")
                if number > 1
                else self._path
            )
            if newer.exists():
                newer.replace(older)


class QueuedFile(logging.Handler):
    """A logging handler on a `LineFile`."""

    def __init__(self, path: Path) -> None:
        """Write to `path`."""
        super().__init__()
        self.file = LineFile(path)

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record."""
        self.file.put(self.format(record))

    def close(self) -> None:
        """Write what is queued and end."""
        self.file.close()
        super().close()


def set_up_logging(agent: str, path: Path | None, level: str = "INFO") -> Callable[[], None]:
    """
    Send this process's log to a file, or to stderr without one.

    Args:
        agent: Stands in every line.
        path: The log file; None for stderr.
        level: A logging level's name.

    Returns:
        A function that writes out what is queued and ends.
    """
    handler: logging.Handler = QueuedFile(path) if path is not None else logging.StreamHandler()
    escaped = agent.replace("%", "%%")
    handler.setFormatter(_Line(f"%(asctime)s %(levelname)s agent={escaped} %(name)s: %(message)s"))
    root = logging.getLogger()
    root.setLevel(level)
    root.addHandler(handler)

    def finish() -> None:
        root.removeHandler(handler)
        handler.close()

    return finish
