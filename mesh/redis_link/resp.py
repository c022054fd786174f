"""
One connection that speaks RESP, the protocol of Redis, without a task of its own.

redis-py asks for each message of a subscription one by one and awaits each reply; at a frame a loop
turn that alone costs more than the way through the server. Here bytes go from the socket into
hiredis's parser, and what it finds is handed on in the same call.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

import hiredis

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

#: Bytes that may wait for the socket before `is_full`; and below which it is free again.
HIGH_WATER_BYTES = 1024 * 1024
LOW_WATER_BYTES = 256 * 1024
#: Commands of one loop turn are joined up to this size.
_JOIN_BYTES = 64 * 1024


class ReplyError(Exception):
    """The server refused a command; the text is the server's."""


class LostError(ConnectionError):
    """The connection ended before the reply came."""


class _Awaited:
    """A command whose reply somebody waits for, or that is answered channel by channel."""

    __slots__ = ("future", "kind", "left")

    def __init__(self, future: asyncio.Future[Any], kind: bytes, left: int) -> None:
        self.future = future
        #: What each confirmation calls itself; empty: one plain reply.
        self.kind = kind
        self.left = left


def command(*words: bytes | str | int) -> bytes:
    """Encode a command."""
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        raw = word if isinstance(word, bytes) else str(word).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(raw), raw))
    return b"".join(parts)


def forget(future: asyncio.Future[Any]) -> None:
    """Take note of an outcome that nobody asks for, as a done callback."""
    if not future.cancelled():
        future.exception()


