"""Entries of streams: how they are named, and what is in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from mesh.journal import Delivery

if TYPE_CHECKING:
    from collections.abc import Sequence

#: A place in a stream: milliseconds, and a number within them.
Spot = tuple[int, int]

Owner = TypeVar("Owner")

START: Spot = (0, 0)


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


def read_entries(
    replied: Sequence[Any],
    owner: Owner,
    topic: str,
    partition: int,
    count: int = 1,
    done: frozenset[str] = frozenset(),
    tenure: str = "",
) -> list[tuple[Spot, Owner, Delivery]]:
    """
    Read what XRANGE, XREAD and XCLAIM give of one stream.

    Args:
        replied: Positions and fields.
        owner: Whose entries they are; comes back beside each.
        topic: The stream's topic.
        partition: Its partition.
        count: How often they were handed out, this time included.
        done: Handlers that have settled them.
        tenure: The version of the group for which its owner got them.
    """
    entries = []
    for position, fields in replied:
        text = position.decode()
        ms, _, seq = text.partition("-")
        if len(fields) == 4 and fields[0] == b"id" and fields[2] == b"event":
            name, frame = fields[1].decode(), fields[3]
        else:
            name, frame = _stranger(text, fields)
        delivery = Delivery(text, topic, partition, name, frame, count, done, tenure)
        entries.append(((int(ms), int(seq)), owner, delivery))
    return entries


def _stranger(position: str, flat: Sequence[bytes]) -> tuple[str, bytes]:
    """Read an entry that a plain client has added; it may hold no event at all."""
    fields = dict(zip(flat[::2], flat[1::2], strict=False))
    frame = fields.get(b"event", b"")
    try:
        name = fields[b"id"].decode() if b"id" in fields else _id_of(frame)
    except UnicodeDecodeError:
        name = ""
    return name or position, frame


def _id_of(frame: bytes) -> str:
    try:
        decode = _named_in_json if frame[:1] == b"{" else _named_in_msgpack
        return decode(frame).id
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return ""
