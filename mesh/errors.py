"""
Every error the mesh raises, in one tree.

::

    MeshError
    ├── ConfigurationError        nothing starts; exit code 78
    │   └── RunDirError           the run directory cannot be used
    ├── AlreadyRunningError       somebody else holds the lock; exit code 75
    ├── HandlerSignatureError     an agent class is written wrongly (raised when the class is made)
    ├── TopicError                a name that the topic grammar does not allow
    ├── PayloadError              data that does not fit its schema or cannot travel
    ├── EventTooLargeError        an event over the size limit
    ├── FrameError                bytes from the wire that are no event
    ├── DeadLetterError           a dead letter that is not there, or cannot be what is asked of it
    ├── NotConnectedError         connect() was not called
    ├── ClosedError               used after close()
    └── BrokerUnavailableError    the fabric does not answer
        ├── AccessDeniedError     the fabric refuses us: password, user, rights, certificate
        ├── BackpressureError     the fabric does not take more within the limit
        ├── DamagedJournalError   the journal's file is damaged
        └── RequestTimeoutError   nobody replied in time
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

EXIT_BUG = 70
EXIT_LOCKED = 75
EXIT_CONFIGURATION = 78

#: Characters of an error's text that are kept: they go into logs, dead letters and states.
_MAX_WORDS = 4000
#: So many errors of a group are told.
_MAX_PARTS = 5


class MeshError(Exception):
    """Base of all errors of the mesh."""


class ConfigurationError(MeshError):
    """
    Settings that cannot be used; carries every mistake found, not only the first.

    Args:
        problems: One sentence a mistake: what was wrong, the value, what is allowed.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        """Keep the mistakes and join them for the message."""
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class RunDirError(ConfigurationError):
    """The run directory cannot be used; the message says why and what to do."""


class AlreadyRunningError(MeshError):
    """
    Another process holds the lock.

    Args:
        what: What is locked, in words.
        pid: The process that holds it, when the lock file says so.
    """

    def __init__(self, what: str, pid: int | None) -> None:
        """Name the thing and its owner."""
        self.pid = pid
        owner = f"by process {pid}" if pid else "by another process"
        super().__init__(f"{what} is already held {owner}; stop it first, or use another MESH_DIR")


class HandlerSignatureError(MeshError, TypeError):
    """A handler whose arguments the mesh cannot fill."""


class TopicError(MeshError, ValueError):
    """A name that breaks the topic grammar."""


class PayloadError(MeshError, ValueError):
    """Data that does not fit the schema of its event type, or that cannot be encoded."""


class EventTooLargeError(PayloadError):
    """An event larger than the limit on the wire."""


class FrameError(MeshError, ValueError):
    """
    Bytes that are no event.

    Args:
        reason: One word for counters, such as ``undecodable`` or ``too_deep``.
        detail: What was wrong, for people.
    """

    def __init__(self, reason: str, detail: str) -> None:
        """Keep the reason apart from the words."""
        self.reason = reason
        super().__init__(f"{reason}: {detail}")


class DeadLetterError(MeshError):
    """A dead letter that is not there, or that cannot be what is asked of it."""


class NotConnectedError(MeshError):
    """The broker was used before ``connect()``."""


class ClosedError(MeshError):
    """Something was used after it was closed."""


class BrokerUnavailableError(MeshError):
    """The fabric does not answer."""


class DamagedJournalError(BrokerUnavailableError):
    """The journal's file is damaged; no retry helps, somebody has to restore it."""


class AccessDeniedError(BrokerUnavailableError):
    """The fabric refuses us: a password, a user, its rights or a certificate; no retry helps."""


class BackpressureError(BrokerUnavailableError):
    """The fabric did not take the event within the limit."""


class RequestTimeoutError(BrokerUnavailableError):
    """Nobody replied within the time limit."""


def words_of(error: BaseException) -> str:
    """Give an error's class and text; a text that cannot be had is no reason to fail once more."""
    try:
        text = str(error)
    except Exception as again:  # noqa: BLE001 - somebody else's code
        text = f"(its text cannot be had: {type(again).__name__})"
    if isinstance(error, BaseExceptionGroup):
        # A task group's own words say nothing of what has failed in it
        text = f"{text}: {'; '.join(words_of(each) for each in error.exceptions[:_MAX_PARTS])}"
    return sound_text(f"{type(error).__name__}: {text}")


def sound_text(text: str) -> str:
    """Give a text as it can be written anywhere: no half surrogate pair, no more than is read."""
    if len(text) > _MAX_WORDS:
        text = f"{text[:_MAX_WORDS]}... ({len(text) - _MAX_WORDS} characters more)"
    # File names that are no UTF-8 come from the system with half pairs in them
    return text.encode(errors="backslashreplace").decode()


def first_leaf(error: BaseException | None) -> BaseException:
    """Give the first error of a group, however deep it is; one that is no group is its own."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert error is not None
    return error


def is_outage(error: BaseException) -> bool:
    """Say whether an error means only that the fabric or the journal is away, and can come back."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(is_outage, error.exceptions))
    # No password becomes right by waiting, no file heals, and who does not reply may never
    lasting = (AccessDeniedError, DamagedJournalError, RequestTimeoutError)
    return isinstance(error, BrokerUnavailableError) and not isinstance(error, lasting)
