"""
Who handles what: the registry of handlers, and the running of them.

Dispatch looks one type up in a dict and walks a tuple that was sorted at registration, so its cost
does not depend on how many handlers other types have.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec

from mesh.errors import words_of
from mesh.events import Event, declaration_of, payload_of
from mesh.retry import RetryPolicy
from mesh.signatures import bind, signature_of
from mesh.topics import check_topic
from mesh.values import State

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    Run = Callable[[Event], Awaitable[Any]]
    #: Wraps the running of one handler; gets the event and what comes next.
    Middleware = Callable[[Event, Run], Awaitable[Any]]

_log = logging.getLogger(__name__)


class HandlerPriority(enum.IntEnum):
    """Which handlers go first; also the inbox lane of the event types they hear."""

    CRITICAL = 0
    HIGH = 1
    NORMAL = 5
    LOW = 10


class Handler(State, eq=False):
    """One registered handler and what is counted of it."""

    topic: str
    func: Callable[..., Awaitable[Any]]
    agent_name: str
    id: str
    priority: HandlerPriority = HandlerPriority.NORMAL
    #: Cancelled after this many seconds; None: the consumer's own limit.
    timeout_s: float | None = None
    max_retries: int | None = None
    #: Default: the consumer's own.
    retry: RetryPolicy | None = None
    #: Runs the handler with its payload decoded and all its middleware around.
    run: Run = None  # type: ignore[assignment]  # made in `__post_init__`
    #: Whether that is the function itself, called the way it wants.
    is_bare: bool = True
    #: The class it wants payloads decoded into, when it wants one.
    schema: type[Any] | None = None
    wants_event: bool = True
    calls: int = 0
    errors: int = 0
    last_error: str | None = None

    def __post_init__(self) -> None:
        """Work out how the function wants to be called."""
        shape = signature_of(self.func)
        self.schema, self.wants_event = shape.schema, shape.wants_event
        self.run = bind(self.func, shape)

    def wrap(self, middleware: Sequence[Middleware]) -> None:
        """Put middleware around it, the first outermost."""
        self.run = compose(middleware, self.run)
        self.is_bare = not middleware

    def starter(
        self, events: Sequence[Event], schema: type[Any] | None
    ) -> Callable[[], Awaitable[Any]]:
        """
        Give what starts the handler on one event after the other, call by call.

        Args:
            events: What it shall run on.
            schema: The class that all their payloads are instances of; None: not known.
        """
        if schema is None or schema is not self.schema or not self.is_bare:
            return map(self.run, events).__next__
        # What `bind` does, without a Python function in between
        payloads = map(payload_of, events)
        if self.wants_event:
            return map(self.func, payloads, events).__next__
        return map(self.func, payloads).__next__

    def failed(self, error: BaseException) -> None:
        """Count a failure."""
        self.calls += 1
        self.errors += 1
        self.last_error = words_of(error)


def check_limits(timeout_s: object, max_retries: object, retry: object) -> None:
    """
    Refuse limits that make no sense, before the first event meets them.

    Raises:
        ValueError: The message names all of them.
    """
    wrong = []
    is_number = isinstance(timeout_s, (int, float)) and not isinstance(timeout_s, bool)
    if timeout_s is not None and not (is_number and 0 < timeout_s < float("inf")):  # type: ignore[operator]  # a number
        wrong.append(f"timeout_s={timeout_s!r}: must be seconds above 0")
    is_count = type(max_retries) is int and max_retries >= 0
    if max_retries is not None and not is_count:
        wrong.append(f"max_retries={max_retries!r}: must be a whole number from 0 on")
    if retry is not None and not isinstance(retry, RetryPolicy):
        wrong.append(f"retry={retry!r}: must be a RetryPolicy")
    if wrong:
        raise ValueError("; ".join(wrong))


def check_middleware(name: str, middleware: object) -> None:
    """
    Refuse what is no middleware, before the first event meets it.

    Raises:
        ValueError: The message names the value.
    """
    if isinstance(middleware, Sequence):
        wrong = [f"{each!r} is no middleware" for each in middleware if not callable(each)]
    else:
        wrong = ["must be a list of middleware, the first outermost"]
    if wrong:
        raise ValueError(
            f"{name}={middleware!r}: {', '.join(wrong)}; one is `async def layer(event, proceed)`"
        )


class EventHandlerRegistry:
    """
    Handlers by event type; safe to share between the consumers of a process.

    Args:
        middleware: Wrapped around every handler, the first outermost. None costs nothing.

    Raises:
        ValueError: One of them cannot be called.
    """

    def __init__(self, middleware: Sequence[Middleware] = ()) -> None:
        """Begin empty."""
        check_middleware("middleware", middleware)
        self._middleware = tuple(middleware)
        self._handlers: dict[str, dict[tuple[str, str], Handler]] = {}
        self._by_topic: dict[str, tuple[Handler, ...]] = {}
        #: What `dispatch` runs, for each handler; all but the last get a payload of their own.
        self._runs: dict[str, tuple[tuple[Run, Handler], ...]] = {}
        self._of_agent: dict[tuple[str, str], tuple[Handler, ...]] = {}
        self._agents_of: dict[str, set[str]] = {}
        self._unheard: dict[str, int] = {}
        self._dispatched = 0

    async def register(
        self,
        event_type: str,
        handler_func: Callable[..., Awaitable[Any]],
        agent_name: str,
        handler_id: str,
        priority: HandlerPriority = HandlerPriority.NORMAL,
        *,
        timeout_s: float | None = None,
        max_retries: int | None = None,
        retry: RetryPolicy | None = None,
        middleware: Sequence[Middleware] = (),
    ) -> Handler:
        """
        Run a coroutine function for every event of a type.

        Args:
            event_type: The type to hear.
            handler_func: ``(event)``, ``(payload: Schema)`` or ``(payload: Schema, event)``.
            agent_name: Whose handler it is; consumers run only their own agent's handlers.
            handler_id: Unique within the agent and type; registering again replaces.
            priority: Most urgent first.
            timeout_s: Cancel the handler after so many seconds.
            max_retries: How often it is tried again after it raised.
            retry: How often, how fast and after which errors.
            middleware: Around this handler only, inside the registry's own.

        Raises:
            HandlerSignatureError: The function cannot be called with an event.
            TopicError: The type breaks the topic grammar.
            ValueError: A limit or a middleware makes no sense.
        """
        topic = check_topic(event_type)
        check_limits(timeout_s, max_retries, retry)
        check_middleware("middleware", middleware)
        handler = Handler(
            topic,
            handler_func,
            agent_name,
            handler_id,
            HandlerPriority(priority),
            timeout_s,
            max_retries,
            retry,
        )
        handler.wrap((*self._middleware, *middleware))
        self._handlers.setdefault(topic, {})[agent_name, handler_id] = handler
        self._sort(topic)
        return handler

    async def unregister(self, agent_name: str, handler_id: str | None = None) -> int:
        """Forget an agent's handlers, or one of them; returns how many."""
        gone = [
            (topic, key)
            for topic, of_topic in self._handlers.items()
            for key in of_topic
            if key[0] == agent_name and handler_id in (None, key[1])
        ]
        for topic, key in gone:
            del self._handlers[topic][key]
        for topic in {topic for topic, _ in gone}:
            self._sort(topic)
        return len(gone)

    def handlers_of(self, topic: str, agent_name: str | None = None) -> tuple[Handler, ...]:
        """Give the handlers of a type, most urgent first; of one agent or of all."""
        if agent_name is None:
            return self._by_topic.get(topic, ())
        return self._of_agent.get((topic, agent_name), ())

    def topics_of(self, agent_name: str) -> list[str]:
        """List the types an agent has handlers for."""
        return sorted({topic for topic, agent in self._of_agent if agent == agent_name})

    async def dispatch(self, event: Event) -> int:
        """
        Run all handlers of the event's type, most urgent first, one after the other.

        A handler that raises is counted and logged; the others run all the same.

        Returns:
            How many ran to the end.
        """
        runs = self._runs.get(event.type)
        if runs is None:
            self.say_unheard(event.type)
            return 0
        self._dispatched += 1
        executed = 0
        for run, handler in runs:
            try:
                await run(event)
            except Exception as error:  # noqa: BLE001 - the neighbours go on
                handler.failed(error)
                _log.exception(
                    "handler %s of %s failed on %s %s; the other handlers go on",
                    handler.id,
                    handler.agent_name,
                    event.type,
                    event.id,
                )
            else:
                handler.calls += 1
                executed += 1
        return executed

    def say_unheard(self, topic: str) -> None:
        """Count an event that nobody handles; say so once a type."""
        seen = self._unheard.get(topic, 0)
        self._unheard[topic] = seen + 1
        if not seen:
            _log.warning("No handlers registered for event %s (said once per type)", topic)

    async def get_stats(self) -> dict[str, Any]:
        """
        Sum up what the handlers did.

        Returns:
            ``total_handlers``, ``total_calls``, ``total_errors``, ``error_rate`` (0..1),
            ``events_dispatched``, ``unhandled`` (by type) and ``handlers`` (one row each).
        """
        rows = [row for of_topic in self._handlers.values() for row in of_topic.values()]
        calls = sum(handler.calls for handler in rows)
        errors = sum(handler.errors for handler in rows)
        return {
            "total_handlers": len(rows),
            "total_calls": calls,
            "total_errors": errors,
            "error_rate": errors / calls if calls else 0.0,
            "events_dispatched": self._dispatched,
            "unhandled": dict(self._unheard),
            "handlers": [
                {
                    "event_type": row.topic,
                    "agent_name": row.agent_name,
                    "handler_id": row.id,
                    "priority": row.priority.name,
                    "calls": row.calls,
                    "errors": row.errors,
                    "last_error": row.last_error,
                }
                for row in rows
            ],
        }

    def _sort(self, topic: str) -> None:
        of_topic = sorted(self._handlers[topic].values(), key=lambda handler: handler.priority)
        for agent in self._agents_of.pop(topic, ()):
            del self._of_agent[topic, agent]
        if not of_topic:
            del self._handlers[topic]
            self._by_topic.pop(topic, None)
            self._runs.pop(topic, None)
            return
        # Events carry the member: found by identity, without comparing texts
        member = declaration_of(topic).member
        self._by_topic[member] = tuple(of_topic)
        runs = [_on_a_copy(handler.run) for handler in of_topic[:-1]]
        self._runs[member] = tuple(zip((*runs, of_topic[-1].run), of_topic, strict=True))
        agents = self._agents_of[topic] = {handler.agent_name for handler in of_topic}
        for agent in agents:
            self._of_agent[topic, agent] = tuple(
                handler for handler in of_topic if handler.agent_name == agent
            )


def own_copy(event: Event) -> Event:
    """Give a handler a payload of its own, so that none sees what its neighbour did to it."""
    if (
        isinstance(payload := payload_of(event), msgspec.Struct)
        and payload.__struct_config__.frozen
    ):
        return event
    copied: Event = msgspec.structs.replace(
        event, data=msgspec.to_builtins(event.data, builtin_types=(bytes, datetime))
    )
    return copied


def _on_a_copy(run: Run) -> Run:
    return lambda event: run(own_copy(event))


def compose(middleware: Iterable[Middleware], run: Run) -> Run:
    """Wrap a handler, the first middleware outermost; none at all gives the handler itself."""
    for layer in reversed(tuple(middleware)):
        run = _wrap(layer, run)
    return run


def _wrap(layer: Middleware, inner: Run) -> Run:
    async def run(event: Event) -> Any:
        return await layer(event, inner)

    return run
