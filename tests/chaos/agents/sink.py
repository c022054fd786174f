"""The end of the chain."""

from __future__ import annotations

from mesh import Event, on, run
from tests.chaos.words import SHIPPED, Link


class Sink(Link):
    """Hears one type."""

    @on(SHIPPED)
    async def on_event(self, event: Event) -> None:
        await self.take(event, None)


if __name__ == "__main__":
    run(Sink)
