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

    0xC1 | version u8 | name length u8 | publisher | epoch u64 | first sequence u64 | count u16
         | body

The body of version 1 is a msgpack array of CloudEvents, that of version 2 a table of them
(`mesh.columns`), which is what a sender makes of more than a few.

Live events in JSON carry ``sequence`` and ``epoch`` as extension attributes instead.
docs/wire.md shows golden frames; old frames decode for ever.
"""

from __future__ import annotations

import contextlib
import functools
import struct
from typing import TYPE_CHECKING, Any, cast

import msgspec

from mesh import columns
from mesh.batch import Batch, accept, all_sound, check_each, check_event, reason_of, type_of
from mesh.errors import FrameError, PayloadError
from mesh.events import Event, EventType, OwnEvent, declaration_of
from mesh.payloads import (
    ARRAY32,
    BEYOND_64_BITS,
    CANNOT,
    MAX_EVENT_BYTES,
    MAX_ITEMS,
    cannot_travel,
    refuse_numbers,
    too_large,
)
from mesh.schemas import is_closed

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

BATCH_MARK = 0xC1
#: Versions of a batch: its events one after the other, or as a table.
ROWS, TABLE = 1, 2
#: Fewer events than this travel one after the other: a table of them costs more than it saves.
_FEW, _FEW_PLAIN = 64, 12
#: A batch is closed at this size; a single larger event travels alone.
MAX_BATCH_BYTES = 64 * 1024
MAX_BATCH_EVENTS = 512
#: What a socket accepts at all.
MAX_FRAME_BYTES = MAX_EVENT_BYTES + MAX_BATCH_BYTES + 1024
#: No honest numbering gets there: at a million events a second it takes nine years.
MAX_SEQUENCE = 2**48
_MAX_EPOCH = 2**63

_HEAD = struct.Struct(">BBB")
_TAIL = struct.Struct(">QQH")
_JOINED = _HEAD.pack(BATCH_MARK, ROWS, 0)

_packer = msgspec.msgpack.Encoder()
_json = msgspec.json.Encoder()
_unpack_builtin = msgspec.msgpack.Decoder(list[Event]).decode
_unpack_own: Callable[[Any], list[Event]] = msgspec.msgpack.Decoder(list[OwnEvent]).decode  # type: ignore[assignment]  # twins
_unpack_raw = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode
_force = msgspec.structs.force_setattr


class _Sequenced(OwnEvent, frozen=True, omit_defaults=True, tag_field="specversion", tag="1.0"):
    """A live event in JSON: the numbers of the loss ledger ride along."""

    sequence: int | None = None
    epoch: int | None = None


_parse_event = msgspec.json.Decoder(_Sequenced).decode
_parse_batch = msgspec.json.Decoder(list[_Sequenced]).decode
_parse_raws = msgspec.json.Decoder(list[msgspec.Raw]).decode


class Batcher:
    """
    Makes one publisher's live batches.

    Args:
        publisher: Its name.

    Raises:
        PayloadError: The name is too long.
    """

    def __init__(self, publisher: str) -> None:
        """Prepare what all its batches begin with."""
        name = publisher.encode()
        if len(name) > 255:
            raise PayloadError(f"agent name {publisher[:40]!r}... has {len(name)} bytes, limit 255")
        self._rows = _HEAD.pack(BATCH_MARK, ROWS, len(name)) + name
        self._table = _HEAD.pack(BATCH_MARK, TABLE, len(name)) + name

    def encode(
        self, topic: str, epoch: int, first: int, events: list[Event], *, plain: bool = False
    ) -> bytes:
        """
        Put a live batch together.

        Args:
            topic: The events' type.
            epoch: When their numbering began.
            first: The number of the first.
            events: Their payloads come from a `payload_encoder`.
            plain: See `columns.tabulate`.
        """
        count = len(events)
        if count >= (_FEW_PLAIN if plain else _FEW):
            return self.encode_table(columns.tabulate(topic, events, plain=plain), epoch, first)
        return b"".join((self._rows, _TAIL.pack(epoch, first, count), _packer.encode(events)))

    def encode_table(self, table: columns.Table, epoch: int, first: int) -> bytes:
        """Put a live batch together of events that are a table already."""
        tail = _TAIL.pack(epoch, first, len(table.id))
        return b"".join((self._table, tail, columns.pack(table)))


def join_frames(frames: Sequence[bytes]) -> bytes:
    """Make one batch of events that were encoded alone, so that they are decoded in one go."""
    count = len(frames)
    return b"".join((_JOINED, _TAIL.pack(0, 1, count), ARRAY32.pack(0xDD, count), *frames))


def encode_json(event: Event, *, epoch: int | None = None, sequence: int | None = None) -> bytes:
    """
    Give an event as one structured-mode CloudEvent in JSON.

    Raises:
        PayloadError: Something in the payload cannot travel.
        EventTooLargeError: The event is over the size limit, as JSON.
    """
    fields = {name: getattr(event, name) for name in Event.__struct_fields__}
    refuse_numbers(event.type, fields["data"])
    try:
        packed = _json.encode(_Sequenced(**fields, sequence=sequence, epoch=epoch))
    except CANNOT as error:
        raise cannot_travel(event.type, error) from error
    if len(packed) > MAX_EVENT_BYTES:
        raise too_large(event.type, len(packed), MAX_EVENT_BYTES)
    return packed


def encode_single(event: Event) -> bytes:
    """
    Give an event as one msgpack CloudEvent without numbering.

    Raises:
        PayloadError: Something in the payload cannot travel.
        EventTooLargeError: The event is over the size limit.
    """
    try:
        packed = _packer.encode(event)
    except CANNOT as error:
        raise cannot_travel(event.type, error) from error
    if len(packed) > MAX_EVENT_BYTES:
        raise too_large(event.type, len(packed), MAX_EVENT_BYTES)
    return packed


def encode_singles(events: Sequence[Event]) -> list[bytes]:
    """
    Do for many events what `encode_single` does for one.

    Raises:
        PayloadError: Something in a payload cannot travel.
        EventTooLargeError: An event is over the size limit.
    """
    try:
        # In C: a call in Python for each costs as much as its encoding
        packed = list(map(_packer.encode, events))
    except CANNOT:
        return list(map(encode_single, events))
    if len(max(packed, key=len, default=b"")) > MAX_EVENT_BYTES:
        return list(map(encode_single, events))
    return packed


def is_frame(frame: bytes) -> bool:
    """Say cheaply, without decoding, whether bytes can be a frame at all (the forwarder asks)."""
    if not frame:
        return False
    mark = frame[0]
    if mark == BATCH_MARK:
        return (
            len(frame) > _HEAD.size
            and frame[1] in (ROWS, TABLE)
            and len(frame) > _HEAD.size + frame[2] + _TAIL.size
        )
    return mark in (0x7B, 0x5B, 0xDE, 0xDF) or 0x80 <= mark <= 0x8F


@functools.cache
def _bounds_itself(schema: Any) -> bool:
    """Say whether msgspec decodes into a schema, and that keeps to the limits by itself."""
    try:
        msgspec.msgpack.Decoder(schema)
    except TypeError:  # such as `x: str | datetime`: both are text
        return False
    return is_closed(schema)


@functools.cache
def _typed_unpacker(schema: Any, *, builtin: bool) -> Callable[[Any], list[Event]] | None:
    """Make a decoder that checks payloads against a schema in C; None if that is not enough."""
    if not _bounds_itself(schema):
        return None
    kind = msgspec.defstruct(
        "Event",
        [("data", schema)],
        bases=(Event if builtin else OwnEvent,),
        module=__name__,
        frozen=True,
        gc=False,
        eq=False,
        omit_defaults=True,
    )
    return msgspec.msgpack.Decoder(list[kind]).decode  # type: ignore[valid-type]


def decode_frame(topic: str, frame: bytes, schema: type[Any] | None = None) -> Batch:
    """
    Decode what a fabric delivered.

    Args:
        topic: The topic it came under.
        frame: Any bytes at all; nothing in them is trusted.
        schema: What all handlers want their payloads decoded into. A wish: where payloads do not
            fit it they are decoded as dicts.

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
        return _decode_batch(topic, frame, schema)
    if mark in (0x7B, 0x5B):
        return _decode_json(topic, frame)
    if 0x80 <= mark <= 0x8F or mark in (0xDE, 0xDF):
        return accept(Batch(topic, []), [frame])
    raise FrameError("undecodable", f"first byte {mark:#04x} starts no known form")


