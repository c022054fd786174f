"""What the agents of the chaos mesh say to each other, and the notes that outlive them."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from typing import TYPE_CHECKING

from mesh import Agent, Event, event_type
from mesh.env import mesh_dir

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ORDER = event_type("chaos.order", durable=True)
PACKED = event_type("chaos.packed", durable=True)
SHIPPED = event_type("chaos.shipped", durable=True)
TICK = event_type("chaos.tick")

#: In whose names orders and ticks are said.
TILLS = ("till_1", "till_2")
#: Who hears what, and says what of it: the chain, and a second group beside it.
HEARS = {
    "packer": ((ORDER, PACKED),),
    "shipper": ((PACKED, SHIPPED),),
    "sink": ((SHIPPED, None),),
    "auditor": ((ORDER, None), (SHIPPED, None)),
}
EAR = "ear"
AGENTS = (*TILLS, *HEARS, EAR)
#: Orders of this key have none on the wire: they may overtake each other.
NO_KEY = "none"

#: (publisher, key, number): names one order all along the chain.
Order = tuple[str, str, int]


class Notes:
    """
    What one agent swears to, a line a fact; written at once, so that no death takes it back.

    Args:
        name: The agent.
    """

    def __init__(self, name: str) -> None:
        folder = f"{mesh_dir()}/notes"
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        self.path = f"{folder}/{name}"
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.write("began", os.getpid())

    def write(self, *words: object) -> None:
        os.write(self._descriptor, (" ".join(map(str, words)) + "\n").encode())

    def write_all(self, lines: list[tuple[object, ...]]) -> None:
        text = "".join(" ".join(map(str, words)) + "\n" for words in lines)
        os.write(self._descriptor, text.encode())

    def close(self) -> None:
        os.close(self._descriptor)


def read_notes(path: Path) -> Iterator[list[str]]:
    """Give the words of each line."""
    with contextlib.suppress(FileNotFoundError), path.open() as file:
        for line in file:
            yield line.split()


class Link(Agent):
    """One link of the chain: notes what it gets, counts it in its state, says the next thing."""

    async def setup(self) -> None:
        self.notes = Notes(self.name)

    async def teardown(self) -> None:
        self.notes.close()

    async def take(self, event: Event, says: str | None) -> None:
        data = event.data
        publisher, key, number = data["publisher"], data["key"], data["number"]
        self.notes.write("got", event.type, publisher, key, number, self.ctx.deliveries)
        name = state_name(event.type, publisher, key)
        count, total = self.ctx.state.get(name, (0, 0))
        self.ctx.state[name] = (count + 1, total + number)
        if says is not None:
            await self.publish(says, data, key=event.key)


def state_name(topic: str, publisher: str, key: str) -> str:
    """Say under which name a link counts."""
    return f"{topic} {publisher} {key}"


def highest_numbers(path: Path) -> Counter[str]:
    """Give the highest number that was tried, by key."""
    highest: Counter[str] = Counter()
    for words in read_notes(path):
        if words[0] == "tried":
            highest[words[1]] = max(highest[words[1]], int(words[2]))
    return highest
