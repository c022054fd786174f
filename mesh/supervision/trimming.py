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

if TYPE_CHECKING:
    from mesh.config import MessageBusConfig
    from mesh.journal import Journal
    from mesh.rundir import RunDir
    from mesh.supervision.door import JournalDoor

_log = logging.getLogger("mesh.monitor")

TRIM_EVERY_S = 60.0


class Trimmer:
    """
    Trims the journal of one mesh once a minute.

    Args:
        rundir: The mesh's directory.
        door: To its journal.
        config: How much is kept.
        every_s: How often.
    """

    def __init__(
        self,
        rundir: RunDir,
        door: JournalDoor,
        config: MessageBusConfig,
        every_s: float = TRIM_EVERY_S,
    ) -> None:
        """Forget nothing yet."""
        self._every_s = every_s
        self._rundir = rundir
        self._door = door
        self._max_age_s = config.journal_max_age_s or None
        self._max_bytes = config.journal_max_bytes or None

    async def run(self) -> None:
        """Trim for ever; returns at once when everything is kept for ever."""
        if self._max_age_s is None and self._max_bytes is None:
            return
        while True:
            await asyncio.sleep(self._every_s)
            # Where nothing durable is heard there may be no journal, and none is made
            if any(card.durable for card in read_cards(self._rundir).values()):
                await self._door.use(self._trim)

    async def _trim(self, journal: Journal) -> None:
        gone = await journal.trim(max_age_s=self._max_age_s, max_bytes=self._max_bytes)
        if gone:
            _log.info("%d old events were forgotten, which every group had settled", gone)
