"""Schemas that are no single class: unions of tagged Structs, parametrised classes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime  # noqa: TC003 - a dataclass of ours names it
from typing import Annotated, Any, Literal, Union

import msgspec
import pytest

from mesh import Agent, Event, InProcessMesh, PayloadError, declare_schema, event_type, on
from mesh.cli.templates import sample_of
from mesh.payloads import convert_payload, payload_encoder, payloads_encoder
from mesh.schemas import name_of, shape_of
from mesh.signatures import signature_of


class Buy(msgspec.Struct, tag=True):
    price: float


class Sell(msgspec.Struct, tag=True):
    price: float
    lots: list[int] = []


#: As code written for older Pythons has it.
OLD: Any = Union[Buy, Sell]  # noqa: UP007 - it is another class than `Buy | Sell`
TRADE = event_type("test.schemas.trade", schema=Buy | Sell)


def test_a_payload_that_fits_no_class_of_a_union_is_refused_by_the_unions_name() -> None:
    words = r"payload of 'test\.schemas\.trade' does not fit Buy \| Sell: .*`float`.*`str`"

    with pytest.raises(PayloadError, match=words):
        payload_encoder(TRADE)({"type": "Buy", "price": "high"})
    with pytest.raises(PayloadError, match=words):
        payloads_encoder(TRADE)([Buy(1.0), {"type": "Buy", "price": "high"}])
    with pytest.raises(PayloadError, match=r"does not fit Buy \| Sell: Invalid value 'Hold'"):
        convert_payload({"type": "Hold"}, Buy | Sell)


def test_a_union_is_declared_once_like_a_class() -> None:
    event_type("test.schemas.trade", schema=Buy | Sell)

    with pytest.raises(ValueError, match=r"live with Buy \| Sell; this says live with Buy\."):
        event_type("test.schemas.trade", schema=Buy)
    with pytest.raises(ValueError, match=r"declared as Buy \| Sell already, not Sell"):
        declare_schema("test.schemas.trade", Sell)


def test_classes_with_other_parameters_are_other_schemas() -> None:
    event_type("test.schemas.counts", schema=dict[str, int])

    with pytest.raises(ValueError, match=r"dict\[str, int\]; this says live with dict\[str, str\]"):
        event_type("test.schemas.counts", schema=dict[str, str])


@pytest.mark.parametrize("union", [Buy | Sell, OLD])
def test_a_handler_may_ask_for_a_union(union: Any) -> None:
    async def on_trade(trade: Any) -> None: ...

    on_trade.__annotations__["trade"] = union

    assert signature_of(on_trade).schema == Buy | Sell


@pytest.mark.parametrize("schema", [Buy, Sell, Buy | Sell, OLD])
def test_the_sample_of_a_tagged_class_fits_it(schema: Any) -> None:
    msgspec.convert(sample_of(schema), schema)


@pytest.mark.parametrize(
    ("schema", "name"),
    [
        (Buy, "Buy"),
        (Buy | None, "Buy | None"),
        (OLD, "Buy | Sell"),
        (dict[str, Buy | int], "dict[str, Buy | int]"),
        (Annotated[Buy, msgspec.Meta(title="x")], "Buy"),
        (Literal["a"], "typing.Literal['a']"),
    ],
)
def test_every_schema_has_a_name(schema: Any, name: str) -> None:
    assert name_of(schema) == name


class Everything(msgspec.Struct, rename="camel", tag="all", tag_field="kind"):
    long_name: Annotated[int, msgspec.Meta(gt=0)]
    maybe: int | msgspec.UnsetType = msgspec.UNSET
    other: str = msgspec.field(name="zz", default="z")
    pairs: tuple[int, str] = (1, "x")
    many: tuple[float, ...] = ()
    words: frozenset[str] = frozenset()
    trades: dict[str, list[Buy | Sell]] = {}


def test_the_strict_twin_takes_what_the_class_takes_and_nothing_else() -> None:
    shape = shape_of(Everything)
    assert shape is not None
    decode = msgspec.msgpack.Decoder(shape.strict).decode
    full = msgspec.to_builtins(Everything(1, 2, trades={"x": [Sell(1.0, [2])]}))
    small = {"longName": 1}

    for good in (full, small):
        msgspec.convert(good, Everything)
        decode(msgspec.msgpack.encode(good))
    more: list[dict[str, Any]] = [
        {"long_name": 1},
        {"longName": 0},
        {"kind": "none"},
        {"trades": {"x": [{"type": "Sell", "price": 1, "more": 2}]}},
    ]
    for bad in ({}, *(full | each for each in more)):
        with pytest.raises(msgspec.ValidationError):
            decode(msgspec.msgpack.encode(bad))
    assert shape.depth == 5


@dataclass
class Odd:
    """Both are text on the wire."""

    at: str | datetime


class Reader(Agent):
    """Asks for what cannot be."""

    heard = False

    @on("test.schemas.odd", max_retries=0)
    async def read(self, odd: Odd) -> None:
        raise AssertionError(odd)

    @on("test.schemas.even")
    async def other(self, event: Event) -> None:
        self.heard = True


async def test_a_class_that_msgspec_cannot_decode_fails_its_handler_and_nobody_else() -> None:
    async with InProcessMesh([Reader]) as mesh:
        await mesh.publish("test.schemas.odd", {"at": "noon"})
        await mesh.publish("test.schemas.even", {})
        await mesh.quiet()
        reader = mesh.agents["reader"]
        (letter,) = reader.consumer.dead_letters.newest

    assert isinstance(reader, Reader)
    assert reader.heard
    assert letter.handler == "read"
    assert "str" in letter.error
