"""
Events of one frame as they are decoded, the sound ones sorted from the others.

One broken event does not take its neighbours along, and each is accounted for: it is an event, or
it is rejected with a reason.
"""

from __future__ import annotations

from itertools import chain
from operator import attrgetter
from typing import Any

import msgspec

from mesh.errors import FrameError
from mesh.events import Event, OwnEvent, declaration_of, payload_of
from mesh.payloads import MAX_EVENT_BYTES, MAX_ITEMS, walk
from mesh.schemas import SCALARS
from mesh.values import State

_json = msgspec.json.Encoder()
_unpack_event = msgspec.msgpack.Decoder(OwnEvent).decode
_force = msgspec.structs.force_setattr
type_of = attrgetter("type")


class Batch(State):
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
    #: The class that all payloads were decoded into; None: dicts.
    schema: type[Any] | None = None

    def reject(self, error: Exception, raw: bytes) -> None:
        """Put an event aside that is not sound."""
        if self.rejected is None:
            self.rejected = []
        self.rejected.append((reason_of(error), str(error), raw))


def all_sound(decoded: list[Any], member: str, size: int) -> bool:
    """Check types and shapes of a whole batch without a Python-level loop: it is done per event."""
    payloads = list(map(payload_of, decoded))
    return (
        SCALARS.issuperset(map(type, chain.from_iterable(map(dict.values, payloads))))
        and {member}.issuperset(map(type_of, decoded))
        and (size <= 2 * MAX_ITEMS or max(map(len, payloads)) <= MAX_ITEMS)
    )


def check_each(batch: Batch, decoded: list[Any], member: str, size: int) -> Batch:
    """Sort the sound events of a batch from the others."""
    for event in decoded:
        try:
            check_event(batch.topic, event, size)
        except FrameError as error:
            batch.reject(error, _json_or_nothing(event))
            continue
        _force(event, "type", member)
        batch.events.append(event)
    return batch


def check_event(topic: str, event: Event, size: int) -> None:
    """
    Hold an event against its topic and the limits.

    Raises:
        FrameError: It is of another type, too deep, or has too many items.
    """
    if event.type != topic:
        raise FrameError("wrong_topic", f"an event of type {event.type!r:.80} under {topic!r}")
    if size > 2 * MAX_ITEMS or not SCALARS.issuperset(map(type, event.data.values())):
        walk(event.data, 1, [0])


def accept(batch: Batch, raws: list[bytes]) -> Batch:
    """Decode events that came alone, or of which some are broken."""
    member = declaration_of(batch.topic).member
    for raw in raws:
        try:
            if len(raw) > MAX_EVENT_BYTES:
                raise FrameError("too_large", f"{len(raw)} bytes, limit {MAX_EVENT_BYTES}")
            event = _unpack_event(raw)
            check_event(batch.topic, event, len(raw))
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            batch.reject(error, raw)
            continue
        _force(event, "type", member)
        batch.events.append(event)
    return batch


def reason_of(error: Exception) -> str:
    """Give the word under which an error is counted."""
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
