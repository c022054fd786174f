"""
What could not be handled, kept for people: events whose handlers gave up, frames that are no
events, publishes that failed.

One JSON object a line in ``MESH_DIR/dead/<agent>.jsonl`` and the newest of them in memory.
"""

from __future__ import annotations

import hashlib
import secrets
import time
import traceback
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from mesh.logs import LineFile

if TYPE_CHECKING:
    from pathlib import Path

    from mesh.events import Event

_KEPT = 1000
#: Broken frames of live topics are sampled: at most one a second and reason is kept.
_SAMPLE_S = 1.0
#: How much is kept of bytes that are no event.
MAX_FRAME_BYTES = 4096


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One failed try."""

    #: Seconds since 1970.
    at_s: float
    error: str


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was put aside, and why."""

    #: Unique; keeping a letter of the same id again replaces it.
    id: str
    #: One word for counters: ``failed``, ``timeout``, ``expired``, ``undecodable``, ...
    reason: str
    #: The last error in words: the name of its class first.
    error: str
    agent: str
    topic: str
    #: When it failed last, in seconds since 1970.
    at_s: float
    #: When it failed first, in seconds since 1970.
    first_at_s: float
    #: The same for errors raised at the same place; empty when nothing was raised.
    traceback_hash: str = ""
    handler: str | None = None
    #: How often it was tried.
    attempts: int = 0
    #: The event under its Python names; None when the bytes were no event.
    event: dict[str, object] | None = None
    #: The CloudEvent, or the first 4 KiB of what came; None when `event` says it all.
    frame: bytes | None = None
    #: Failed tries that are known one by one, the oldest first.
    history: tuple[Attempt, ...] = ()


def encode_letter(letter: DeadLetter) -> bytes:
    """Give a letter as bytes, for a store."""
    return msgspec.msgpack.encode(letter)


def decode_letter(stored: bytes) -> DeadLetter:
    """Give a letter that `encode_letter` wrote."""
    return msgspec.msgpack.decode(stored, type=DeadLetter)


def traceback_hash(error: BaseException) -> str:
    """Give a short text that is equal for errors of one class raised through the same lines."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    places = [f"{frame.filename}:{frame.lineno}:{frame.name}" for frame in frames]
    return hashlib.sha256("\n".join([type(error).__name__, *places]).encode()).hexdigest()[:12]


class DeadLetters:
    """
    The dead letters of one agent.

    Args:
        agent: Whose they are.
        path: Where they are written; None keeps them in memory only.
    """

    def __init__(self, agent: str, path: Path | None = None) -> None:
        """Open nothing before the first letter."""
        self._agent = agent
        self._path = path
        self._file: LineFile | None = None
        self._sampled_at: dict[str, float] = {}
        self.newest: deque[DeadLetter] = deque(maxlen=_KEPT)
        self.total = 0

    def put_event(
        self,
        event: Event,
        reason: str,
        error: BaseException | str,
        *,
        handler: str | None = None,
        attempts: int = 0,
    ) -> None:
        """Keep an event."""
        words = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        now_s = time.time()
        self._put(
            DeadLetter(
                id=f"{event.id}/{self._agent}/{handler or ''}",
                reason=reason,
                error=words,
                traceback_hash="" if isinstance(error, str) else traceback_hash(error),
                agent=self._agent,
                topic=str(event.type),
                at_s=now_s,
                first_at_s=now_s,
                handler=handler,
                attempts=attempts,
                event=event.to_dict(),
            )
        )

    def put_frame(self, topic: str, reason: str, error: str, raw: bytes) -> None:
        """Keep a sample of bytes that are no event."""
        now = time.monotonic()
        self.total += 1
        if now - self._sampled_at.get(reason, -_SAMPLE_S) < _SAMPLE_S:
            return
        self._sampled_at[reason] = now
        now_s = time.time()
        self._put(
            DeadLetter(
                id=secrets.token_hex(12),
                reason=reason,
                error=error,
                agent=self._agent,
                topic=topic,
                at_s=now_s,
                first_at_s=now_s,
                frame=raw[:MAX_FRAME_BYTES],
            ),
            counted=True,
        )

    def close(self) -> None:
        """Write out what is queued."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _put(self, letter: DeadLetter, *, counted: bool = False) -> None:
        self.total += not counted
        self.newest.append(letter)
        if self._path is None:
            return
        if self._file is None:
            self._file = LineFile(self._path)
        self._file.put(msgspec.json.encode(letter).decode())
