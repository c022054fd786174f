"""
What could not be handled, kept for people: events whose handlers gave up, frames that are no
events, publishes that failed.

They live in the journal, on every fabric, for live events too; the newest of a process also in its
memory.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import secrets
import time
import traceback
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from mesh.errors import BrokerUnavailableError, ConfigurationError, sound_text, words_of
from mesh.logs import say_once

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from mesh.events import Event

_log = logging.getLogger(__name__)

_KEPT = 1000
#: What may wait for a journal that is away; more is counted and said, not kept.
_MAX_WAITING = 10_000
_BATCH = 256
#: Broken frames of live topics are sampled: at most one a second and reason is kept.
_SAMPLE_S = 1.0
#: How much is kept of bytes that are no event.
MAX_FRAME_BYTES = 4096
#: What msgspec raises for data that has no form in bytes.
_NO_FORM = (TypeError, ValueError, OverflowError, RecursionError)


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One failure, or one edit."""

    #: Seconds since 1970.
    at_s: float
    error: str


class Earlier(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of an event that failed before, when its dead letter is replayed."""

    #: The id of the letter.
    letter: str
    #: The one handler that is to run; None: all handlers of the agent.
    handler: str | None
    attempts: int
    first_at_s: float
    history: tuple[Attempt, ...]


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
    #: Failures before the last one, and edits, the oldest first.
    history: tuple[Attempt, ...] = ()
    #: What `frame` was before somebody edited the letter.
    original: bytes | None = None


def encode_letter(letter: DeadLetter) -> bytes:
    """Give a letter as bytes, for a store."""
    return msgspec.msgpack.encode(letter)


def decode_letter(stored: bytes) -> DeadLetter:
    """Give a letter that `encode_letter` wrote."""
    return msgspec.msgpack.decode(stored, type=DeadLetter)


def go_on(letter: DeadLetter, earlier: Earlier) -> DeadLetter:
    """Give the letter of a replay that failed as the next page of the letter that was replayed."""
    if letter.handler != earlier.handler:
        return letter
    return msgspec.structs.replace(
        letter,
        id=earlier.letter,
        attempts=earlier.attempts + letter.attempts,
        first_at_s=earlier.first_at_s,
        history=earlier.history,
    )


def _encoded(event: Event) -> bytes | None:
    """Give the CloudEvent, which holds what `to_dict` turns into text: bytes and moments."""
    try:
        return msgspec.msgpack.encode(event)
    except _NO_FORM:
        return None


def _fields(event: Event) -> tuple[dict[str, object] | None, str]:
    """Give an event under its Python names, or why it cannot be written down."""
    try:
        fields = event.to_dict()
        msgspec.msgpack.encode(fields)
    except _NO_FORM as error:
        # A handler may have put anything into it
        return None, f" (the event itself cannot be kept: {error})"
    return fields, ""


def traceback_hash(error: BaseException) -> str:
    """Give a short text that is equal for errors of one class raised through the same lines."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    places = [f"{frame.filename}:{frame.lineno}:{frame.name}" for frame in frames]
    return hashlib.sha256("\n".join([type(error).__name__, *places]).encode()).hexdigest()[:12]


class DeadLetters:
    """
    The dead letters of one agent, on their way into the journal.

    Args:
        agent: Whose they are.
        bury: Keeps letters for good; None keeps the newest in memory only.
    """

    def __init__(
        self, agent: str, bury: Callable[[Sequence[DeadLetter]], Awaitable[None]] | None = None
    ) -> None:
        """Begin without any."""
        self._agent = agent
        self._bury = bury
        self._waiting: deque[DeadLetter] = deque()
        self._writing: asyncio.Task[None] | None = None
        self._sampled_at: dict[str, float] = {}
        self.newest: deque[DeadLetter] = deque(maxlen=_KEPT)
        self.total = 0
        #: Letters that could not be kept: the journal was away too long, or has no form for them.
        self.unkept = 0

    def letter(
        self,
        event: Event,
        reason: str,
        error: BaseException | str,
        *,
        handler: str | None = None,
        attempts: int = 0,
    ) -> DeadLetter:
        """Make the letter of an event; it is not kept yet."""
        words = error if isinstance(error, str) else words_of(error)
        # A letter that cannot be kept would hold up all that wait behind it
        fields, why = _fields(event)
        now_s = time.time()
        return DeadLetter(
            id=f"{event.id}/{self._agent}/{handler or ''}",
            reason=reason,
            error=sound_text(words + why),
            traceback_hash="" if isinstance(error, str) else traceback_hash(error),
            agent=self._agent,
            topic=str(event.type),
            at_s=now_s,
            first_at_s=now_s,
            handler=handler,
            attempts=attempts,
            event=fields,
            frame=_encoded(event),
        )

    def frame_letter(self, topic: str, reason: str, error: str, raw: bytes) -> DeadLetter:
        """Make the letter of bytes that are no event; it is not kept yet."""
        now_s = time.time()
        return DeadLetter(
            id=secrets.token_hex(12),
            reason=reason,
            error=sound_text(error),
            agent=self._agent,
            topic=topic,
            at_s=now_s,
            first_at_s=now_s,
            frame=raw[:MAX_FRAME_BYTES],
        )

    def put(self, letter: DeadLetter) -> None:
        """Keep a letter: in memory now, in the journal soon."""
        self.note(letter)
        if self._bury is None:
            return
        if len(self._waiting) >= _MAX_WAITING:
            self.unkept += 1
            return
        self._waiting.append(letter)
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(
                self._write(), name=f"{self._agent}-dead-letters"
            )

    def note(self, letter: DeadLetter) -> None:
        """Count a letter that somebody else keeps: it is part of a step."""
        self.total += 1
        self.newest.append(letter)

    def put_frame(self, topic: str, reason: str, error: str, raw: bytes) -> None:
        """Keep a sample of bytes that are no event, which came live."""
        now = time.monotonic()
        if now - self._sampled_at.get(reason, -_SAMPLE_S) < _SAMPLE_S:
            self.total += 1
            return
        self._sampled_at[reason] = now
        self.put(self.frame_letter(topic, reason, error, raw))

    async def written(self) -> None:
        """Return when the letters so far are kept; waits for a journal that is away."""
        while self._writing is not None and not self._writing.done():
            await asyncio.wait({self._writing})

    async def close(self, limit_s: float = 2.0) -> None:
        """
        Write out what waits.

        Args:
            limit_s: How long the journal may take.
        """
        if self._writing is None:
            return
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.gather(self._writing, return_exceptions=True)
        except TimeoutError:
            _log.error(
                "%s: %d dead letters could not be kept: the journal does not answer",
                self._agent,
                len(self._waiting),
            )

    async def _write(self) -> None:
        assert self._bury is not None
        pause_s, size = 0.05, _BATCH
        while self._waiting:
            batch = list(itertools.islice(self._waiting, size))
            try:
                await self._bury(batch)
            except BrokerUnavailableError as error:
                say_once(
                    _log,
                    f"dead-letters-{self._agent}",
                    "%s keeps dead letters in memory while the journal is away (said once): %s",
                    self._agent,
                    error,
                )
                await asyncio.sleep(pause_s)
                pause_s = min(2.0, pause_s * 2)
                continue
            except ConfigurationError as error:
                # No waiting makes it a journal
                say_once(
                    _log,
                    f"no-dead-letters-{self._agent}",
                    "%s cannot keep dead letters (said once): %s",
                    self._agent,
                    error,
                )
                self.unkept += len(self._waiting)
                self._waiting.clear()
                return
            except Exception as error:  # noqa: BLE001 - nobody has thought of it
                # Whichever letter it is must not hold up the others
                size = 1
                if len(batch) == 1:
                    self.unkept += 1
                    say_once(
                        _log,
                        f"unkept-{self._agent}",
                        "%s cannot keep a dead letter (said once): %s: %.500r",
                        self._agent,
                        words_of(error),
                        self._waiting.popleft(),
                    )
                continue
            pause_s = 0.05
            for _ in batch:
                self._waiting.popleft()
