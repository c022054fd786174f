"""What other hosts of one mesh say of their agents, heard on the fabric they share."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mesh.consumer import ConsumerConfig, EventConsumer
from mesh.errors import MeshError
from mesh.events import EventType
from mesh.factory import make_broker
from mesh.handlers import EventHandlerRegistry

if TYPE_CHECKING:
    from mesh.config import MessageBusConfig
    from mesh.events import Event
    from mesh.rundir import RunDir

#: Agents beat once a second.
_LISTEN_S = 1.3
_CONNECT_S = 3.0
_NAME = "mesh-status"


@dataclass(frozen=True, slots=True)
class AgentElsewhere:
    """One agent of another run directory, by its own word."""

    host: str
    directory: str
    name: str
    pid: int
    state: str
    handled: int
    failed: int
    lost: int
    queue: int

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain data."""
        return asdict(self)


async def listen(config: MessageBusConfig, rundir: RunDir) -> list[AgentElsewhere]:
    """
    Hear one round of heartbeats on a fabric that joins hosts.

    Returns:
        The agents that do not run in this directory, by host, directory and name.

    Raises:
        BrokerUnavailableError: The fabric does not answer.
    """
    heard: dict[tuple[str, str, str], AgentElsewhere] = {}

    async def note(event: Event) -> None:
        found = _read(event.data)
        if found is not None and found.directory != str(rundir.path):
            heard[found.host, found.directory, found.name] = found

    broker = make_broker(config, rundir.path)
    try:
        async with asyncio.timeout(_CONNECT_S):
            await broker.connect()
        registry = EventHandlerRegistry()
        await registry.register(EventType.AGENT_HEARTBEAT, note, _NAME, "note")
        consumer = EventConsumer(
            ConsumerConfig(agent_name=_NAME, broker=broker, handler_registry=registry)
        )
        await consumer.start()
        await asyncio.sleep(_LISTEN_S)
        await consumer.stop()
    except TimeoutError:
        raise MeshError(f"{config.broker_type} does not answer: other hosts are unknown") from None
    finally:
        await broker.close()
    return [heard[key] for key in sorted(heard)]


def _read(data: dict[str, Any]) -> AgentElsewhere | None:
    """Read a heartbeat; anybody can send one, so nothing in it is trusted."""
    try:
        return AgentElsewhere(
            host=str(data["host"]),
            directory=str(data["directory"]),
            name=str(data["name"]),
            pid=int(data["pid"]),
            state=str(data["state"]),
            handled=int(data["handled"]),
            failed=int(data["failed"]),
            lost=int(data["lost"]),
            queue=int(data["queue"]),
        )
    except (KeyError, TypeError, ValueError):
        return None
