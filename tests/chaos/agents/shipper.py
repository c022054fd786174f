"""The second link of the chain."""

from __future__ import annotations

from mesh import Event, on, run
from tests.chaos.words import PACKED, SHIPPED, Link


class Shipper(Link):
    """Hears one type."""

    @on(PACKED)
    async def on_event(self, event: Event) -> None:
        await self.take(event, SHIPPED)


if __name__ == "__main__":
    run(Shipper)
