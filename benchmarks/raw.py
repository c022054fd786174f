"""
Peers written by hand, as bare as they can be: ``python -m benchmarks.raw ROLE ...``.

Raw pyzmq through `zmq.proxy`: one event a frame, bytes in and bytes out, nothing decoded. Once
synchronous (throughput), once watched on an asyncio loop (latency). And a Unix stream socket with
64 KiB writes and typed decoding: the limit of what a Python process can take.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import sys
import time
from pathlib import Path

import msgspec
import zmq

_STAMP = struct.Struct("d")
_ECHO = b"echo"


def proxy(directory: str) -> None:
    """Forward for ever."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    publishers, subscribers = context.socket(zmq.XSUB), context.socket(zmq.XPUB)
    for side in (publishers, subscribers):
        side.set_hwm(0)
    subscribers.bind(f"ipc://{directory}/out.sock")
    publishers.bind(f"ipc://{directory}/in.sock")
    zmq.proxy(publishers, subscribers)


def publish(directory: str, count: int, size: int, rate: float, subscribers: int) -> None:
    """Send `count` frames of `size` bytes once all subscribers are there."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    out = context.socket(zmq.XPUB)
    out.setsockopt(zmq.XPUB_VERBOSE, 1)
    out.set_hwm(0)
    out.connect(f"ipc://{directory}/in.sock")
    out.recv()
    while len(list(Path(directory).glob("ready-*"))) < subscribers:
        time.sleep(0.005)
    if rate:
        asyncio.run(_publish_paced(out, count, size, rate))
    else:
        body = b"e" * size
        for _ in range(count):
            out.send(body)
    out.close(linger=-1)
    context.term()


async def _publish_paced(out: zmq.Socket[bytes], count: int, size: int, rate: float) -> None:
    filler = b"e" * (size - 8)
    start = time.monotonic()
    for number in range(count):
        await asyncio.sleep(start + number / rate - time.monotonic())
        out.send(filler + _STAMP.pack(time.monotonic()))


def subscribe(directory: str, count: int, name: str) -> None:
    """Count frames, synchronously."""
    socket_in = _subscriber(directory, name)
    socket_in.recv()
    first = time.perf_counter()
    for _ in range(count - 1):
        socket_in.recv()
    _write(directory, name, {"events_per_s": count / (time.perf_counter() - first)})


def subscribe_on_loop(directory: str, count: int, name: str) -> None:
    """Note each frame's time of travel, the socket watched on a loop."""
    asyncio.run(_subscribe_on_loop(directory, count, name))


async def _subscribe_on_loop(directory: str, count: int, name: str) -> None:
    socket_in = _subscriber(directory, name)
    delays: list[float] = []
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def drain() -> None:
        while True:
            try:
                frame = socket_in.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            delays.append((time.monotonic() - _STAMP.unpack(frame[-8:])[0]) * 1e6)
            if len(delays) == count:
                done.set()

    loop.add_reader(socket_in.fileno(), drain)
    loop.call_soon(drain)
    await done.wait()
    _write(directory, name, {"delays_us": delays})


def _subscriber(directory: str, name: str) -> zmq.Socket[bytes]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    socket_in = context.socket(zmq.SUB)
    socket_in.set_hwm(0)
    socket_in.connect(f"ipc://{directory}/out.sock")
    socket_in.setsockopt(zmq.SUBSCRIBE, b"e")
    time.sleep(0.3)  # the slow joiner: a bare peer has no better way
    Path(directory, f"ready-{name}").touch()
    return socket_in


def _write(directory: str, name: str, figures: object) -> None:
    draft = Path(directory, f"{name}.draft")
    draft.write_text(json.dumps(figures))
    draft.rename(Path(directory, name))


class _Sample(msgspec.Struct):
    type: str
    source: str
    id: str
    time: float
    data: dict[str, float | str]


def socket_send(directory: str, count: int, size: int) -> None:
    """Write events to a Unix stream socket, 64 KiB at a time."""
    packer = msgspec.msgpack.Encoder()
    sample = _Sample(
        "bench.sample", "sender", "0123456789ab", 1.5, {"bid": 1.5, "text": "x" * (size - 90)}
    )
    one = packer.encode(sample)
    with socket.socket(socket.AF_UNIX) as out:
        out.connect(f"{directory}/limit.sock")
        batch = bytearray()
        for _ in range(count):
            batch += len(one).to_bytes(4, "big")
            batch += packer.encode(sample)
            if len(batch) >= 65536:
                out.sendall(batch)
                batch.clear()
        out.sendall(batch)


def socket_receive(directory: str, count: int, name: str) -> None:
    """Read and decode events from a Unix stream socket."""
    decode = msgspec.msgpack.Decoder(_Sample).decode
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{directory}/limit.sock")
        server.listen(1)
        Path(directory, f"ready-{name}").touch()
        source, _ = server.accept()
        with source:
            seen, rest, first = 0, b"", 0.0
            while seen < count:
                chunk = rest + source.recv(262144)
                first = first or time.perf_counter()
                at, end = 0, len(chunk)
                while end - at >= 4:
                    length = int.from_bytes(chunk[at : at + 4], "big")
                    if end - at - 4 < length:
                        break
                    decode(chunk[at + 4 : at + 4 + length])
                    at += 4 + length
                    seen += 1
                rest = chunk[at:]
    _write(directory, name, {"events_per_s": count / (time.perf_counter() - first)})


def main(arguments: list[str]) -> None:
    """Play a role."""
    role, directory, *rest = arguments
    if role == "proxy":
        proxy(directory)
    elif role == "publish":
        publish(directory, int(rest[0]), int(rest[1]), float(rest[2]), int(rest[3]))
    elif role == "subscribe":
        subscribe(directory, int(rest[0]), rest[1])
    elif role == "subscribe-loop":
        subscribe_on_loop(directory, int(rest[0]), rest[1])
    elif role == "socket-send":
        socket_send(directory, int(rest[0]), int(rest[1]))
    elif role == "socket-receive":
        socket_receive(directory, int(rest[0]), rest[1])
    else:
        raise SystemExit(f"no role {role!r}")


if __name__ == "__main__":
    os.umask(0o077)
    main(sys.argv[1:])
