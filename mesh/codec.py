r"""
Events to bytes and back.

The first byte tells the form, so all can be mixed on one fabric:

====  =====================================================================
0xC1  a live batch (0xC1 is the byte that msgpack never uses)
0x7B  ``{``: one CloudEvent in JSON, structured mode
0x5B  ``[``: a CloudEvents JSON batch
0x8X  one CloudEvent as a msgpack map (also 0xDE)
====  =====================================================================

A live batch, all events of one topic and publisher, numbers big endian::

    0xC1 | version u8 = 1 | name length u8 | publisher | epoch u64 | first sequence u64 | count u16
         | msgpack array of CloudEvents: 0xDD, count u32, event, event, ...

Live events in JSON carry ``sequence`` and ``epoch`` as extension attributes instead.
docs/wire.md shows golden frames; old frames decode for ever.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from datetime import datetime
from types import NoneType
from typing import TYPE_CHECKING, Any

import msgspec

from mesh.errors import EventTooLargeError, FrameError, PayloadError
from mesh.events import Event, declaration_of

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH_MARK = 0xC1
BATCH_VERSION = 1
MAX_EVENT_BYTES = 256 * 1024
#: A batch is closed at this size; a single larger event travels alone.
MAX_BATCH_BYTES = 64 * 1024
MAX_BATCH_EVENTS = 64
#: What a socket accepts at all.
MAX_FRAME_BYTES = MAX_EVENT_BYTES + MAX_BATCH_BYTES + 1024
MAX_DEPTH = 32
MAX_ITEMS = 10_000

_HEAD = struct.Struct(">BBB")
_TAIL = struct.Struct(">QQH")
_ARRAY32 = struct.Struct(">BI")

_SCALARS = frozenset({NoneType, bool, int, float, str, bytes, datetime})
_TEXT_ONLY = frozenset({str})

_packer = msgspec.msgpack.Encoder()
_json = msgspec.json.Encoder()
_unpack_batch = msgspec.msgpack.Decoder(list[Event]).decode
_unpack_raw = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode
_unpack_event = msgspec.msgpack.Decoder(Event).decode
_force = msgspec.structs.force_setattr


class _Sequenced(Event, frozen=True, omit_defaults=True, tag_field="specversion", tag="1.0"):
    """A live event in JSON: the numbers of the loss ledger ride along."""

    sequence: int | None = None
    epoch: int | None = None


_parse_event = msgspec.json.Decoder(_Sequenced).decode
_parse_batch = msgspec.json.Decoder(list[_Sequenced]).decode


@dataclass(slots=True)
class Batch:
    """Events of one topic as they came in one frame."""

    topic: str
    events: list[Event]
    publisher: str = ""
    #: When the publisher's numbering began (ns since 1970); 0: not numbered.
    epoch: int = 0
    #: Sequence number of the first event, and how many numbers the frame covers.
    first: int = 0
    count: int = 0
    #: What could not be decoded: (reason, detail, bytes).
    rejected: list[tuple[str, str, bytes]] | None = None


def encode_payload(topic: str, data: Any) -> Any:
    """
    Check a payload against its type's declaration and give what travels as ``data``.

    Args:
        topic: The event type.
        data: A dict, or an instance of the declared schema.

    Returns:
        `data` itself when nothing is declared, else its encoded and verified form.

    Raises:
        PayloadError: Names the type, the field, what was expected and what it got.
    """
    schema = declaration_of(topic).schema
    if schema is None:
        if type(data) is dict:
            if _SCALARS.issuperset(map(type, data.values())) and _TEXT_ONLY.issuperset(
                map(type, data)
            ):
                return data
            return _checked(topic, data)
        return _plain(topic, data)
    return msgspec.Raw(validated(topic, schema, data))


def _plain(topic: str, data: Any) -> dict[str, Any]:
    """Turn an object into the dict it stands for."""
    if hasattr(data, "model_dump"):
        data = data.model_dump()
    try:
        plain = data if isinstance(data, dict) else msgspec.to_builtins(data)
    except TypeError as error:
        raise PayloadError(f"payload of {topic!r} cannot travel: {error}") from error
    if not isinstance(plain, dict):
        raise PayloadError(
            f"payload of {topic!r} must be an object (dict, Struct, dataclass, pydantic model),"
            f" got {type(data).__name__}"
        )
    return _checked(topic, plain)


def _checked(topic: str, data: dict[str, Any]) -> dict[str, Any]:
    try:
        _walk(data, 1, [0])
    except FrameError as error:
        raise PayloadError(f"payload of {topic!r}: {error}") from None
    return data


def validated(topic: str, schema: type[Any], data: Any) -> bytes:
    """
    Encode a payload and prove that its schema takes it.

    Encoding first and decoding what was encoded proves exactly what the other side will see, for
    every kind of schema, at half the cost of a conversion followed by an encoding.

    Raises:
        PayloadError: Names the type, the field, what was expected and what it got.
    """
    if hasattr(data, "model_dump"):
        data = data.model_dump(mode="json")
    try:
        raw = _packer.encode(data)
        _schema_decoder(schema)(raw)
    except (msgspec.ValidationError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise PayloadError(
            f"payload of {topic!r} does not fit {schema.__qualname__}: {error}"
        ) from error
    return raw


_decoders: dict[type[Any], Callable[[bytes], Any]] = {}


def _schema_decoder(schema: type[Any]) -> Callable[[bytes], Any]:
    decode = _decoders.get(schema)
    if decode is None:
        decode = _decoders[schema] = _make_decoder(schema)
    return decode


def _make_decoder(schema: type[Any]) -> Callable[[bytes], Any]:
    if hasattr(schema, "model_validate"):
        unpack = msgspec.msgpack.Decoder(dict[str, Any]).decode

        def decode_model(raw: bytes) -> Any:
            return schema.model_validate(unpack(raw))

        return decode_model
    return msgspec.msgpack.Decoder(schema).decode


def convert_payload(data: dict[str, Any], schema: type[Any]) -> Any:
    """
    Decode a received payload into the class a handler asks for.

    Raises:
        PayloadError: The payload does not fit.
    """
    try:
        if hasattr(schema, "model_validate"):
            return schema.model_validate(data)
        return msgspec.convert(data, schema, strict=False)
    except (msgspec.ValidationError, ValueError) as error:
        raise PayloadError(f"payload does not fit {schema.__qualname__}: {error}") from error


def encode_event(event: Event, buffer: bytearray) -> None:
    """
    Append an event in msgpack to a buffer.

    Raises:
        PayloadError: Something in the payload cannot travel; the buffer is as it was.
        EventTooLargeError: The event is over the size limit; the buffer is as it was.
    """
    before = len(buffer)
    try:
        _packer.encode_into(event, buffer, -1)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        del buffer[before:]
        raise PayloadError(f"payload of {event.type!r} cannot travel: {error}") from error
    if len(buffer) - before > MAX_EVENT_BYTES:
        size = len(buffer) - before
        del buffer[before:]
        raise EventTooLargeError(
            f"event {event.type!r} has {size} bytes, the limit is {MAX_EVENT_BYTES};"
            " send a reference to the data instead"
        )


def batch_prefix(publisher: str) -> bytes:
    """Make the fixed start of a publisher's live batches."""
    name = publisher.encode()
    if len(name) > 255:
        raise PayloadError(f"agent name {publisher[:40]!r}... has {len(name)} bytes, limit 255")
    return _HEAD.pack(BATCH_MARK, BATCH_VERSION, len(name)) + name


