"""What a consumer needs to know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.clock import SYSTEM_CLOCK
from mesh.inbox import OVERFLOWS
from mesh.values import Value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mesh.broker import MessageBroker
    from mesh.clock import Clock
    from mesh.deadletters import DeadLetters
    from mesh.handlers import EventHandlerRegistry
    from mesh.ledger import Ledger


class ConsumerConfig(Value, frozen=True, kw_only=True):
    """What a consumer needs."""

    agent_name: str
    broker: MessageBroker
    handler_registry: EventHandlerRegistry
    subscribed_events: Sequence[str] = ()
    #: How many events may wait in the inbox before reading stops.
    buffer_size: int = 1000
    max_retries: int = 3
    retry_delay_ms: float = 100.0
    #: ``block``: stop reading; ``drop_oldest``; ``latest``: keep the newest per type and key. For
    #: live events only.
    overflow: str = "block"
    #: Handlers that may run at the same time; order is kept per key.
    concurrency: int = 1
    #: A handler is cancelled after so many seconds.
    handler_timeout_s: float = 30.0
    #: How long `stop` lets handlers finish.
    drain_timeout_s: float = 8.0
    #: Replicas of one agent share its events, its state and its dead letters; default: the name.
    group: str | None = None
    #: Hear only what comes live: nothing of the journal's, in nobody's group.
    live_only: bool = False
    #: Where a group that has never read begins: ``now`` or ``earliest``.
    start: str = "now"
    #: A journal that does not answer at the start is waited for, instead of raising.
    patient: bool = False
    #: An event whose handling has killed its process so often is put aside.
    max_deliveries: int = 5
    #: An event with more handlers behind it than this is put aside: it goes in circles.
    max_hops: int = 32
    clock: Clock = SYSTEM_CLOCK
    ledger: Ledger | None = None
    dead_letters: DeadLetters | None = None
    #: Log every event that is handled (DEBUG level).
    log_events: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers that make no sense."""
        for name in ("buffer_size", "concurrency", "max_deliveries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, was {getattr(self, name)}")
        if self.overflow not in OVERFLOWS:
            raise ValueError(
                f"overflow must be one of {', '.join(OVERFLOWS)}, was {self.overflow!r}"
            )
