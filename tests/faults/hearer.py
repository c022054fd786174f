"""The agent at which garbage is thrown; counts what its handlers were given."""

from __future__ import annotations

import msgspec

from mesh import Agent, Event, on


class Numbered(msgspec.Struct):
    """What `fuzz.typed` should carry."""

    n: int
    name: str = ""


class Hearer(Agent):
    """Hears two types, one of them with a schema."""

    @on("fuzz.heard")
    async def on_heard(self, event: Event) -> None:
        self.context.ledger.count("seen")

    @on("fuzz.typed", max_retries=0)
    async def on_typed(self, numbered: Numbered, event: Event) -> None:
        self.context.ledger.count("seen")
