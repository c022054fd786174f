"""
LEGION mesh: agents as supervised processes, typed events between them.

Everything public can be imported from here; each name loads its module when it is first used, so an
agent process loads only what it needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mesh import filters, middleware
    from mesh.agent import Agent, AgentContext
    from mesh.broker import MessageBroker
    from mesh.brokers.memory import InMemoryMessageBroker
    from mesh.brokers.redis import RedisMessageBroker
    from mesh.brokers.zeromq import ZeroMQMessageBroker
    from mesh.config import MessageBusConfig
    from mesh.consumer import ConsumerConfig, EventConsumer
    from mesh.context import HandlerContext
    from mesh.dead_letter_queue import DeadGroup, DeadLetterQueue, ReplayReport
    from mesh.deadletters import DeadLetter, DeadLetters
    from mesh.errors import (
        AccessDeniedError,
        AlreadyRunningError,
        BackpressureError,
        BrokerUnavailableError,
        ClosedError,
        ConfigurationError,
        DamagedJournalError,
        DeadLetterError,
        EventTooLargeError,
        FrameError,
        HandlerSignatureError,
        MeshError,
        NotConnectedError,
        PayloadError,
        RequestTimeoutError,
        RunDirError,
        TopicError,
    )
    from mesh.events import (
        Event,
        EventType,
        declare_durable,
        declare_schema,
        event_type,
        is_durable,
    )
    from mesh.factory import MessageBus, MessageBusFactory
    from mesh.filters import Filter
    from mesh.handlers import EventHandlerRegistry, HandlerPriority
    from mesh.inprocess import InProcessMesh
    from mesh.journal import DeadQuery
    from mesh.launch import launch
    from mesh.marks import every, on, source
    from mesh.outcomes import Reject, Retry, Skip
    from mesh.publisher import EventPublisher, PublisherConfig
    from mesh.requests import Requester
    from mesh.retry import RetryPolicy
    from mesh.runtime import run
    from mesh.workers import OffloadError, OffloadTimeoutError

__version__ = "0.1.0"

_HOMES = {
    "mesh.agent": ("Agent", "AgentContext"),
    "mesh.marks": ("every", "on", "source"),
    "mesh.broker": ("MessageBroker",),
    "mesh.brokers.memory": ("InMemoryMessageBroker",),
    "mesh.brokers.redis": ("RedisMessageBroker",),
    "mesh.brokers.zeromq": ("ZeroMQMessageBroker",),
    "mesh.config": ("MessageBusConfig",),
    "mesh.consumer": ("ConsumerConfig", "EventConsumer"),
    "mesh.context": ("HandlerContext",),
    "mesh.dead_letter_queue": ("DeadGroup", "DeadLetterQueue", "ReplayReport"),
    "mesh.deadletters": ("DeadLetter", "DeadLetters"),
    "mesh.errors": (
        "AccessDeniedError",
        "AlreadyRunningError",
        "BackpressureError",
        "BrokerUnavailableError",
        "ClosedError",
        "ConfigurationError",
        "DamagedJournalError",
        "DeadLetterError",
        "EventTooLargeError",
        "FrameError",
        "HandlerSignatureError",
        "MeshError",
        "NotConnectedError",
        "PayloadError",
        "RequestTimeoutError",
        "RunDirError",
        "TopicError",
    ),
    "mesh.events": (
        "Event",
        "EventType",
        "declare_durable",
        "declare_schema",
        "event_type",
        "is_durable",
    ),
    "mesh.factory": ("MessageBus", "MessageBusFactory"),
    "mesh.filters": ("Filter",),
    "mesh.handlers": ("EventHandlerRegistry", "HandlerPriority"),
    "mesh.inprocess": ("InProcessMesh",),
    "mesh.journal": ("DeadQuery",),
    "mesh.launch": ("launch",),
    "mesh.outcomes": ("Reject", "Retry", "Skip"),
    "mesh.publisher": ("EventPublisher", "PublisherConfig"),
    "mesh.requests": ("Requester",),
    "mesh.retry": ("RetryPolicy",),
    "mesh.runtime": ("run",),
    "mesh.workers": ("OffloadError", "OffloadTimeoutError"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AccessDeniedError",
    "Agent",
    "AgentContext",
    "AlreadyRunningError",
    "BackpressureError",
    "BrokerUnavailableError",
    "ClosedError",
    "ConfigurationError",
    "ConsumerConfig",
    "DamagedJournalError",
    "DeadGroup",
    "DeadLetter",
    "DeadLetterError",
    "DeadLetterQueue",
    "DeadLetters",
    "DeadQuery",
    "Event",
    "EventConsumer",
    "EventHandlerRegistry",
    "EventPublisher",
    "EventTooLargeError",
    "EventType",
    "Filter",
    "FrameError",
    "HandlerContext",
    "HandlerPriority",
    "HandlerSignatureError",
    "InMemoryMessageBroker",
    "InProcessMesh",
    "MeshError",
    "MessageBroker",
    "MessageBus",
    "MessageBusConfig",
    "MessageBusFactory",
    "NotConnectedError",
    "OffloadError",
    "OffloadTimeoutError",
    "PayloadError",
    "PublisherConfig",
    "RedisMessageBroker",
    "Reject",
    "ReplayReport",
    "RequestTimeoutError",
    "Requester",
    "Retry",
    "RetryPolicy",
    "RunDirError",
    "Skip",
    "TopicError",
    "ZeroMQMessageBroker",
    "declare_durable",
    "declare_schema",
    "event_type",
    "every",
    "filters",
    "is_durable",
    "launch",
    "middleware",
    "on",
    "run",
    "source",
]


def __getattr__(name: str) -> Any:
    module = _HOME_OF.get(name)
    if module is None:
        if name in ("filters", "middleware"):
            return importlib.import_module(f"mesh.{name}")
        raise AttributeError(f"module 'mesh' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
