"""`mesh agents`: who hears and says what, and which topics hang in the air."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from mesh.card import read_cards
from mesh.cli import say
from mesh.cli.exits import NoMeshError
from mesh.cli.place import Place, directory_option, json_option
from mesh.events import is_durable
from mesh.ledger_views import read_ledgers
from mesh.topics import PRIVATE_PREFIX

if TYPE_CHECKING:
    from mesh.rundir import RunDir

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


def topics_of(rundir: RunDir) -> dict[str, Topic]:
    """Join the agents' cards and ledgers into topics; agents' own lives are left out."""
    topics: dict[str, Topic] = {}
    for name, card in read_cards(rundir).items():
        for topic in card.hears:
            entry = topics.setdefault(topic, Topic())
            entry.heard_by.append(name)
            entry.note_class(name, durable=topic in card.durable)
    for name, view in read_ledgers(rundir.ledgers).items():
        for topic, out in view.out.items():
            entry = topics.setdefault(topic, Topic())
            entry.said_by.append(name)
            entry.published += out.sequence
            if out.sequence:
                # Only live events are numbered
                entry.note_class(name, durable=not out.epoch)
    return {
        name: topics[name]
        for name in sorted(topics)
        if not name.startswith(PRIVATE_PREFIX)
        and (not name.startswith(LIFE) or topics[name].heard_by)
    }


@click.command()
@json_option
@directory_option
def agents(json_form: bool, directory: str | None) -> None:
    """
    Show who hears and says what, and topics that only one side knows.

    \b
    Example:
      mesh agents
      mesh agents --json
    """  # noqa: D301
    rundir = Place.find(directory).rundir
    cards = read_cards(rundir)
    if not cards:
        raise NoMeshError(f"no agent has started in {rundir.path}; start a mesh with `mesh up`")
    topics = topics_of(rundir)
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
