"""What the agents of the outage tests say, and how they swear to it."""

from __future__ import annotations

import os

from mesh import Agent, event_type

ORDER = event_type("outage.order", durable=True)
CRY = event_type("outage.cry", durable=True)
TICK = event_type("outage.tick")


class Noting(Agent):
    """Notes what it does where no death can take it back."""

    async def setup(self) -> None:
        path = os.path.join(os.environ["MESH_DIR"], f"notes.{self.name}")
        self.notes = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.note("began", os.getpid())

    async def teardown(self) -> None:
        os.close(self.notes)

    def note(self, *words: object) -> None:
        os.write(self.notes, (" ".join(map(str, words)) + "\n").encode())
