"""What a journal on SQLite remembers of a consumer of its own process."""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mesh.journal import MAX_UNSETTLED

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from mesh.journal import Delivery

# A cursor that nothing else moves is at most about so many events behind
_SWEEP_EVENTS = 5000
# Of an incarnation; a pid has 22 bits, and a whole number of SQLite 63
_RANDOM_BITS = 40

#: (topic, partition) by their numbers.
Place = tuple[int, int]
#: (seq, place)
Spot = tuple[int, Place]


def incarnation(pid: int) -> int:
    """Give a number of which `pid_of` gives the process, and which is never given again."""
    return pid << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)


def pid_of(incarnation: int) -> int:
    """Give the process of a consumer."""
    return incarnation >> _RANDOM_BITS


@dataclass(slots=True)
class Holding:
    """What a consumer owns, as one transaction found it."""

    version: int
    #: It became a member, so it holds nothing from before.
    fresh: bool
    lease_until_ms: int
    topics: dict[int, str]
    owned: frozenset[int]
    #: Another's by right: nothing more is read of them, and they go when they are empty.
    surplus: frozenset[int]
    cursors: dict[Place, int]
    #: The last that may have been handed to a lost consumer, where there is one.
    bounds: dict[Place, int]
    acked: dict[Place, set[int]]
    done: dict[int, set[str]]
    #: What a lost consumer may have been handed, the oldest first.
    suspects: list[Spot]
    #: Suspects whose handings-out are counted in the file.
    counted: set[int]


@dataclass(slots=True)
class Moves:
    """What settling some events changes in the file."""

    cursors: dict[Place, int] = field(default_factory=dict)
    #: Settled before something older of their place.
    acked: list[Spot] = field(default_factory=list)
    #: Places with such events that the cursor has passed by now.
    passed: set[Place] = field(default_factory=set)


