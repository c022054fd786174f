"""
What a consumer did not hear: the numbers of each publisher's batches are checked for gaps.

A number that is missing when a younger one comes is lost, and counted so; should it come after all,
it is left aside: order is promised, and the account stays exact.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from mesh.codec import MAX_SEQUENCE
from mesh.ledger import IN_EPOCH, IN_LAST, IN_LOST, IN_PASSED

if TYPE_CHECKING:
    from mesh.batch import Batch
    from mesh.ledger import Ledger

_log = logging.getLogger(__name__)

#: Numbers further behind the last one are no late ones: the last one was a lie.
_LATE_NUMBERS = 20_000


class Gaps:
    """
    Checks the numbers of one agent's links.

    Args:
        agent_name: Who hears.
        ledger: Where losses are counted.
    """

    def __init__(self, agent_name: str, ledger: Ledger) -> None:
        """Know what the ledger knows."""
        self._agent_name = agent_name
        self._ledger = ledger

    def check(self, at: int, batch: Batch, *, shared: bool) -> int:
        """
        Count what is missing before a numbered batch.

        Args:
            at: Its link's place in the ledger.
            batch: What came.
            shared: Other replicas hear it as well: the group's account tells what was lost.

        Returns:
            How many numbers it covers; 0: it is too late, and nothing of it is heard.
        """
        cells = self._ledger.cells
        last = cells[at + IN_LAST]
        if cells[at + IN_EPOCH] != batch.epoch:
            if batch.epoch < cells[at + IN_EPOCH]:
                return batch.count  # a second publisher of the same name, older than the one known
            # Who was listening before the numbering began was meant to get it from 1 on
            listened = 0 < self._ledger.get("ready_at_us") * 1000 < batch.epoch
            last = 0 if listened else batch.first - 1
            cells[at + IN_EPOCH] = batch.epoch
        missing = batch.first - last - 1
        if missing > 0:
            # The frame claims it, whoever sent it: a sum that fits whatever is claimed
            where = at + (IN_PASSED if shared else IN_LOST)
            cells[where] = min(cells[where] + missing, MAX_SEQUENCE)
            _log.warning(
                "%s %s %d events of %s on %s (numbers %d to %d)",
                self._agent_name,
                "missed, for itself and other replicas," if shared else "lost",
                missing,
                batch.publisher,
                batch.topic,
                last + 1,
                batch.first - 1,
            )
        newest = batch.first + batch.count - 1
        if newest > last:
            cells[at + IN_LAST] = newest
        elif last - newest < _LATE_NUMBERS and not self._ledger.is_shared(at):
            self._say_late(batch, last)
            return 0
        return batch.count

    def _say_late(self, batch: Batch, last: int) -> None:
        """
        Leave a batch aside that younger ones have overtaken: they were counted as missing then.

        A publisher was killed while a stalled forwarder still held frames of it, and those of its
        successor came through first.
        """
        self._ledger.count("late", batch.count)
        _log.warning(
            "%s leaves %d events of %s on %s aside, which came after younger ones (numbers %d to %d"
            " after %d)",
            self._agent_name,
            batch.count,
            batch.publisher,
            batch.topic,
            batch.first,
            batch.first + batch.count - 1,
            last,
        )
