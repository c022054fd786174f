"""
Distributed tracing: a W3C ``traceparent`` in each event, and an OpenTelemetry span per publish and
per handler when the optional extra ``tracing`` is installed. The one door to OpenTelemetry.

Names follow the messaging conventions of OpenTelemetry (semconv 1.45, status Development), written
out here because the Python constants live in a private module. Where tracing is off there is no
middleware, hence no cost; an incoming traceparent still travels on.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import msgspec

from mesh.env import environment
from mesh.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mesh.events import Event

    Run = Callable[[Event], Awaitable[Any]]
    Middleware = Callable[[Event, Run], Awaitable[Any]]

SYSTEM = "legion_mesh"


def tracing_middleware(
    setting: str, agent_name: str
) -> tuple[tuple[Middleware, ...], tuple[Middleware, ...]]:
    """
    Give the layers around handlers and around publishes.

    Args:
        setting: ``on``, ``off``, or ``auto``: on where OpenTelemetry is installed and was set up
            (its SDK is loaded already, or an ``OTEL_...`` variable is set).
        agent_name: The consumer's name in spans.

    Raises:
        ConfigurationError: ``on`` without OpenTelemetry.
    """
    if setting == "off" or (setting == "auto" and not _is_set_up()):
        return (), ()
    if find_spec("opentelemetry") is None:
        raise ConfigurationError(
            "LEGION_TRACING=on: OpenTelemetry is not installed;"
            " `pip install 'legion-mesh[tracing]'`, or set LEGION_TRACING=off"
        )
    _configure_from_environment(agent_name)
    return (trace_handler(agent_name),), (trace_publish(agent_name),)


def _is_set_up() -> bool:
    loaded = "opentelemetry.sdk.trace" in sys.modules
    asked = any(name.startswith("OTEL_") for name in environment())
    return loaded or (asked and find_spec("opentelemetry") is not None)


def _configure_from_environment(agent_name: str) -> None:
    """
    Install a tracer provider that exports to the console where OTEL_TRACES_EXPORTER=console.

    Whoever installed a provider of their own (``opentelemetry-instrument``, tests) keeps it.
    """
    if environment().get("OTEL_TRACES_EXPORTER") != "console":
        return
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import (
        ConsoleSpanExporter,
        SimpleSpanProcessor,
    )

    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return
    provider = TracerProvider(resource=Resource.create({"service.name": agent_name}))
    provider.add_span_processor(
        SimpleSpanProcessor(
            ConsoleSpanExporter(
                out=sys.stdout, formatter=lambda span: span.to_json(indent=None) + "\n"
            )
        )
    )
    trace.set_tracer_provider(provider)


def trace_publish(agent_name: str) -> Middleware:
    """Make a producer span around each publish and write its context into the event."""
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import (
        TraceContextTextMapPropagator,
    )

    tracer = trace.get_tracer("mesh")
    propagator = TraceContextTextMapPropagator()

    async def trace_it(event: Event, proceed: Run) -> Any:
        with tracer.start_as_current_span(
            f"publish {event.type}",
            kind=trace.SpanKind.PRODUCER,
            attributes=_attributes(event, "publish", "send", agent_name),
        ):
            carrier: dict[str, str] = {}
            propagator.inject(carrier)
            parent = carrier.get("traceparent", event.traceparent)
            return await proceed(msgspec.structs.replace(event, traceparent=parent))

    return trace_it


def trace_handler(agent_name: str) -> Middleware:
    """Make a consumer span around each handler, a child of the publisher's."""
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import (
        TraceContextTextMapPropagator,
    )

    tracer = trace.get_tracer("mesh")
    propagator = TraceContextTextMapPropagator()

    async def trace_it(event: Event, proceed: Run) -> Any:
        carrier = {"traceparent": event.traceparent} if event.traceparent else {}
        with tracer.start_as_current_span(
            f"process {event.type}",
            context=propagator.extract(carrier),
            kind=trace.SpanKind.CONSUMER,
            attributes=_attributes(event, "process", "process", agent_name),
        ):
            return await proceed(event)

    return trace_it


def _attributes(event: Event, name: str, kind: str, agent_name: str) -> dict[str, str]:
    return {
        "messaging.system": SYSTEM,
        "messaging.operation.name": name,
        "messaging.operation.type": kind,
        "messaging.destination.name": str(event.type),
        "messaging.message.id": event.id,
        "messaging.message.conversation_id": event.correlation_id,
        "messaging.client.id": agent_name,
    }
