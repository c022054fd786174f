"""
How methods of an agent are marked: as handlers (`on`), timers (`every`) and sources (`source`); and
what of a class is marked so.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from mesh.errors import HandlerSignatureError
from mesh.handlers import HandlerPriority, check_limits, check_middleware
from mesh.middleware.filter import only
from mesh.signatures import parameters_of, signature_of
from mesh.topics import check_topic
from mesh.values import Value

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from mesh.events import Event
    from mesh.filters import Filter
    from mesh.handlers import Middleware
    from mesh.retry import RetryPolicy

_Method = TypeVar("_Method", bound="Callable[..., Awaitable[Any]]")

#: A marked method, as it stands in the class.
Marked: TypeAlias = "Callable[..., Awaitable[Any]]"

_ON = "__mesh_on__"
_EVERY = "__mesh_every__"
_SOURCE = "__mesh_source__"


class Hearing(Value, frozen=True):
    """What `@on` was told."""

    topics: tuple[str, ...]
    priority: HandlerPriority
    timeout_s: float | None
    max_retries: int | None
    retry: RetryPolicy | None
    middleware: tuple[Middleware, ...]


def on(
    *event_types: str,
    priority: HandlerPriority = HandlerPriority.NORMAL,
    filter: Filter | Callable[[Event], bool] | None = None,
    timeout_s: float | None = None,
    max_retries: int | None = None,
    retry: RetryPolicy | None = None,
    middleware: Sequence[Middleware] = (),
) -> Callable[[_Method], _Method]:
    """
    Make a method the handler of one or more event types.

    Args:
        event_types: What to hear.
        priority: Urgent events overtake a backlog of less urgent ones.
        filter: Only events for which this holds (see `mesh.filters`).
        timeout_s: Cancel the handler after so many seconds; default: the settings' limit.
        max_retries: Tries after the first failed; default: the settings'.
        retry: How often, how fast and after which errors to try again; instead of `max_retries`.
        middleware: Around this handler only, the first outermost.

    Raises:
        TopicError: A type breaks the topic grammar.
        HandlerSignatureError: No type is given.
        ValueError: A limit, the filter or a middleware makes no sense.
    """
    if not event_types or callable(event_types[0]):
        raise HandlerSignatureError("@on needs event types: @on(EventType.MARKET_DATA_RECEIVED)")
    check_limits(timeout_s, max_retries, retry)
    check_middleware("middleware", middleware)
    layers = (*((only(filter),) if filter is not None else ()), *middleware)
    marked = Hearing(
        tuple(check_topic(name) for name in event_types),
        priority,
        timeout_s,
        max_retries,
        retry,
        layers,
    )

    def mark(method: _Method) -> _Method:
        setattr(method, _ON, (*getattr(method, _ON, ()), marked))
        return method

    return mark


def every(seconds: float) -> Callable[[_Method], _Method]:
    """
    Call a method again and again while the agent runs; a slow call delays the next one.

    Args:
        seconds: From the start of one call to the start of the next.

    Raises:
        ValueError: `seconds` is not above 0.
    """
    if not seconds > 0:
        raise ValueError(f"@every needs seconds above 0, got {seconds!r}")

    def mark(method: _Method) -> _Method:
        setattr(method, _EVERY, float(seconds))
        return method

    return mark


def source(method: _Method) -> _Method:
    """
    Make a method the agent's source: it starts once all agents of the mesh are READY.

    It may return when its input ends. When it raises, the agent ends with an error (and supervisord
    starts it anew). Only when it raises because the fabric or the journal is away, the agent lives
    on and calls it again, as a new process would: a source goes on where its `ctx.state` (or
    `published`) says it was.
    """
    setattr(method, _SOURCE, True)
    return method


def marked_methods(cls: type) -> list[tuple[str, Marked]]:
    """List the marked methods as they stand in the class, overridden ones once, in order."""
    found: dict[str, Marked] = {}
    for base in reversed(cls.__mro__):
        for name, value in vars(base).items():
            if any(hasattr(value, mark) for mark in (_ON, _EVERY, _SOURCE)):
                found[name] = value
            else:
                found.pop(name, None)
    return list(found.items())


def check_marked(cls: type) -> None:
    """
    Check the signatures of what is marked in a class.

    Raises:
        HandlerSignatureError: One cannot be called.
    """
    for _, method in marked_methods(cls):
        if handlers_marked(method):
            signature_of(method, bound=False)
            _check_once(method)
        if is_source(method) or period_of(method) is not None:
            _check_plain(method)


def handlers_marked(method: Marked) -> tuple[Hearing, ...]:
    """Give what `@on` was told of a method, once for each time it stands there."""
    marks: tuple[Hearing, ...] = getattr(method, _ON, ())
    return marks


def period_of(method: Marked) -> float | None:
    """Give the seconds of a timer; None: it is none."""
    return getattr(method, _EVERY, None)


def is_source(method: Marked) -> bool:
    """Say whether a method is a source."""
    return hasattr(method, _SOURCE)


def _check_once(method: Marked) -> None:
    """Refuse a type that stands in two `@on` of one method: a handler hears each event once."""
    topics = [topic for marked in handlers_marked(method) for topic in marked.topics]
    twice = sorted({topic for topic in topics if topics.count(topic) > 1})
    if twice:
        name = getattr(method, "__qualname__", repr(method))
        raise HandlerSignatureError(
            f"{name} hears {', '.join(twice)} twice; one @on for each type, its filters joined"
            " with | (see mesh.filters)"
        )


def _check_plain(method: Callable[..., Awaitable[Any]]) -> None:
    name = getattr(method, "__qualname__", repr(method))
    if not inspect.iscoroutinefunction(method):
        raise HandlerSignatureError(f"{name} is not a coroutine function: write `async def`")
    needed = [
        each
        for each in parameters_of(method)[1:]
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    if needed:
        raise HandlerSignatureError(
            f"{name} takes {', '.join(each.name for each in needed)};"
            " timers and sources take nothing but self"
        )
