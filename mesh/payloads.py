"""
What events carry: payloads checked against what their type declares, within limits, to bytes and
back.
"""

from __future__ import annotations

import math
import struct
from datetime import datetime
from itertools import chain
from typing import TYPE_CHECKING, Any

import msgspec

from mesh.errors import EventTooLargeError, FrameError, PayloadError
from mesh.events import declaration_of
from mesh.schemas import SCALARS, Schema, name_of, shape_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mesh.events import Event

MAX_EVENT_BYTES = 256 * 1024
#: What of it is kept for the envelope.
_ENVELOPE_BYTES = 4 * 1024
_MAX_PAYLOAD_BYTES = MAX_EVENT_BYTES - _ENVELOPE_BYTES
#: No text of the envelope (key, correlation id, ...) is longer.
MAX_TEXT_BYTES = 512
MAX_DEPTH = 32
MAX_ITEMS = 10_000

_TEXT_ONLY = frozenset({str})
#: An array whose length follows in four bytes.
ARRAY32 = struct.Struct(">BI")

_packer = msgspec.msgpack.Encoder()
_unpack: Callable[[Any], dict[str, Any]] = msgspec.msgpack.Decoder(dict[str, Any]).decode
#: JSON has such numbers, msgpack has not.
BEYOND_64_BITS = "it holds a whole number below -2**63 or above 2**64 - 1"
#: What msgspec and pydantic raise for data that cannot travel or does not fit.
CANNOT = (msgspec.ValidationError, TypeError, ValueError, OverflowError, RecursionError)


def payload_encoder(topic: str) -> Callable[[Any], Any]:
    """
    Make the function that checks payloads of a type and gives what travels as ``data``.

    Made once a type and publisher: what the type declares is then known without looking it up.

    Args:
        topic: The event type.

    Returns:
        A function of a payload (a dict, or an instance of the declared schema). What it gives is
        encoded: nobody can change it any more, and encoding the event cannot fail because of it. It
        raises PayloadError, which names the type, the field, what was expected and what it got, or
        EventTooLargeError.
    """
    schema = declaration_of(topic).schema
    if schema is not None:
        return _schema_encoder(topic, schema)
    flat = SCALARS.issuperset
    text = _TEXT_ONLY.issuperset
    pack, raw = _packer.encode, msgspec.Raw

    def encode(data: Any) -> msgspec.Raw:
        is_flat = type(data) is dict and flat(map(type, data.values())) and text(map(type, data))
        if not is_flat:
            if type(data) is raw:
                return data
            data = _plain(topic, data)
        try:
            packed = pack(data)
        except CANNOT as error:
            raise cannot_travel(topic, error) from error
        if not is_flat or len(packed) > 2 * MAX_ITEMS:
            _check_limits(topic, packed)
        return raw(packed)

    return encode


def _schema_encoder(topic: str, schema: Schema) -> Callable[[Any], msgspec.Raw]:
    types, proven_bytes = _proof_of(schema)
    proofs = [_make_decoder(each) for each in types]
    prove = proofs[0] if len(proofs) == 1 else _all_of(proofs)
    decode = _make_decoder(schema)
    pack, raw = _packer.encode, msgspec.Raw

    def encode(data: Any) -> msgspec.Raw:
        # Encoding first and decoding what was encoded proves exactly what the other side will see,
        # for every kind of schema, at half the cost of a conversion followed by an encoding
        try:
            packed = pack(data)
            prove(packed)
        except CANNOT:
            packed = _fitting(topic, schema, decode, data)
            _check_limits(topic, packed)
            return raw(packed)
        if len(packed) > proven_bytes:
            _check_limits(topic, packed)
        return raw(packed)

    return encode


def _proof_of(schema: Any) -> tuple[tuple[Any, ...], int]:
    """
    Give what a payload has to be decoded into, and up to how many bytes that proves the limits.

    What a schema does not name travels all the same, and can be anything: hence its strict twin.
    """
    shape = None if hasattr(schema, "model_validate") else shape_of(schema)
    if shape is None or not shape.is_object or shape.depth > MAX_DEPTH:
        return (schema,), 0
    # An item takes a byte at least
    proven_bytes = _MAX_PAYLOAD_BYTES if shape.items <= MAX_ITEMS else MAX_ITEMS
    return (shape.strict, schema) if shape.has_code else (shape.strict,), proven_bytes


