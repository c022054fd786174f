"""
Many agents in one process, joined by memory: for tests, notebooks and quick runs.

    async with InProcessMesh([MarketData, Features]) as mesh:
        await mesh.sources_done()
        await mesh.quiet()
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mesh.account import Account, account
from mesh.agent import Agent, AgentContext
from mesh.brokers.memory import InMemoryMessageBroker
from mesh.clock import SYSTEM_CLOCK
from mesh.config import MessageBusConfig
from mesh.errors import ConfigurationError
from mesh.events import set_delivery
from mesh.ledger import Ledger
from mesh.ledger_views import LedgerView, view_of
from mesh.loading import load_agent
from mesh.params import Params
from mesh.publisher import EventPublisher, PublisherConfig
from mesh.requests import Requester

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from mesh.broker import MessageBroker
    from mesh.clock import Clock


class InProcessMesh:
    """
    Runs agents in this process; opens all before the first source speaks.

    Args:
        agents: Agent classes, or paths of their scripts.
        params: Parameters for all of them (``{"csv": "bars.csv"}``).
        config: Settings; the fabric is memory whatever they say.
        clock: Time; tests bring a `FakeClock`.
        broker: Default: a fresh `InMemoryMessageBroker`.
    """

    def __init__(
        self,
        agents: Sequence[type[Agent] | str | Path],
        *,
        params: Mapping[str, str] | None = None,
        config: MessageBusConfig | None = None,
        clock: Clock = SYSTEM_CLOCK,
        broker: MessageBroker | None = None,
    ) -> None:
        """Make the agents; nothing runs yet."""
        self.broker = broker or InMemoryMessageBroker()
        self.gate = asyncio.Event()
        #: What all agents read.
        self.params = Params(params or {})
        self.agents: dict[str, Agent] = {}
        self._config = config or MessageBusConfig(broker_type="memory")
        self._clock = clock
        set_delivery(self._config.durable_events, self._config.allow_downgrade)
        for name, kind in _named(agents):
            self.agents[name] = kind(
                AgentContext(
                    name=name,
                    broker=self.broker,
                    config=self._config,
                    clock=clock,
                    params=self.params,
                    gate=self.gate,
                    ledger=Ledger.in_memory(),
                )
            )
        self._publisher = EventPublisher(
            PublisherConfig(agent_name="mesh", broker=self.broker, clock=clock)
        )
        self._requester = Requester(self.broker, self._publisher)
        self._running: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Open all agents, then let the sources speak."""
        await self.broker.connect()
        opened: list[Agent] = []
        try:
            for agent in self.agents.values():
                opened.append(agent)
                await agent.open()
        except BaseException:
            for agent in reversed(opened):
                await agent.close()
            await self.broker.close()
            raise
        self._running = asyncio.create_task(self._work(), name="in-process-mesh")
        self.gate.set()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the sources, then each agent in the order of the pipeline."""
        assert self._running is not None
        self._running.cancel()
        (outcome,) = await asyncio.gather(self._running, return_exceptions=True)
        for agent in self.agents.values():
            await agent.publisher.flush()
            await agent.close()
        await self._requester.close()
        await self._publisher.close()
        await self.broker.close()
        if kind is None and isinstance(outcome, Exception):
            raise outcome

    async def publish(self, event_type: str, data: Any, *, key: str | None = None) -> None:
        """Publish an event from outside."""
        await self._publisher.publish(event_type, data, key=key)
        await self._publisher.flush()

    async def request(self, event_type: str, data: Any, *, timeout_s: float = 5.0) -> Any:
        """Ask an agent; gives the reply's payload."""
        reply = await self._requester.request(event_type, data, timeout_s=timeout_s)
        return reply.data

    async def sources_done(self) -> None:
        """
        Return when every source has returned.

        Raises:
            Exception: What a source raised.
        """
        assert self._running is not None
        done = asyncio.create_task(self._await_sources(), name="sources-done")
        try:
            await asyncio.wait({self._running, done}, return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                self._running.result()
        finally:
            done.cancel()
            await asyncio.gather(done, return_exceptions=True)

    async def quiet(self) -> None:
        """Return when everything published has been handled, and what that published, and so on."""
        while True:
            before = self._said()
            for agent in self.agents.values():
                await agent.publisher.flush()
                await agent.consumer.drained()
                await agent.consumer.dead_letters.written()
            if before == self._said() and not self._unsettled() and not await self._pending():
                return
            await asyncio.sleep(0)

    def account(self) -> Account:
        """Give the account of all events."""
        return account(self.views(), settled=True)

    def views(self) -> dict[str, LedgerView]:
        """Give every agent's counters."""
        return {name: view_of(name, agent.context.ledger) for name, agent in self.agents.items()}

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for name, agent in self.agents.items():
                tasks.create_task(agent.work(), name=name)

    async def _await_sources(self) -> None:
        for agent in self.agents.values():
            await agent.sources_done.wait()

    def _said(self) -> int:
        return sum(
            view.handled + sum(out.sequence for out in view.out.values())
            for view in self.views().values()
        )

    async def _pending(self) -> int:
        """Count what the journal still has for the agents."""
        if not self.broker.has_journal:
            return 0
        journal = await self.broker.open_journal()
        return sum(view.pending for view in await journal.groups() if view.group in self.agents)

    def _unsettled(self) -> int:
        return sum(agent.consumer.unsettled() for agent in self.agents.values())


def _named(agents: Sequence[type[Agent] | str | Path]) -> list[tuple[str, type[Agent]]]:
    named: list[tuple[str, type[Agent]]] = []
    for each in agents:
        if isinstance(each, (str, Path)):
            kind = load_agent(each)
            name = kind.name or Path(each).stem
        else:
            kind = each
            name = kind.name or kind.__name__.lower()
        named.append((name, kind))
    names = [name for name, _ in named]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ConfigurationError(
            [f"agent name {name!r} is used twice; names are unique" for name in doubled]
        )
    return named
