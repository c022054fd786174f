"""`mesh agents`: who hears and says what, and which topics hang in the air."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from mesh.card import read_cards
from mesh.cli import say
from mesh.cli.exits import NoMeshError
from mesh.cli.known import known_agents
from mesh.cli.place import Place, directory_option, json_option
from mesh.events import is_durable
from mesh.ledger import JOURNAL
from mesh.ledger_views import read_ledgers
from mesh.replicas import group_of
from mesh.topics import PRIVATE_PREFIX

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.card import Card
    from mesh.ledger_views import LedgerView

#: Said by every agent of itself, for eyes; nobody has to hear it.
LIFE = "agent."


@dataclass(slots=True)
class Topic:
    """Who says and hears one type, and how often it was said."""

    said_by: list[str] = field(default_factory=list)
    heard_by: list[str] = field(default_factory=list)
    published: int = 0
    #: Who says or hears it durably, and who live.
    durable_for: list[str] = field(default_factory=list)
    live_for: list[str] = field(default_factory=list)

    @property
    def orphan(self) -> str | None:
        """Say what is missing, when something is."""
        if not self.heard_by:
            return "said, but heard by nobody"
        return None if self.said_by else "heard, but said by nobody yet"

    @property
    def disagreement(self) -> str | None:
        """Say who takes it for durable and who for live, when not all agree."""
        if not (self.durable_for and self.live_for):
            return None
        return f"durable for {', '.join(self.durable_for)}, live for {', '.join(self.live_for)}"

    def note_class(self, name: str, *, durable: bool) -> None:
        """Note how one agent takes it."""
        names = self.durable_for if durable else self.live_for
        if name not in names:
            names.append(name)


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


def topics_of(place: Place) -> dict[str, Topic]:
    """
    Join the agents' cards and ledgers into topics; agents' own lives are left out.

    Raises:
        ConfigurationError: supervisord.conf cannot be read.
    """
    topics: dict[str, Topic] = {}
    cards = cards_of(place)
    for name, card in cards.items():
        for topic in card.hears:
            entry = topics.setdefault(topic, Topic())
            entry.heard_by.append(name)
            entry.note_class(name, durable=topic in card.durable)
    gone = read_cards(place.rundir).keys() - cards.keys()
    views = read_ledgers(place.rundir.ledgers)
    for name, view in views.items():
        for topic, out in view.out.items() if name not in gone and not view.retired else ():
            entry = topics.setdefault(topic, Topic())
            entry.said_by.append(name)
            entry.published += out.sequence
            if out.sequence:
                # Only live events are numbered
                entry.note_class(name, durable=not out.epoch)
    _add_others(topics, views)
    return {
        name: topics[name]
        for name in sorted(topics)
        if not name.startswith(PRIVATE_PREFIX)
        and (not name.startswith(LIFE) or topics[name].heard_by)
    }


def _add_others(topics: dict[str, Topic], views: Mapping[str, LedgerView]) -> None:
    """Add who was heard and has no ledger here: `mesh publish`, a program, another host."""
    heard: dict[tuple[str, str], int] = {}
    for view in views.values():
        for link, each in view.in_.items():
            if link[0] not in views:
                heard[link] = max(heard.get(link, 0), each.received)
    # The journal last: it passes on what somebody else has said
    for (publisher, topic), count in sorted(heard.items(), key=lambda item: item[0][0] == JOURNAL):
        entry = topics.get(topic)
        if entry is None or not count:
            continue
        if publisher != JOURNAL or not entry.said_by:
            entry.said_by.append(publisher)
            entry.published += count


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
    topics = topics_of(place)
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