def seal_batch(prefix: bytes, epoch: int, first: int, count: int, events: bytearray) -> bytes:
    """Put header and encoded events of a live batch together."""
    return b"".join(
        (prefix, _TAIL.pack(epoch, first, count), _ARRAY32.pack(0xDD, count), events)
    )


def encode_json(event: Event, *, epoch: int | None = None, sequence: int | None = None) -> bytes:
    """
    Give an event as one structured-mode CloudEvent in JSON.

    Raises:
        PayloadError: Something in the payload cannot travel.
    """
    fields = {name: getattr(event, name) for name in Event.__struct_fields__}
    if isinstance(fields["data"], msgspec.Raw):
        fields["data"] = msgspec.msgpack.decode(fields["data"])
    try:
        return _json.encode(_Sequenced(**fields, sequence=sequence, epoch=epoch))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise PayloadError(f"payload of {event.type!r} cannot travel: {error}") from error


def encode_single(event: Event) -> bytes:
    """Give an event as one msgpack CloudEvent without numbering."""
    buffer = bytearray()
    encode_event(event, buffer)
    return bytes(buffer)


def is_frame(frame: bytes) -> bool:
    """Say cheaply, without decoding, whether bytes can be a frame at all (the forwarder asks)."""
    if not frame:
        return False
    mark = frame[0]
    if mark == BATCH_MARK:
        return (
            len(frame) > _HEAD.size
            and frame[1] == BATCH_VERSION
            and len(frame) >= _HEAD.size + frame[2] + _TAIL.size + _ARRAY32.size
        )
    return mark in (0x7B, 0x5B, 0xDE, 0xDF) or 0x80 <= mark <= 0x8F


