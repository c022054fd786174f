"""Watch a run: its progress on the screen, and when its input has ended and all is quiet."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Self

from mesh.account import account
from mesh.cli import say
from mesh.cli.report import began_at_s, work_published

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from types import TracebackType

    from mesh.ledger_views import LedgerView

LOOK_S = 0.05
#: Nothing moved for so long: what is still under way will not arrive any more.
_STILL_S = 2.0
#: Durable events are waited for longer: an agent that was killed comes back and goes on.
_DURABLE_STILL_S = 30.0


class Watch:
    """
    Looks at the ledgers of a mesh.

    Args:
        views: Gives them.
        hears: Gives topics by agent.
        pending: Counts what the journal still has for the agents.
    """

    def __init__(
        self,
        views: Callable[[], Mapping[str, LedgerView]],
        hears: Callable[[], Mapping[str, frozenset[str]]],
        pending: Callable[[], Awaitable[int]] | None = None,
    ) -> None:
        """Look at nothing yet."""
        self.views = views
        self.hears = hears
        self._pending = pending
        self._moved_at_s = time.time()
        self._seen: object = None
        self._live: Any = None

    def __enter__(self) -> Self:
        """Begin to show progress, where somebody looks."""
        self._live = say.begin_live(auto_refresh=False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the screen clean."""
        if self._live is not None:
            self._live.stop()

    @property
    def seconds(self) -> float:
        """Give the time from the first event to the last movement seen."""
        began_s = began_at_s(self.views())
        return 0.0 if began_s is None else max(0.001, self._moved_at_s - began_s)

    async def sources_done(self) -> None:
        """Return when the input of every source has ended, or one has failed."""
        while True:
            self.look()
            views = self.views().values()
            # A successor that has just begun does not know yet whether it is a source
            begun = all(view.state not in ("absent", "starting") for view in views)
            if begun and {view.sources for view in views} <= {"none", "done", "failed"}:
                return
            await asyncio.sleep(LOOK_S)

    async def quiet(self) -> bool:
        """
        Return when everything that was said is handled, or nothing moves any more.

        Returns:
            False when something was still under way.
        """
        zeros, still_since_s = 0, time.monotonic()
        while True:
            if self.look():
                zeros, still_since_s = 0, time.monotonic()
            pending = 0 if self._pending is None else await self._pending()
            if pending == 0 and account(self.views(), self.hears()).in_flight == 0:
                zeros += 1
                # Ledgers are read one after the other: only what two looks agree upon is true
                if zeros >= 2:
                    return True
            elif time.monotonic() - still_since_s > (_DURABLE_STILL_S if pending else _STILL_S):
                return False
            else:
                zeros = 0
            await asyncio.sleep(LOOK_S)

    def look(self) -> bool:
        """Show how far the run is; say whether something has moved since the last look."""
        views = self.views()
        by_type = work_published(views)
        handled = {
            (name, link): heard.settled
            for name, view in views.items()
            for link, heard in view.in_.items()
            if not link[1].startswith("agent.")
        }
        moved = (by_type, handled) != self._seen
        if moved:
            self._seen = (by_type, handled)
            self._moved_at_s = time.time()
        if self._live is not None:
            self._live.update(self._screen(views, by_type), refresh=True)
        return moved

    def _screen(self, views: Mapping[str, LedgerView], by_type: Mapping[str, int]) -> Any:
        from rich.console import Group
        from rich.text import Text

        joined = account(views, self.hears())
        total = sum(by_type.values())
        rate = total / self.seconds if self.seconds else 0.0
        head = Text(
            f"{total:,} events, {rate:,.0f}/s, {joined.in_flight:,} under way,"
            f" {joined.lost:,} lost",
            style="red" if joined.lost else "green",
        )
        return Group(head, say.rich_table(("type", "events"), by_type.items()))
