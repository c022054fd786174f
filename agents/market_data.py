"""
Says what the market does: from a CSV file, or from a seeded synthetic market without one.

Params: ``csv`` (path), ``speed`` (1, N times real time, or ``max``), ``symbol``, ``seed``,
``bars`` (how many synthetic quotes; 0: without end).
"""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING

from agents.feed import Feed, Row
from agents.payloads import FeedReport, Quote
from agents.settings import Settings
from mesh import Agent, EventType, is_durable, run, source

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK = 500


class MarketData(Agent):
    """The source of the pipeline."""

    feed: Feed | None = None

    async def setup(self) -> None:
        settings = Settings(self.params)
        self.symbol = self.params.get("symbol", "BTCUSD")
        self.seed = settings.whole("seed", 7, 0, 2**53)
        self.bars = settings.whole("bars", 0, 0, 10**9)
        path = self.params.get("csv")
        #: Times faster than real time; 0: as fast as the mesh can take.
        self.speed = 0.0
        if self.params.get("speed", "max" if path else "1") != "max":
            self.speed = settings.number("speed", 1.0, 1e-3, 1e9)
        settings.check()
        #: Where quotes are durable, how far they got is kept together with them.
        self.durable = is_durable(EventType.MARKET_DATA_RECEIVED)
        if self.durable:
            await self.keep_state()
        if path:
            self.feed = Feed(Path(path))
            await asyncio.to_thread(self.feed.check)

    @source
    async def stream(self) -> None:
        rows = self.feed.rows() if self.feed else synthetic(self.seed, self.bars)
        # After a crash: what this name has said already is not said twice
        said = (
            self.ctx.state.get("rows", 0)
            if self.durable
            else self.published(EventType.MARKET_DATA_RECEIVED)
        )
        rows = islice(rows, said, None)
        number, before = said, None
        while chunk := await asyncio.to_thread(lambda: list(islice(rows, self._chunk_size()))):
            if self.durable and not self.speed:
                async with self.step(f"rows from {number}") as ctx:
                    for row in chunk:
                        number += 1
                        await self._say(number, row)
                    ctx.state["rows"] = number
                continue
            for row in chunk:
                number += 1
                if self.speed and before is not None:
                    await self.clock.sleep((row.time - before).total_seconds() / self.speed)
                before = row.time
                if self.durable:
                    async with self.step(f"row {number}") as ctx:
                        await self._say(number, row)
                        ctx.state["rows"] = number
                else:
                    await self._say(number, row)
            if not self.speed:
                await self.headroom()
        await self._report(number)

    async def _say(self, number: int, row: Row) -> None:
        quote = Quote(self.symbol, number, row.time.isoformat(), row.bid, row.ask)
        await self.publish(EventType.MARKET_DATA_RECEIVED, quote, key=self.symbol)

    def _chunk_size(self) -> int:
        return 1 if self.speed and not self.feed else _CHUNK

    async def _report(self, rows: int) -> None:
        feed = self.feed
        if feed is None or not feed.bad_rows:
            return
        for example in feed.examples:
            self.log.warning("%s: skipped %s", feed.path, example)
        self.log.warning(
            "%s: skipped %d of %d rows", feed.path, feed.bad_rows, rows + feed.bad_rows
        )
        self.context.ledger.count("bad_rows", feed.bad_rows)
        report = FeedReport(rows, feed.bad_rows, feed.examples)
        await self.publish(EventType.MARKET_FEED_LOST, report)


def synthetic(seed: int, bars: int) -> Iterator[Row]:
    """
    Invent a market: a random walk with a slowly turning drift, four quotes a second.

    Args:
        seed: The same seed gives the same market.
        bars: How many quotes; 0: without end.
    """
    chance = random.Random(seed)  # noqa: S311 - a market, no secret
    price, drift = 20_000.0, 0.0
    start = datetime(2024, 1, 1, tzinfo=UTC)
    for number in range(bars) if bars else count():
        drift = 0.995 * drift + chance.gauss(0, 0.00002)
        price *= 1 + drift + chance.gauss(0, 0.0002)
        half = price * 0.00005
        time = start + timedelta(seconds=number / 4)
        yield Row(number + 1, time, round(price - half, 2), round(price + half, 2))


if __name__ == "__main__":
    run(MarketData)
