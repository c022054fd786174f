"""Counts each order in its state, and swears to what it was given."""

from __future__ import annotations

from mesh import Event, on, run
from tests.outages.words import ORDER, Noting


class Counter(Noting):
    """A durable consumer whose effects are in its state."""

    @on(ORDER)
    async def on_order(self, event: Event) -> None:
        number = event.data["n"]
        self.ctx.state[str(number)] = self.ctx.state.get(str(number), 0) + 1
        self.note("got", number)


if __name__ == "__main__":
    run(Counter)
