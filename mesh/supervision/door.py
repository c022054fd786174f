"""The monitor's door to the journal: opened when it is first needed, and anew after an outage."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from mesh.config import MessageBusConfig
from mesh.errors import ConfigurationError
from mesh.factory import make_broker

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mesh.journal import Journal
    from mesh.rundir import RunDir

_log = logging.getLogger("mesh.monitor")


class JournalDoor:
    """
    One journal for all that the monitor does with it.

    Args:
        rundir: The mesh's directory.
    """

    def __init__(self, rundir: RunDir) -> None:
        """Open nothing."""
        self._rundir = rundir
        self._journal: Journal | None = None
        self._opening = asyncio.Lock()
        self._complained = False

    async def use(self, work: Callable[[Journal], Awaitable[object]]) -> bool:
        """
        Do something with the journal; nothing is raised, for agents must be watched.

        Returns:
            False when it is away: then it is worth another try.
        """
        journal: Journal | None = None
        try:
            journal = await self._opened()
            await work(journal)
        except Exception as error:  # noqa: BLE001 - whatever it is
            if not self._complained:
                self._complained = True
                _log.warning("the journal is away (said once): %s", error)
            # Another one may have opened it anew meanwhile
            if journal is not None and journal is self._journal:
                await self.aclose()
            return isinstance(error, (ConfigurationError, NotImplementedError))
        if self._complained:
            self._complained = False
            _log.warning("the journal is back")
        return True

    async def _opened(self) -> Journal:
        async with self._opening:
            if self._journal is None:
                journal = make_broker(MessageBusConfig.from_env(), self._rundir.path).make_journal()
                await journal.connect()
                self._journal = journal
            return self._journal

    async def aclose(self) -> None:
        """Close what is open."""
        journal, self._journal = self._journal, None
        if journal is not None:
            try:
                await journal.close()
            except Exception as error:  # noqa: BLE001 - it was broken already
                _log.debug("the journal did not close: %s", error)
