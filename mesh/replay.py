"""
A dead letter on its way back to the handler that failed.

It travels in the journal, on a private topic of the one group that it concerns (`replay_topic`), as
a CloudEvent whose data hold the event itself and what is known of its failures.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec

from mesh import codec
from mesh.deadletters import Attempt, Earlier, encode_letter
from mesh.errors import FrameError
from mesh.events import Event
from mesh.journal import Record
from mesh.payloads import MAX_EVENT_BYTES
from mesh.topics import check_topic, replay_topic

if TYPE_CHECKING:
    from mesh.deadletters import DeadLetter

#: In whose name the mesh replays.
REPLAYER = "mesh-dlq"
#: So much of the history travels: the newest, and of each the first words.
_MAX_HISTORY = 20
_MAX_WORDS = 300


class _Replay(msgspec.Struct, frozen=True, kw_only=True):
    """What stands in `data`."""

    topic: str
    handler: str | None
    #: The event, one CloudEvent.
    frame: bytes
    letter: str
    attempts: int
    first_at_s: float
    history: tuple[Attempt, ...]


def event_of(letter: DeadLetter) -> Event | None:
    """Give the event of a letter as it was; None when its bytes are no event."""
    if letter.event is None:
        return None
    if letter.frame is not None:
        with suppress(FrameError):
            decoded = codec.decode_frame(letter.topic, letter.frame).events
            if decoded:
                return decoded[0]
    fields: dict[str, Any] = dict(letter.event)
    for name in ("timestamp", "expires_at"):
        if fields.get(name) is not None:
            fields[name] = datetime.fromisoformat(fields[name])
    return Event(**fields)


def replay_record(letter: DeadLetter, event: Event, now: datetime) -> Record:
    """
    Make the record that brings an event back to the handler of a letter.

    Its id is made of the whole letter: replaying one a second time changes nothing, and a letter
    that failed anew is another one.

    Args:
        letter: As it was read.
        event: What is handled.
        now: When it is replayed.

    Raises:
        EventTooLargeError: The event leaves no room for the envelope around it.
        PayloadError: Something in the payload cannot travel.
        TopicError: The agent's name is none that can have replays.
    """
    topic = check_topic(replay_topic(letter.agent))
    identity = hashlib.blake2b(encode_letter(letter), digest_size=12).hexdigest()
    frame = codec.encode_single(event)
    history = _cut((*letter.history, Attempt(at_s=letter.at_s, error=letter.error)))
    # A large event leaves less room
    room = MAX_EVENT_BYTES - len(frame) - 2048
    while history and len(history) * (_MAX_WORDS + 32) > room:
        history = history[1:]
    data = _Replay(
        topic=letter.topic,
        handler=letter.handler,
        frame=frame,
        letter=letter.id,
        attempts=letter.attempts,
        first_at_s=letter.first_at_s,
        history=history,
    )
    wrapped = Event(
        type=topic,
        data=msgspec.to_builtins(data, builtin_types=(bytes,)),
        source_agent=REPLAYER,
        timestamp=now,
        correlation_id=event.correlation_id,
        id=identity,
        key=event.key,
    )
    return Record(topic, identity, codec.encode_single(wrapped), event.key)


def read_replay(wrapped: Event) -> tuple[Event, Earlier]:
    """
    Give the event that a record of `replay_record` brings, and what is known of its failures.

    Raises:
        FrameError: It brings none.
    """
    try:
        data = msgspec.convert(wrapped.data, _Replay)
    except msgspec.ValidationError as error:
        raise FrameError("undecodable", f"no replay: {error}") from None
    batch = codec.decode_frame(data.topic, data.frame)
    if batch.rejected:
        raise FrameError(batch.rejected[0][0], batch.rejected[0][1])
    if len(batch.events) != 1:
        raise FrameError("undecodable", f"{len(batch.events)} events in one replay")
    earlier = Earlier(
        letter=data.letter,
        handler=data.handler,
        attempts=data.attempts,
        first_at_s=data.first_at_s,
        history=data.history,
    )
    return batch.events[0], earlier


def _cut(history: tuple[Attempt, ...]) -> tuple[Attempt, ...]:
    newest = sorted(history, key=lambda each: each.at_s)[-_MAX_HISTORY:]
    return tuple(Attempt(at_s=each.at_s, error=each.error[:_MAX_WORDS]) for each in newest)
