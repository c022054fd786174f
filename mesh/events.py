"""
The words of the mesh: `Event`, the built-in `EventType` members, and types declared by users.

An `Event` is immutable and is, on the wire, a CloudEvents 1.0 event: its fields carry the names of
CloudEvents attributes there (see docs/wire.md). The class of delivery - live or durable - belongs
to the *type* and is declared here once, so publisher and consumer cannot disagree about it.

Source of the attribute names: https://github.com/cloudevents/spec (v1.0.2), its extensions
``partitioning``, ``expirytime`` and ``distributed tracing``.
"""

from __future__ import annotations

import itertools
import os
import secrets
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec

from mesh.errors import TopicError
from mesh.schemas import Schema, name_of
from mesh.topics import PRIVATE_PREFIX, check_topic
from mesh.values import Value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Ids:
    """
    An endless row of ids, unique without asking anybody.

    A counter behind 48 random bits: uuid4 as text costs thirty times as much (benchmarks/, 3.2
    against 0.1 microseconds).
    """

    __slots__ = ("_numbers", "_prefix")

    def __init__(self) -> None:
        """Begin anew."""
        self._prefix = f"{secrets.token_hex(6)}-"
        self._numbers = itertools.count(1)

    def one(self) -> str:
        """Make an id."""
        return f"{self._prefix}{next(self._numbers)}"

    def many(self, count: int) -> list[str]:
        """Make so many."""
        prefix = self._prefix
        return [f"{prefix}{number}" for number in itertools.islice(self._numbers, count)]


_ids = Ids()


def _reseed() -> None:
    global _ids
    _ids = Ids()


os.register_at_fork(after_in_child=_reseed)


def new_id() -> str:
    """Make one id (see `Ids`)."""
    return _ids.one()


