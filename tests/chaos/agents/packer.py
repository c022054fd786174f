"""The first link of the chain."""

from __future__ import annotations

from mesh import Event, on, run
from tests.chaos.words import ORDER, PACKED, Link


class Packer(Link):
    """Hears one type."""

    @on(ORDER)
    async def on_event(self, event: Event) -> None:
        await self.take(event, PACKED)


if __name__ == "__main__":
    run(Packer)
