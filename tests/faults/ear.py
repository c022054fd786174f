"""The agent that counts what reaches its handler, the first event apart."""

from __future__ import annotations

from mesh import Agent, Event, on


class Ear(Agent):
    """Hears `starts.said`."""

    @on("starts.said")
    async def on_said(self, event: Event) -> None:
        self.context.ledger.count("later" if event.data["number"] else "first")
