"""
What the agents of the pipeline say to each other: one payload class an event type.

Prices are in quote currency a unit, quantities in units, moments ISO 8601 text as in the input. The
quote travels with every decision, so each agent depends on one stream only and a run gives the same
fills in one process and over many.
"""

from __future__ import annotations

import msgspec

from mesh import EventType, declare_durable, declare_schema, event_type


class Quote(msgspec.Struct, frozen=True):
    """The market at one moment; for a bar, around its close."""

    symbol: str
    #: 1 for the first row of the input.
    number: int
    time: str
    bid: float
    ask: float

    @property
    def mid(self) -> float:
        """Give the middle of bid and ask."""
        return (self.bid + self.ask) / 2


class Features(msgspec.Struct, frozen=True):
    """Numbers over the last quotes; None until there are enough of them."""

    quote: Quote
    #: Relative change of the mid price since the last quote.
    change: float
    fast_mean: float | None
    slow_mean: float | None
    #: Standard deviation of `change` over the slow window.
    volatility: float | None


class Signal(msgspec.Struct, frozen=True):
    """What the strategy wants to hold from now on: -1 short, 0 flat, 1 long."""

    quote: Quote
    target: int
    #: Distance of the means in units of price.
    strength: float


class Approval(msgspec.Struct, frozen=True):
    """A trade that risk lets pass; positive quantities buy."""

    quote: Quote
    order_id: str
    quantity: int


class Rejection(msgspec.Struct, frozen=True):
    """A trade that risk refuses."""

    quote: Quote
    quantity: int
    reason: str


class Breach(msgspec.Struct, frozen=True):
    """A limit that was crossed."""

    quote: Quote
    limit: str
    value: float
    allowed: float


class Fill(msgspec.Struct, frozen=True):
    """An order that was executed; positive quantities bought. Money is in cents: sums are exact."""

    order_id: str
    symbol: str
    time: str
    quantity: int
    price: float
    fee_cents: int
    #: The mid price at the time of the fill, to value positions with.
    mark: float


class Position(msgspec.Struct, frozen=True):
    """What is held of one symbol."""

    symbol: str
    quantity: int
    average_price: float


class Portfolio(msgspec.Struct, frozen=True):
    """Profit and loss so far, in cents of quote currency."""

    fills: int
    realised_cents: int
    unrealised_cents: int
    fees_cents: int


class FeedReport(msgspec.Struct, frozen=True):
    """How the feed ended."""

    rows: int
    bad_rows: int
    examples: list[str]


declare_schema(EventType.MARKET_DATA_RECEIVED, Quote)
declare_schema(EventType.FEATURES_COMPUTED, Features)
declare_schema(EventType.SIGNAL_GENERATED, Signal)
declare_schema(EventType.TRADE_APPROVED, Approval)
declare_schema(EventType.TRADE_REJECTED, Rejection)
declare_schema(EventType.RISK_LIMIT_BREACHED, Breach)
declare_schema(EventType.ORDER_EXECUTED, Fill)
declare_schema(EventType.POSITION_CHANGED, Position)
declare_schema(EventType.PORTFOLIO_UPDATED, Portfolio)
declare_schema(EventType.MARKET_FEED_LOST, FeedReport)

# A signal becomes money: what risk has not seen yet must outlive it. All that follows from one is
# durable anyway
declare_durable(EventType.SIGNAL_GENERATED)

#: Asks the portfolio for its final account; answered with a reply.
REPORT_REQUESTED = event_type(
    "portfolio.report.requested", doc="Somebody asks the portfolio for its account."
)
