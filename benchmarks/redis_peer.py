"""
The bare peers over Redis, each role a process of its own.

redis-py's asyncio client with hiredis, pub/sub: 100 events a pipeline (one by one when paced), one
event a message, decoded into a typed struct.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import time
from pathlib import Path

import msgspec
from redis.asyncio import Redis

_PIPELINE = 100
#: What a bare peer's event carries beside the padding.
_ENVELOPE_BYTES = 89


class _Sample(msgspec.Struct):
    type: str
    source: str
    id: str
    time: float
    data: dict[str, float | str]


def socket_of(directory: str | Path) -> Path:
    """Give the socket of the measured server."""
    return Path(directory, "redis.sock")


def serve_command(directory: Path) -> list[str]:
    """Give the command of a server that drops no slow subscriber."""
    program = shutil.which("redis-server") or str(Path(sys.prefix, "bin", "redis-server"))
    limits = ["--client-output-buffer-limit", "pubsub 0 0 0"]
    place = ["--unixsocket", str(socket_of(directory)), "--dir", str(directory)]
    return [program, "--port", "0", "--save", "", *place, *limits]


async def publish(directory: str, count: int, size: int, rate: float) -> None:
    """Publish in pipelines, or at a rate one by one."""
    pack = msgspec.msgpack.Encoder().encode
    text = "x" * (size - _ENVELOPE_BYTES)
    async with Redis.from_url(f"unix://{socket_of(directory)}") as out:
        if rate:
            start = time.monotonic()
            for number in range(count):
                await asyncio.sleep(start + number / rate - time.monotonic())
                sent_s = time.monotonic()
                await out.publish("e", pack(_event(sent_s, text)))
            return
        for _ in range(count // _PIPELINE):
            pipe = out.pipeline(transaction=False)
            for _ in range(_PIPELINE):
                pipe.publish("e", pack(_event(0.0, text)))
            await pipe.execute()


def _event(sent_s: float, text: str) -> _Sample:
    return _Sample("bench.sample", "sender", "0123456789ab", sent_s, {"bid": 1.5, "text": text})


async def subscribe(directory: str, count: int, name: str) -> None:
    """Take and decode; note each event's way."""
    decode = msgspec.msgpack.Decoder(_Sample).decode
    seen, first_s = 0, 0.0
    delays_us: list[float] = []
    async with (
        Redis.from_url(f"unix://{socket_of(directory)}") as client,
        client.pubsub(ignore_subscribe_messages=True) as hearing,
    ):
        await hearing.subscribe("e")
        await hearing.get_message(timeout=5.0)
        _say_ready(directory, name)
        while seen < count:
            message = await hearing.get_message(timeout=None)
            if message is None:
                continue
            event = decode(message["data"])
            if not seen:
                first_s = time.perf_counter()
            seen += 1
            delays_us.append((time.monotonic() - event.time) * 1e6)
    _write(directory, name, count / (time.perf_counter() - first_s), delays_us)


def _say_ready(directory: str, name: str) -> None:
    Path(directory, f"ready-{name}").touch()


def _write(directory: str, name: str, events_per_s: float, delays_us: list[float]) -> None:
    draft = Path(directory, f"{name}.draft")
    draft.write_text(json.dumps({"events_per_s": events_per_s, "delays_us": delays_us}))
    draft.rename(Path(directory, name))


def main(arguments: list[str]) -> None:
    """Play a role."""
    role, directory, count, *rest = arguments
    if role == "publish":
        asyncio.run(publish(directory, int(count), int(rest[0]), float(rest[1])))
    elif role == "subscribe":
        asyncio.run(subscribe(directory, int(count), rest[0]))
    else:
        raise SystemExit(f"no role {role!r}")


if __name__ == "__main__":
    main(sys.argv[1:])