class Consumer:
    """
    One consumer. Its two threads meet here: the reader adds, the writer takes away.

    Everything below `lock` is read and changed while it is held.

    Args:
        group: Its group's name.
        name: Its own.
    """

    def __init__(self, group: str, name: str) -> None:
        """Own nothing."""
        self.group = group
        self.name = name
        #: One read at a time.
        self.reading = asyncio.Lock()
        self.lock = threading.Lock()
        self.holding: Holding | None = None
        #: Tells it from others of its name, before and after.
        self.incarnation = incarnation(os.getpid())
        self.was_member = False
        #: What it holds must be looked up anew before the next read.
        self.stale = True
        #: Changes whenever reading must begin elsewhere; a read begun before is thrown away.
        self.turn = 0
        #: All up to here was handed out or passed over, by topic.
        self.positions: dict[int, int] = {}
        #: What was handed out. A step is of what is held now, not of the same event handed out
        #: before: what its handler saw then may not be true any more.
        self.held: dict[int, tuple[Place, Delivery]] = {}
        self.alone: int | None = None
        self._swept_to = 0
        #: A read waits for something to be settled.
        self.blocked = False

    def take(self, holding: Holding) -> None:
        """Go on with what a transaction found."""
        with self.lock:
            if holding.fresh:
                self.held.clear()
            self.holding, self.was_member = holding, True
            self._keep_only(holding.owned)
            self.stale = self._is_drained(holding)
            self._begin_anew()

    def lose(self, partitions: Collection[int]) -> None:
        """Forget what another consumer owns by now."""
        with self.lock:
            if self.holding is not None:
                self.holding.owned -= frozenset(partitions)
                self._keep_only(self.holding.owned)
            self.stale = True
            self.turn += 1

    def forget(self) -> None:
        """Own nothing any more."""
        with self.lock:
            self.holding, self.stale = None, True
            self.held.clear()
            self.alone = None
            self.turn += 1

    def holds(self, delivery: Delivery) -> bool:
        """Say whether it is held, as it was handed out then."""
        found = self.held.get(int(delivery.position))
        return found is not None and found[1] is delivery

    def give_back(self, deliveries: Iterable[Delivery]) -> None:
        """Take events back that were handed out and not handled."""
        with self.lock:
            for delivery in deliveries:
                if not self.holds(delivery):
                    continue
                seq = int(delivery.position)
                (topic, _), _ = self.held.pop(seq)
                self.positions[topic] = min(self.positions.get(topic, 0), seq - 1)
                if seq == self.alone:
                    self.alone = None
            self.turn += 1
            if self.holding is not None:
                self.stale |= self._is_drained(self.holding)

    def must_wait(self) -> bool:
        """Say whether nothing can be read before something is settled; `settle` will tell then."""
        with self.lock:
            self.blocked = self.alone is not None or len(self.held) >= MAX_UNSETTLED
            return self.blocked

    def moves(self, settled: Collection[int]) -> Moves:
        """Work out how far the cursors go when these are settled."""
        with self.lock:
            if self.holding is None:
                return Moves()
            by_place: dict[Place, list[int]] = {}
            for seq in settled:
                by_place.setdefault(self.held[seq][0], []).append(seq)
            return self._moves(self.holding, by_place, settled)

    def settle(self, settled: Collection[int], moves: Moves) -> bool:
        """Let go of what a transaction settled; says whether a waiting read should look again."""
        with self.lock:
            holding = self.holding
            if holding is None:
                return True
            for seq in settled:
                self.held.pop(seq, None)
                holding.done.pop(seq, None)
                holding.counted.discard(seq)
                if seq == self.alone:
                    self.alone = None
            if holding.suspects:
                holding.suspects = [spot for spot in holding.suspects if spot[0] not in settled]
            self._move(holding, moves)
            self.stale |= self._is_drained(holding)
            return self.blocked or self.stale

    def sweep(self, *, always: bool) -> Moves:
        """
        Work out how far cursors go over events of other partitions.

        Without it a successor would look through all that came since a partition last had events.

        Args:
            always: Also when little came since the last time.
        """
        with self.lock:
            holding = self.holding
            if holding is None or self.stale:
                return Moves()
            reached = max(self.positions.values(), default=0)
            if not always and reached - self._swept_to < _SWEEP_EVENTS:
                return Moves()
            self._swept_to = reached
            return self._moves(holding, {place: [] for place in holding.cursors}, ())

    def swept(self, moves: Moves) -> None:
        """Go on behind the cursors that `sweep` gave, once they are kept."""
        with self.lock:
            if self.holding is not None:
                self._move(self.holding, moves)

    def _moves(
        self,
        holding: Holding,
        by_place: dict[Place, list[int]],
        settled: Collection[int],
    ) -> Moves:
        moves = Moves()
        lowest: dict[Place, int] = {}
        held = [(seq, place) for seq, (place, _) in self.held.items()]
        for seq, place in held + holding.suspects:
            if seq not in settled and seq < lowest.get(place, seq + 1):
                lowest[place] = seq
        for place, seqs in by_place.items():
            cursor = holding.cursors[place]
            # Up to here each event is known to be settled, held or suspect; what was given back or
            # must be read again lies behind
            known_to = max(cursor, holding.bounds.get(place, 0))
            if place[1] not in holding.surplus:
                known_to = max(known_to, self.positions.get(place[0], 0))
            reached = min(known_to, lowest.get(place, known_to + 1) - 1)
            if reached > cursor:
                moves.cursors[place] = reached
                if any(seq <= reached for seq in holding.acked.get(place, ())):
                    moves.passed.add(place)
            moves.acked += [(seq, place) for seq in seqs if seq > reached]
        return moves

    def _move(self, holding: Holding, moves: Moves) -> None:
        for place, cursor in moves.cursors.items():
            if cursor > holding.cursors.get(place, cursor):
                holding.cursors[place] = cursor
        for place in moves.passed:
            holding.acked[place] = {
                seq for seq in holding.acked[place] if seq > holding.cursors[place]
            }
        for seq, place in moves.acked:
            holding.acked.setdefault(place, set()).add(seq)

    def _keep_only(self, owned: frozenset[int]) -> None:
        self.held = {seq: each for seq, each in self.held.items() if each[0][1] in owned}
        if self.alone not in self.held:
            self.alone = None

    def _is_drained(self, holding: Holding) -> bool:
        """Say whether a surplus partition can go."""
        if not holding.surplus:
            return False
        return not holding.surplus <= {partition for (_, partition), _ in self.held.values()}

    def _begin_anew(self) -> None:
        """Read from the cursors on; what is held or settled beyond them is passed over."""
        self.turn += 1
        self.positions = {}
        if self.holding is not None:
            for (topic, _), cursor in self.holding.cursors.items():
                self.positions[topic] = min(self.positions.get(topic, cursor), cursor)
