"""What became of every event of a mesh, worked out from the ledgers of all its agents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.ledger import JOURNAL
from mesh.ledger_views import In
from mesh.replicas import group_of
from mesh.values import Value, field

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mesh.ledger_views import LedgerView, Out


class LinkAccount(Value, frozen=True):
    """The account of one publisher, topic and subscriber."""

    published: int
    received: int
    lost: int
    in_flight: int

    def to_dict(self) -> dict[str, int]:
        """Give the account as plain data."""
        return {name: getattr(self, name) for name in self.__struct_fields__}


class Account(Value, frozen=True):
    """What became of every event of the mesh, from the ledgers alone."""

    links: Mapping[str, LinkAccount] = field(default_factory=dict)
    published: Mapping[str, int] = field(default_factory=dict)

    @property
    def lost_by_link(self) -> dict[str, int]:
        """Give the links that lost something."""
        return {name: link.lost for name, link in self.links.items() if link.lost}

    @property
    def lost(self) -> int:
        """Sum up what was lost on all links."""
        return sum(link.lost for link in self.links.values())

    @property
    def in_flight(self) -> int:
        """Sum up what was published and has neither been settled nor lost."""
        return sum(link.in_flight for link in self.links.values())


def account(
    views: Mapping[str, LedgerView],
    hears: Mapping[str, frozenset[str]] | None = None,
    *,
    settled: bool = False,
) -> Account:
    """
    Join the ledgers of publishers and subscribers into one account.

    Args:
        views: Ledgers by agent name.
        hears: Topics by agent name, to see links on which nothing ever arrived.
        settled: True once the mesh is still: what a subscriber has not seen by now is lost, not
            under way.
    """
    links: dict[str, LinkAccount] = {}
    published: dict[str, int] = {}
    groups = _sharing(views)
    for publisher in views.values():
        for topic, said in publisher.out.items():
            published[topic] = published.get(topic, 0) + said.sequence
            for name, subscribers in groups.items() if said.epoch else ():
                ears = _heard(subscribers, publisher.name, topic, said, hears or {})
                if ears:
                    links[f"{publisher.name}>{topic}>{name}"] = (
                        _shared_link(said, ears, settled=settled)
                        if ears[0][0].shared
                        else _link(said, *ears[0], settled=settled)
                    )
    for name, subscribers in groups.items():
        for said_by, topic in {link for view in subscribers for link in view.in_}:
            if said_by not in views and said_by != JOURNAL:
                links[f"{said_by}>{topic}>{name}"] = _one_sided_link(subscribers, said_by, topic)
    for subscriber in views.values():
        for (publisher_name, topic), heard in subscriber.in_.items():
            if publisher_name == JOURNAL:
                unfinished = 0 if subscriber.retired else heard.received - heard.settled
                links[f"{JOURNAL}>{topic}>{subscriber.name}"] = LinkAccount(
                    published=published.get(topic, 0),
                    received=heard.received,
                    lost=0,
                    in_flight=unfinished,
                )
    return Account(links=links, published=published)


def _never_heard(
    subscriber: LedgerView, topic: str, said: Out, hears: Mapping[str, frozenset[str]]
) -> In | None:
    """Count a link on which nothing arrived, when the subscriber was listening before it began."""
    listens = topic in hears.get(subscriber.name, frozenset())
    if listens and 0 < subscriber.ready_at_s * 1e9 < said.epoch:
        return In(said.epoch, 0, 0, 0, 0, 0)
    return None


def _sharing(views: Mapping[str, LedgerView]) -> dict[str, list[LedgerView]]:
    """Join replicas that share what they hear under their group's name; others stand alone."""
    groups: dict[str, list[LedgerView]] = {}
    for view in views.values():
        groups.setdefault(group_of(view.name) if view.shared else view.name, []).append(view)
    return groups


def _heard(
    subscribers: list[LedgerView],
    publisher: str,
    topic: str,
    said: Out,
    hears: Mapping[str, frozenset[str]],
) -> list[tuple[LedgerView, In]]:
    found = []
    for subscriber in subscribers:
        heard = subscriber.in_.get((publisher, topic))
        if heard is None and not subscriber.retired:
            heard = _never_heard(subscriber, topic, said, hears)
        if heard is not None:
            found.append((subscriber, heard))
    return found


def _shared_link(said: Out, heard: list[tuple[LedgerView, In]], *, settled: bool) -> LinkAccount:
    """
    Account for what replicas share: nobody handles an event twice, so the sum tells what is lost.

    Of what it did not take, a replica does not know whether another one did.
    """
    current = [each for view, each in heard if not view.retired]
    same = [each for _, each in heard if each.epoch == said.epoch]
    # A retired one's inbox went with it
    received = sum(each.settled if view.retired else each.received for view, each in heard)
    unfinished = sum(each.received - each.settled for each in current)
    # What was said before the first of them listened was not meant for them
    base = min((each.last - each.received - each.passed - each.lost for each in same), default=0)
    # Who has heard nothing since it listens (anew) does not know what it has missed
    lasts = [each.last if each.epoch == said.epoch else 0 for each in current if each.epoch]
    seen = said.sequence if settled else min(lasts, default=said.sequence)
    return LinkAccount(
        published=said.sequence,
        received=received,
        lost=max(0, seen - max(0, base) - received),
        in_flight=unfinished + said.sequence - seen,
    )


def _one_sided_link(subscribers: list[LedgerView], publisher: str, topic: str) -> LinkAccount:
    """Account for a publisher without a ledger (`mesh publish`): only those who heard it count."""
    link = publisher, topic
    heard = [(view.retired, view.in_[link]) for view in subscribers if link in view.in_]
    received = sum(each.received for _, each in heard)
    missed = sum(each.lost for _, each in heard)
    unfinished = sum(each.received - each.settled for retired, each in heard if not retired)
    # A retired one's inbox went with it
    gone = sum(each.received - each.settled for retired, each in heard if retired)
    return LinkAccount(received + missed, received, missed + gone, unfinished)


def _link(said: Out, view: LedgerView, heard: In, *, settled: bool) -> LinkAccount:
    if view.retired:
        lost = heard.lost + heard.received - heard.settled
        return LinkAccount(said.sequence, heard.received, lost, 0)
    # A newer epoch means the publisher's ledger was begun anew: nothing of it was seen yet
    last = heard.last if heard.epoch == said.epoch else 0
    # Whoever listens anew is not waiting for what was said before
    under_way = max(0, said.sequence - last) if heard.epoch else 0
    unfinished = heard.received - heard.settled
    return LinkAccount(
        published=said.sequence,
        received=heard.received,
        lost=heard.lost + (under_way if settled else 0),
        in_flight=unfinished + (0 if settled else under_way),
    )