class RespConnection(asyncio.Protocol):
    """
    A connection; made by the loop's ``create_connection`` or ``create_unix_connection``.

    Args:
        on_message: Gets channel and payload of each message; False stops the reading until
            `resume`.
        on_refused: Gets the server's words for each `send` that it refused, and that one's token.
        on_unsubscribed: Gets a channel that the server took away by itself.
        on_ended: Called once, before those who wait for replies are told.
        on_free: Called when the socket takes more again.
    """

    def __init__(
        self,
        *,
        on_message: Callable[[bytes, bytes], bool] | None = None,
        on_refused: Callable[[str, Any], None] | None = None,
        on_unsubscribed: Callable[[bytes], None] | None = None,
        on_ended: Callable[[], None] | None = None,
        on_free: Callable[[], None] | None = None,
    ) -> None:
        """Begin unconnected."""
        self._on_message = on_message
        self._on_refused = on_refused
        self._on_unsubscribed = on_unsubscribed
        self._on_ended = on_ended
        self._on_free = on_free
        self._reader = hiredis.Reader()
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        # All but _Awaited are tokens of `send`, whose replies only count when they are refusals
        self._awaited: deque[Any] = deque()
        self._joined: list[bytes] = []
        self._joined_bytes = 0
        self._flush_scheduled = False
        #: True while more than `HIGH_WATER_BYTES` wait for the socket.
        self.is_full = False
        #: True between a message that was one too many and `resume`.
        self.is_paused = False
        #: Counts what arrives: who looks twice knows whether the other side lives.
        self.received = 0
        #: Becomes the reason of the end when the connection is lost or closed.
        self.ended: asyncio.Future[Exception] = self._loop.create_future()

    # -- what asyncio calls --------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(HIGH_WATER_BYTES, LOW_WATER_BYTES)

    def data_received(self, data: bytes) -> None:
        """Hand on what is complete."""
        self.received += 1
        self._reader.feed(data)
        if not self.is_paused:
            self._read()

    def pause_writing(self) -> None:
        """Note that the socket takes no more for now."""
        self.is_full = True

    def resume_writing(self) -> None:
        """Note that it does again."""
        self.is_full = False
        if self._on_free is not None:
            self._on_free()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell everybody who waits."""
        self._end(exc or LostError("the server closed the connection"))

    # -- what owners call ----------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Say whether commands can be sent."""
        return self._transport is not None and not self.ended.done()

    @property
    def in_doubt(self) -> int:
        """Count the commands sent by `send` that are not answered."""
        return sum(type(each) is not _Awaited for each in self._awaited)

    def send(self, encoded: bytes, token: Any = None) -> None:
        """
        Send an encoded command whose reply nobody waits for.

        The first of a loop turn leaves at once, others of the same turn leave together at its end.

        Args:
            encoded: What `command` gives.
            token: Comes back when the server refuses it.
        """
        self._awaited.append(token)
        self._write(encoded)

    async def call(self, *words: bytes | str | int) -> Any:
        """
        Send a command and give its reply.

        Raises:
            ReplyError: The server refused it.
            LostError: The connection ended.
        """
        return await self.ask(*words)

    def ask(self, *words: bytes | str | int) -> asyncio.Future[Any]:
        """Send a command; its reply comes in the future, as `call` says."""
        return self._ask(command(*words), b"", 0)

    async def subscribe(self, verb: str, channels: Collection[bytes]) -> None:
        """
        Send (S)SUBSCRIBE; returns when each channel is confirmed.

        Raises:
            ReplyError: The server refused it.
            LostError: The connection ended.
        """
        if channels:
            await self._ask(command(verb, *channels), verb.lower().encode(), len(channels))

    def unsubscribe(self, verb: str, channels: Collection[bytes]) -> None:
        """Send (S)UNSUBSCRIBE; nobody waits for it."""
        if channels and self.is_open:
            asked = self._ask(command(verb, *channels), verb.lower().encode(), len(channels))
            asked.add_done_callback(forget)

    def resume(self) -> None:
        """Read on after a pause."""
        if self.is_paused and self.is_open:
            self.is_paused = False
            self._loop.call_soon(self._read_on)

    def close(self) -> None:
        """Send what is waiting, then close."""
        if self._transport is not None and not self._transport.is_closing():
            self._flush()
            self._transport.close()

    def end(self, reason: Exception) -> None:
        """Close at once, and tell everybody why."""
        self._end(reason)
        self.abort()

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    # -- inside --------------------------------------------------------------------------------

    def _ask(self, encoded: bytes, kind: bytes, confirmations: int) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._loop.create_future()
        if not self.is_open:
            future.set_exception(LostError("the connection is closed"))
            return future
        # Stays in line when its waiter is cancelled, so that no reply meets the wrong command
        self._awaited.append(_Awaited(future, kind, confirmations))
        self._write(encoded)
        return future

    def _write(self, encoded: bytes) -> None:
        if self._flush_scheduled:
            self._joined.append(encoded)
            self._joined_bytes += len(encoded)
            if self._joined_bytes >= _JOIN_BYTES:
                self._flush()
            return
        assert self._transport is not None
        self._transport.write(encoded)
        self._flush_scheduled = True
        self._loop.call_soon(self._end_turn)

    def _end_turn(self) -> None:
        self._flush_scheduled = False
        self._flush()

    def _flush(self) -> None:
        if self._joined and self._transport is not None:
            self._transport.write(b"".join(self._joined))
            self._joined.clear()
            self._joined_bytes = 0

    def _read_on(self) -> None:
        if self.is_paused or not self.is_open:
            return
        self._read()
        if not self.is_paused and self._transport is not None:
            self._transport.resume_reading()

    def _read(self) -> None:
        take = self._reader.gets
        try:
            while (reply := take()) is not False:
                if type(reply) is list and self._on_message is not None:
                    if reply[0] in (b"message", b"smessage"):
                        if not self._on_message(reply[1], reply[2]):
                            self._pause()
                            return
                    else:
                        self._confirm(reply)
                else:
                    self._answer(reply)
        except hiredis.ProtocolError as error:
            self.end(LostError(f"no RESP: {error}"))

    def _pause(self) -> None:
        self.is_paused = True
        if self._transport is not None:
            self._transport.pause_reading()

    def _confirm(self, reply: list[Any]) -> None:
        """Take a confirmation, one that nobody asked for, or a reply that is a list."""
        kind = reply[0]
        head = self._awaited[0] if self._awaited else None
        if type(head) is _Awaited and head.kind == kind:
            head.left -= 1
            if not head.left:
                self._answer(reply)
        elif kind in (b"unsubscribe", b"sunsubscribe"):
            if self._on_unsubscribed is not None:
                self._on_unsubscribed(reply[1])
        else:
            self._answer(reply)

    def _answer(self, reply: Any) -> None:
        if not self._awaited:
            # Said before the server hangs up, such as "max number of clients reached"
            self.end(LostError(str(reply)))
            return
        awaited = self._awaited.popleft()
        refused = isinstance(reply, hiredis.ReplyError)
        if type(awaited) is not _Awaited:
            if refused and self._on_refused is not None:
                self._on_refused(str(reply), awaited)
        elif not awaited.future.done():
            if refused:
                awaited.future.set_exception(ReplyError(str(reply)))
            else:
                awaited.future.set_result(reply)

    def _end(self, reason: Exception) -> None:
        if self.ended.done():
            return
        self.ended.set_result(reason)
        if self._on_ended is not None:
            self._on_ended()
        for each in self._awaited:
            if type(each) is _Awaited and not each.future.done():
                each.future.set_exception(LostError(str(reason)))
