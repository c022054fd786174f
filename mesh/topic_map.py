"""Who says and hears which type in a mesh, joined from the agents' cards and ledgers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.card import read_cards
from mesh.ledger import JOURNAL
from mesh.ledger_views import read_ledgers
from mesh.topics import PRIVATE_PREFIX
from mesh.values import State, field

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.card import Card
    from mesh.ledger_views import LedgerView
    from mesh.rundir import RunDir

#: Said by every agent of itself, for eyes; nobody has to hear it.
LIFE = "agent."


class Topic(State):
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


def topics_of(
    cards: Mapping[str, Card], views: Mapping[str, LedgerView], gone: frozenset[str] = frozenset()
) -> dict[str, Topic]:
    """
    Join cards and ledgers into topics, in their order; agents' own lives are left out.

    Args:
        cards: Of the agents that count, by name.
        views: All ledgers, by name.
        gone: Whose ledgers say nothing any more.
    """
    topics: dict[str, Topic] = {}
    for name, card in cards.items():
        for topic in card.hears:
            entry = topics.setdefault(topic, Topic())
            entry.heard_by.append(name)
            entry.note_class(name, durable=topic in card.durable)
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


def disagreements(rundir: RunDir) -> dict[str, str]:
    """
    Tell which types some agents of a mesh take for durable and others for live.

    What the ones say the others never hear, and nobody misses it: nothing is lost on the way. Only
    agents that live count; what others have left there may be older than a change of mind.

    Returns:
        By type, who takes it for what.
    """
    cards = read_cards(rundir)
    dead = frozenset(name for name in cards if rundir.holder(rundir.lock(name)) is None)
    alive = {name: card for name, card in cards.items() if name not in dead}
    joined = topics_of(alive, read_ledgers(rundir.ledgers), dead)
    return {name: each.disagreement for name, each in joined.items() if each.disagreement}