def _all_of(proofs: Sequence[Callable[[bytes], Any]]) -> Callable[[bytes], None]:
    def prove(packed: bytes) -> None:
        for each in proofs:
            each(packed)

    return prove


def payloads_encoder(topic: str) -> Callable[[Sequence[Any]], list[Any]]:
    """
    Make the function that does for many payloads of a type what `payload_encoder`'s does for one.

    It raises the same errors, for the first payload that does not fit.
    """
    encode, schema = payload_encoder(topic), declaration_of(topic).schema
    types, proven_bytes = ((), 0) if schema is None else _proof_of(schema)
    if not proven_bytes:
        return lambda payloads: [encode(data) for data in payloads]
    prove_all = _all_of([msgspec.msgpack.Decoder(list[each]).decode for each in types])  # type: ignore[valid-type]
    pack, raw = _packer.encode, msgspec.Raw

    def encode_all(payloads: Sequence[Any]) -> list[msgspec.Raw]:
        # Three calls into C for all of them, instead of three for each
        try:
            packed = list(map(pack, payloads))
            prove_all(b"".join((ARRAY32.pack(0xDD, len(packed)), *packed)))
        except CANNOT:
            return [encode(data) for data in payloads]
        if len(max(packed, key=len, default=b"")) > proven_bytes:
            return [encode(data) for data in payloads]
        return list(map(raw, packed))

    return encode_all


def payloads_packer(topic: str) -> Callable[[Sequence[Any]], msgspec.Raw | None]:
    """
    Make the function that checks many payloads of a type and encodes them as one array, in C.

    It gives None where that does not do: then `payloads_encoder` finds out what is the matter.
    """
    schema = declaration_of(topic).schema
    if schema is None:
        return _pack_flat
    types, proven_bytes = _proof_of(schema)
    if not proven_bytes:
        return lambda payloads: None
    prove_all = _all_of([msgspec.msgpack.Decoder(list[each]).decode for each in types])  # type: ignore[valid-type]
    pack, raw = _packer.encode, msgspec.Raw

    def pack_all(payloads: Sequence[Any]) -> msgspec.Raw | None:
        try:
            packed = pack(payloads)
            if len(packed) > proven_bytes:
                return None
            prove_all(packed)
        except CANNOT:
            return None
        return raw(packed)

    return pack_all


def _pack_flat(payloads: Sequence[Any]) -> msgspec.Raw | None:
    if not _are_flat(payloads):
        return None
    try:
        packed = _packer.encode(payloads)
    except CANNOT:
        return None
    # As `payload_encoder` judges, for whatever of these bytes may belong to one
    if len(packed) > 2 * MAX_ITEMS and max(map(len, payloads)) > MAX_ITEMS:
        return None
    return msgspec.Raw(packed)


def _are_flat(payloads: Sequence[Any]) -> bool:
    """Say whether all are dicts that hold nothing else but scalars under texts."""
    try:
        return SCALARS.issuperset(
            map(type, chain.from_iterable(map(dict.values, payloads)))
        ) and _TEXT_ONLY.issuperset(map(type, chain.from_iterable(payloads)))
    except TypeError:  # one is no dict
        return False


