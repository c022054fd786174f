"""What the tests of the Redis fabric share: ears, a proxy that can fall silent, free ports."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from mesh import ConsumerConfig, EventConsumer, EventHandlerRegistry

if TYPE_CHECKING:
    from pathlib import Path

    from mesh import Event, MessageBroker


class Ear:
    """Keeps what it hears; can be full."""

    def __init__(self, room: int = 10**9) -> None:
        self.frames: list[bytes] = []
        self.room = room

    def receive(self, topic: str, frame: bytes) -> None:
        self.frames.append(frame)

    def has_room(self) -> bool:
        return len(self.frames) < self.room


class Listener(EventConsumer):
    """Keeps the numbers of the events it handles."""

    async def initialize(self) -> None:
        self.numbers: list[int] = []
        await self.registry.register("number.said", self.hear, self.agent_name, "hear")

    async def hear(self, event: Event) -> None:
        self.numbers.append(event.data["number"])


async def listener(broker: MessageBroker, name: str = "listener") -> Listener:
    """Give a consumer that hears ``number.said``; `stop` it."""
    made = Listener(
        ConsumerConfig(
            agent_name=name,
            broker=broker,
            handler_registry=EventHandlerRegistry(),
            subscribed_events=["number.said"],
        )
    )
    await made.initialize()
    await made.start()
    return made


class Proxy:
    """Stands between a client and a server on a Unix socket; can stop passing bytes on."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._passing = asyncio.Event()
        self._passing.set()
        self._deaf = False
        self._swallows: asyncio.Event | None = None
        self._lines: set[asyncio.Task[None]] = set()
        self.port = 0

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for line in self._lines:
            line.cancel()
        await asyncio.gather(*self._lines, return_exceptions=True)
        await self._server.wait_closed()

    def freeze(self) -> None:
        """Keep all connections and pass nothing on, as a cable that was pulled."""
        self._passing.clear()

    def swallow(self) -> None:
        """Keep all connections and take what comes, to no effect: the other end is long gone."""
        self._swallows = asyncio.Event()

    def lose_answers(self) -> None:
        """Swallow what the server says next, and hang up: the client cannot know what it did."""
        self._deaf = True

    def thaw(self) -> None:
        """Pass bytes on again; a connection of which any were swallowed is reset."""
        if self._swallows is not None:
            self._swallows.set()
            self._swallows = None
        self._passing.set()

    async def _accept(self, source: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._lines.add(task)
        reader, writer = await asyncio.open_unix_connection(str(self._target))
        try:
            with contextlib.suppress(asyncio.CancelledError):
                # Whatever ends one direction ends the other
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._pass(source, writer))
                    both.create_task(self._pass(reader, back, answers=True))
        except* OSError:
            pass
        finally:
            for each in (writer, back):
                each.close()
                # A cancelled task would be an error to asyncio's server
                with contextlib.suppress(OSError, asyncio.CancelledError):
                    await each.wait_closed()
            self._lines.discard(task)

    async def _pass(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, answers: bool = False
    ) -> None:
        while data := await source.read(65536):
            await self._passing.wait()
            if self._swallows is not None:
                await self._swallows.wait()
                break
            if answers and self._deaf:
                self._deaf = False
                break
            target.write(data)
            await target.drain()
        raise ConnectionResetError("one side has closed")


def free_ports(count: int) -> list[int]:
    """Give ports that nobody uses now, each with its neighbour 10,000 above free as well."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < count:
            with contextlib.suppress(OSError, OverflowError):
                one = held.enter_context(socket.socket())
                one.bind(("127.0.0.1", 0))
                port = one.getsockname()[1]
                if port + 10_000 < 65_536:
                    bus = held.enter_context(socket.socket())
                    bus.bind(("127.0.0.1", port + 10_000))
                    found.append(port)
    return found


async def command(url: str, *words: Any) -> Any:
    """Run a command by redis-py."""
    import redis.asyncio

    async with redis.asyncio.Redis.from_url(url) as client:
        return await client.execute_command(*words)  # type: ignore[no-untyped-call]


def certificates(folder: Path) -> None:
    """Make an authority and a server's certificate for 127.0.0.1."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl on this machine")

    def run(*words: str) -> None:
        subprocess.run([openssl, *words], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    run("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test-ca",
        "-days", "2", "-addext", "keyUsage=critical,keyCertSign")  # fmt: skip
    run("req", *key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=server")
    (folder / "names").write_text(
        "subjectAltName=IP:127.0.0.1,DNS:localhost\nauthorityKeyIdentifier=keyid\n"
    )
    run("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-days", "2",
        "-CAcreateserial", "-out", "server.pem", "-extfile", "names")  # fmt: skip
