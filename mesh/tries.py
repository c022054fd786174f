"""What follows when a handler has failed: tries with pauses, then the event is put aside."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from mesh import codec
from mesh.cancelling import shed
from mesh.context import current_context
from mesh.errors import BrokerUnavailableError, FrameError, MeshError, PayloadError, words_of
from mesh.ledger import Ledger
from mesh.outcomes import Outcome, Reject, Retry, Skip
from mesh.retry import RetryPolicy, in_words

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from mesh.consumer_config import ConsumerConfig
    from mesh.context import HandlerContext
    from mesh.deadletters import DeadLetters
    from mesh.events import Event
    from mesh.handlers import Handler
    from mesh.inbox import Arrival, Inbox

_log = logging.getLogger(__name__)

_FAILED = Ledger.at("failed")


class ExpiredError(MeshError):
    """An event expired before a handler could be tried again."""


#: Such an error is no surprise, and no place in the handler.
_NO_SURPRISES = (Outcome, BrokerUnavailableError, ExpiredError)


class Slot:
    """One handler at a time; what the watch sees of it."""

    __slots__ = (
        "age_s",
        "event",
        "handler",
        "inbox",
        "pausing",
        "retries",
        "seen",
        "task",
        "timed_out",
    )

    def __init__(self, inbox: Inbox) -> None:
        """Begin empty."""
        self.inbox = inbox
        self.task: asyncio.Task[None] | None = None
        self.event: Event | None = None
        self.handler: Handler | None = None
        #: What the watch saw last: the same handler, event and try again is still running.
        self.seen: tuple[Event | None, Handler | None, int] = (None, None, 0)
        self.retries = 0
        self.age_s = 0.0
        #: What the watch has cancelled, and on what it ran.
        self.timed_out: tuple[Event | None, Handler | None] | None = None
        self.pausing = False


class Tries:
    """
    The tries of one consumer's handlers.

    Args:
        config: The consumer's.
        ledger: Where failures are counted.
        dead_letters: Where live events are put aside.
        is_ending: Says whether the slots are being cancelled, for the consumer ends.
    """

    def __init__(
        self,
        config: ConsumerConfig,
        ledger: Ledger,
        dead_letters: DeadLetters,
        is_ending: Callable[[], bool],
    ) -> None:
        """Prepare."""
        self._is_ending = is_ending
        self._config = config
        self._agent_name = config.agent_name
        self._ledger = ledger
        self._cells = ledger.cells
        self._dead_letters = dead_letters
        self._retry = RetryPolicy(
            max_retries=config.max_retries, first_delay_s=config.retry_delay_ms / 1000
        )

    def take_back(self, slot: Slot) -> bool:
        """
        End the cancellation of a handler that was over its limit.

        Returns:
            Whether it is the one that runs now; another one has not let itself be cancelled.
        """
        overdue, slot.timed_out = slot.timed_out, None
        if overdue is None or slot.task is None:
            return False
        slot.task.uncancel()
        return overdue[0] is slot.event and overdue[1] is slot.handler

    def limit_s(self, slot: Slot) -> float:
        """Tell how many seconds the handler in a slot may run."""
        handler = slot.handler
        if handler is not None and handler.timeout_s is not None:
            return handler.timeout_s
        return self._config.handler_timeout_s

    async def after(
        self,
        error: BaseException,
        slot: Slot,
        handler: Handler,
        event: Event,
        arrival: Arrival,
        context: HandlerContext | None = None,
    ) -> HandlerContext | None:
        """
        Try a handler again, or put the event aside; cancellation from outside passes through.

        Args:
            error: What the handler raised.
            slot: Where it ran.
            handler: Who raised it.
            event: What it ran on.
            arrival: What the event came with.
            context: Of its step; None: it came live.

        Returns:
            What the step goes on with: what is left of a try that has failed cannot write into it.
        """
        policy = handler.retry or self._retry
        retries = policy.max_retries if handler.max_retries is None else handler.max_retries
        attempt, first = 1, error
        while True:
            failure = await self._as_failure(slot, handler, error)
            if context is not None:
                context = context.again()
                current_context.set(context)
            if isinstance(failure, Skip):
                self._ledger.count("skipped")
                handler.calls += 1
                return context
            # The handler may have changed the payload before it failed
            event = _as_it_came(event, arrival, context)
            if attempt > retries or not _is_worth_a_try(failure, policy):
                break
            handler.failed(failure)
            # The pause is not the handler's time
            slot.pausing = True
            pause_s = failure.after_s if isinstance(failure, Retry) else policy.delay_s(attempt)
            await self._config.clock.sleep(pause_s)
            slot.pausing = False
            if (late := too_late(event, self._config.clock.now())) is not None:
                failure = ExpiredError(f"{late}, after {in_words(attempt)}: {words_of(failure)}")
                break
            slot.retries += 1
            attempt += 1
            try:
                await handler.run(event)
            except BaseException as again:  # noqa: BLE001 - sorted out above
                _tell_apart(again, first)
                error = again
            else:
                handler.calls += 1
                return context
        self._give_up(handler, event, failure, attempt, context)
        return context

    def _give_up(
        self,
        handler: Handler,
        event: Event,
        failure: BaseException,
        attempts: int,
        context: HandlerContext | None,
    ) -> None:
        handler.failed(failure)
        self._cells[_FAILED] += 1
        reason = _reason(failure)
        self._ledger.count(reason if reason == "expired" else f"handler_{reason}")
        letter = self._dead_letters.letter(
            event, reason, failure, handler=handler.id, attempts=attempts
        )
        if context is None:
            self._dead_letters.put(letter)
        else:
            context.dead.append(letter)
        _log.error(
            "handler %s of %s failed on %s %s after %s and the event was put aside: %s",
            handler.id,
            self._agent_name,
            event.type,
            event.id,
            in_words(attempts),
            letter.error,
            exc_info=None if isinstance(failure, _NO_SURPRISES) else failure,
        )

    async def _as_failure(
        self, slot: Slot, handler: Handler, error: BaseException
    ) -> BaseException:
        """Tell a handler's failure from the cancellation of the consumer."""
        timed_out = self.take_back(slot)
        self._pass_through(slot, error)
        if slot.task is not None and slot.task.cancelling():
            await shed(slot.task)
            self._pass_through(slot, error)
        if timed_out and isinstance(error, (asyncio.CancelledError, GeneratorExit)):
            return TimeoutError(
                f"{handler.id} ran longer than {self.limit_s(slot):g} s and was cancelled"
            )
        return error

    def _pass_through(self, slot: Slot, error: BaseException) -> None:
        """Raise what is no failure of a handler's."""
        if isinstance(error, GeneratorExit) and not _is_running(slot.task):
            raise error  # the slot is being closed; otherwise the handler has raised it
        if self._is_ending():
            # A handler that makes something else of that gets no further try
            raise asyncio.CancelledError from error