class EventType(StrEnum):
    """
    The built-in event types. The value is the topic on every fabric.

    Each has a `doc` and a delivery class: `durable` types are the ones that become money.
    """

    doc: str
    durable: bool

    def __new__(cls, value: str, doc: str, durable: bool = False) -> EventType:
        """Make a member from its row in the table below."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.doc = doc
        member.durable = durable
        return member

    # market data
    MARKET_DATA_RECEIVED = "market.data.received", "A price update arrived: a tick or a bar."
    MARKET_QUOTE_RECEIVED = "market.quote.received", "Best bid and ask changed."
    MARKET_TRADE_RECEIVED = "market.trade.received", "A trade was printed on the venue."
    MARKET_BAR_CLOSED = "market.bar.closed", "A bar of fixed length is complete."
    MARKET_FEED_LOST = "market.feed.lost", "The feed stopped, or skipped input it could not read."
    MARKET_FEED_RESTORED = "market.feed.restored", "The feed is back."
    # features and models
    FEATURES_COMPUTED = "features.computed", "Numbers derived from market data are ready."
    MODEL_PREDICTION_MADE = "model.prediction.made", "A model spoke."
    MODEL_UPDATED = "model.updated", "A model was retrained or replaced."
    # signals
    SIGNAL_GENERATED = "signal.generated", "A strategy wants to change its position."
    SIGNAL_EXPIRED = "signal.expired", "A signal became too old to act upon."
    # risk
    TRADE_APPROVED = "trade.approved", "Risk lets a trade pass.", True
    TRADE_REJECTED = "trade.rejected", "Risk refuses a trade, with the reason."
    RISK_LIMIT_BREACHED = "risk.limit.breached", "A limit was crossed.", True
    RISK_LIMITS_CHANGED = "risk.limits.changed", "New limits are in force."
    # orders and fills
    ORDER_REQUESTED = "order.requested", "An order shall be sent.", True
    ORDER_SUBMITTED = "order.submitted", "An order left for the venue."
    ORDER_ACCEPTED = "order.accepted", "The venue took the order."
    ORDER_REJECTED = "order.rejected", "The venue refused the order.", True
    ORDER_CANCELLED = "order.cancelled", "An order was taken back.", True
    ORDER_EXECUTED = "order.executed", "An order was executed at a price.", True
    ORDER_FILLED = "order.filled", "An order is complete.", True
    ORDER_EXPIRED = "order.expired", "An order ran out of time."
    # positions and portfolio
    POSITION_OPENED = "position.opened", "A position exists now."
    POSITION_CHANGED = "position.changed", "A position grew, shrank or turned."
    POSITION_CLOSED = "position.closed", "A position is flat again."
    PORTFOLIO_UPDATED = "portfolio.updated", "Profit and loss were computed anew."
    PORTFOLIO_REBALANCED = "portfolio.rebalanced", "Target weights were applied."
    # agents' lives
    AGENT_STARTED = "agent.started", "An agent process began."
    AGENT_READY = "agent.ready", "An agent hears everything it subscribed to."
    AGENT_STOPPED = "agent.stopped", "An agent ended as it was told to."
    AGENT_FAILED = "agent.failed", "An agent died or was replaced."
    AGENT_HEARTBEAT = "agent.heartbeat", "An agent is alive; how it is doing. For eyes only."
    # system
    SYSTEM_STARTED = "system.started", "All agents are ready; sources may speak."
    SYSTEM_STOPPING = "system.stopping", "The mesh is being taken down."
    SYSTEM_ALERT = "system.alert", "Somebody should look at this."
    SYSTEM_CONFIG_CHANGED = "system.config.changed", "Configuration changed while running."
    SYSTEM_DEAD_LETTER = "system.dead.letter", "An event could not be handled and was put aside."


def _utc_now() -> datetime:
    return datetime.now(UTC)


if TYPE_CHECKING:
    Moment = datetime
else:
    # One without a zone is refused when it comes from the wire: it cannot be compared
    Moment = Annotated[datetime, msgspec.Meta(tz=True)]

#: What fields are called as CloudEvents attributes, where that is something else.
ATTRIBUTES = {
    "source_agent": "source",
    "timestamp": "time",
    "correlation_id": "correlationid",
    "causation_id": "causationid",
    "key": "partitionkey",
    "expires_at": "expirytime",
    "reply_to": "replyto",
}


class Event(
    msgspec.Struct,
    frozen=True,
    # Never part of a reference cycle of its own making: the collector need not look at it
    gc=False,
    eq=False,
    omit_defaults=True,
    tag_field="specversion",
    tag="1.0",
    rename=ATTRIBUTES,
):
    """
    Something that happened, said by one agent to whoever listens.

    Args:
        type: What happened; a member of `EventType`, of a `StrEnum` of yours, or a declared string.
        data: The payload: a JSON-like object.
        source_agent: Who says it.
        timestamp: When it was said; aware, UTC.
        correlation_id: The same for all events that follow from one cause at the edge of the mesh.
        id: Unique for this event.
        causation_id: The id of the event whose handler published this one.
        key: Events of one key keep their order when a consumer works concurrently.
        expires_at: After this moment the event must not be acted upon; aware.
        traceparent: W3C trace context.
        reply_to: The topic on which an answer is awaited.
        hops: How many handlers lie between this event and the edge of the mesh.

    `data` always reads as a dict. Who changes something in it changes nobody else's: each handler
    has its own, and so has each of its tries (but not with ``overflow="latest"``). Inside, the
    payload may still be encoded (an event on its way out) or be an instance of the schema its
    handlers ask for (one that came in).
    """

    if TYPE_CHECKING:
        type: str
    else:
        # What a built-in type decodes to, in C; `OwnEvent` is the twin for all other types
        type: EventType
    data: dict[str, Any]
    source_agent: str
    timestamp: Moment = msgspec.field(default_factory=_utc_now)
    correlation_id: str = msgspec.field(default_factory=new_id)
    id: str = msgspec.field(default_factory=new_id)
    causation_id: str | None = None
    key: str | None = None
    expires_at: Moment | None = None
    traceparent: str | None = None
    reply_to: str | None = None
    hops: int = 0

    def __eq__(self, other: object) -> bool:
        """Equal when all fields are; whether the type is built in or one's own plays no part."""
        if not isinstance(other, Event):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.__struct_fields__)

    def __hash__(self) -> int:
        """Hash by id."""
        return hash(self.id)

    def __repr__(self) -> str:
        """Show all fields that say something."""
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        said = (f"{name}={value!r}" for name, value in fields.items() if value is not None)
        return f"Event({', '.join(said)})"

    def to_dict(self) -> dict[str, Any]:
        """Give the event as plain data under its Python names; moments as ISO 8601 text."""
        plain = {name: getattr(self, name) for name in self.__struct_fields__}
        built: dict[str, Any] = msgspec.to_builtins(plain)
        return built