def refuse_numbers(topic: str, value: Any) -> None:
    """
    Refuse what JSON would turn into null without a word, or carry to where nobody can keep it.

    Raises:
        PayloadError: There is a number that JSON has not, or one beyond 64 bits.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise PayloadError(
            f"payload of {topic!r} cannot travel as JSON: it holds {value}; use msgpack, or None"
        )
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise PayloadError(f"payload of {topic!r} cannot travel: {BEYOND_64_BITS}")
    if isinstance(value, (dict, list, tuple)):
        for each in value.values() if isinstance(value, dict) else value:
            refuse_numbers(topic, each)


def cannot_travel(topic: str, error: Exception) -> PayloadError:
    """Say that something in a payload has no form on the wire."""
    return PayloadError(f"payload of {topic!r} cannot travel: {error}")


def too_large(topic: str, size: int, limit: int = _MAX_PAYLOAD_BYTES) -> EventTooLargeError:
    """Say that an event is over the limit, and what to do."""
    return EventTooLargeError(
        f"event of type {str(topic)!r} has {size} bytes, the limit is {limit};"
        " send a reference to the data instead"
    )


def _fitting(topic: str, schema: Schema, decode: Callable[[bytes], Any], data: Any) -> bytes:
    """Encode what fits a schema; pydantic models, which msgspec does not know, have their turn."""
    try:
        packed = _packer.encode(data)
        decode(packed)
    except CANNOT as first:
        error: Exception = first
    else:
        return packed
    if hasattr(data, "model_dump"):
        try:
            packed = _packer.encode(data.model_dump(mode="json"))
            decode(packed)
        except CANNOT as second:
            error = second
        else:
            return packed
    raise PayloadError(f"payload of {topic!r} does not fit {name_of(schema)}: {error}") from error


def _plain(topic: str, data: Any) -> dict[str, Any]:
    """Turn an object into the dict it stands for."""
    if hasattr(data, "model_dump"):
        data = data.model_dump()
    try:
        plain = data if isinstance(data, dict) else msgspec.to_builtins(data)
    except CANNOT as error:
        raise cannot_travel(topic, error) from error
    if not isinstance(plain, dict):
        raise PayloadError(
            f"payload of {topic!r} must be an object (dict, Struct, dataclass, pydantic model),"
            f" got {type(data).__name__}"
        )
    return plain


def _check_limits(topic: str, packed: bytes) -> None:
    """Judge a payload as those who hear it do, by what is in the bytes that they get."""
    if len(packed) > _MAX_PAYLOAD_BYTES:
        raise too_large(topic, len(packed))
    try:
        data = _unpack(packed)
        if not SCALARS.issuperset(map(type, data.values())) or len(data) > MAX_ITEMS:
            walk(data, 1, [0])
    except (FrameError, *CANNOT) as error:
        raise PayloadError(f"payload of {topic!r}: {error}") from None


def _make_decoder(schema: Schema) -> Callable[[bytes], Any]:
    if hasattr(schema, "model_validate"):

        def decode_model(raw: bytes) -> Any:
            return schema.model_validate(_unpack(raw))

        return decode_model
    return msgspec.msgpack.Decoder(schema).decode


def convert_payload(data: dict[str, Any], schema: Schema) -> Any:
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
        raise PayloadError(f"payload does not fit {name_of(schema)}: {error}") from error


def check_text(name: str, value: Any) -> None:
    """
    Refuse a text of the envelope that cannot travel.

    Raises:
        PayloadError: It is no text, too long, or holds half a surrogate pair; the message names it.
    """
    if not isinstance(value, str):
        raise PayloadError(f"{name} must be text, got {type(value).__name__}: {value!r:.80}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise PayloadError(f"{name} cannot travel: {error}") from error
    if size > MAX_TEXT_BYTES:
        raise PayloadError(f"{name} has {size} bytes, the limit is {MAX_TEXT_BYTES}")


def check_envelope(event: Event) -> None:
    """
    Refuse an event that somebody else has made, if something beside its payload cannot travel.

    Raises:
        PayloadError: The message names the field and the value.
    """
    for name in ("source_agent", "id", "correlation_id"):
        check_text(name, getattr(event, name))
    for name in ("causation_id", "key", "traceparent", "reply_to"):
        if getattr(event, name) is not None:
            check_text(name, getattr(event, name))
    for name in ("timestamp", "expires_at"):
        moment = getattr(event, name)
        if moment is None and name == "expires_at":
            continue
        if not isinstance(moment, datetime) or moment.tzinfo is None:
            raise PayloadError(f"{name} must be a datetime with a time zone, got {moment!r:.80}")
    if type(event.hops) is not int or not 0 <= event.hops < 2**63:
        raise PayloadError(f"hops must be a whole number from 0 on, got {event.hops!r:.80}")


def walk(value: Any, depth: int, items: list[int]) -> None:
    """Hold a payload that was decoded against the limits on depth and number of items."""
    if depth > MAX_DEPTH:
        raise FrameError("too_deep", f"nested deeper than {MAX_DEPTH}")
    items[0] += len(value)
    if items[0] > MAX_ITEMS:
        raise FrameError("too_many_items", f"more than {MAX_ITEMS} items")
    if isinstance(value, dict):
        if not _TEXT_ONLY.issuperset(map(type, value)):
            key = next(each for each in value if type(each) is not str)
            raise FrameError("invalid", f"key {key!r:.40} is {type(key).__name__}, not text")
        children = value.values()
    else:
        children = value
    if SCALARS.issuperset(map(type, children)):
        return
    for child in children:
        if isinstance(child, (dict, list, tuple)):
            walk(child, depth + 1, items)
