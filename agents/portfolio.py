"""Keeps the books: positions, profit and loss, and a digest of all fills in order."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from agents.payloads import REPORT_REQUESTED, Fill, Portfolio, Position
from mesh import Agent, Event, EventType, on, run


@dataclass(slots=True)
class Book:
    """What is held of one symbol; cost at average price, money in cents."""

    quantity: int = 0
    average_price: float = 0.0
    realised_cents: int = 0
    mark: float = 0.0

    def apply(self, fill: Fill) -> None:
        """Book a fill."""
        self.mark = fill.mark
        closing = min(abs(fill.quantity), abs(self.quantity))
        if self.quantity * fill.quantity < 0:
            side = 1 if self.quantity > 0 else -1
            gain = (fill.price - self.average_price) * closing * side
            self.realised_cents += round(gain * 100)
        after = self.quantity + fill.quantity
        if self.quantity * fill.quantity >= 0:
            held = self.average_price * abs(self.quantity) + fill.price * abs(fill.quantity)
            self.average_price = held / abs(after)
        elif abs(fill.quantity) > abs(self.quantity):
            self.average_price = fill.price
        elif not after:
            self.average_price = 0.0
        self.quantity = after

    @property
    def unrealised_cents(self) -> int:
        """Give the gain that closing at the mark would bring."""
        return round((self.mark - self.average_price) * self.quantity * 100)


class PortfolioAgent(Agent):
    """Hears fills, says positions and profit; answers for its account."""

    max_replicas = 1  # one account holds over all symbols

    async def setup(self) -> None:
        kept = self.ctx.state.get("account", {})
        self.books = {symbol: Book(**book) for symbol, book in kept.get("books", {}).items()}
        self.fills: int = kept.get("fills", 0)
        self.fees_cents: int = kept.get("fees_cents", 0)
        #: Each fill is hashed together with the digest before it: it can be kept and gone on with.
        self.digest: bytes = kept.get("digest", b"")

    @on(EventType.ORDER_EXECUTED)
    async def on_fill(self, fill: Fill, event: Event) -> None:
        book = self.books.setdefault(fill.symbol, Book())
        book.apply(fill)
        self.fills += 1
        self.fees_cents += fill.fee_cents
        line = f"{fill.order_id},{fill.time},{fill.quantity},{fill.price!r},{fill.fee_cents}\n"
        self.digest = hashlib.sha256(self.digest + line.encode()).digest()
        self.ctx.state["account"] = {
            "books": {symbol: asdict(book) for symbol, book in self.books.items()},
            "fills": self.fills,
            "fees_cents": self.fees_cents,
            "digest": self.digest,
        }
        position = Position(fill.symbol, book.quantity, book.average_price)
        await self.publish(EventType.POSITION_CHANGED, position, key=event.key)
        await self.publish(EventType.PORTFOLIO_UPDATED, self.summary(), key=event.key)

    @on(REPORT_REQUESTED)
    async def on_request(self, event: Event) -> None:
        if event.reply_to is not None:
            await self.reply(event, self.report())

    def summary(self) -> Portfolio:
        """Sum up profit and loss."""
        return Portfolio(
            fills=self.fills,
            realised_cents=sum(book.realised_cents for book in self.books.values()),
            unrealised_cents=sum(book.unrealised_cents for book in self.books.values()),
            fees_cents=self.fees_cents,
        )

    def report(self) -> dict[str, Any]:
        """Give the account: fills, their digest, money in units of quote currency."""
        summary = self.summary()
        net = summary.realised_cents + summary.unrealised_cents - summary.fees_cents
        return {
            "fills": self.fills,
            "fills_digest": self.digest.hex(),
            "realised_pnl": summary.realised_cents / 100,
            "unrealised_pnl": summary.unrealised_cents / 100,
            "fees": summary.fees_cents / 100,
            "net_pnl": net / 100,
            "positions": {symbol: book.quantity for symbol, book in self.books.items()},
        }


if __name__ == "__main__":
    run(PortfolioAgent)
