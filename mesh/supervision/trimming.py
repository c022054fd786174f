"""
Old events that every group has settled are forgotten, or a journal would only grow.

How old, or how many bytes, the settings say. What a group has not settled is kept, whatever its
age; a group that is gone for good is forgotten by hand (``mesh journal forget``).
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from mesh.card import read_cards
from mesh.ledger_views import read_ledgers

if TYPE_CHECKING:
    from collections.abc import Callable

    from mesh.config import MessageBusConfig
    from mesh.journal import Journal
    from mesh.rundir import RunDir
    from mesh.supervision.door import JournalDoor

_log = logging.getLogger("mesh.monitor")

TRIM_EVERY_S = 60.0
#: A mesh that never runs for a minute trims as well; its agents begin first.
FIRST_S = 5.0


class Trimmer:
    """
    Trims the journal of one mesh once a minute.

    Args:
        rundir: The mesh's directory.
        door: To its journal.
        config: How much is kept.
        failed: Called when a trim has failed; the door says why, once an outage.
        first_s: When it begins.
        every_s: How often.
    """

    def __init__(
        self,
        rundir: RunDir,
        door: JournalDoor,
        config: MessageBusConfig,
        failed: Callable[[], None],
        *,
        first_s: float = FIRST_S,
        every_s: float = TRIM_EVERY_S,
    ) -> None:
        """Forget nothing yet."""
        self._failed = failed
        self._first_s = first_s
        self._every_s = every_s
        self._has_file = config.broker_type == "zmq"
        self._rundir = rundir
        self._door = door
        self._max_age_s = config.journal_max_age_s or None
        self._max_bytes = config.journal_max_bytes or None
        #: The last trim came to its end.
        self._done = False

    async def run(self) -> None:
        """Trim for ever; returns at once when everything is kept for ever."""
        if self._max_age_s is None and self._max_bytes is None:
            return
        await asyncio.sleep(self._first_s)
        while True:
            if self._is_used():
                self._done = False
                await self._door.use(self._trim)
                if not self._done:
                    self._failed()
            await asyncio.sleep(self._every_s)

    def _is_used(self) -> bool:
        """Say whether there is a journal: where nothing is durable, none is made or asked for."""
        if self._has_file:
            return self._rundir.journal().is_file()
        # What nobody hears is kept all the same, and would stay for ever
        return any(card.durable for card in read_cards(self._rundir).values()) or any(
            not out.epoch
            for view in read_ledgers(self._rundir.ledgers).values()
            for out in view.out.values()
        )

    async def _trim(self, journal: Journal) -> None:
        gone = await journal.trim(max_age_s=self._max_age_s, max_bytes=self._max_bytes)
        if gone:
            _log.info("%d old events were forgotten, which every group had settled", gone)
        self._done = True
