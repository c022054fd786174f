"""The agents that are measured: a sender and a counter, everything on."""

from __future__ import annotations

import json
import time
from pathlib import Path

import msgspec

from mesh import Agent, Event, event_type, on, source


class Sample(msgspec.Struct, frozen=True):
    """What is sent: 200 bytes or 4 KiB on the wire with its envelope, by the length of `text`."""

    symbol: str
    bid: float
    ask: float
    sent_s: float
    text: str


SAMPLE = event_type("bench.sample", schema=Sample, doc="What the benchmarks send.")
#: An event with this payload has about 200 bytes; its envelope alone has 150.
TEXT = {200: "", 4096: "x" * 3850}


class Sender(Agent):
    """Sends ``count`` events of ``size`` bytes, at full speed or at ``rate`` a second."""

    @source
    async def send(self) -> None:
        """Send them all."""
        count, rate = int(self.params["count"]), float(self.params.get("rate", "0"))
        text = TEXT[int(self.params["size"])]
        if rate:
            await self._paced(count, rate, text)
            return
        for number in range(count):
            if not number % 1024:
                await self.headroom(32 * 1024)
            await self.publish(SAMPLE, Sample("BTCUSD", 1.5, 2.5, 0.0, text))

    async def _paced(self, count: int, rate: float, text: str) -> None:
        start = time.monotonic()
        for number in range(count):
            await self.clock.sleep(start + number / rate - time.monotonic())
            await self.publish(SAMPLE, Sample("BTCUSD", 1.5, 2.5, time.monotonic(), text))


class Counter(Agent):
    """Counts what arrives and writes the figures to a file after the last event."""

    seen = 0
    first_s = 0.0

    async def setup(self) -> None:
        """Read the parameters once."""
        self.count = int(self.params["count"])
        self.delays_us: list[float] | None = [] if "rate" in self.params else None

    @on(SAMPLE)
    async def count_one(self, event: Event) -> None:
        """Count; with a rate, note the way's time."""
        if not self.seen:
            self.first_s = time.perf_counter()
        self.seen += 1
        if self.delays_us is not None:
            self.delays_us.append((time.monotonic() - event.data["sent_s"]) * 1e6)
        if self.seen == self.count:
            took_s = time.perf_counter() - self.first_s
            figures = {"events_per_s": self.count / took_s, "delays_us": self.delays_us}
            path = Path(self.params["out"]) / self.name
            path.with_suffix(".draft").write_text(json.dumps(figures))
            path.with_suffix(".draft").rename(path)
