"""Seeded garbage: random, mutated and cunning frames for the sockets of a mesh."""

from __future__ import annotations

import random
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from mesh import codec, columns
from mesh.events import Event

if TYPE_CHECKING:
    from collections.abc import Callable

HEARD, TYPED = "fuzz.heard", "fuzz.typed"
_PRIVATE = re.compile(rb"_[A-Za-z0-9_.:-]{0,127}\0")
_LETTERS = b"abcXYZ0189_.:-"
_MARKS = b"\xc1{[\x80\x88\x8f\xde\xdf"
_EDGES = (0, 1, 2**16 - 1, 2**31, 2**32 - 1, 2**48, 2**63 - 1, 2**63, 2**64 - 1)

_SOUND: dict[str, Any] = {
    "specversion": "1.0",
    "type": HEARD,
    "data": {"n": 1},
    "source": "stranger",
    "time": "2026-01-02T03:04:05Z",
    "correlationid": "c",
    "id": "i",
}
#: Values that an attribute may come with; each was chosen because somebody may compute with it.
_ODD: dict[str, list[Any]] = {
    "specversion": ["0.3", "1.1", 1, None, ""],
    "type": [TYPED, "", None, 7, "fuzz.heard\0", "x" * 300],
    "data": [
        None, [], 7, "text", {}, {"n": 2**63}, {"n": 1e308}, {"ü": "\U0001f600"}, {"\0": "\0"},
    ],
    "source": ["", "x" * 250, "x" * 5000, "a\0b", "\n\x1b[31m", None, 7, "(others)"],
    "time": [
        "0001-01-01T00:00:00", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z",
        "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "2026-01-02T03:04:05", "now",
        0, None,
    ],
    "correlationid": ["", "x" * 10_000, None, 7],
    "id": ["", "x" * 10_000, None, 7],
    "partitionkey": ["", "x" * 10_000, "\0", 7],
    "expirytime": [
        "0001-01-01T00:00:00", "0001-01-01T00:00:00Z", "2020-01-01T00:00:00+05:00",
        "9999-12-31T23:59:59Z", 7,
    ],
    "traceparent": ["", "00-00-00-00", "x" * 10_000, "00-" + "0" * 32 + "-" + "0" * 16 + "-01", 7],
    "replyto": ["", "_reply.x", "no topic", "x" * 10_000, 7],
    "hops": [-1, 2**31, 2**63, 2**64, 1e9, "1", None],
    "sequence": [*_EDGES, -1, 2**70, 1.5, "1"],
    "epoch": [*_EDGES, -1, 2**70, 1.5, "1"],
}  # fmt: skip


def is_private(message: bytes) -> bool:
    """Say whether a message is on a topic of the mesh's own, which is passed on unseen."""
    return _PRIVATE.match(message) is not None


