"""The agents that are measured: a sender and a counter, everything on."""

from __future__ import annotations

import json
import time
from pathlib import Path

import msgspec

from mesh import Agent, event_type, on, source


class Sample(msgspec.Struct, frozen=True):
    """What is sent: 200 bytes or 4 KiB on the wire with its envelope, by the length of `text`."""

    symbol: str
    bid: float
    ask: float
    #: Monotonic; in the throughput runs the moment when the sender began.
    sent_s: float
    text: str


SAMPLE = event_type("bench.sample", schema=Sample, doc="What the benchmarks send.")
PASSED = event_type("bench.passed", schema=Sample, doc="A sample that a relay has passed on.")
#: An event with this payload has about 200 bytes; its envelope alone has 150.
TEXT = {200: "", 4096: "x" * 3850}


class Sender(Agent):
    """
    Sends ``count`` events of ``size`` bytes, at full speed or at ``rate`` a second.

    ``batch`` above 1: that many a `publish_batch`; else one by one.
    """

    @source
    async def send(self) -> None:
        """Send them all."""
        count, rate = int(self.params["count"]), float(self.params.get("rate", "0"))
        text = TEXT[int(self.params["size"])]
        if rate:
            await self._paced(count, rate, text)
            return
        # Made beforehand, as the bare peers make theirs
        batch, begun_s = int(self.params["batch"]), time.monotonic()
        samples = [Sample("BTCUSD", 1.5, 2.5, begun_s, text) for _ in range(batch)]
        if batch > 1:
            pairs = [(SAMPLE, sample) for sample in samples]
            for begun in range(0, count, batch):
                if not begun // batch % max(1, 1024 // batch):
                    await self.headroom(32 * 1024)
                await self.publish_batch(pairs[: count - begun])
            return
        for number in range(count):
            if not number % 1024:
                await self.headroom(32 * 1024)
            await self.publish(SAMPLE, samples[0])

    async def _paced(self, count: int, rate: float, text: str) -> None:
        start = time.monotonic()
        for number in range(count):
            await self.clock.sleep(start + number / rate - time.monotonic())
            await self.publish(SAMPLE, Sample("BTCUSD", 1.5, 2.5, time.monotonic(), text))


class _Counting(Agent):
    """Counts what arrives and writes the figure to a file after the last event."""

    async def setup(self) -> None:
        """Read the parameters once."""
        self.left = int(self.params["count"])

    def finish(self, last: Sample) -> None:
        """Say how long it took."""
        took_s = time.monotonic() - last.sent_s
        self.write({"events_per_s": int(self.params["count"]) / took_s})

    def write(self, figures: object) -> None:
        """Leave the figures where the benchmark waits for them."""
        path = Path(self.params["out"]) / self.name
        path.with_suffix(".draft").write_text(json.dumps(figures))
        path.with_suffix(".draft").rename(path)


class Counter(_Counting):
    """Counts samples."""

    @on(SAMPLE)
    async def count_one(self, sample: Sample) -> None:
        """Count."""
        self.left -= 1
        if not self.left:
            self.finish(sample)


class Relay(Agent):
    """Hears a sample and says it again, as the next link of a chain."""

    @on(SAMPLE)
    async def pass_on(self, sample: Sample) -> None:
        """Say it under another type."""
        await self.publish(PASSED, sample)


class Last(_Counting):
    """Counts at the end of the chain."""

    @on(PASSED)
    async def count_one(self, sample: Sample) -> None:
        """Count."""
        self.left -= 1
        if not self.left:
            self.finish(sample)


class Stopwatch(_Counting):
    """Notes how long each event was on its way."""

    async def setup(self) -> None:
        """Read the parameters once."""
        await super().setup()
        self.delays_us: list[float] = []

    @on(SAMPLE)
    async def note(self, sample: Sample) -> None:
        """Note the way's time."""
        self.delays_us.append((time.monotonic() - sample.sent_s) * 1e6)
        if len(self.delays_us) == self.left:
            self.write({"delays_us": self.delays_us})
