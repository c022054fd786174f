"""Limits: whatever a publisher accepts is handled, and it refuses what nobody would hear."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

import msgspec
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh import (
    Event,
    EventPublisher,
    EventTooLargeError,
    InMemoryMessageBroker,
    PayloadError,
    PublisherConfig,
    codec,
    columns,
    event_type,
)
from mesh.errors import FrameError
from mesh.payloads import MAX_DEPTH, MAX_ITEMS, payloads_packer

if TYPE_CHECKING:
    from collections.abc import Callable


class Closed(msgspec.Struct):
    name: str = ""


class Wide(msgspec.Struct):
    values: list[float] = []
    by_name: dict[str, list[int]] = {}


class Loose(msgspec.Struct):
    anything: Any = None


class Chain(msgspec.Struct):
    next: Chain | None = None


class Outer(msgspec.Struct):
    inner: Closed


class Watched(msgspec.Struct):
    name: str = ""

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise ValueError("bad names are refused")


@dataclass
class Row:
    name: str = ""
    values: list[float] = field(default_factory=list)


class Typed(TypedDict, total=False):
    name: str


class Model(pydantic.BaseModel):
    values: list[float] = []
    anything: Any = None


class One(msgspec.Struct, tag=True):
    name: str = ""


class Two(msgspec.Struct, tag=True):
    values: list[float]


class Pairs(msgspec.Struct, array_like=True):
    name: str = ""


SCHEMAS: dict[str, Any] = {
    "free": None,
    "closed": Closed,
    "wide": Wide,
    "loose": Loose,
    "chain": Chain,
    "watched": Watched,
    "row": Row,
    "typed": Typed,
    "model": Model,
    "dict": dict[str, list[int]],
    "any": dict[str, Any],
}
for _name, _schema in SCHEMAS.items():
    event_type(f"limits.{_name}", schema=_schema)
event_type("limits.outer", schema=Outer)
event_type("limits.pairs", schema=Pairs)
event_type("limits.union", schema=One | Two)


class Ear(InMemoryMessageBroker):
    """Keeps the frames it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[bytes] = []

    def try_send(self, topic: str, frame: bytes) -> bool:
        self.frames.append(frame)
        return True


def nested(levels: int, *, arrays: bool) -> Any:
    """Give a value of so many levels."""
    value: Any = [] if arrays else {}
    for level in range(levels - 1):
        value = [value] if arrays or level % 2 else {"d": value}
    return value


