"""How handlers want to be called: read from their signatures when they are registered."""

from __future__ import annotations

import inspect
import sys
import typing
from typing import TYPE_CHECKING, Any

from mesh.errors import HandlerSignatureError
from mesh.events import Event, payload_of
from mesh.payloads import convert_payload
from mesh.values import Value

if sys.version_info >= (3, 14):
    import annotationlib

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Run = Callable[[Event], Awaitable[Any]]


class Shape(Value, frozen=True):
    """How a handler wants to be called."""

    schema: type[Any] | None
    wants_event: bool


def signature_of(func: Callable[..., Any], *, bound: bool = True) -> Shape:
    """
    Read a handler's signature.

    Args:
        func: The handler.
        bound: False for a plain function that will become a method: ``self`` is skipped.

    Raises:
        HandlerSignatureError: The message shows the signature and the forms that work.
    """
    target = inspect.unwrap(func)
    if not (
        inspect.iscoroutinefunction(target)
        or inspect.iscoroutinefunction(getattr(target, "__call__", None))  # noqa: B004 - its kind, not whether it is there
    ):
        raise _wrong(func, "is not a coroutine function: write `async def`")
    try:
        parameters = parameters_of(func)
    except (TypeError, ValueError):
        return Shape(None, wants_event=True)
    if not bound:
        parameters = parameters[1:]
    needed = [each for each in parameters if _is_needed(each)]
    if any(each.kind is each.KEYWORD_ONLY for each in needed) or len(needed) > 2:
        raise _wrong(func, "takes arguments that the mesh cannot fill")
    if not needed and not any(_takes_position(each) for each in parameters):
        raise _wrong(func, "takes no event")
    hints = _hints(func)
    taken = needed or [each for each in parameters if _takes_position(each)][:1]
    classes = [hints.get(each.name) for each in taken]
    if len(taken) == 1:
        only = classes[0]
        return (
            Shape(None, wants_event=True)
            if _is_event(only)
            else Shape(_schema(func, only), wants_event=False)
        )
    if not _is_event(classes[1]):
        raise _wrong(func, f"takes {taken[1].name!r} second, which must be the Event")
    if classes[0] is None:
        raise _wrong(func, f"does not say what {taken[0].name!r} is: annotate it with a class")
    return Shape(_schema(func, classes[0]), wants_event=True)


def parameters_of(func: Callable[..., Any]) -> list[inspect.Parameter]:
    """Give what a function takes, whatever its annotations name."""
    if sys.version_info >= (3, 14):
        found = inspect.signature(func, annotation_format=annotationlib.Format.FORWARDREF)
    else:
        found = inspect.signature(func)
    return list(found.parameters.values())


def bind(func: Callable[..., Awaitable[Any]], shape: Shape) -> Run:
    """
    Give a function of one event that calls a handler the way its signature asks for.

    ``(event)``, ``(payload: Schema)`` and ``(payload: Schema, event)`` are understood; the payload
    is decoded into the annotated class.
    """
    if shape.schema is None:
        return func
    schema = shape.schema

    # Plain functions that hand the coroutine on: one frame less an event
    def run_with_both(event: Event) -> Awaitable[Any]:
        payload = payload_of(event)
        if type(payload) is not schema:
            payload = convert_payload(event.data, schema)
        return func(payload, event)

    def run_with_payload(event: Event) -> Awaitable[Any]:
        payload = payload_of(event)
        if type(payload) is not schema:
            payload = convert_payload(event.data, schema)
        return func(payload)

    return run_with_both if shape.wants_event else run_with_payload


def _schema(func: Callable[..., Any], annotated: Any) -> type[Any]:
    if isinstance(annotated, str):
        raise _wrong(
            func,
            f"asks for {annotated!r}, which its module does not know: define or import it at the"
            " module's top level, not in a function or under TYPE_CHECKING",
        )
    origin = typing.get_origin(annotated) or annotated
    if origin is not typing.Union and not isinstance(origin, type):
        raise _wrong(func, f"asks for {annotated!r}, which is not a class")
    if origin in (str, int, float, bool, bytes, list, tuple, set):
        raise _wrong(func, f"asks for {origin.__name__}; payloads are objects")
    schema: type[Any] = annotated
    return schema


def _is_event(annotated: Any) -> bool:
    return annotated is None or annotated is Event or annotated is Any


def _is_needed(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    )


def _takes_position(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (
        parameter.POSITIONAL_ONLY,
        parameter.POSITIONAL_OR_KEYWORD,
        parameter.VAR_POSITIONAL,
    )


def _hints(func: Callable[..., Any]) -> dict[str, Any]:
    """Give what a handler's annotations name, each for itself; text where nothing has the name."""
    target = inspect.unwrap(func)
    # `Event` is known also where it is imported for type checkers only
    known = {"Event": Event, **getattr(target, "__globals__", {})}
    hints: dict[str, Any] = {}

    def probe() -> None: ...

    for name, hint in _annotations(target).items():
        probe.__annotations__ = {name: hint}
        try:
            hints.update(typing.get_type_hints(probe, known))
        except Exception:  # noqa: BLE001 - an annotation can be any expression
            hints[name] = Event if hint == "mesh.Event" else hint
    return hints


def _annotations(target: Any) -> dict[str, Any]:
    """Give annotations; those that cannot be evaluated as text."""
    if sys.version_info >= (3, 14):
        try:
            found = annotationlib.get_annotations(target, format=annotationlib.Format.FORWARDREF)
        except TypeError:
            return {}
        return {
            name: hint.__forward_arg__ if isinstance(hint, annotationlib.ForwardRef) else hint
            for name, hint in found.items()
        }
    return getattr(target, "__annotations__", {})


def _wrong(func: Callable[..., Any], why: str) -> HandlerSignatureError:
    name = getattr(func, "__qualname__", repr(func))
    return HandlerSignatureError(
        f"handler {name} {why}. Handlers look like `async def h(event: Event)`,"
        " `async def h(payload: MyStruct)` or `async def h(payload: MyStruct, event: Event)`"
    )