def decode_frame(topic: str, frame: bytes) -> Batch:
    """
    Decode what a fabric delivered.

    Args:
        topic: The topic it came under.
        frame: Any bytes at all; nothing in them is trusted.

    Returns:
        The events that are sound; `rejected` holds the others of the same frame.

    Raises:
        FrameError: The frame as a whole is no frame; `reason` is for the counters.
    """
    if not frame:
        raise FrameError("undecodable", "an empty frame")
    if len(frame) > MAX_FRAME_BYTES:
        raise FrameError("too_large", f"{len(frame)} bytes, the limit is {MAX_FRAME_BYTES}")
    mark = frame[0]
    if mark == BATCH_MARK:
        return _decode_batch(topic, frame)
    if mark in (0x7B, 0x5B):
        return _decode_json(topic, frame)
    if 0x80 <= mark <= 0x8F or mark in (0xDE, 0xDF):
        return _accept(Batch(topic, []), [frame])
    raise FrameError("undecodable", f"first byte {mark:#04x} starts no known form")


def _decode_batch(topic: str, frame: bytes) -> Batch:
    if len(frame) < _HEAD.size:
        raise FrameError("undecodable", "the header of the batch is cut off")
    _, version, length = _HEAD.unpack_from(frame)
    if version != BATCH_VERSION:
        raise FrameError("unknown_version", f"batch version {version}, known: {BATCH_VERSION}")
    start = _HEAD.size + length
    body = start + _TAIL.size
    if len(frame) < body + _ARRAY32.size:
        raise FrameError("undecodable", "the header of the batch is cut off")
    try:
        publisher = frame[_HEAD.size : start].decode()
    except UnicodeDecodeError as error:
        raise FrameError("undecodable", f"publisher name: {error}") from None
    epoch, first, count = _TAIL.unpack_from(frame, start)
    batch = Batch(topic, [], publisher, epoch, first, count)
    events = memoryview(frame)[body:]
    try:
        decoded = _unpack_batch(events)
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return _decode_one_by_one(batch, events)
    if len(decoded) != count:
        raise FrameError("undecodable", f"{len(decoded)} events where the header says {count}")
    return _check_all(batch, decoded, len(frame))


def _check_all(batch: Batch, decoded: list[Event], size: int) -> Batch:
    """Check every event of a frame; the common case, all sound and flat, stays in C."""
    topic = batch.topic
    member = declaration_of(topic).member
    flat = _SCALARS.issuperset
    sound = batch.events
    plain = type(member) is str
    large = size > 2 * MAX_ITEMS
    for event in decoded:
        if (
            event.type != topic
            or not flat(map(type, event.data.values()))
            or (large and len(event.data) > MAX_ITEMS)
        ):
            try:
                _check_event(topic, event, size)
            except FrameError as error:
                _reject(batch, error, _json_or_nothing(event))
                continue
        if not plain:
            _force(event, "type", member)
        sound.append(event)
    return batch