_slot = Event.__dict__["data"]

#: The payload as it is kept: a dict, encoded (`msgspec.Raw`), or an instance of a schema.
payload_of: Callable[[Event], Any] = _slot.__get__


def key_of(event: Event) -> str:
    """Give what keeps events in order: their key, the empty text too; without one each is alone."""
    return event.id if event.key is None else event.key


def _data(event: Event) -> dict[str, Any]:
    kept = payload_of(event)
    if type(kept) is dict:
        return kept
    if type(kept) is msgspec.Raw:
        kept = msgspec.msgpack.decode(kept)
        _slot.__set__(event, kept)
    # An instance of a schema stays: the next handler wants it as it is
    plain: dict[str, Any] = msgspec.to_builtins(kept, builtin_types=(bytes, datetime))
    return plain


# Over the slot of the same name: decoding and encoding go to the slot directly, in C, so that a
# payload nobody reads as a dict is never made one
type.__setattr__(Event, "data", property(_data, doc="The payload as a dict."))


class OwnEvent(Event, frozen=True, gc=False, eq=False, omit_defaults=True):
    """An event of a declared or unknown type, as it is decoded; otherwise an `Event`."""

    if not TYPE_CHECKING:
        type: str


class Declaration(Value, frozen=True, kw_only=True):
    """What is known of an event type."""

    #: The name on the wire.
    topic: str
    #: What `event.type` shows: the enum member where there is one.
    member: str
    durable: bool = False
    #: The class payloads must fit; None: any JSON-like object.
    schema: Schema | None = None
    doc: str = ""


_declarations: dict[str, Declaration] = {
    member.value: Declaration(
        topic=member.value, member=member, durable=member.durable, doc=member.doc
    )
    for member in EventType
}


_Name = TypeVar("_Name", bound=str)


def event_type(
    name: _Name, *, durable: bool = False, schema: Schema | None = None, doc: str = ""
) -> _Name:
    """
    Declare an event type of your own; declare it in a module that publisher and consumer import.

    Args:
        name: A string, or a member of a `StrEnum` of yours; its value is the topic.
        durable: True for what must not be lost (see docs/architecture.md).
        schema: A msgspec Struct, dataclass, TypedDict or pydantic model that payloads must fit, or
            a union of tagged Structs.
        doc: One sentence, shown by `mesh agents`.

    Returns:
        `name` itself, so that a declaration can stand where the name is made.

    Raises:
        TopicError: The name breaks the topic grammar, or is one of the mesh's own.
        ValueError: It is declared already, and differently.
    """
    topic = check_topic(name)
    if topic.startswith(PRIVATE_PREFIX):
        raise TopicError(
            f"{topic!r} starts with {PRIVATE_PREFIX!r}: such topics are the mesh's own"
        )
    made = Declaration(topic=topic, member=name, durable=durable, schema=schema, doc=doc)
    known = _declarations.get(topic)
    if known is not None and _differs(known, made):
        raise ValueError(
            f"{topic!r} is declared already as {_words(known)}; this says {_words(made)}."
            " Declare a type once, in a module that all its users import"
        )
    _declarations[topic] = made
    return name