def _decode_batch(topic: str, frame: bytes, schema: type[Any] | None) -> Batch:
    if len(frame) < _HEAD.size:
        raise FrameError("undecodable", "the header of the batch is cut off")
    _, version, length = _HEAD.unpack_from(frame)
    if version not in (ROWS, TABLE):
        raise FrameError("unknown_version", f"batch version {version}, known: {ROWS} and {TABLE}")
    start = _HEAD.size + length
    body = start + _TAIL.size
    if len(frame) <= body:
        raise FrameError("undecodable", "the header of the batch is cut off")
    try:
        publisher = frame[_HEAD.size : start].decode()
    except UnicodeDecodeError as error:
        raise FrameError("undecodable", f"publisher name: {error}") from None
    epoch, first, count = _TAIL.unpack_from(frame, start)
    _check_numbers(epoch, first, count)
    batch = Batch(topic, [], publisher, epoch, first, count)
    decode = _decode_rows if version == ROWS else _decode_table
    return decode(batch, memoryview(frame)[body:], len(frame), schema)


def _decode_table(batch: Batch, body: memoryview, size: int, schema: type[Any] | None) -> Batch:
    topic, count = batch.topic, batch.count
    member = declaration_of(topic).member
    if schema is not None and _bounds_itself(cast("Hashable", schema)):
        with contextlib.suppress(msgspec.MsgspecError, ValueError):
            batch.events = columns.unpack(body, count, topic, member, schema)
            batch.schema = schema
            return batch
    try:
        events = columns.unpack(body, count, topic, member, dict[str, Any])
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return accept(batch, _rows_of(body, count))
    if all_sound(events, member, size):
        batch.events = events
        return batch
    return check_each(batch, events, member, size)


