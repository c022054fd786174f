"""Hears the live type, and notes each that it gets."""

from __future__ import annotations

from mesh import Agent, Event, on, run
from tests.chaos.words import TICK, Notes


class Ear(Agent):
    """Hears ticks."""

    async def setup(self) -> None:
        self.notes = Notes(self.name)

    async def teardown(self) -> None:
        self.notes.close()

    @on(TICK)
    async def on_tick(self, event: Event) -> None:
        self.notes.write("got", TICK, event.data["publisher"], TICK, event.data["number"], 1)


if __name__ == "__main__":
    run(Ear)
