"""Publishes from a source and a timer, and gives no thought to errors."""

from __future__ import annotations

from mesh import every, run, source
from tests.outages.words import CRY, TICK, Noting


class Hawker(Noting):
    """What most people write."""

    @source
    async def cry(self) -> None:
        self.note("called")
        while True:
            await self.publish(CRY, {"fresh": "fish"})
            await self.publish(TICK, {})
            self.note("cried")
            await self.clock.sleep(0.05)

    @every(0.05)
    async def tick(self) -> None:
        await self.publish(CRY, {"still": "fresh"})


if __name__ == "__main__":
    run(Hawker)