def _check_event(topic: str, event: Event, size: int) -> None:
    if event.type != topic:
        raise FrameError("wrong_topic", f"an event of type {event.type!r:.80} under {topic!r}")
    if size > 2 * MAX_ITEMS or not _SCALARS.issuperset(map(type, event.data.values())):
        _walk(event.data, 1, [0])


def _decode_one_by_one(batch: Batch, body: memoryview) -> Batch:
    """Save the sound events of a batch of which some are broken."""
    try:
        raws = _unpack_raw(body)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise FrameError(_reason(error), str(error)) from None
    if len(raws) != batch.count:
        raise FrameError("undecodable", f"{len(raws)} events where the header says {batch.count}")
    return _accept(batch, [bytes(raw) for raw in raws])


def _accept(batch: Batch, raws: list[bytes]) -> Batch:
    member = declaration_of(batch.topic).member
    for raw in raws:
        try:
            if len(raw) > MAX_EVENT_BYTES:
                raise FrameError("too_large", f"{len(raw)} bytes, limit {MAX_EVENT_BYTES}")  # noqa: TRY301 - counted like the rest
            event = _unpack_event(raw)
            _check_event(batch.topic, event, len(raw))
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            _reject(batch, error, raw)
            continue
        _force(event, "type", member)
        batch.events.append(event)
    return batch


def _decode_json(topic: str, frame: bytes) -> Batch:
    try:
        parsed = _parse_batch(frame) if frame[0] == 0x5B else [_parse_event(frame)]
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise FrameError(_reason(error), str(error)) from None
    if len(parsed) > MAX_ITEMS:
        raise FrameError("too_many_items", f"{len(parsed)} events, the limit is {MAX_ITEMS}")
    batch = Batch(topic, [])
    member = declaration_of(topic).member
    for found in parsed:
        try:
            _check_event(topic, found, len(frame))
        except FrameError as error:
            _reject(batch, error, frame)
            continue
        fields = {name: getattr(found, name) for name in Event.__struct_fields__}
        batch.events.append(Event(**{**fields, "type": member}))
    if parsed and parsed[0].sequence is not None and parsed[0].epoch is not None:
        batch.publisher, batch.epoch = parsed[0].source_agent, parsed[0].epoch
        batch.first, batch.count = parsed[0].sequence, len(parsed)
    return batch


def _reject(batch: Batch, error: Exception, raw: bytes) -> None:
    if batch.rejected is None:
        batch.rejected = []
    batch.rejected.append((_reason(error), str(error), raw))


def _reason(error: Exception) -> str:
    if isinstance(error, FrameError):
        return error.reason
    if isinstance(error, RecursionError):
        return "too_deep"
    if isinstance(error, msgspec.ValidationError):
        return "unknown_version" if "specversion" in str(error) else "invalid"
    return "undecodable"


def _json_or_nothing(event: Event) -> bytes:
    try:
        return _json.encode(event)
    except (TypeError, ValueError, RecursionError):
        return b""


def _walk(value: Any, depth: int, items: list[int]) -> None:
    """Hold a payload against the limits on depth and number of items."""
    if depth > MAX_DEPTH:
        raise FrameError("too_deep", f"nested deeper than {MAX_DEPTH}")
    items[0] += len(value)
    if items[0] > MAX_ITEMS:
        raise FrameError("too_many_items", f"more than {MAX_ITEMS} items")
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise FrameError("invalid", f"key {key!r:.40} is {type(key).__name__}, not text")
        children = value.values()
    else:
        children = value
    for child in children:
        if isinstance(child, (dict, list, tuple)):
            _walk(child, depth + 1, items)