def _rows_of(body: memoryview, count: int) -> list[bytes]:
    try:
        return columns.rows_of(body, count)
    except FrameError:
        raise
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise FrameError(reason_of(error), str(error)) from None


def _decode_rows(batch: Batch, events: memoryview, size: int, schema: type[Any] | None) -> Batch:
    topic, count = batch.topic, batch.count
    member = declaration_of(topic).member
    builtin = type(member) is EventType
    typed = None if schema is None else _typed_unpacker(cast("Hashable", schema), builtin=builtin)
    decoded: list[Event] | None = None
    if typed is not None:
        with contextlib.suppress(msgspec.MsgspecError, ValueError):
            decoded = typed(events)
    if decoded is None:
        typed = None
        try:
            decoded = _unpack_builtin(events) if builtin else _unpack_own(events)
        except (msgspec.MsgspecError, RecursionError, ValueError):
            return _decode_one_by_one(batch, events)
    if len(decoded) != count:
        raise FrameError("undecodable", f"{len(decoded)} events where the header says {count}")
    if (typed is not None and {member}.issuperset(map(type_of, decoded))) or (
        typed is None and all_sound(decoded, member, size)
    ):
        batch.events = decoded
        batch.schema = None if typed is None else schema
        if type(member) not in (EventType, str):
            for event in decoded:
                _force(event, "type", member)
        return batch
    return check_each(batch, decoded, member, size)


def _check_numbers(epoch: int, first: int, count: int) -> None:
    """Refuse numbers that no publisher gives: the ledger computes with them."""
    if not (0 <= epoch < _MAX_EPOCH and 0 < first and 0 < count and first + count < MAX_SEQUENCE):
        raise FrameError("invalid", f"epoch {epoch}, numbers from {first}, {count} of them")


def _decode_one_by_one(batch: Batch, body: memoryview) -> Batch:
    """Save the sound events of a batch of which some are broken."""
    try:
        raws = _unpack_raw(body)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise FrameError(reason_of(error), str(error)) from None
    if len(raws) != batch.count:
        raise FrameError("undecodable", f"{len(raws)} events where the header says {batch.count}")
    return accept(batch, [bytes(raw) for raw in raws])


def _decode_json(topic: str, frame: bytes) -> Batch:
    try:
        parsed = _parse_json(frame)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise FrameError(reason_of(error), str(error)) from None
    batch = Batch(topic, [])
    member = declaration_of(topic).member
    for found in parsed:
        try:
            if isinstance(found, Exception):
                raise found
            check_event(topic, found, len(frame))
            fields = {name: getattr(found, name) for name in Event.__struct_fields__}
            event = Event(**{**fields, "type": member})
            _check_integers(event)
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            batch.reject(error, frame)
            continue
        batch.events.append(event)
    first = parsed[0] if parsed else None
    if isinstance(first, _Sequenced) and first.sequence is not None and first.epoch is not None:
        _check_numbers(first.epoch, first.sequence, len(parsed))
        batch.publisher, batch.epoch = first.source_agent, first.epoch
        batch.first, batch.count = first.sequence, len(parsed)
    return batch


def _parse_json(frame: bytes) -> Sequence[_Sequenced | Exception]:
    """Give the events of a frame, and what is the matter with those that are none."""
    if frame[0] != 0x5B:
        if len(frame) > MAX_EVENT_BYTES:
            raise FrameError("too_large", f"{len(frame)} bytes, limit {MAX_EVENT_BYTES}")
        return [_parse_event(frame)]
    with contextlib.suppress(msgspec.ValidationError, UnicodeDecodeError, RecursionError):
        return _at_most(_parse_batch(frame))
    return [_parse_or_error(raw) for raw in _at_most(_parse_raws(frame))]


def _at_most(parsed: list[Any]) -> list[Any]:
    if len(parsed) > MAX_ITEMS:
        raise FrameError("too_many_items", f"{len(parsed)} events, the limit is {MAX_ITEMS}")
    return parsed


def _parse_or_error(raw: msgspec.Raw) -> _Sequenced | Exception:
    try:
        return _parse_event(raw)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        return error


def _check_integers(event: Event) -> None:
    """Refuse what only JSON can say: it could be neither published on nor kept."""
    try:
        _packer.encode(event)
    except OverflowError:
        raise FrameError("invalid", BEYOND_64_BITS) from None
