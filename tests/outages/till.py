"""Says numbered orders until it must close, and swears to which were kept and which refused."""

from __future__ import annotations

import os
from itertools import count

from mesh import BrokerUnavailableError, run, source
from tests.outages.words import ORDER, Noting

_KEYS = 5


class Till(Noting):
    """A publisher that survives its errors."""

    def is_closing(self) -> bool:
        return os.path.exists(os.path.join(os.environ["MESH_DIR"], "closing"))

    @source
    async def sell(self) -> None:
        for number in count(1):
            if self.is_closing():
                self.note("closed")
                return
            try:
                await self.publish(ORDER, {"n": number}, key=f"k{number % _KEYS}")
            except BrokerUnavailableError as error:
                self.note("refused", number, type(error).__name__, error)
            else:
                self.note("kept", number)
            # A pace, so that a test ends with some hundreds of them
            await self.clock.sleep(0.005)


if __name__ == "__main__":
    run(Till)
