"""
What handling one event changes, collected until it is committed as one step, and what a handler can
know of it: `self.ctx` in an agent.

Inside the handler of a durable event everything durable is provisional: what it publishes and what
it writes to `ctx.state` is kept together with the settling of the event, or not at all. A try that
fails leaves nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import MutableMapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import msgspec

from mesh.errors import ClosedError, PayloadError
from mesh.journal import Step
from mesh.payloads import check_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mesh.deadletters import DeadLetter
    from mesh.events import Event
    from mesh.journal import Delivery, Record

_MISSING = object()
#: Between what a derived id begins with and its digest.
_DERIVED = "~"
_ROOT_LENGTH = 40
_ODD = re.compile(r"[^A-Za-z0-9_.-]+")
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder().decode


class DurableState(MutableMapping[str, Any]):
    """
    State of an agent by name, kept in the journal in the same step as the event that changed it.

    Values are anything that JSON could hold, and bytes. What you read is a copy: assign to change.

    Args:
        known: What is committed, encoded; shared by all handlers of the agent.
        changes: What this step changes.
        write_through: Called instead of collecting changes, outside of steps.
        is_open: Whether it takes changes.
    """

    __slots__ = ("_changes", "_is_open", "_known", "_write_through")

    def __init__(
        self,
        known: dict[str, bytes],
        changes: dict[str, bytes | None],
        write_through: Callable[[str, bytes | None], None] | None = None,
        *,
        is_open: bool = True,
    ) -> None:
        """Look at both."""
        self._known = known
        self._changes = changes
        self._write_through = write_through
        self._is_open = is_open

    def close(self) -> None:
        """Take no more changes: the step is over."""
        self._is_open = False

    def __getitem__(self, name: str) -> Any:
        """
        Read a value.

        Raises:
            KeyError: There is none.
        """
        raw: Any = self._changes.get(name, _MISSING)
        if raw is _MISSING:
            raw = self._known[name]
        if raw is None:
            raise KeyError(name)
        return _unpack(raw)

    def __setitem__(self, name: str, value: Any) -> None:
        """
        Write a value.

        Raises:
            PayloadError: It cannot be encoded, or the name is no text.
            ClosedError: The step is over.
        """
        check_text("the name of state", name)
        try:
            raw = _pack(value)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise PayloadError(f"state {name!r} cannot be kept: {error}") from error
        self._put(name, raw)

    def __delitem__(self, name: str) -> None:
        """
        Remove a value.

        Raises:
            KeyError: There is none.
            ClosedError: The step is over.
        """
        if name not in self:
            raise KeyError(name)
        self._put(name, None)

    def __contains__(self, name: object) -> bool:
        """Say whether there is a value."""
        raw: Any = self._changes.get(name, _MISSING)  # type: ignore[call-overload]
        return name in self._known if raw is _MISSING else raw is not None

    def __iter__(self) -> Iterator[str]:
        """List the names."""
        return (name for name in {**self._known, **self._changes} if name in self)

    def __len__(self) -> int:
        """Count the values."""
        return sum(1 for _ in self)

    def _put(self, name: str, raw: bytes | None) -> None:
        if not self._is_open:
            raise ClosedError(
                f"state {name!r} cannot be kept: the step of this context is over;"
                " take `self.ctx` anew"
            )
        if self._write_through is None:
            self._changes[name] = raw
            return
        merge_state(self._known, {name: raw})
        self._write_through(name, raw)


def merge_state(known: dict[str, bytes], changes: dict[str, bytes | None]) -> None:
    """Make changes known."""
    for name, raw in changes.items():
        if raw is None:
            known.pop(name, None)
        else:
            known[name] = raw


class HandlerContext:
    """
    One event in the hands of one agent.

    Args:
        agent_name: Whose handlers run; the same for all its replicas.
        known: The agent's committed state.
        event: What is handled; None in a step without an event (a source's).
        delivery: What the journal handed out; None for live events.
        write_through: See `DurableState`.
        cause: What ids of published events are derived from, where there is no event.
    """

    __slots__ = (
        "_cause",
        "_changed_before",
        "_published",
        "_recorded_before",
        "_state",
        "_write_through",
        "agent_name",
        "attempt",
        "changes",
        "dead",
        "delivery",
        "event",
        "handler",
        "has_failed",
        "is_open",
        "known",
        "records",
    )

    def __init__(
        self,
        agent_name: str,
        known: dict[str, bytes],
        event: Event | None = None,
        delivery: Delivery | None = None,
        write_through: Callable[[str, bytes | None], None] | None = None,
        cause: str | None = None,
    ) -> None:
        """Begin with nothing changed."""
        self.agent_name = agent_name
        #: The agent's state as it is without this step.
        self.known = known
        self.event = event
        self.delivery = delivery
        #: Which handler runs, and at which try: 1 for the first.
        self.handler = ""
        self.attempt = 1
        #: False once it is committed, or given up: what is published then stands alone.
        self.is_open = True
        #: It was taken back: what is left of it must not publish at all.
        self.has_failed = False
        self.records: list[Record] = []
        self.dead: list[DeadLetter] = []
        self.changes: dict[str, bytes | None] = {}
        self._write_through = write_through
        self._state: DurableState | None = None
        self._cause = cause if event is None else event.id
        self._published = 0
        self._recorded_before = 0
        self._changed_before: dict[str, bytes | None] | None = None

    @property
    def state(self) -> DurableState:
        """Give the agent's durable state by name."""
        if self._state is None:
            # Many handlers keep none
            self._state = DurableState(
                self.known, self.changes, self._write_through, is_open=self.is_open
            )
        return self._state

    @property
    def deliveries(self) -> int:
        """Tell how often the journal has handed the event out; above 1 after a crash."""
        return 1 if self.delivery is None else self.delivery.deliveries

    @property
    def is_durable(self) -> bool:
        """Say whether the event comes again if this process dies now."""
        return self.delivery is not None

    @property
    def idempotency_key(self) -> str:
        """
        Give a text that is the same each time this handler gets this event.

        For effects outside the mesh: a payment service that knows the key does nothing twice.
        """
        return f"{self._cause or ''}/{self.agent_name}/{self.handler}"

    # -- for the mesh --------------------------------------------------------------------------

    def begin(self, handler: str) -> None:
        """Note where a handler begins, so that a try that fails can be taken back."""
        self.handler = handler
        self.attempt = 1
        self._published = 0
        self._recorded_before = len(self.records)
        self._changed_before = dict(self.changes) if self.changes else None

    def again(self) -> HandlerContext:
        """
        Forget what the handler that has failed published and wrote; give the context of what comes.

        What the failed try has left running keeps the old one, and can do nothing more with it.
        """
        self.fail()
        new = HandlerContext(
            self.agent_name, self.known, self.event, self.delivery, cause=self._cause
        )
        new.records = self.records[: self._recorded_before]
        new.dead = self.dead
        new.changes.update(self._changed_before or {})
        new.begin(self.handler)
        new.attempt = self.attempt + 1
        return new

    def derive_id(self) -> str | None:
        """
        Give the id of the next event that is published; None: any will do.

        Derived from the cause, so that doing it again publishes the same event again, which the
        journal then knows.
        """
        if self._cause is None:
            return None
        self._published += 1
        cause = f"{self.idempotency_key}/{self._published}"
        digest = hashlib.blake2b(cause.encode(), digest_size=12).hexdigest()
        # Ids that begin alike lie side by side in an index: a digest alone would touch a page of it
        # for each event
        return f"{_root_of(self._cause)}{_DERIVED}{digest}"

    def close(self) -> None:
        """Take nothing more: what is published or written from now on stands alone."""
        self.is_open = False
        if self._state is not None:
            self._state.close()

    def fail(self) -> None:
        """Take nothing more, and let nothing that is left of it stand alone either."""
        self.has_failed = True
        self.close()

    def require_not_failed(self) -> None:
        """
        Refuse what is left running of a try that has failed, and was taken back.

        Raises:
            ClosedError: It has failed.
        """
        if self.has_failed:
            raise ClosedError(
                f"{self.handler or self._cause or 'a step'} of {self.agent_name} has failed, and"
                " what it does is taken back: this is a task that it left running"
            )

    def step(self) -> Step:
        """Close, and give everything as one step."""
        self.close()
        acks = [] if self.delivery is None else [self.delivery]
        return Step(acks, [], self.records, self.dead, self.changes)


def _root_of(cause: str) -> str:
    """Give the id, or what there is of it, that a chain of derived ids began with."""
    return _ODD.sub("-", cause.partition(_DERIVED)[0][:_ROOT_LENGTH])


#: The step that is under way in this task; None outside the handlers of durable events.
current_context: ContextVar[HandlerContext | None] = ContextVar("current_context", default=None)
