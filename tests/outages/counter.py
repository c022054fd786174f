"""Counts each order in its state, and swears to what it was given."""

from __future__ import annotations

import os

from mesh import Agent, Event, event_type, on, run

ORDER = event_type("outage.order", durable=True)


class Counter(Agent):
    """A durable consumer whose effects are in its state."""

    async def setup(self) -> None:
        path = os.path.join(os.environ["MESH_DIR"], "notes.counter")
        self.notes = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.note("began", os.getpid())

    async def teardown(self) -> None:
        os.close(self.notes)

    def note(self, *words: object) -> None:
        os.write(self.notes, (" ".join(map(str, words)) + "\n").encode())

    @on(ORDER)
    async def on_order(self, event: Event) -> None:
        number = event.data["n"]
        self.ctx.state[str(number)] = self.ctx.state.get(str(number), 0) + 1
        self.note("got", number)


if __name__ == "__main__":
    run(Counter)
