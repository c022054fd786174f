"""Durable events as they come out of the journal: bytes, most of which are one event each."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mesh import codec
from mesh.errors import FrameError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mesh.deadletters import Earlier
    from mesh.events import Event
    from mesh.journal import Delivery


class Kept(NamedTuple):
    """Durable events of one topic on their way to the slots."""

    topic: str
    events: list[Event]
    deliveries: list[Delivery]
    #: Set when a dead letter is replayed.
    earlier: Earlier | None = None


def decode_all(topic: str, frames: Sequence[bytes], schema: type | None) -> list[Event] | None:
    """Decode events that were encoded alone in one go; None when one of them is not sound."""
    # JSON cannot be joined; msgpack maps can
    if any(frame[:1] in (b"{", b"[", b"") for frame in frames):
        return None
    try:
        batch = codec.decode_frame(topic, codec.join_frames(frames), schema)
    except FrameError:
        return None
    return batch.events if len(batch.events) == len(frames) else None


def decode_one(topic: str, frame: bytes) -> Event:
    """
    Decode one event.

    Raises:
        FrameError: It is none, or more than one.
    """
    batch = codec.decode_frame(topic, frame)
    if batch.rejected:
        raise FrameError(batch.rejected[0][0], batch.rejected[0][1])
    if len(batch.events) != 1:
        raise FrameError("undecodable", f"{len(batch.events)} events in one record")
    return batch.events[0]
