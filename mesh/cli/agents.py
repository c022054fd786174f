"""`mesh agents`: who hears and says what, and which topics hang in the air."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mesh.card import read_cards
from mesh.cli import say
from mesh.cli.exits import NoMeshError
from mesh.cli.known import known_agents
from mesh.cli.place import Place, directory_option, json_option
from mesh.events import is_durable
from mesh.ledger_views import read_ledgers
from mesh.replicas import group_of
from mesh.topic_map import topics_of

if TYPE_CHECKING:
    from mesh.card import Card
    from mesh.topic_map import Topic


def cards_of(place: Place) -> dict[str, Card]:
    """
    Read the cards of the agents that this mesh has; those of agents that were taken out stay away.

    Raises:
        ConfigurationError: supervisord.conf cannot be read.
    """
    known = known_agents(place)
    return {
        name: card
        for name, card in read_cards(place.rundir).items()
        if not known.is_stray(card.group or group_of(name))
    }


def topics_in(place: Place) -> dict[str, Topic]:
    """
    Tell who says and hears which type in a mesh, without agents that were taken out.

    Raises:
        ConfigurationError: supervisord.conf cannot be read.
    """
    cards = cards_of(place)
    gone = frozenset(read_cards(place.rundir)) - cards.keys()
    return topics_of(cards, read_ledgers(place.rundir.ledgers), gone)


@click.command()
@json_option
@directory_option
def agents(json_form: bool, directory: str | None) -> None:
    """
    Show who hears and says what, and topics that only one side knows.

    Whoever was heard counts as having said it, as mesh-publish does after `mesh publish`; a durable
    type that no agent here has said comes from the (journal).

    \b
    Example:
      mesh agents
      mesh agents --json
    """  # noqa: D301
    place = Place.find(directory)
    cards = cards_of(place)
    if not cards:
        where = place.rundir.path
        raise NoMeshError(f"no agent has started in {where}; start a mesh with `mesh up`")
    topics = topics_in(place)
    said = {
        name: [topic for topic, entry in topics.items() if name in entry.said_by] for name in cards
    }
    if json_form:
        say.as_json(
            {
                "agents": {
                    name: {
                        "script": card.script,
                        "pid": card.pid,
                        "state": card.state,
                        "group": card.group or name,
                        "hears": list(card.hears),
                        "durable": list(card.durable),
                        "says": said[name],
                    }
                    for name, card in cards.items()
                },
                "topics": {
                    name: {
                        "said_by": entry.said_by,
                        "heard_by": entry.heard_by,
                        "published": entry.published,
                        "durable": _is_durable(name, entry),
                        "disagreement": entry.disagreement,
                        "orphan": entry.orphan,
                    }
                    for name, entry in topics.items()
                },
            }
        )
        return
    say.table(
        ("agent", "group", "state", "hears", "says"),
        [
            (
                name,
                card.group or name,
                card.state,
                " ".join(card.hears) or None,
                " ".join(said[name]) or None,
            )
            for name, card in cards.items()
        ],
    )
    say.line()
    say.table(
        ("type", "delivery", "said by", "heard by", "published", "note"),
        [
            (
                name,
                "durable" if _is_durable(name, each) else "live",
                " ".join(each.said_by),
                " ".join(each.heard_by),
                each.published,
                each.disagreement or each.orphan,
            )
            for name, each in topics.items()
        ],
        [_colour(each) for each in topics.values()],
    )


def _is_durable(name: str, topic: Topic) -> bool:
    """Believe the agents; where none tells, the declaration."""
    known = topic.durable_for or topic.live_for
    return bool(topic.durable_for) if known else is_durable(name)


def _colour(topic: Topic) -> say.Colour:
    if topic.disagreement:
        return "red"
    return "yellow" if topic.orphan else ""
