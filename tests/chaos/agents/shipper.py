"""The second link of the chain."""

from __future__ import annotations

from mesh import Event, RetryPolicy, on, run
from tests.chaos.words import PACKED, SHIPPED, Link

_UNLUCKY = 97


class Shipper(Link):
    """Hears one type; now and then the first try fails when everything is done."""

    @on(PACKED, retry=RetryPolicy(first_delay_s=0.001))
    async def on_event(self, event: Event) -> None:
        await self.take(event, SHIPPED)
        if event.data["number"] % _UNLUCKY == 0 and self.ctx.attempt == 1:
            raise OSError("no luck at the first try")


if __name__ == "__main__":
    run(Shipper)
