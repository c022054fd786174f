"""A second group that hears what the chain hears, at both ends of it."""

from __future__ import annotations

from mesh import Event, on, run
from tests.chaos.words import ORDER, SHIPPED, Link


class Auditor(Link):
    """Hears two types, several events at a time; those of one key in their order."""

    concurrency = 4

    @on(ORDER)
    async def on_order(self, event: Event) -> None:
        await self.take(event, None)

    @on(SHIPPED)
    async def on_shipped(self, event: Event) -> None:
        await self.take(event, None)


if __name__ == "__main__":
    run(Auditor)