def _tell_apart(error: BaseException, first: BaseException) -> None:
    """Let a try's error not come with the traceback of the first, within whose handling it ran."""
    link: BaseException | None = error
    seen: set[int] = set()  # somebody may have made a ring
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if link.__context__ is first:
            link.__context__ = None
        link = link.__context__


def _is_running(task: asyncio.Task[None] | None) -> bool:
    try:
        return asyncio.current_task() is task
    except RuntimeError:
        return False


def _as_it_came(event: Event, arrival: Arrival, context: HandlerContext | None) -> Event:
    """Give an event as it was before a handler had it."""
    delivery = None if context is None else context.delivery
    frame = arrival.frame if delivery is None else delivery.frame
    try:
        batch = codec.decode_frame(event.type, frame, arrival.schema)
    except FrameError:
        return event
    return next((each for each in batch.events if each.id == event.id), event)


def _is_worth_a_try(failure: BaseException, policy: RetryPolicy) -> bool:
    if isinstance(failure, Retry):
        return True
    return isinstance(failure, policy.on) and not isinstance(
        failure, (TimeoutError, PayloadError, Reject)
    )


def too_late(event: Event, now: datetime) -> str | None:
    """Say that an event has expired; None: it has not."""
    if event.expires_at is None or event.expires_at > now:
        return None
    return f"it expired at {event.expires_at}"


def _reason(failure: BaseException) -> str:
    if isinstance(failure, ExpiredError):
        return "expired"
    if isinstance(failure, TimeoutError):
        return "timeout"
    if isinstance(failure, Reject):
        return "rejected"
    return "invalid" if isinstance(failure, PayloadError) else "failed"
