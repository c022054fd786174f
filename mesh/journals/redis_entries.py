"""Entries of streams: how they are named, and what is in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

#: A place in a stream: milliseconds, and a number within them.
Spot = tuple[int, int]

START: Spot = (0, 0)


class Entry(NamedTuple):
    """An event as it lies in a stream."""

    spot: Spot
    #: The spot in Redis's own words.
    position: str
    id: str
    frame: bytes


class _Named(msgspec.Struct):
    """All that is asked of a CloudEvent here."""

    id: str


_named_in_json = msgspec.json.Decoder(_Named).decode
_named_in_msgpack = msgspec.msgpack.Decoder(_Named).decode


def spot_of(position: str | bytes) -> Spot:
    """Read a position."""
    text = position if isinstance(position, str) else position.decode()
    ms, _, seq = text.partition("-")
    return int(ms), int(seq or 0)


def position_of(spot: Spot) -> str:
    """Write a position."""
    return f"{spot[0]}-{spot[1]}"


def read_entries(replied: Sequence[Sequence[Any]]) -> list[Entry]:
    """Read what XRANGE, XREAD and XCLAIM give of one stream."""
    entries = []
    for position, fields in replied:
        text = position.decode()
        ms, _, seq = text.partition("-")
        if len(fields) == 4 and fields[0] == b"id" and fields[2] == b"event":
            entries.append(Entry((int(ms), int(seq)), text, fields[1].decode(), fields[3]))
        elif fields is not None:
            entries.append(_stranger(text, dict(zip(fields[::2], fields[1::2], strict=False))))
    return entries


def _stranger(position: str, fields: dict[bytes, bytes]) -> Entry:
    """Read an entry that a plain client has added; what is no event goes to its handler's agent."""
    frame = fields.get(b"event", b"")
    try:
        name = fields[b"id"].decode() if b"id" in fields else _id_of(frame)
    except UnicodeDecodeError:
        name = ""
    return Entry(spot_of(position), position, name or position, frame)


def _id_of(frame: bytes) -> str:
    try:
        decode = _named_in_json if frame[:1] == b"{" else _named_in_msgpack
        return decode(frame).id
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return ""
