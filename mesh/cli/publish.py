"""`mesh publish`: say an event from the command line."""

from __future__ import annotations

import asyncio
import importlib
import json
import math
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from mesh.card import read_cards
from mesh.cli import say
from mesh.cli.place import Place, directory_option, joining_settings, json_option
from mesh.errors import PayloadError, TopicError
from mesh.events import declare_durable
from mesh.factory import make_broker
from mesh.publisher import EventPublisher, PublisherConfig
from mesh.replicas import group_of
from mesh.topics import PRIVATE_PREFIX, check_topic

if TYPE_CHECKING:
    from pathlib import Path

    from mesh.config import MessageBusConfig
    from mesh.events import Event
    from mesh.rundir import RunDir

#: The name that stands in the event as its source.
_NAME = "mesh-publish"
#: Where a project declares what its types carry.
PAYLOADS = "agents/payloads.py"


@click.command()
@click.argument("event_type", metavar="TYPE")
@click.argument("data", metavar="JSON")
@click.option("--key", help="Events of one key keep their order.")
@json_option
@directory_option
def publish(
    event_type: str, data: str, key: str | None, json_form: bool, directory: str | None
) -> None:
    """
    Say an event; JSON is its payload, an object, or - to read it from stdin.

    Exit code 65 when the type or the payload cannot travel: bad JSON, a name that is no topic, a
    payload that does not fit the type's schema in agents/payloads.py.

    \b
    Example:
      mesh new till --hears customer.came && mesh reload
      mesh publish customer.came '{"name": "Ada"}'
      echo '{"limit": 3}' | mesh publish risk.limits.changed -
    """  # noqa: D301
    topic = check_topic(event_type)
    if topic.startswith(PRIVATE_PREFIX):
        raise TopicError(
            f"{topic!r} starts with {PRIVATE_PREFIX!r}: such topics are the mesh's own"
        )
    payload = parse_payload(sys.stdin.read() if data == "-" else data)
    place = Place.find(directory)
    config = joining_settings(place)
    load_schemas(place.project)
    if any(topic in card.durable for card in read_cards(place.rundir).values()):
        declare_durable(topic)
    event = asyncio.run(_publish(place.rundir, config, topic, payload, key))
    listeners = _listeners(place.rundir, topic)
    if json_form:
        say.as_json({"event": event.to_dict(), "heard_by": listeners})
    else:
        say.line(f"said {topic} {event.id}; heard by {_folded(listeners)}")
    if not listeners:
        say.note(
            f"no agent of this mesh hears {topic}; `mesh agents` lists what they hear", "yellow"
        )


def parse_payload(text: str) -> dict[str, Any]:
    """
    Read a payload.

    Raises:
        PayloadError: It is no JSON, or no object.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"JSON cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise PayloadError(f'JSON must be an object such as {{"price": 1}}, got {text[:40]}')
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _finite(digits: str) -> float:
    """Read a number; one that is too large would silently become infinite."""
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:40]} is too large for a number")
    return number


def load_schemas(project: Path) -> None:
    """Declare the project's payloads, so that a wrong one is refused here and not at an agent."""
    if not (project / PAYLOADS).is_file():
        return
    sys.path.insert(0, str(project))
    try:
        importlib.import_module("agents.payloads")
    except Exception as error:  # noqa: BLE001 - the project's own code may raise anything
        say.note(f"agents/payloads.py cannot be imported, payloads are not checked: {error}")
    finally:
        sys.path.remove(str(project))


def _listeners(rundir: RunDir, topic: str) -> list[str]:
    cards = read_cards(rundir).values()
    return sorted(card.name for card in cards if topic in card.hears and card.state == "ready")


def _folded(listeners: list[str]) -> str:
    """Name each agent once: its replicas share what it hears."""
    counts = Counter(map(group_of, listeners))
    shown = [name if count == 1 else f"{name} ({count} replicas)" for name, count in counts.items()]
    return ", ".join(shown) or "no agent"


async def _publish(
    rundir: RunDir, config: MessageBusConfig, topic: str, payload: dict[str, Any], key: str | None
) -> Event:
    async with make_broker(config, rundir.path) as broker:
        publisher = EventPublisher(
            PublisherConfig(agent_name=_NAME, broker=broker, wire_format=config.wire_format)
        )
        event = await publisher.publish(topic, payload, key=key)
        await publisher.close()
        return event
