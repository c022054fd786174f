"""
Judges a run from what agents swore to in their notes and what the journal holds.

Nothing here asks the mesh what it believes; but of live events it is held to its own counters.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from mesh import codec
from mesh.account import account
from tests.chaos.words import (
    EAR,
    HEARS,
    NO_KEY,
    ORDER,
    PACKED,
    SHIPPED,
    TICK,
    TILLS,
    Order,
    read_notes,
    state_name,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from mesh.journal import Journal
    from mesh.ledger_views import LedgerView

_PAGE = 5000
_SHOWN = 5


@dataclass(slots=True)
class Got:
    """What one agent swore to have been given."""

    #: In the order of its notes, by type.
    orders: dict[str, list[Order]] = field(default_factory=dict)
    #: How many processes it was.
    lives: int = 0


@dataclass(slots=True)
class Evidence:
    """All that is known at the end."""

    tried: set[Order]
    #: Whose keeping was confirmed to who said it.
    kept: set[Order]
    till_lives: int
    got: dict[str, Got]
    #: What the journal holds, by type.
    journal: dict[str, Counter[Order]]
    #: (count, sum of numbers) by group and name.
    state: dict[str, dict[str, tuple[int, int]]]
    #: Ledgers of each life of the mesh.
    ledgers: Sequence[Mapping[str, LedgerView]]
    parked: Counter[str]


@dataclass(slots=True)
class Verdict:
    """What was promised and did not come, and the figures of it."""

    figures: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def note(self, name: str, amount: int) -> None:
        """Add a figure that nobody judges."""
        self.figures[name] = self.figures.get(name, 0) + amount

    def forbid(self, name: str, what: str, found: Iterable[object]) -> None:
        """Add a figure that must be 0; `what` says of what kind these were."""
        listed = list(found)
        self.note(name, len(listed))
        if listed:
            shown = ", ".join(map(str, listed[:_SHOWN]))
            self.problems.append(f"{name}: {len(listed)} {what}, such as {shown}")


def read_evidence(
    notes: Path,
    journal: dict[str, Counter[Order]],
    state: dict[str, dict[str, tuple[int, int]]],
    ledgers: Sequence[Mapping[str, LedgerView]],
    parked: Counter[str],
) -> Evidence:
    """Read the notes of all agents, beside what else is known."""
    tried: set[Order] = set()
    kept: set[Order] = set()
    till_lives = 0
    for name in TILLS:
        for words in read_notes(notes / name):
            if words[0] == "began":
                till_lives += 1
            elif words[0] == "tried":
                tried.add((name, words[1], int(words[2])))
            elif words[0] == "kept":
                kept.add((name, words[1], int(words[2])))
            else:
                kept |= {(name, words[1], number) for number in range(1, int(words[2]) + 1)}
    got: dict[str, Got] = {}
    for name in (*HEARS, EAR):
        mine = got[name] = Got()
        for words in read_notes(notes / name):
            if words[0] == "began":
                mine.lives += 1
            else:
                _, topic, publisher, key, number, _ = words
                mine.orders.setdefault(topic, []).append((publisher, key, int(number)))
    return Evidence(tried, kept, till_lives, got, journal, state, ledgers, parked)


async def read_journal(journal: Journal) -> dict[str, Counter[Order]]:
    """Read all that the journal holds of the chain."""
    found: dict[str, Counter[Order]] = {}
    for topic in (ORDER, PACKED, SHIPPED):
        held = found[topic] = Counter()
        after: int | str | None = None
        while page := await journal.scan([topic], after=after, limit=_PAGE):
            after = page[-1].position
            for stored in page:
                held[_order_of(codec.decode_frame(topic, stored.frame).events[0].data)] += 1
    return found


async def read_state(journal: Journal) -> dict[str, dict[str, tuple[int, int]]]:
    """Read what each group has counted."""
    return {
        group: {
            name: tuple(msgspec.msgpack.decode(raw))
            for name, raw in (await journal.load_state(group)).items()
        }
        for group in HEARS
    }


def _order_of(data: Mapping[str, Any]) -> Order:
    return (data["publisher"], data["key"], data["number"])


def judge(told: Evidence) -> Verdict:
    """Hold the mesh to its promises."""
    verdict = Verdict()
    tried = {order for order in told.tried if order[1] != TICK}
    held = set(told.journal[ORDER])
    verdict.note("orders tried", len(tried))
    verdict.note("orders accepted", len(told.kept))
    verdict.note("  not confirmed, and kept", len(held - told.kept))
    verdict.note("  not confirmed, and not kept", len(tried - held - told.kept))
    verdict.forbid("lost", "orders after their acceptance", told.kept - held)
    verdict.forbid("unexpected", "orders in the journal that nobody tried", held - tried)
    for topic, orders in told.journal.items():
        twice = [order for order, amount in orders.items() if amount > 1]
        verdict.forbid("effects twice", f"events kept twice as {topic}", twice)
    for group, heard in HEARS.items():
        for topic, says in heard:
            _judge_hop(told, group, topic, says, verdict)
    verdict.forbid("parked", "dead letters", told.parked.elements())
    _judge_live(told, verdict)
    return verdict


def _judge_hop(told: Evidence, group: str, topic: str, says: str | None, verdict: Verdict) -> None:
    """Judge what one group did with one type."""
    held = set(told.journal[topic])
    got = told.got[group].orders.get(topic, [])
    first = list(dict.fromkeys(got))
    verdict.note("deliveries", len(got))
    verdict.note("  of these again", len(got) - len(first))
    verdict.forbid("lost", f"of {topic} never given to {group}", held - set(first))
    verdict.forbid(
        "unexpected", f"of {topic} given to {group}, and nobody said them", set(first) - held
    )
    verdict.forbid("reordered", f"first deliveries of {topic} to {group}", _out_of_order(first))
    wrong: dict[str, list[str]] = {"lost": [], "effects twice": []}
    for name, (count, total) in _expected_state(topic, held).items():
        found = told.state[group].get(name, (0, 0))
        if found != (count, total):
            kind = "lost" if found[0] < count else "effects twice"
            wrong[kind].append(f"{name}: {found[0]} of sum {found[1]}, not {count} of {total}")
    verdict.note("effects", len(held))
    for kind, words in wrong.items():
        verdict.forbid(kind, f"counts in the state of {group}", words)
    if says is not None:
        verdict.forbid("lost", f"{says} of {group}", held - set(told.journal[says]))
        verdict.forbid(
            "unexpected", f"{says} of {group}, out of nothing", set(told.journal[says]) - held
        )


def _expected_state(topic: str, held: Iterable[Order]) -> dict[str, tuple[int, int]]:
    expected: dict[str, tuple[int, int]] = {}
    for publisher, key, number in held:
        name = state_name(topic, publisher, key)
        count, total = expected.get(name, (0, 0))
        expected[name] = (count + 1, total + number)
    return expected


def _out_of_order(first: Iterable[Order]) -> list[Order]:
    """Give the first deliveries that came after a later one of their key."""
    reached: dict[tuple[str, str], int] = {}
    wrong = []
    for publisher, key, number in first:
        if key == NO_KEY:
            continue
        if number < reached.get((publisher, key), 0):
            wrong.append((publisher, key, number))
        reached[publisher, key] = max(number, reached.get((publisher, key), 0))
    return wrong


def _judge_live(told: Evidence, verdict: Verdict) -> None:
    """Hold the ledgers of live events to what was really heard."""
    said = {order for order in told.tried if order[1] == TICK}
    ear = told.got[EAR]
    got = ear.orders.get(TICK, [])
    published = settled = lost = 0
    for views in told.ledgers:
        joined = account(views, {EAR: frozenset([TICK])}, settled=True)
        for till in TILLS:
            if (link := joined.links.get(f"{till}>{TICK}>{EAR}")) is not None:
                heard = views[EAR].in_.get((till, TICK))
                done = heard.settled if heard is not None else 0
                published += link.published
                settled += done
                # Who was killed and did not come back in this life has lost what it held
                lost += link.lost + link.in_flight
    verdict.figures |= {
        "ticks said": len(said),
        "ticks heard": len(got),
        "ticks lost": len(said) - len(set(got)),
        "ticks lost by the ledgers": lost,
    }
    verdict.forbid("effects twice", "ticks heard again", range(len(got) - len(set(got))))
    verdict.forbid("unexpected", "ticks that nobody said", set(got) - said)
    verdict.forbid("reordered", "ticks", _out_of_order(got))
    # A death between a note and its counter, one tick at most, on either side
    if published != settled + lost:
        verdict.problems.append(f"ledgers: {published} ticks are not {settled} and {lost} lost")
    if not 0 <= len(said) - published <= told.till_lives:
        verdict.problems.append(f"ledgers: {published} ticks published, {len(said)} were tried")
    if not 0 <= len(got) - settled <= ear.lives:
        verdict.problems.append(f"ledgers: {settled} ticks handled, {len(got)} were heard")