class Frames:
    """
    Makes messages as they are thrown at the forwarder: mostly ``topic 0x00 frame``.

    Args:
        seed: The same seed gives the same messages.
    """

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._sound = [(topic, frame) for topic in (HEARD, TYPED) for frame in _sound_frames(topic)]
        self._kinds: list[Callable[[], bytes]] = []
        weights = []
        for make, weight in (
            (self._noise, 8),
            (self._bad_topic, 8),
            (self._unheard, 8),
            (self._private, 2),
            (self._nonsense, 16),
            (self._mutated, 36),
            (self._cunning, 16),
            (self._good, 5.9),
            (self._huge, 0.1),
        ):
            self._kinds.append(make)
            weights.append(weight)
        self._weights = weights

    def take(self, count: int) -> list[bytes]:
        """Make the next messages."""
        kinds = self._chance.choices(self._kinds, self._weights, k=count)
        return [make() for make in kinds]

    def subscription(self, number: int) -> bytes:
        """Make a message as a subscriber sends it; no two are alike."""
        chance = self._chance
        mark = bytes([chance.choice((1, 1, 1, 2, 0x41, 0xFF))])
        key = b"fuzz.sub.%d" % number
        kind = chance.randrange(6)
        if kind == 0:
            key += chance.randbytes(chance.randrange(40))
        elif kind == 1:
            key += b"\0" + chance.randbytes(2)
        elif kind == 2:
            key += b"x" * chance.choice((100, 129, 5000, 60_000 if number % 500 == 0 else 300))
        return mark + key + (b"\0" if kind > 2 else b"")

    def datagram(self) -> bytes:
        """Make a datagram that is no beat."""
        chance = self._chance
        kind = chance.randrange(4)
        if kind == 0:
            return chance.randbytes(chance.randrange(6000))
        beat = {"name": "hearer", "pid": 1, "seq": 1, "state": "ready", "mono_s": 1.0}
        if kind == 1:  # well made, but the kernel knows that it comes from another process
            return msgspec.msgpack.encode(beat)
        if kind == 2:
            beat[chance.choice(list(beat))] = chance.choice((None, 2**63, "\0", [], -1, "x" * 5000))
            return msgspec.msgpack.encode({**beat, "pid": 1})
        return self._mutate(msgspec.msgpack.encode(beat))

    # -- kinds ---------------------------------------------------------------------------------

    def _noise(self) -> bytes:
        return self._chance.randbytes(self._chance.randrange(200))

    def _bad_topic(self) -> bytes:
        chance = self._chance
        topic = bytearray(self._topic(1, 40))
        topic[chance.randrange(len(topic))] = chance.choice(b" /\n\x80\xff\t*>")
        if chance.random() < 0.1:
            topic = bytearray(b"x" * chance.choice((129, 500)))
        return bytes(topic) + b"\0" + chance.choice(self._sound)[1]

    def _unheard(self) -> bytes:
        topic = b"fuzz." + self._topic(1, 60)
        return topic + b"\0" + self._chance.choice(self._sound)[1]

    def _private(self) -> bytes:
        return b"_" + self._topic(0, 40) + b"\0" + self._noise()

    def _nonsense(self) -> bytes:
        """Valid envelope, random inside."""
        chance = self._chance
        return self._heard() + bytes([chance.choice(_MARKS)]) + self._noise()

    def _mutated(self) -> bytes:
        topic, frame = self._chance.choice(self._sound)
        return topic.encode() + b"\0" + self._mutate(frame)

    def _cunning(self) -> bytes:
        """Well-formed, with values that nobody expects."""
        chance = self._chance
        fields = dict(_SOUND)
        for name in chance.sample(list(_ODD), chance.randint(1, 3)):
            fields[name] = chance.choice(_ODD[name])
        if chance.random() < 0.1:
            del fields[chance.choice(list(fields))]
        topic = HEARD.encode() + b"\0"
        form = chance.randrange(4)
        if form == 0:
            return topic + _packed(fields)
        if form == 1:
            return topic + msgspec.json.encode(fields)
        if form == 2:
            return topic + msgspec.json.encode([fields] * chance.randint(0, 3))
        return topic + self._headed([_packed(fields)] * chance.randint(1, 3))

    def _good(self) -> bytes:
        topic, frame = self._chance.choice(self._sound)
        return topic.encode() + b"\0" + frame

    def _huge(self) -> bytes:
        """Too large, too deep, too many; all of them pass the socket's own limit."""
        chance = self._chance
        inside = chance.choice(
            (
                {"text": "x" * chance.choice((70_000, 262_000, 300_000))},
                {"many": [1] * 20_000},
                {"deep": _nested(chance.choice((31, 33, 200)))},
            )
        )
        deep = chance.randrange(3)
        if deep == 0:
            return self._heard() + b"[" * chance.choice((600, 100_000))
        if deep == 1:
            return self._heard() + b"\x81\xa4data" + b"\x91" * chance.choice((600, 100_000))
        return self._heard() + _packed({**_SOUND, "data": inside})

    # -- tools ---------------------------------------------------------------------------------

    def _heard(self) -> bytes:
        return (HEARD if self._chance.random() < 0.95 else TYPED).encode() + b"\0"

    def _topic(self, least: int, most: int) -> bytes:
        return bytes(self._chance.choices(_LETTERS, k=self._chance.randint(least, most)))

    def _headed(self, events: list[bytes]) -> bytes:
        """Put a batch's header before events, with numbers from the edges."""
        chance = self._chance
        count = chance.choice((len(events), len(events), *_EDGES)) & 0xFFFF
        array = chance.choice((count, len(events)))
        epoch, first = chance.choice(_EDGES), chance.choice(_EDGES)
        name = chance.choice((b"stranger", b"", b"\xff\xfe", b"a\0b", b"x" * 255))
        return b"".join(
            (
                b"\xc1\x01", bytes([len(name)]), name, epoch.to_bytes(8, "big"),
                first.to_bytes(8, "big"), count.to_bytes(2, "big"),
                b"\xdd", array.to_bytes(4, "big"), *events,
            )
        )  # fmt: skip

    def _mutate(self, frame: bytes) -> bytes:
        chance = self._chance
        changed = bytearray(frame)
        for _ in range(chance.choice((1, 1, 1, 2, 5))):
            if not changed:
                break
            at = chance.randrange(len(changed))
            kind = chance.randrange(6)
            if kind == 0:
                changed[at] ^= 1 << chance.randrange(8)
            elif kind == 1:
                changed[at] = chance.randrange(256)
            elif kind == 2:
                del changed[at:]
            elif kind == 3:
                changed[at:at] = chance.randbytes(chance.randint(1, 8))
            elif kind == 4:
                del changed[at : at + chance.randint(1, 8)]
            else:
                other = chance.choice(self._sound)[1]
                changed[at:] = other[chance.randrange(len(other)) :]
        return bytes(changed)


def _sound_frames(topic: str) -> list[bytes]:
    when = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    event = Event(topic, {"n": 1, "name": "one"}, "stranger", when, "c", "i", key="k")
    frames = [codec.encode_single(event), codec.encode_json(event)]
    frames.append(codec.encode_json(event, epoch=7, sequence=8))
    frames.append(b"[" + frames[1] + b"," + frames[1] + b"]")
    batcher = codec.Batcher("stranger")
    frames += [batcher.encode(topic, 7, 8, [event] * count) for count in (1, 3)]
    table = columns.tabulate(topic, [event] * 8, plain=False)
    frames.append(batcher.encode_table(table, 7, 8))
    return frames


def _packed(fields: dict[str, Any]) -> bytes:
    try:
        return msgspec.msgpack.encode(fields)
    except OverflowError:
        return msgspec.msgpack.encode({**fields, "hops": 2**63, "sequence": 0, "epoch": 0})


def _nested(depth: int) -> list[Any]:
    inside: list[Any] = []
    for _ in range(depth):
        inside = [inside]
    return inside
