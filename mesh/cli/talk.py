"""`mesh tail` and `mesh publish`: hear and speak as a guest."""

from __future__ import annotations

import asyncio
import json
import signal
from typing import TYPE_CHECKING

import click

from mesh import codec
from mesh.card import read_cards
from mesh.cli.common import clean, rundir
from mesh.config import MessageBusConfig
from mesh.errors import FrameError
from mesh.events import declarations
from mesh.factory import make_broker
from mesh.ledger import read_ledgers
from mesh.publisher import EventPublisher, PublisherConfig
from mesh.topics import check_topic

if TYPE_CHECKING:
    from mesh.events import Event


class _Ear:
    """Queues what comes; a slow terminal loses the oldest."""

    MAX_QUEUED = 10_000

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Event] = asyncio.Queue()
        self.missed = 0

    def receive(self, topic: str, frame: bytes) -> None:
        try:
            events = codec.decode_frame(topic, frame).events
        except FrameError as error:
            click.echo(f"{topic}: {clean(error)}", err=True)
            return
        for event in events:
            if self.queue.qsize() >= self.MAX_QUEUED:
                self.queue.get_nowait()
                self.missed += 1
            self.queue.put_nowait(event)

    def has_room(self) -> bool:
        return True


@click.command()
@click.argument("types", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="One CloudEvent a line.")
@click.option("-n", "count", type=click.IntRange(min=1), help="End after so many events.")
def tail(*, types: tuple[str, ...], as_json: bool, count: int | None) -> int:
    r"""
    Print events as they are said (default: all but heartbeats).

    \b
    mesh tail order.executed --json | jq .data
    """
    wanted = [check_topic(name) for name in types] or _all_topics()
    return asyncio.run(_tail(wanted, as_json=as_json, count=count))


def _all_topics() -> list[str]:
    """Give every topic known here: built in, and heard or said by the mesh's agents."""
    where = rundir()
    known = {each.topic for each in declarations()}
    for card in read_cards(where).values():
        known.update(card.hears)
    for view in read_ledgers(where.ledgers).values():
        known.update(view.out)
    return sorted(known - {"agent.heartbeat"})


async def _tail(topics: list[str], *, as_json: bool, count: int | None) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    ear = _Ear()
    async with make_broker(MessageBusConfig.from_env(), rundir().path) as broker:
        await broker.attach(topics, ear)
        printing = asyncio.create_task(_print(ear, as_json=as_json, count=count))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({printing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in (printing, stopping):
            task.cancel()
        outcomes = await asyncio.gather(printing, stopping, return_exceptions=True)
    if ear.missed:
        click.echo(f"{ear.missed} events were not printed: the output is too slow", err=True)
    if isinstance(outcomes[0], Exception):
        raise outcomes[0]
    return 0


async def _print(ear: _Ear, *, as_json: bool, count: int | None) -> None:
    printed = 0
    while count is None or printed < count:
        event = await ear.queue.get()
        printed += 1
        if as_json:
            click.echo(codec.encode_json(event))
        else:
            data = json.dumps(event.data, default=str)
            moment = event.timestamp.strftime("%H:%M:%S.%f")
            click.echo(clean(f"{moment} {event.source_agent} {event.type} {data}"))


@click.command()
@click.argument("event_type", metavar="TYPE")
@click.argument("data", metavar="JSON")
@click.option("--key", help="The event's key.")
def publish(*, event_type: str, data: str, key: str | None) -> int:
    r"""
    Say one event.

    \b
    mesh publish system.alert '{"text": "hello"}'
    """
    topic = check_topic(event_type)
    try:
        payload = json.loads(data)
    except ValueError as error:
        raise click.UsageError(f"JSON {data[:60]!r} cannot be read: {error}") from error
    if not isinstance(payload, dict):
        raise click.UsageError(f"JSON must be an object, got {type(payload).__name__}")
    return asyncio.run(_publish(topic, payload, key))


async def _publish(topic: str, payload: dict[str, object], key: str | None) -> int:
    where = rundir()
    async with make_broker(MessageBusConfig.from_env(), where.path) as broker:
        publisher = EventPublisher(PublisherConfig(agent_name="cli", broker=broker))
        event = await publisher.publish(topic, payload, key=key)
        await publisher.close()
    click.echo(event.id)
    if not any(topic in card.hears for card in read_cards(where).values()):
        click.echo(f"no agent of this mesh hears {topic}", err=True)
    return 0
