"""`mesh tail`: an ephemeral listener on the bus."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING

import click

from mesh.card import read_cards
from mesh.cli import say
from mesh.cli.following import Follower
from mesh.cli.place import Place, directory_option, joining_settings, json_option
from mesh.cli.signals import stop_signals
from mesh.consumer import ConsumerConfig, EventConsumer
from mesh.events import EventType, declarations, is_durable
from mesh.factory import make_broker
from mesh.handlers import EventHandlerRegistry
from mesh.ledger_views import read_ledgers
from mesh.topics import PRIVATE_PREFIX, check_topic

if TYPE_CHECKING:
    from mesh.config import MessageBusConfig
    from mesh.events import Event
    from mesh.rundir import RunDir

_NAME = "mesh-tail"
_BUFFER = 10_000


@click.command()
@click.argument("types", nargs=-1, metavar="[TYPE...]")
@click.option("-n", "--count", type=click.IntRange(min=1), help="End after so many events.")
@json_option
@directory_option
def tail(types: tuple[str, ...], count: int | None, json_form: bool, directory: str | None) -> None:
    """
    Listen to events as they happen; all known types, or those given.

    Known are the built-in types and those that the agents of this mesh hear or have said; of these,
    agent.heartbeat is shown only when it is named. Nothing is shown that was said before this
    command began; durable events come from then on as the journal keeps them. A slow reader of
    this command slows nobody: it misses live events, and says how many. Ctrl-C ends it, with exit
    code 0.

    \b
    Example:
      mesh tail order.executed portfolio.updated
      mesh tail market.data.received --json -n 3
      mesh tail agent.heartbeat
    """  # noqa: D301
    topics = [check_topic(name) for name in types]
    place = Place.find(directory)
    config = joining_settings(place)
    wanted = topics or _known(place.rundir)
    asyncio.run(_listen(place.rundir, config, wanted, count, json_form=json_form))


async def _listen(
    rundir: RunDir,
    config: MessageBusConfig,
    topics: list[str],
    count: int | None,
    *,
    json_form: bool,
) -> None:
    shown = 0
    broken: OSError | None = None
    with stop_signals() as stop:

        async def show(event: Event) -> None:
            nonlocal shown, broken
            if stop.is_set():
                return
            try:
                _print(event, json_form=json_form)
            except OSError as error:
                broken = error  # whoever read us has gone, mostly
                stop.set()
                return
            shown += 1
            if shown == count:
                stop.set()

        async with make_broker(config, rundir.path) as broker:
            registry = EventHandlerRegistry()
            for topic in topics:
                await registry.register(topic, show, _NAME, topic)
            consumer = EventConsumer(
                ConsumerConfig(
                    agent_name=_NAME,
                    broker=broker,
                    handler_registry=registry,
                    buffer_size=_BUFFER,
                    overflow="drop_oldest",
                    log_events=False,
                    live_only=True,
                )
            )
            durable = _durable(rundir, topics)
            async with contextlib.AsyncExitStack() as exits:
                if durable:
                    await exits.enter_async_context(Follower(broker, durable, show))
                await consumer.start()
                types = say.counted(len(topics), "type")
                say.note(f"listening to {types} in {rundir.path}; Ctrl-C ends")
                await stop.wait()
                await consumer.stop()
            missed = consumer.ledger.lost() + consumer.ledger.counts().get("overflow", 0)
            if broken is not None:
                raise broken
            if missed and shown != count:
                say.note(f"{say.counted(missed, 'event')} came too fast to be shown", "yellow")


def _durable(rundir: RunDir, topics: list[str]) -> list[str]:
    """Choose what may be kept in the journal: by the declarations, and by what agents say."""
    told = {topic for card in read_cards(rundir).values() for topic in card.durable}
    told |= {
        topic
        for view in read_ledgers(rundir.ledgers).values()
        for topic, out in view.out.items()
        if not out.epoch
    }
    return [topic for topic in topics if topic in told or is_durable(topic)]


def _known(rundir: RunDir) -> list[str]:
    topics = {each.topic for each in declarations()}
    for card in read_cards(rundir).values():
        topics.update(card.hears)
    for view in read_ledgers(rundir.ledgers).values():
        topics.update(view.out)
    # One a second from each agent would hide the rest
    topics.discard(EventType.AGENT_HEARTBEAT)
    return sorted(topic for topic in topics if not topic.startswith(PRIVATE_PREFIX))


def _print(event: Event, *, json_form: bool) -> None:
    if json_form:
        say.as_json(event.to_dict(), compact=True)
        return
    time = event.timestamp.strftime("%H:%M:%S.%f")[:-3]
    key = f" [{event.key}]" if event.key else ""
    data = json.dumps(event.data, default=str, ensure_ascii=False)
    say.line(f"{time} {event.type} {event.source_agent}{key} {data}")
