"""Opens the journal of a mesh from outside, running or not; one that is not there is not made."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mesh.cli.place import own_redis_is_down, settings_of
from mesh.dead_letter_queue import DeadLetterQueue
from mesh.env import DEFAULT_JOURNAL, journal_name
from mesh.errors import BrokerUnavailableError, ConfigurationError, MeshError
from mesh.factory import make_broker
from mesh.publisher import EventPublisher, PublisherConfig
from mesh.replay import REPLAYER

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from mesh.broker import MessageBroker
    from mesh.config import MessageBusConfig
    from mesh.journal import Journal
    from mesh.rundir import RunDir

#: So long `mesh status` waits for a journal.
_LOOK_S = 3.0


@dataclass(frozen=True, slots=True)
class KeptFacts:
    """What the journal holds that nobody has settled."""

    #: None: nothing was ever kept, or the journal does not answer.
    dead_letters: int | None = None
    #: Groups that are behind: events that are not settled, and the age of the oldest in seconds.
    behind: dict[str, tuple[int, float]] = field(default_factory=dict)
    #: Why nothing is known.
    trouble: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Give it as plain data."""
        return {
            "dead_letters": self.dead_letters,
            "behind": {
                group: {"pending": pending, "oldest_s": round(oldest_s, 3)}
                for group, (pending, oldest_s) in self.behind.items()
            },
            "journal_trouble": self.trouble or None,
        }


async def look_at_kept(rundir: RunDir) -> KeptFacts:
    """Look into the journal of a mesh; raises nothing when it is away, and makes none."""
    try:
        config = settings_of(rundir)
        if config.broker_type == "memory" or not has_journal(rundir, config):
            return KeptFacts()
        async with asyncio.timeout(_LOOK_S), opened_journal(rundir, config) as journal:
            dead_letters = await DeadLetterQueue(journal).count()
            behind: dict[str, tuple[int, float]] = {}
            for view in await journal.groups():
                if view.pending:
                    pending, oldest_s = behind.get(view.group, (0, 0.0))
                    behind[view.group] = pending + view.pending, max(oldest_s, view.oldest_s)
            return KeptFacts(dead_letters, behind)
    except TimeoutError:
        return KeptFacts(trouble=f"the journal did not answer within {_LOOK_S:g} s")
    except MeshError as error:
        return KeptFacts(trouble=f"the journal cannot be read: {error}")


def has_journal(rundir: RunDir, config: MessageBusConfig) -> bool:
    """
    Say whether there is a journal to open; Redis is one.

    Raises:
        ConfigurationError: The fabric of these settings is memory.
        BrokerUnavailableError: It is in a redis-server of the mesh's own, which is down with it.
    """
    if config.broker_type == "memory":
        raise ConfigurationError(
            "LEGION_BROKER_TYPE=memory: what memory keeps ends with its process; use zmq or redis"
        )
    if own_redis_is_down(rundir):
        raise BrokerUnavailableError(
            f"the mesh in {rundir.path} keeps events and dead letters in its own redis-server,"
            " which is down: `mesh up --with-redis` first"
        )
    return config.broker_type != "zmq" or rundir.journal().is_file()


def require_usual_journal(rundir: RunDir) -> None:
    """
    Let only the usual journal be one that is not there, for nothing was ever kept in it.

    Raises:
        ConfigurationError: MESH_JOURNAL names another one; tells those that there are.
    """
    name = journal_name()
    if name == DEFAULT_JOURNAL:
        return
    folder = rundir.journal().parent
    there = ", ".join(sorted(path.stem for path in folder.glob("*.sqlite"))) or "none"
    raise ConfigurationError(
        f"MESH_JOURNAL={name}: no such journal in {folder}; there are: {there}"
    )


@asynccontextmanager
async def opened_journal(rundir: RunDir, config: MessageBusConfig) -> AsyncIterator[Journal]:
    """
    Open the journal, for looking.

    Raises:
        BrokerUnavailableError: It does not answer.
    """
    # A Redis that may forget can hold dead letters of live events all the same
    lenient = replace(config, redis_allow_volatile=True)
    journal = make_broker(lenient, rundir.path).make_journal()
    try:
        await journal.connect()
        yield journal
    finally:
        await journal.close()


@asynccontextmanager
async def opened_queue(
    rundir: RunDir, *, speaking: bool = False
) -> AsyncIterator[DeadLetterQueue | None]:
    """
    Open the dead letters of a mesh; gives None where nothing was ever kept.

    Args:
        rundir: The mesh's directory.
        speaking: Join the fabric, so that a running mesh hears of it.

    Raises:
        ConfigurationError: The settings cannot be used, or name a journal that is not there.
        BrokerUnavailableError: The journal does not answer.
    """
    config = settings_of(rundir)
    if not has_journal(rundir, config):
        require_usual_journal(rundir)
        yield None
        return
    if not speaking:
        async with opened_journal(rundir, config) as journal:
            yield DeadLetterQueue(journal)
        return
    async with AsyncExitStack() as stack:
        broker = make_broker(config, rundir.path)
        stack.push_async_callback(broker.close)
        publisher = None
        if _runs(rundir, config):
            publisher = await _publisher(broker, config)
            stack.push_async_callback(publisher.close)
        yield DeadLetterQueue(await broker.open_journal(), publisher)


async def _publisher(broker: MessageBroker, config: MessageBusConfig) -> EventPublisher:
    await broker.connect()
    return EventPublisher(
        PublisherConfig(agent_name=REPLAYER, broker=broker, wire_format=config.wire_format)
    )


def _runs(rundir: RunDir, config: MessageBusConfig) -> bool:
    # Joining a ZeroMQ mesh that is down would start a forwarder for it
    return config.broker_type != "zmq" or rundir.holder(rundir.lock("forwarder")) is not None
