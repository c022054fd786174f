"""How much may wait for a writer: who finds no room stands in line, and is refused at last."""

from __future__ import annotations

import asyncio
from collections import deque

from mesh.errors import BackpressureError


class Room:
    """
    The room before a writer, in bytes; used on one loop.

    Args:
        writer: Whose, for the error.
        limit_bytes: How much may wait.
        timeout_s: How long to stand in line.
    """

    def __init__(self, writer: str, limit_bytes: int, timeout_s: float) -> None:
        """Begin empty."""
        self._writer = writer
        self._limit_bytes = limit_bytes
        self._timeout_s = timeout_s
        self._queued_bytes = 0
        self._line: deque[asyncio.Event] = deque()

    async def wait(self, weight_bytes: int) -> None:
        """
        Wait in line until there is room; whatever its size, one may wait alone.

        Raises:
            BackpressureError: The writer took nothing for too long.
        """
        if not self._line and self._has_room(weight_bytes):
            return
        turn = asyncio.Event()
        self._line.append(turn)
        try:
            async with asyncio.timeout(self._timeout_s):
                while self._line[0] is not turn or not self._has_room(weight_bytes):
                    turn.clear()
                    await turn.wait()
        except TimeoutError:
            raise BackpressureError(
                f"{self._writer} took nothing for {self._timeout_s:g} s:"
                f" {self._queued_bytes} bytes wait to be written; is the disk slow or full?"
            ) from None
        finally:
            self._line.remove(turn)
            self.call_next()

    def take(self, weight_bytes: int) -> None:
        """Begin to wait for the writer."""
        self._queued_bytes += weight_bytes

    def give_back(self, weight_bytes: int) -> None:
        """Make room again; `call_next` when all of it is made."""
        self._queued_bytes -= weight_bytes

    def call_next(self) -> None:
        """Let the first in line look."""
        if self._line:
            self._line[0].set()

    def _has_room(self, weight_bytes: int) -> bool:
        return not self._queued_bytes or self._queued_bytes + weight_bytes <= self._limit_bytes
