"""The agent whose source speaks at once; whoever is not there yet misses its first event."""

from __future__ import annotations

from mesh import Agent, source

#: Those after the first show that it was not only the last that arrived.
SAID = 5


class Mouth(Agent):
    """Says `starts.said {number: int}`, from 0 on."""

    @source
    async def speak(self) -> None:
        for number in range(SAID):
            await self.publish("starts.said", {"number": number})
