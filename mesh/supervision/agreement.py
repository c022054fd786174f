"""
A type that some agents take for durable and others for live is told by the monitor, in its log.

Nobody else would notice: what the ones say, the others just never hear.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from mesh.topic_map import disagreements

if TYPE_CHECKING:
    from mesh.rundir import RunDir

_log = logging.getLogger("mesh.monitor")

COMPARE_EVERY_S = 5.0


class Agreement:
    """
    Compares what the agents of one mesh take their types for.

    Args:
        rundir: The mesh's directory.
        every_s: How often.
    """

    def __init__(self, rundir: RunDir, *, every_s: float = COMPARE_EVERY_S) -> None:
        """Know of nothing yet."""
        self._rundir = rundir
        self._every_s = every_s
        self._told: dict[str, str] = {}

    async def run(self) -> None:
        """Compare for ever."""
        while True:
            await asyncio.sleep(self._every_s)
            found = await asyncio.to_thread(disagreements, self._rundir)
            for topic, words in found.items():
                if self._told.get(topic) != words:
                    _log.warning(
                        "%s is %s: what the ones say the others never hear; import one declaration",
                        topic,
                        words,
                    )
            self._told = found
