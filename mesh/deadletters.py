"""
What could not be handled, kept for people: events whose handlers gave up, frames that are no
events, publishes that failed.

One JSON object a line in ``MESH_DIR/dead/<agent>.jsonl`` and the newest of them in memory.
"""

from __future__ import annotations

import base64
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import msgspec

from mesh.logs import LineFile

if TYPE_CHECKING:
    from pathlib import Path

    from mesh.events import Event

_KEPT = 1000
#: Broken frames of live topics are sampled: at most one a second and reason is kept.
_SAMPLE_S = 1.0
_MAX_RAW_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """One thing that was put aside, and why."""

    #: One word for counters: ``failed``, ``timeout``, ``expired``, ``undecodable``, ...
    reason: str
    error: str
    agent: str
    topic: str
    #: Seconds since 1970.
    at_s: float
    handler: str | None = None
    attempts: int = 0
    #: The event under its Python names; None when the bytes were no event.
    event: dict[str, object] | None = None
    #: The first 4 KiB of what came, base64; None when `event` says it all.
    raw: str | None = None


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
        self._put(
            DeadLetter(
                reason=reason,
                error=words,
                agent=self._agent,
                topic=str(event.type),
                at_s=time.time(),
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
        self._put(
            DeadLetter(
                reason=reason,
                error=error,
                agent=self._agent,
                topic=topic,
                at_s=time.time(),
                raw=base64.b64encode(raw[:_MAX_RAW_BYTES]).decode(),
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
        self._file.put(msgspec.json.encode(asdict(letter)).decode())
