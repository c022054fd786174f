"""Publishes from a source and a timer, and gives no thought to errors."""

from __future__ import annotations

import os

from mesh import Agent, event_type, every, run, source

CRY = event_type("outage.cry", durable=True)
TICK = event_type("outage.tick")


class Hawker(Agent):
    """What most people write."""

    async def setup(self) -> None:
        path = os.path.join(os.environ["MESH_DIR"], "notes.hawker")
        self.notes = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.note("began", os.getpid())

    async def teardown(self) -> None:
        os.close(self.notes)

    def note(self, *words: object) -> None:
        os.write(self.notes, (" ".join(map(str, words)) + "\n").encode())

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
