"""The wire: golden frames, and what is no frame."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh import codec, columns
from mesh.errors import EventTooLargeError, FrameError, PayloadError
from mesh.events import Event, EventType, event_type, payload_of
from mesh.payloads import MAX_EVENT_BYTES, payload_encoder

WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
TOPIC = EventType.MARKET_DATA_RECEIVED
EVENT = Event(TOPIC, {"p": 1.5}, "feed", WHEN, "c-1", "e-1", key="BTC")

GOLDEN_EVENT = bytes.fromhex(
    "88ab7370656376657273696f6ea3312e30a474797065b46d61726b65742e646174612e72656365697665"
    "64a46461746181a170cb3ff8000000000000a6736f75726365a466656564a474696d65d6ff695735a5ad"
    "636f7272656c6174696f6e6964a3632d31a26964a3652d31ac706172746974696f6e6b6579a3425443"
)
GOLDEN_JSON = (
    b'{"specversion":"1.0","type":"market.data.received","data":{"p":1.5},"source":"feed",'
    b'"time":"2026-01-02T03:04:05Z","correlationid":"c-1","id":"e-1","partitionkey":"BTC",'
    b'"sequence":8,"epoch":7}'
)


#: Two columns besides ids and payloads, the other attributes said once.
GOLDEN_TABLE = bytes.fromhex(
    "87ab7370656376657273696f6ea3312e30a474797065b46d61726b65742e646174612e7265636569766564a4"
    "646174619681a170cb000000000000000081a170cb3fe000000000000081a170cb3ff000000000000081a170"
    "cb3ff800000000000081a170cb400000000000000081a170cb4004000000000000a6736f75726365a4666565"
    "64a474696d65d6ff695735a5a2696496a3652d30a3652d31a3652d32a3652d33a3652d34a3652d35ac706172"
    "746974696f6e6b657996c0a3425443c0a3425443c0a3425443"
)


def six_events() -> list[Event]:
    return [
        Event(TOPIC, {"p": n / 2}, "feed", WHEN, f"e-{n}", f"e-{n}", key="BTC" if n % 2 else None)
        for n in range(6)
    ]


class Tick(msgspec.Struct, frozen=True):
    symbol: str
    price: float


TICK = event_type("test.codec.tick", schema=Tick)


def batch(*events: Event) -> bytes:
    return codec.Batcher("feed").encode(events[0].type, 7, 8, list(events))


def table(*events: Event) -> bytes:
    made = columns.tabulate(events[0].type, events, plain=False)
    return codec.Batcher("feed").encode_table(made, 7, 8)


def header(version: int, count: int) -> bytes:
    numbers = (7).to_bytes(8, "big") + (8).to_bytes(8, "big")
    return bytes((0xC1, version, 4)) + b"feed" + numbers + count.to_bytes(2, "big")


def test_the_golden_frames_decode_for_ever() -> None:
    golden_batch = header(1, 1) + b"\x91" + GOLDEN_EVENT
    # As it was written before arrays were kept short
    old_batch = header(1, 1) + b"\xdd\x00\x00\x00\x01" + GOLDEN_EVENT

    assert codec.encode_single(EVENT) == GOLDEN_EVENT
    assert batch(EVENT) == golden_batch
    assert codec.encode_json(EVENT, epoch=7, sequence=8) == GOLDEN_JSON
    for frame in (GOLDEN_EVENT, golden_batch, old_batch, GOLDEN_JSON, b"[" + GOLDEN_JSON + b"]"):
        decoded = codec.decode_frame(TOPIC, frame)
        assert decoded.events == [EVENT]
        assert decoded.events[0].type is TOPIC
    assert (decoded.publisher, decoded.epoch, decoded.first, decoded.count) == ("feed", 7, 8, 1)


def test_the_golden_table_decodes_for_ever() -> None:
    events = six_events()
    golden = header(2, 6) + GOLDEN_TABLE

    assert table(*events) == golden
    decoded = codec.decode_frame(TOPIC, golden)
    assert decoded.events == events
    assert decoded.events[0].type is TOPIC
    assert (decoded.publisher, decoded.epoch, decoded.first, decoded.count) == ("feed", 7, 8, 6)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"", "undecodable"),
        (b"\x00", "undecodable"),
        (b"\xc1", "undecodable"),
        (b"\xc1\x03\x00" + bytes(30), "unknown_version"),
        (b"{", "undecodable"),
        (b'{"specversion":"9.9","type":"x","data":{},"source":"s"}', "unknown_version"),
        (b'{"specversion":"1.0","type":"x"}', "invalid"),
        (b"{" + b" " * codec.MAX_FRAME_BYTES, "too_large"),
    ],
)
def test_what_is_no_frame_is_refused_with_a_reason(frame: bytes, reason: str) -> None:
    with pytest.raises(FrameError) as caught:
        codec.decode_frame(TOPIC, frame)

    assert caught.value.reason == reason


def test_an_event_of_depth_sixty_thousand_is_too_deep() -> None:
    """Some Pythons give up while they decode it, others (3.14) have room for all of it."""
    data = b'{"a":' + b"[" * 60_000 + b"]" * 60_000 + b"}"
    whole = msgspec.json.encode(msgspec.structs.replace(EVENT, data=msgspec.Raw(data)))
    try:
        reasons = [reason for reason, _, _ in codec.decode_frame(TOPIC, whole).rejected or ()]
    except FrameError as error:
        reasons = [error.reason]

    assert reasons == ["too_deep"]


def as_sent(data: object) -> Any:
    return msgspec.Raw(msgspec.msgpack.encode(data))


def deep(levels: int) -> dict[str, object]:
    value: dict[str, object] = {}
    for _ in range(levels):
        value = {"d": value}
    return value


def test_one_broken_event_does_not_take_its_neighbours_along() -> None:
    good = msgspec.msgpack.encode(EVENT)
    wrong_type = good.replace(b"market.data.received", b"market.data.REceived")
    too_deep = msgspec.msgpack.encode(msgspec.structs.replace(EVENT, data=deep(40)))
    not_a_map = msgspec.msgpack.encode([1, 2])
    body = b"".join((good, wrong_type, too_deep, not_a_map, good))

    decoded = codec.decode_frame(TOPIC, header(1, 5) + b"\xdd\x00\x00\x00\x05" + body)

    assert decoded.events == [EVENT, EVENT]
    assert decoded.rejected is not None
    assert [reason for reason, _, _ in decoded.rejected] == ["wrong_topic", "too_deep", "invalid"]


ODD: dict[str, list[object]] = {
    "source_agent": ["feed", "replay"],
    "timestamp": [WHEN, WHEN + timedelta(seconds=1)],
    "correlation_id": ["c-1", "e-1"],
    "causation_id": [None, "cause", "another"],
    "key": [None, "BTC", "ETH"],
    "expires_at": [None, WHEN],
    "traceparent": [None, "00-11-22-01"],
    "reply_to": [None, "_reply.1"],
    "hops": [0, 3],
}


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("name", ODD)
def test_a_table_keeps_every_attribute_of_every_event(name: str, mixed: bool) -> None:
    values = ODD[name] if mixed else ODD[name][-1:]
    events = [
        msgspec.structs.replace(event, **{name: values[n % len(values)]})
        for n, event in enumerate(six_events())
    ]

    assert codec.decode_frame(TOPIC, table(*events)).events == events


@pytest.mark.parametrize("count", [1, 11, 12, 63, 64, 200])
@pytest.mark.parametrize("plain", [True, False])
def test_however_many_travel_together_they_arrive_as_they_were(count: int, plain: bool) -> None:
    events = [
        Event(TOPIC, {"p": n}, "feed", WHEN + timedelta(seconds=n), f"e-{n}", f"e-{n}")
        for n in range(count)
    ]

    frame = codec.Batcher("feed").encode(TOPIC, 7, 8, events, plain=plain)

    assert codec.decode_frame(TOPIC, frame).events == events


def test_a_table_with_schema_comes_as_what_the_handlers_ask_for() -> None:
    encode = payload_encoder(TICK)
    events = [Event(TICK, encode(Tick("BTC", n)), "feed", WHEN, "c", f"e-{n}") for n in range(6)]

    decoded = codec.decode_frame(TICK, table(*events), Tick).events

    assert [payload_of(event) for event in decoded] == [Tick("BTC", n) for n in range(6)]
    assert decoded == events


@pytest.mark.parametrize("schema", [None, Tick])
def test_one_broken_event_of_a_table_does_not_take_its_neighbours_along(
    schema: type[Tick] | None,
) -> None:
    datas: list[object] = [{"symbol": "BTC", "price": 1.0}] * 6
    datas[1], datas[2], datas[3] = 7, deep(40), {"symbol": "BTC", "price": "high"}
    events = [
        Event(TICK, as_sent(data), "feed", WHEN, "c", f"e-{n}") for n, data in enumerate(datas)
    ]

    decoded = codec.decode_frame(TICK, table(*events), schema)

    assert [event.id for event in decoded.events] == ["e-0", "e-3", "e-4", "e-5"]
    assert decoded.rejected is not None
    assert [reason for reason, _, _ in decoded.rejected] == ["invalid", "too_deep"]
    assert b"e-1" in decoded.rejected[0][2], "what is kept of it shows which one it was"


def test_a_table_with_a_key_that_is_no_text_loses_only_that_event() -> None:
    events = six_events()
    events[2] = msgspec.structs.replace(events[2], key=5)

    decoded = codec.decode_frame(TOPIC, table(*events))

    assert [event.id for event in decoded.events] == ["e-0", "e-1", "e-3", "e-4", "e-5"]
    assert decoded.rejected is not None
    assert "partitionkey" in decoded.rejected[0][1]


@pytest.mark.parametrize("name", [b"id", b"data", b"source", b"time", b"partitionkey", b"type"])
def test_whatever_a_table_lacks_every_event_is_accounted_for(name: bytes) -> None:
    """As the ledger counts them: each number is an event, or put aside."""
    frame = table(*six_events()).replace(name, b"?" * len(name))

    try:
        decoded = codec.decode_frame(TOPIC, frame)
    except FrameError:
        return
    assert len(decoded.events) + len(decoded.rejected or ()) == 6


def test_a_table_cannot_make_much_of_little() -> None:
    bomb = {
        "specversion": "1.0",
        "type": TOPIC,
        "source": "x" * 200_000,
        "data": [None] * 60_000,
    }

    with pytest.raises(FrameError, match="too_large"):
        codec.decode_frame(TOPIC, header(2, 60_000) + msgspec.msgpack.encode(bomb))


@pytest.mark.parametrize("count", [5, 7])
def test_a_table_of_another_length_than_it_says_is_refused(count: int) -> None:
    frame = table(*six_events())

    with pytest.raises(FrameError, match=f"header says {count}"):
        codec.decode_frame(TOPIC, header(2, count) + frame[len(header(2, 6)) :])


def test_a_table_under_another_topic_is_refused_event_by_event() -> None:
    decoded = codec.decode_frame("other.topic", table(*six_events()))

    assert decoded.events == []
    assert decoded.rejected is not None
    assert {reason for reason, _, _ in decoded.rejected} == {"wrong_topic"}


def test_too_many_items_are_refused() -> None:
    bomb = codec.encode_single(msgspec.structs.replace(EVENT, data={"a": [[]] * 20_000}))

    decoded = codec.decode_frame(TOPIC, bomb)

    assert decoded.events == []
    assert decoded.rejected is not None
    assert decoded.rejected[0][0] == "too_many_items"


@pytest.mark.parametrize("attribute", [b'"time"', b'"expirytime"'])
def test_a_moment_without_a_zone_is_refused(attribute: bytes) -> None:
    """Nobody could compare it with now."""
    naive = GOLDEN_JSON[:-1] + b"," + attribute + b':"0001-01-01T00:00:00"}'

    with pytest.raises(FrameError, match="timezone"):
        codec.decode_frame(TOPIC, naive)


@pytest.mark.parametrize(
    ("epoch", "first"), [(7, 0), (7, 2**48), (7, 2**64 - 1), (2**63, 1), (2**64 - 1, 1)]
)
def test_numbers_that_nobody_gives_are_refused(epoch: int, first: int) -> None:
    numbers = epoch.to_bytes(8, "big") + first.to_bytes(8, "big") + b"\x00\x01"
    frame = header(1, 1)[:7] + numbers + b"\xdd\x00\x00\x00\x01" + GOLDEN_EVENT
    in_json = GOLDEN_JSON.replace(b'"sequence":8,"epoch":7', b'"sequence":%d,"epoch":%d')

    for each in (frame, in_json % (first, epoch)):
        with pytest.raises(FrameError) as caught:
            codec.decode_frame(TOPIC, each)
        assert caught.value.reason == "invalid"


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_random_bytes_never_raise_anything_else(frame: bytes) -> None:
    try:
        codec.decode_frame(TOPIC, frame)
    except FrameError:
        pass


@settings(max_examples=500)
@given(st.integers(0, 10_000), st.integers(0, 255), st.booleans(), st.sampled_from([3, 6]))
def test_mutated_frames_never_raise_anything_else(
    at: int, byte: int, cut: bool, count: int
) -> None:
    frame = bytearray((batch if count == 3 else table)(*[EVENT] * count))
    frame[at % len(frame)] = byte
    try:
        decoded = codec.decode_frame(TOPIC, bytes(frame[: at % len(frame)] if cut else frame))
    except FrameError:
        return
    # Another first byte makes it one event
    assert len(decoded.events) + len(decoded.rejected or ()) == (decoded.count or 1)


def test_a_payload_error_names_type_field_expected_and_got() -> None:
    encode = payload_encoder(TICK)

    with pytest.raises(PayloadError) as caught:
        encode({"symbol": "BTC", "price": "high"})

    words = str(caught.value)
    for expected in ("test.codec.tick", "Tick", "`float`", "`str`", "$.price"):
        assert expected in words


@pytest.mark.parametrize("bad", [{1: "x"}, {"x": deep(40)}, ["x"], {"x": {2: 3}}, 7])
def test_payloads_that_cannot_travel_are_refused_at_the_publisher(bad: object) -> None:
    with pytest.raises(PayloadError):
        payload_encoder("free.form")(bad)


def test_an_event_over_the_limit_is_refused() -> None:
    with pytest.raises(EventTooLargeError, match="the limit is 262144"):
        codec.encode_single(msgspec.structs.replace(EVENT, data={"x": "y" * 300_000}))


def test_own_types_come_back_as_what_they_were_declared() -> None:
    event = Event(TICK, {"symbol": "BTC", "price": 1.0}, "feed", WHEN, "c", "e")

    (back,) = codec.decode_frame(TICK, codec.encode_single(event)).events

    assert back == event
    assert isinstance(back, Event)
    assert back.type == TICK


def test_payloads_come_as_what_the_handlers_ask_for() -> None:
    event = Event(TICK, {"symbol": "BTC", "price": 1.0}, "feed", WHEN, "c", "e")

    (typed,) = codec.decode_frame(TICK, batch(event), Tick).events

    assert payload_of(typed) == Tick("BTC", 1.0)
    assert typed.data == {"symbol": "BTC", "price": 1.0}
    assert typed == event


def test_payloads_that_do_not_fit_the_wish_come_as_dicts() -> None:
    event = Event(TICK, {"symbol": "BTC", "price": "1.0"}, "feed", WHEN, "c", "e")

    (plain,) = codec.decode_frame(TICK, batch(event), Tick).events

    assert payload_of(plain) == {"symbol": "BTC", "price": "1.0"}


def test_a_published_event_reads_as_a_dict() -> None:
    sent = Event(TICK, payload_encoder(TICK)(Tick("BTC", 1.0)), "feed", WHEN, "c", "e")

    assert sent.data["price"] == 1.0
    assert sent.data is sent.data


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [{"deep": float("-inf")}]])
def test_what_json_has_not_is_refused_and_not_made_null(value: Any) -> None:
    event = Event("t.x", {"value": value}, "mouth")

    with pytest.raises(PayloadError, match="cannot travel as JSON: it holds"):
        codec.encode_json(event)
    assert codec.decode_frame("t.x", codec.encode_single(event)).events


def test_an_event_that_is_too_large_only_as_json_is_refused_as_json() -> None:
    event = msgspec.structs.replace(EVENT, data={"text": "\x01" * 200_000})

    codec.encode_single(event)
    with pytest.raises(EventTooLargeError, match="the limit is 262144"):
        codec.encode_json(event)


def test_one_json_event_is_heard_up_to_the_size_that_a_publisher_lets_leave() -> None:
    spare = MAX_EVENT_BYTES - len(codec.encode_json(EVENT)) - len(',"x":""')
    largest = msgspec.structs.replace(EVENT, data={"p": 1.5, "x": "y" * spare})
    frame = codec.encode_json(largest)

    assert len(frame) == MAX_EVENT_BYTES
    assert codec.decode_frame(TOPIC, frame).events == [largest]
    with pytest.raises(FrameError, match="too_large"):
        codec.decode_frame(TOPIC, frame[:-1] + b" }")


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**30])
@pytest.mark.parametrize("data", [{"x": 0}, {"x": [{"deep": 0}]}])
def test_no_publisher_says_a_whole_number_beyond_64_bits(number: int, data: dict[str, Any]) -> None:
    told = msgspec.json.encode(data).replace(b"0", b"%d" % number)
    event = Event("t.x", msgspec.json.decode(told), "mouth")

    with pytest.raises(PayloadError, match="cannot travel"):
        codec.encode_json(event)
    with pytest.raises(PayloadError, match="cannot travel"):
        codec.encode_single(event)


@pytest.mark.parametrize("number", [2**64 - 1, -(2**63)])
def test_whole_numbers_of_64_bits_come_as_they_were(number: int) -> None:
    event = msgspec.structs.replace(EVENT, data={"x": number})

    for frame in (codec.encode_json(event), codec.encode_single(event)):
        assert codec.decode_frame(TOPIC, frame).events == [event]


BAD_VALUES = [b"1" + b"0" * 19 + b"9", b"-1" + b"0" * 30, b'[{"deep":2' + b"0" * 19 + b"}]"]


@pytest.mark.parametrize("value", BAD_VALUES)
def test_a_whole_number_beyond_64_bits_is_refused_and_its_neighbours_are_heard(
    value: bytes,
) -> None:
    """It could be neither published on nor kept."""
    bad = GOLDEN_JSON.replace(b"1.5", value)

    alone = codec.decode_frame(TOPIC, bad)
    among = codec.decode_frame(TOPIC, b"[" + b",".join((GOLDEN_JSON, bad, GOLDEN_JSON)) + b"]")

    assert (alone.events, among.events) == ([], [EVENT, EVENT])
    for each in (alone, among):
        assert each.rejected is not None
        ((reason, words, _),) = each.rejected
        assert reason == "invalid"
        assert "whole number below -2**63 or above 2**64 - 1" in words
    assert (among.first, among.count) == (8, 3), "the ledger counts it as come"


def test_hops_beyond_64_bits_are_refused() -> None:
    frame = GOLDEN_JSON[:-1] + b',"hops":1' + b"0" * 30 + b"}"

    assert codec.decode_frame(TOPIC, frame).rejected


@pytest.mark.parametrize("value", [b"1e999", b"1" + b"0" * 5000, b'"\xed\xa0\x80"'])
def test_a_value_that_is_none_in_json_loses_only_its_event(value: bytes) -> None:
    bad = GOLDEN_JSON.replace(b"1.5", value)

    with pytest.raises(FrameError):
        codec.decode_frame(TOPIC, bad)
    among = codec.decode_frame(TOPIC, b"[" + b",".join((GOLDEN_JSON, bad, GOLDEN_JSON)) + b"]")

    assert among.events == [EVENT, EVENT]
    assert len(among.rejected or ()) == 1


@pytest.mark.parametrize("value", [b'"\\ud800 is one half"', b'"\\udc00 is the other"', b"NaN"])
def test_what_is_no_json_at_all_is_no_frame(value: bytes) -> None:
    bad = GOLDEN_JSON.replace(b"1.5", value)

    for frame in (bad, b"[" + GOLDEN_JSON + b"," + bad + b"]"):
        with pytest.raises(FrameError) as caught:
            codec.decode_frame(TOPIC, frame)
        assert caught.value.reason == "undecodable"


def test_a_json_batch_of_too_many_is_refused() -> None:
    with pytest.raises(FrameError, match="too_many_items"):
        codec.decode_frame(TOPIC, b"[" + b"1," * 11_000 + b"1]")