def declare_schema(name: str, schema: Schema) -> None:
    """
    Give the payloads of a declared or built-in type a schema.

    Args:
        name: The event type.
        schema: A msgspec Struct, dataclass, TypedDict or pydantic model.

    Raises:
        TopicError: The name breaks the topic grammar.
        ValueError: The type has another schema already.
    """
    topic = check_topic(name)
    known = declaration_of(topic)
    if known.schema is not None and _same_class(known.schema, schema) is False:
        raise ValueError(
            f"payloads of {topic!r} are declared as {name_of(known.schema)} already,"
            f" not {name_of(schema)}"
        )
    _declarations[topic] = msgspec.structs.replace(known, schema=schema)


def declare_durable(*names: str) -> None:
    """
    Make built-in or declared types durable in this application.

    Call it in the module that publishers and consumers import, where their schemas are declared.

    Raises:
        TopicError: A name breaks the topic grammar.
    """
    for name in names:
        topic = check_topic(name)
        _declarations[topic] = msgspec.structs.replace(declaration_of(topic), durable=True)


def declaration_of(name: str) -> Declaration:
    """Tell what is known of a type; an undeclared one is live and takes any payload."""
    known = _declarations.get(name)
    return known if known is not None else Declaration(topic=str(name), member=name)


#: What the settings say of delivery, over all declarations: see `set_delivery`.
_made_durable: tuple[str, ...] = ()
_made_live: frozenset[str] = frozenset()
#: A pattern does not mean what the mesh says of itself.
_OWN = ("agent.", "system.", PRIVATE_PREFIX)


def set_delivery(durable: Iterable[str] = (), live: Iterable[str] = ()) -> None:
    """
    Set the delivery class of types in this process, whatever is declared; called once, by settings.

    Args:
        durable: Topics that become durable; ``order.*`` means all that start so, ``*`` all types
            but the mesh's own (``agent.``, ``system.``).
        live: Topics that become live, against their declaration.
    """
    global _made_durable, _made_live
    _made_durable, _made_live = tuple(durable), frozenset(live)


def is_durable(topic: str) -> bool:
    """Say how a type is delivered: declared durable, or made so by the settings."""
    if topic in _made_live or topic.startswith(PRIVATE_PREFIX):
        return False
    return declaration_of(topic).durable or any(_means(each, topic) for each in _made_durable)


def is_downgraded(topic: str) -> bool:
    """Say whether the settings make a type live that is declared durable."""
    return topic in _made_live and declaration_of(topic).durable


def _means(pattern: str, topic: str) -> bool:
    if not pattern.endswith("*"):
        return pattern == topic
    return topic.startswith(pattern[:-1]) and not topic.startswith(_OWN)


def is_declared(name: str) -> bool:
    """Say whether a type is built in or was declared in this process."""
    return name in _declarations


def declarations() -> list[Declaration]:
    """List all built-in and declared types of this process."""
    return list(_declarations.values())


def set_declarations(declared: list[Declaration]) -> None:
    """Put back what `declarations` gave, for tests that declare types of their own."""
    _declarations.clear()
    _declarations.update({each.topic: each for each in declared})


def _same_class(one: Schema, other: Schema) -> bool:
    # A script run by path and imported by name holds the same class twice
    return one is other or name_of(one) == name_of(other)


def _differs(known: Declaration, made: Declaration) -> bool:
    if known.durable != made.durable:
        return True
    if known.schema is None or made.schema is None:
        return known.schema is not made.schema
    return not _same_class(known.schema, made.schema)


def _words(declaration: Declaration) -> str:
    schema = name_of(declaration.schema) if declaration.schema else "any payload"
    return f"{'durable' if declaration.durable else 'live'} with {schema}"
