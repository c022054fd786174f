"""
What users write: an `Agent` with handlers marked `@on`, timers marked `@every`, and `@source`.

::

    class Echo(Agent):
        @on(EventType.MARKET_DATA_RECEIVED)
        async def on_tick(self, event: Event) -> None:
            await self.publish(EventType.SIGNAL_GENERATED, {"price": event.data["price"]})

The same class runs as a supervised process, as a plain process, or with others in one process:
that is chosen outside (`mesh up`, `mesh.launch`, `mesh.inprocess`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any, ClassVar

from mesh.clock import SYSTEM_CLOCK
from mesh.config import MessageBusConfig
from mesh.consumer import ConsumerConfig, EventConsumer
from mesh.context import HandlerContext, current_context
from mesh.deadletters import DeadLetters
from mesh.errors import PayloadError
from mesh.handlers import EventHandlerRegistry, check_middleware
from mesh.ledger import SOURCES, STATES, Ledger
from mesh.ledger_views import Backlog
from mesh.marks import check_marked, handlers_marked, is_source, marked_methods, period_of
from mesh.own_work import OwnWork
from mesh.publisher import EventPublisher, PublisherConfig
from mesh.replicas import MAX_REPLICAS
from mesh.requests import Requester
from mesh.values import Value, field

if TYPE_CHECKING:
    from collections.abc import (
        AsyncIterator,
        Callable,
        Coroutine,
        Iterable,
        Mapping,
        Sequence,
    )
    from pathlib import Path

    from mesh.broker import MessageBroker
    from mesh.clock import Clock
    from mesh.events import Event
    from mesh.handlers import Middleware
    from mesh.own_work import Call
    from mesh.workers import WorkerPool

#: `headroom` waits while more events than this are under way in the mesh.
MAX_UNDER_WAY = 8192
#: Half of what ZeroMQ holds on each leg (`mesh.brokers.zeromq.HIGH_WATER_FRAMES`).
MAX_FRAMES_UNDER_WAY = 1000


class AgentContext(Value, frozen=True, kw_only=True):
    """What an agent is given by whoever runs it."""

    name: str
    broker: MessageBroker
    #: What replicas of one agent share; default: the name.
    group: str | None = None
    config: MessageBusConfig = field(default_factory=MessageBusConfig)
    clock: Clock = SYSTEM_CLOCK
    params: Mapping[str, str] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger.in_memory)
    dead_letters: DeadLetters | None = None
    #: Sources wait for it; set from the start where nobody has to be waited for.
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    #: It is started anew whenever it ends: what does not answer at its start is waited for instead.
    patient: bool = False
    #: Where the ledgers of the mesh are; None in one process.
    ledgers: Path | None = None
    middleware: Sequence[Middleware] = ()
    publisher_middleware: Sequence[Middleware] = ()

    def __post_init__(self) -> None:
        """Refuse what is no middleware."""
        for name in ("middleware", "publisher_middleware"):
            check_middleware(name, getattr(self, name))


class Agent:
    """
    Base class of agents. Override nothing to begin with; mark methods.

    Class attributes that may be set: `name`, `concurrency`, `overflow`, `buffer_size`, `start`,
    `shared`, `max_replicas`.
    """

    #: Default: what the process was started as, else the script's name.
    name: str = ""
    #: Handlers that may run at the same time; order is kept per key.
    concurrency: ClassVar[int] = 1
    #: ``block``, ``drop_oldest`` or ``latest``; default: the settings'.
    overflow: ClassVar[str | None] = None
    #: Events that may wait; default: the settings'.
    buffer_size: ClassVar[int | None] = None
    #: Replicas share its live events, each key going to one; False: each replica hears all of them.
    shared: ClassVar[bool] = True
    #: How many replicas there may be; 1 for who keeps what belongs to several keys together.
    max_replicas: ClassVar[int] = MAX_REPLICAS
    #: Where this agent begins with durable types it has never heard: ``now`` or ``earliest``.
    start: ClassVar[str] = "now"

    def __init_subclass__(cls, **options: Any) -> None:
        """
        Check the marked methods' signatures when the class is made.

        Raises:
            HandlerSignatureError: A handler cannot be called with an event, a timer or source takes
                arguments, or one of them is no coroutine function.
        """
        super().__init_subclass__(**options)
        check_marked(cls)

    def __init__(self, context: AgentContext) -> None:
        """Join parts; nothing runs yet."""
        self.name = context.name
        self.context = context
        self.clock = context.clock
        self.params = context.params
        self.log = logging.getLogger(f"agent.{context.name}")
        self.registry = EventHandlerRegistry(context.middleware)
        config = context.config
        self._dead_letters = context.dead_letters or DeadLetters(
            context.group or context.name, context.broker.bury
        )
        self.publisher = EventPublisher(
            PublisherConfig(
                agent_name=context.name,
                broker=context.broker,
                clock=context.clock,
                ledger=context.ledger,
                dead_letters=self._dead_letters,
                middleware=context.publisher_middleware,
                wire_format=config.wire_format,
                publish_timeout_s=config.publish_timeout_s,
            )
        )
        if type(self).publish is Agent.publish:
            vars(self)["publish"] = self.publisher.publish
        self.consumer = EventConsumer(
            ConsumerConfig(
                agent_name=context.name,
                broker=context.broker,
                handler_registry=self.registry,
                buffer_size=(
                    config.consumer_buffer_size if self.buffer_size is None else self.buffer_size
                ),
                max_retries=config.consumer_max_retries,
                retry_delay_ms=config.consumer_retry_delay_ms,
                overflow=self.overflow or config.consumer_overflow,
                concurrency=self.concurrency,
                handler_timeout_s=config.handler_timeout_s,
                drain_timeout_s=config.drain_timeout_s,
                group=context.group,
                start=self.start,
                patient=context.patient,
                max_deliveries=config.max_deliveries,
                max_hops=config.max_hops,
                clock=context.clock,
                ledger=context.ledger,
                dead_letters=self._dead_letters,
                log_events=config.log_events,
            )
        )
        vars(self.consumer)["restore"] = self.restore
        self._requester = Requester(context.broker, self.publisher)
        #: `setup` was called, so `teardown` will be.
        self._was_set_up = False
        #: Set once every source has returned; at once where there is none.
        self.sources_done = asyncio.Event()
        self._workers: WorkerPool | None = None
        self._backlog: Backlog | None = None

    # -- for users -----------------------------------------------------------------------------

    async def setup(self) -> None:
        """Override: prepare before the first event; raise ConfigurationError for bad settings."""

    async def restore(self) -> None:
        """
        Override: take over `ctx.state`, which was loaded anew.

        Called when events of other replicas come to this one; only who keeps parts of the state in
        attributes needs it. At the start it is not called: call it in `setup`.
        """

    def rebalanced(self, came: Callable[[str], bool]) -> None:
        """
        Override: forget what attributes hold of keys that come to this replica.

        Called between two events, when live events are shared anew (`mesh scale`, a replica that
        died or is back). What another replica has done with a key meanwhile is not known here.

        Args:
            came: Says of a key whether it does.
        """

    async def teardown(self) -> None:
        """Override: clean up after the last event."""

    def publish(
        self,
        event_type: str,
        data: Any,
        *,
        key: str | None = None,
        correlation_id: str | None = None,
        expires_in_s: float | None = None,
    ) -> Coroutine[Any, Any, Event]:
        """Publish an event in this agent's name; see `EventPublisher.publish`."""
        # `__init__` puts the publisher's own method in this one's place: one frame less an event
        return self.publisher.publish(
            event_type, data, correlation_id, key=key, expires_in_s=expires_in_s
        )

    @property
    def ctx(self) -> HandlerContext:
        """
        Give what there is to know of the event that is being handled, and the agent's state.

        ``ctx.state["name"]`` is kept together with the settling of the event; outside of handlers
        of durable events it is committed soon. ``ctx.idempotency_key``, ``ctx.attempt``,
        ``ctx.deliveries``.

        Raises:
            ConfigurationError: This agent keeps no state, and no durable event is being handled.
            ClosedError: The try that began this task has failed, and was taken back.
        """
        context = current_context.get()
        # A task that outlives its handler has the context of a step that is over
        if context is not None:
            if context.is_open:
                return context
            context.require_not_failed()
        return self.consumer.loose_context()

    @property
    def has_state(self) -> bool:
        """Say whether `ctx.state` is kept: always when something durable is heard."""
        return self.consumer.has_state

    async def keep_state(self) -> None:
        """
        Keep `ctx.state` although nothing durable is heard; call it in `setup`.

        Raises:
            BrokerUnavailableError: The journal does not answer.
        """
        await self.consumer.prepare(keep_state=True)

    @contextlib.asynccontextmanager
    async def step(self, cause: str | None = None) -> AsyncIterator[HandlerContext]:
        """
        Make what a source or timer publishes and writes one step: all of it is kept, or nothing.

        ::

            async with self.step() as ctx:
                await self.publish(ORDER, order)
                ctx.state["row"] = row

        Durable events and state only; live events leave at once. What raises keeps nothing.

        Args:
            cause: Names what is done (``"row 7"``): doing it again publishes the same events again,
                which the journal then knows. Needed where a step is not one transaction (a Redis
                Cluster).

        Raises:
            ConfigurationError: This agent keeps no state.
            BrokerUnavailableError: The journal does not answer while the agent starts or ends; in
                between it is waited for, as with the steps of handlers.
        """
        known = self.consumer.loose_context()
        context = HandlerContext(self.name, known.known, cause=cause)
        before = current_context.set(context)
        try:
            yield context
        except BaseException:
            context.fail()
            raise
        finally:
            context.close()
            current_context.reset(before)
        await self.consumer.commit(context)

    async def publish_batch(self, events: Iterable[tuple[str, Any]]) -> int:
        """Publish many events in order, far cheaper each; see `EventPublisher.publish_batch`."""
        return await self.publisher.publish_batch(events)

    async def request(
        self, event_type: str, data: Any, *, timeout_s: float = 5.0, key: str | None = None
    ) -> Event:
        """
        Publish a request and return the first reply.

        Raises:
            RequestTimeoutError: Nobody replied in time.
        """
        return await self._requester.request(event_type, data, timeout_s=timeout_s, key=key)

    async def reply(self, request: Event, data: Any) -> None:
        """
        Answer a request.

        Raises:
            PayloadError: The event asks for no reply.
        """
        if request.reply_to is None:
            raise PayloadError(f"event {request.type!r} {request.id} asks for no reply")
        answer = self.publisher.make_event(
            request.reply_to, data, request.correlation_id, causation_id=request.id
        )
        await self.publisher.publish_event(answer)

    async def offload(self, func: Callable[..., Any], *args: Any, timeout_s: float = 30.0) -> Any:
        """
        Run a CPU-heavy module-level function in a worker process; the loop keeps beating.

        Raises:
            OffloadError: The function raised or cannot travel.
            OffloadTimeoutError: It did not come back in time.
        """
        if self._workers is None:
            from mesh.workers import WorkerPool

            self._workers = WorkerPool()
        return await self._workers.call(func, *args, timeout_s=timeout_s)

    async def headroom(self, max_under_way: int = MAX_UNDER_WAY) -> None:
        """
        Wait while many events are under way in the mesh, for sources that could outrun it.

        Live events are lost when a consumer falls behind by more than the fabric holds; a replay at
        full speed that calls this now and then loses none.
        """
        if self.context.ledgers is None:
            await asyncio.sleep(0)
            return
        if self._backlog is None:
            self._backlog = Backlog(self.context.ledgers)
        # The fabric counts frames, and where each event is one it holds fewer events
        limit = min(max_under_way, MAX_FRAMES_UNDER_WAY * self.publisher.events_a_frame())
        # Counters in shared memory cannot wake us; two milliseconds are a few hundred events
        while self._backlog.under_way() > limit:  # noqa: ASYNC110
            await asyncio.sleep(0.002)

    def published(self, event_type: str) -> int:
        """Tell how many events of a type this agent's name has published in this mesh so far."""
        return self.context.ledger.published(event_type)

    # -- for those who run agents --------------------------------------------------------------

    @classmethod
    def hears(cls) -> list[str]:
        """List the topics this class has handlers for."""
        return sorted(
            {
                topic
                for _, method in marked_methods(cls)
                for marked in handlers_marked(method)
                for topic in marked.topics
            }
        )

    @classmethod
    def has_source(cls) -> bool:
        """Say whether the class has a `@source`."""
        return any(is_source(method) for _, method in marked_methods(cls))

    async def open(self) -> None:
        """Set up, register the handlers and subscribe; READY afterwards."""
        ledger = self.context.ledger
        ledger.set("state", STATES.index("starting"))
        ledger.set("started_mono_ms", int(self.clock.mono_s() * 1000))
        ledger.set("sources", SOURCES.index("waiting" if self.has_source() else "none"))
        await self._register()
        # What was kept is there when `setup` looks for it
        await self.consumer.prepare()
        self._was_set_up = True
        await self.setup()
        vars(self.consumer)["rebalanced"] = self.rebalanced
        await self.consumer.start()
        ledger.set("state", STATES.index("ready"))

    async def _register(self) -> None:
        for name, method in marked_methods(type(self)):
            for marked in handlers_marked(method):
                for topic in marked.topics:
                    await self.registry.register(
                        topic,
                        getattr(self, name),
                        self.name,
                        name,
                        marked.priority,
                        timeout_s=marked.timeout_s,
                        max_retries=marked.max_retries,
                        retry=marked.retry,
                        middleware=marked.middleware,
                    )

    async def work(self) -> None:
        """Run timers and sources; returns when all sources have, and never with a timer."""
        marked = [(getattr(self, name), method) for name, method in marked_methods(type(self))]
        sources = [call for call, method in marked if is_source(method)]
        own = OwnWork(self.context.ledger, self.clock, self.log)
        async with asyncio.TaskGroup() as tasks:
            for call, method in marked:
                if (seconds := period_of(method)) is not None:
                    tasks.create_task(own.repeat(call, seconds), name=call.__name__)
            if sources:
                tasks.create_task(self._run_sources(own, sources), name="sources")
            else:
                self.sources_done.set()

    async def _run_sources(self, own: OwnWork, sources: list[Call]) -> None:
        await self.context.gate.wait()
        await self.context.broker.synchronize()
        await own.run_sources(sources, self.publisher.flush)
        self.sources_done.set()

    async def close(self) -> None:
        """Hear nothing more, drain, tear down, send what is batched."""
        ledger = self.context.ledger
        ledger.set("state", STATES.index("draining"))
        await self.consumer.stop()
        try:
            if self._was_set_up:
                await self.teardown()
        except Exception:
            self.log.exception("teardown failed; the agent ends all the same")
        await self.consumer.keep_rest()
        await self._requester.close()
        if self._workers is not None:
            await self._workers.close()
        await self.publisher.close()
        await self._dead_letters.close()
        ledger.set("state", STATES.index("stopped"))