def arrays_of(items: int, each: int) -> list[Any]:
    """Give an array of arrays with about so many items in all of them together."""
    return [[0] * each for _ in range(items // (each + 1))]


def is_heard(topic: str, data: Any) -> bool:
    """Say what the other side would say if the payload were sent, in every form of the wire."""
    raw: Any = msgspec.Raw(msgspec.msgpack.encode(data))
    events = [Event(topic, raw, "mouth", correlation_id="c", id=f"e-{n}") for n in range(2)]
    table = columns.tabulate(topic, events, plain=True)
    batcher = codec.Batcher("mouth")
    frames = [
        codec.encode_single(events[0]),
        batcher.encode(topic, 7, 1, events),
        batcher.encode_table(table, 7, 1),
        codec.join_frames([codec.encode_single(event) for event in events]),
    ]
    frames.append(codec.encode_json(events[0]))
    said = {_accepts(topic, frame) for frame in frames}
    assert len(said) == 1, "all forms are judged alike"
    return said.pop()


def _accepts(topic: str, frame: bytes) -> bool:
    try:
        decoded = codec.decode_frame(topic, frame)
    except FrameError:
        return False
    return not decoded.rejected


async def _publish(publisher: EventPublisher, topic: str, data: Any, way: int) -> None:
    if way == 0:
        await publisher.publish(topic, data)
    elif way == 1:
        await publisher.publish_event(publisher.make_event(topic, data))
    else:
        await publisher.publish_batch([(topic, data)] * (way - 1))


async def _publish_in_all_ways(topic: str, data: Any) -> tuple[set[bool], list[bytes]]:
    """Give whether each way accepts it, and all frames that left."""
    accepted: set[bool] = set()
    frames: list[bytes] = []
    for wire_format in ("msgpack", "json"):
        async with Ear() as ear:
            publisher = EventPublisher(
                PublisherConfig(agent_name="mouth", broker=ear, wire_format=wire_format)
            )
            for way in range(4):
                try:
                    await _publish(publisher, topic, data, way)
                    await publisher.flush()
                except PayloadError:
                    accepted.add(False)
                else:
                    accepted.add(True)
            await publisher.close()
            frames += ear.frames
    return accepted, frames


near_depth = st.integers(MAX_DEPTH - 3, MAX_DEPTH + 2)
near_items = st.integers(MAX_ITEMS - 4, MAX_ITEMS + 2)
values = st.one_of(
    st.builds(nested, near_depth, arrays=st.booleans()),
    st.builds(lambda n: [0] * n, near_items),
    st.builds(lambda n: [0.5] * n, near_items),
    st.builds(lambda n: dict.fromkeys(map(str, range(n)), 1), near_items),
    st.builds(arrays_of, near_items, st.sampled_from([0, 1, 7])),
    st.builds(lambda n: set(range(n)), near_items),
    st.builds(lambda n: Wide(values=[0.0] * n), near_items),
    st.builds(lambda n: Loose(Loose(nested(n, arrays=True))), near_depth),
    st.just(b"bytes"),
    st.just("text"),
)
payloads = st.one_of(
    st.builds(
        lambda name, value: {name: value},
        st.sampled_from(["name", "values", "by_name", "anything", "next", "other"]),
        values,
    ),
    values,
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([*SCHEMAS]), payloads)
def test_a_payload_is_published_exactly_when_it_is_heard(name: str, data: Any) -> None:
    topic = f"limits.{name}"

    accepted, frames = asyncio.run(_publish_in_all_ways(topic, data))

    assert len(accepted) == 1, "publish and publish_batch, msgpack and JSON judge alike"
    if accepted == {True}:
        assert frames
        assert all(_accepts(topic, frame) for frame in frames)
    elif name in ("free", "any"):
        # Nothing else but the limits can be the matter
        assert not is_heard(topic, data)


async def accepts(name: str, data: Any) -> bool:
    """Say whether a publisher takes a payload, which all its ways must agree upon."""
    accepted, _ = await _publish_in_all_ways(f"limits.{name}", data)
    assert len(accepted) == 1
    return accepted.pop()


@pytest.mark.parametrize(
    ("name", "fields", "make"),
    [
        ("free", 1, lambda n: {"values": [0.5] * n}),
        ("free", 0, lambda n: dict.fromkeys(map(str, range(n)), 1)),
        ("free", 1, lambda n: {"values": set(range(n))}),
        ("closed", 2, lambda n: {"name": "x", "other": [0] * n}),
        ("watched", 2, lambda n: {"name": "x", "other": [0] * n}),
        ("wide", 2, lambda n: Wide([0.5] * n)),
        ("wide", 1, lambda n: {"values": [0.5] * n}),
        ("loose", 1, lambda n: Loose([0] * n)),
        ("row", 2, lambda n: Row(values=[0.5] * n)),
        ("typed", 1, lambda n: {"other": [0] * n}),
        ("model", 2, lambda n: Model(values=[0.5] * n)),
        ("model", 1, lambda n: {"values": [0.5] * n}),
        ("outer", 2, lambda n: Outer({"other": [0] * n})),  # type: ignore[arg-type]
        ("union", 2, lambda n: Two([0.5] * n)),
    ],
)
async def test_as_many_items_as_are_heard_may_leave(
    name: str, fields: int, make: Callable[[int], Any]
) -> None:
    assert await accepts(name, make(MAX_ITEMS - fields))
    assert not await accepts(name, make(MAX_ITEMS - fields + 1))


def chain(links: int) -> Chain:
    made = Chain()
    for _ in range(links - 1):
        made = Chain(made)
    return made


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("free", lambda n: {"d": nested(n - 1, arrays=False)}),
        ("free", lambda n: {"d": Loose(nested(n - 2, arrays=False))}),
        ("closed", lambda n: {"name": "x", "other": nested(n - 1, arrays=True)}),
        ("wide", lambda n: {"values": [], "other": nested(n - 1, arrays=True)}),
        ("loose", lambda n: Loose(nested(n - 1, arrays=True))),
        ("chain", chain),
        ("typed", lambda n: {"other": nested(n - 1, arrays=True)}),
        ("model", lambda n: Model(anything=nested(n - 1, arrays=True))),
        ("model", lambda n: {"anything": nested(n - 1, arrays=True)}),
        ("outer", lambda n: Outer({"other": nested(n - 2, arrays=True)})),  # type: ignore[arg-type]
        ("any", lambda n: {"d": nested(n - 1, arrays=True)}),
    ],
)
async def test_as_deep_as_is_heard_may_leave(name: str, make: Callable[[int], Any]) -> None:
    assert await accepts(name, make(MAX_DEPTH))
    assert not await accepts(name, make(MAX_DEPTH + 1))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("loose", {"anything": {1: 2}}),
        ("model", {"anything": {1: 2}}),
        ("pairs", Pairs("x")),
        ("any", {"a": {1: 2}}),
        ("watched", {"name": "bad"}),
    ],
)
async def test_what_is_no_object_for_others_does_not_leave(name: str, data: Any) -> None:
    assert not await accepts(name, data)


async def test_what_a_schema_does_not_name_travels_all_the_same() -> None:
    async with Ear() as ear:
        publisher = EventPublisher(PublisherConfig(agent_name="mouth", broker=ear))
        await publisher.publish("limits.closed", {"name": "x", "other": [1, {"a": 2}]})
        await publisher.close()

    (event,) = codec.decode_frame("limits.closed", ear.frames[0]).events
    assert event.data == {"name": "x", "other": [1, {"a": 2}]}


@pytest.mark.parametrize("count", [1, 3, 100])
@pytest.mark.parametrize("name", ["free", "closed", "wide"])
async def test_one_event_over_the_size_limit_keeps_all_of_its_batch_here(
    name: str, count: int
) -> None:
    pairs = [(f"limits.{name}", {"name": "x"})] * count
    pairs[count // 2] = (f"limits.{name}", {"name": "x" * 260_000})
    async with Ear() as ear:
        publisher = EventPublisher(PublisherConfig(agent_name="mouth", broker=ear))
        with pytest.raises(EventTooLargeError, match="the limit is 258048"):
            await publisher.publish_batch(pairs)
        await publisher.close()

    assert ear.frames == []


def test_a_batch_of_small_events_is_packed_in_one_go() -> None:
    for name in ("free", "closed", "row", "watched"):
        assert payloads_packer(f"limits.{name}")([{"name": "x"}] * 100) is not None, name
