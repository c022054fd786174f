"""
What a dead process held in the journal is free at once, for its successor and for other replicas.

The kernel tells the death of each agent's process (a pidfd), so that nobody waits for a lease, nor
for supervisord. Only that very process is freed: its successor may have joined already.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Self

from mesh.beats import LOOK
from mesh.card import read_card, read_cards
from mesh.journal import LEASE_S
from mesh.process import is_running
from mesh.replicas import group_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from mesh.card import Card
    from mesh.rundir import RunDir
    from mesh.supervision.door import JournalDoor
    from mesh.supervision.supervisord import ProcessInfo

_log = logging.getLogger("mesh.monitor")

_PAUSE_S = 1.0
#: The journal of a mesh of agents that die without end is no business of ours.
_MAX_DEAD = 1000


class Freer:
    """
    Watches the processes of one mesh, and frees those that die.

    Args:
        rundir: The mesh's directory.
        door: To its journal.
        tell: Says a word to a living agent.
        on_death: Called when a process has died.
    """

    def __init__(
        self,
        rundir: RunDir,
        door: JournalDoor,
        tell: Callable[[str, bytes], None],
        on_death: Callable[[], None],
    ) -> None:
        """Watch nobody yet."""
        self._rundir = rundir
        self._door = door
        self._tell = tell
        self._on_death = on_death
        #: Watched processes by pid: name and pidfd.
        self._watched: dict[int, tuple[str, int]] = {}
        self._programs: frozenset[str] = frozenset()
        self._dead: asyncio.Queue[tuple[str, str, int]] = asyncio.Queue(_MAX_DEAD)
        self._complained = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Begin with those who died while nobody watched."""
        self._task = asyncio.create_task(self._free_all(), name="free-the-dead")
        for card in read_cards(self._rundir).values():
            if not is_running(card.pid):
                self._note(card)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Watch nobody any more."""
        for pid in list(self._watched):
            self._forget(pid)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def watch(self, programs: Iterable[ProcessInfo]) -> None:
        """Watch the processes that supervisord keeps."""
        found = [each for each in programs if each.name != "monitor"]
        self._programs = frozenset(each.name for each in found)
        for each in found:
            if each.pid and each.pid not in self._watched:
                self._begin(each.name, each.pid)

    def _begin(self, name: str, pid: int) -> None:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return  # it ended in this moment, and is not collected: its successor comes
        except OSError as error:
            self._complain(f"cannot be told of the death of processes: {error}")
            return
        self._watched[pid] = (name, descriptor)
        asyncio.get_running_loop().add_reader(descriptor, self._ended, pid)

    def _ended(self, pid: int) -> None:
        name = self._forget(pid)
        self._on_death()
        card = read_card(self._rundir, name)
        if card is not None:
            self._note(card, pid)

    def _forget(self, pid: int) -> str:
        name, descriptor = self._watched.pop(pid)
        asyncio.get_running_loop().remove_reader(descriptor)
        os.close(descriptor)
        return name

    def _note(self, card: Card, pid: int | None = None) -> None:
        """Note a death, unless it heard nothing durable or ended well: then it holds nothing."""
        gone = card.pid if pid is None else pid
        if not card.durable or (card.pid == gone and card.state == "stopped"):
            return
        if not self._dead.full():
            self._dead.put_nowait((card.group or group_of(card.name), card.name, gone))

    async def _free_all(self) -> None:
        while True:
            group, name, pid = await self._dead.get()
            # Later its lease has ended, and its successor has taken over long ago
            for _ in range(int(LEASE_S / _PAUSE_S)):
                if await self._free(group, name, pid):
                    break
                await asyncio.sleep(_PAUSE_S)

    async def _free(self, group: str, name: str, pid: int) -> bool:
        """Free one; False when the journal is away."""
        if not await self._door.use(lambda journal: journal.free_process(group, name, pid)):
            return False
        _log.info("what %s (pid %d) held in the journal is free", name, pid)
        for other in self._programs:
            if group_of(other) == group:
                self._tell(other, LOOK)
        return True

    def _complain(self, words: str) -> None:
        if not self._complained:
            self._complained = True
            _log.warning("%s (said once)", words)
