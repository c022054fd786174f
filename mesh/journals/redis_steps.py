"""The steps of one commit, put together: what they settle of which stream, and how to undo that."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from mesh.journals.redis_consumers import name_of

if TYPE_CHECKING:
    from mesh.deadletters import DeadLetter
    from mesh.journal import Delivery, Record, Step
    from mesh.journals.redis_consumers import Consumer, Lane, Name
    from mesh.journals.redis_entries import Spot


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[list[bytes], dict[str, Any]]).decode


@dataclass(slots=True)
class LaneSteps:
    """What is settled of one stream."""

    #: The youngest: the place of the settled ones.
    reached: tuple[Spot, int, str] | None = None
    #: On the pending list.
    acks: list[str] = field(default_factory=list)
    marks: list[str] = field(default_factory=list)
    unmarks: list[str] = field(default_factory=list)


def encode_decision(keys: list[bytes], plan: dict[str, Any]) -> bytes:
    """Keep the call that settles a partition, for whoever has to make it."""
    return _encode((keys, plan))


def decode_decision(decision: bytes) -> tuple[list[bytes], dict[str, Any]]:
    """Give the call back."""
    return _decode(decision)


class Settlement:
    """
    Steps that are not refused.

    Args:
        me: Whose they are; None: a source's.
    """

    def __init__(self, me: Consumer | None) -> None:
        """Settle nothing yet."""
        self.me = me
        #: The consumer's name, for the pending list.
        self.consumer = "" if me is None else me.name
        self.lanes: dict[Lane, LaneSteps] = {}
        self.records: list[Record] = []
        self.letters: list[DeadLetter] = []
        self.state: dict[str, bytes | None] = {}
        self._number = 0
        self._returns = 0 if me is None else me.returns
        self._settled: list[tuple[Name, Delivery]] = []
        #: What streams knew of them.
        self._known: list[tuple[dict[str, tuple[Spot, int]], str, tuple[Spot, int]]] = []

    def add(self, step: Step) -> bool:
        """Take a step in; False when it settles what the consumer does not hold (any more)."""
        acks, me = step.acks, self.me
        if len(acks) == 1 and me is not None and not step.done:
            # What nearly all are
            if not me.holds(acks[0]):
                return False
            self._ack(me, name_of(acks[0]))
        elif acks or step.done:
            if me is None:
                return False
            names = [name_of(each) for each in acks]
            marks = [(name_of(each), handler) for each, handler in step.done]
            known = all(map(me.holds, [*acks, *(each for each, _ in step.done)]))
            if not known or len(set(names)) < len(names):
                return False
            for name, handler in marks:
                self._mark(me, name, handler)
            for name in names:
                self._ack(me, name)
        if step.records:
            self.records += step.records
        if step.dead:
            self.letters += step.dead
        if step.state:
            self.state |= step.state
        return True

    def pins(self, lane: Lane) -> list[str]:
        """Give what is held of a stream, and older than what is settled."""
        reached = self.lanes[lane].reached
        overtaken: list[str] = []
        if reached is not None:
            for position, (spot, _) in lane.plain.items():
                if spot > reached[0]:
                    break
                overtaken.append(position)
        return overtaken

    def positions(self) -> dict[tuple[str, int], list[str]]:
        """Give all that is settled, by topic and partition."""
        found: dict[tuple[str, int], list[str]] = {}
        for (topic, partition, position), _ in self._settled:
            found.setdefault((topic, partition), []).append(position)
        return found

    def number(self) -> dict[str, Any]:
        """Give what tells this change of the state from all others of its consumer."""
        if self.me is None:
            return {}
        self._number = self.me.number = self.me.number + 1
        return {"number": self.me.number, "incarnation": self.me.incarnation}

    def is_outdated(self) -> bool:
        """Say whether Redis was away since: it may have come back older, and know nothing of it."""
        return self.me is not None and self.me.returns != self._returns

    def note_number(self) -> None:
        """Remember that the change of the state is kept."""
        if self.me is not None and self._number:
            self.me.noted = self._number

    def undo(self) -> None:
        """Hold everything again, unless it is settled."""
        if self.me is None:
            return
        for name, delivery in self._settled:
            if self.me.settling.pop(name, None) is not None:
                self.me.held[name] = delivery
        for places, position, place in self._known:
            places[position] = place
        for lane in self.lanes:
            lane.plain = dict(sorted(lane.plain.items(), key=lambda item: item[1]))

    def settle(self) -> None:
        """Let go of all of it, because Redis has."""
        if self.me is None:
            return
        for lane, steps in self.lanes.items():
            for position in self.pins(lane):
                del lane.plain[position]
            if steps.reached is not None:
                lane.settled_to = steps.reached[0]
        self.me.settled(name for name, _ in self._settled)
        self.lanes, self._settled, self._known = {}, [], []

    def _ack(self, me: Consumer, name: Name) -> None:
        delivery = me.settling[name] = me.held.pop(name)
        topic, partition, position = name
        lane = me.lanes[topic, partition]
        steps = self.lanes.get(lane)
        if steps is None:
            steps = self.lanes[lane] = LaneSteps()
        places = lane.plain
        place = places.pop(position, None)
        if place is None:
            steps.acks.append(position)
            places = lane.returned
            place = places.pop(position, None)
        if place is not None:
            self._known.append((places, position, place))
            if place[0] > (lane.settled_to if steps.reached is None else steps.reached[0]):
                steps.reached = (*place, position)
        if lane.done and position in lane.done:
            steps.unmarks += [f"{position} {each}" for each in lane.done.pop(position)]
        self._settled.append((name, delivery))

    def _mark(self, me: Consumer, name: Name, handler: str) -> None:
        topic, partition, position = name
        lane = me.lanes[topic, partition]
        lane.done.setdefault(position, set()).add(handler)
        self.lanes.setdefault(lane, LaneSteps()).marks.append(f"{position} {handler}")
