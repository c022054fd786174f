"""A connection to one Redis server that comes back by itself, and says so sparingly."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any

from mesh.errors import AccessDeniedError, BrokerUnavailableError
from mesh.redis_link.access import open_connection, unavailable
from mesh.redis_link.resp import ReplyError, forget
from mesh.retry import RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from mesh.logs import Sparing
    from mesh.redis_link.access import Access, Address
    from mesh.redis_link.resp import RespConnection

#: An idle connection is asked for a sign of life so often.
CHECK_EVERY_S = 1.0
#: And taken for dead when it gives none for so long.
SILENT_S = 3.0
_BACK_OFF = RetryPolicy(first_delay_s=0.05, max_delay_s=1.0, jitter=0.5)
#: What is on its way out at the end may take so long.
_CLOSE_S = 1.0


async def end(task: asyncio.Task[None]) -> None:
    """Cancel a task, and wait until it has ended."""
    task.cancel()
    await asyncio.wait({task})


class KeptConnection:
    """
    One connection, made anew whenever it is lost.

    Args:
        find: Gives the server's address; asked before each attempt.
        access: Credentials and limits.
        prepare: Run on each new connection before it counts as up.
        callbacks: Those of `RespConnection`, but for `on_ended`.
        sparing: Where to say what happens.
        on_up: Called when it is up.
        on_down: Called when it is lost or cannot be made.
    """

    def __init__(
        self,
        find: Callable[[], Awaitable[Address]],
        access: Access,
        prepare: Callable[[RespConnection], Awaitable[None]],
        callbacks: dict[str, Any],
        sparing: Sparing,
        *,
        on_up: Callable[[], None],
        on_down: Callable[[], None],
        silent_s: float = SILENT_S,
    ) -> None:
        """Begin unconnected."""
        self._find = find
        self._access = access
        self._prepare = prepare
        self._callbacks = callbacks
        self._sparing = sparing
        self._on_up = on_up
        self._on_down = on_down
        self._silent_s = silent_s
        #: The address of the latest attempt.
        self.address: Address
        self._up = asyncio.Event()
        self._fatal: BaseException | None = None
        self._keeper: asyncio.Task[None] | None = None
        #: The living connection; None while there is none.
        self.connection: RespConnection | None = None
        #: Why there is none, for people.
        self.trouble: BrokerUnavailableError | None = None

    def start(self) -> None:
        """Begin to connect."""
        self._keeper = asyncio.get_running_loop().create_task(self._keep(), name="redis-keeper")
        self._keeper.add_done_callback(self._ended_keeping)

    async def wait_up(self) -> RespConnection:
        """
        Give the living connection, when there is one.

        Raises:
            AccessDeniedError: The server refused us, and there never was a connection.
        """
        while (connection := self.connection) is None:
            if self._fatal is not None:
                raise self._fatal
            await self._up.wait()
        return connection

    async def close(self) -> None:
        """End it; what was sent still leaves, within a second."""
        if self._keeper is not None:
            await end(self._keeper)
        connection = self.connection
        if connection is None:
            return
        with contextlib.suppress(TimeoutError, ReplyError, ConnectionError):
            async with asyncio.timeout(_CLOSE_S):
                if not connection.is_paused:
                    await connection.call("PING")
                connection.close()
                await asyncio.shield(connection.ended)
        connection.abort()

    async def _keep(self) -> None:
        failures = 0
        down_since_s: float | None = None
        while True:
            try:
                connection = await self._open()
            except BrokerUnavailableError as error:
                self._fail(error)
                if down_since_s is None and isinstance(error, AccessDeniedError):
                    # At the first attempt it is a mistake in the settings; later, somebody at work
                    raise
                down_since_s = down_since_s or time.monotonic()
                failures += 1
                await asyncio.sleep(_BACK_OFF.delay_s(failures))
                continue
            if down_since_s is not None:
                took_s = time.monotonic() - down_since_s
                self._sparing.say("up", logging.INFO, f"redis is back after {took_s:.1f} s")
            failures = 0
            self.trouble = None
            self.connection = connection
            self._up.set()
            self._on_up()
            await self._watch(connection)
            down_since_s = time.monotonic()
            lost = connection.in_doubt
            doubt = f"; {lost} frames on their way may be lost" if lost else ""
            self._sparing.say("down", logging.WARNING, f"{self.trouble}{doubt}; connecting anew")

    def _ended_keeping(self, keeper: asyncio.Task[None]) -> None:
        """Let nobody wait for a connection that nobody makes any more."""
        if not keeper.cancelled():
            self._fatal = keeper.exception()
            self._up.set()

    async def _open(self) -> RespConnection:
        self.address = await self._find()
        connection = await open_connection(
            self.address, self._access, on_ended=self._ended, **self._callbacks
        )
        try:
            async with asyncio.timeout(self._access.timeout_s):
                await self._prepare(connection)
        except (ReplyError, OSError, TimeoutError) as error:
            connection.abort()
            raise unavailable(self.address, error, self._access) from None
        except BaseException:
            connection.abort()
            raise
        return connection

    def _fail(self, error: BrokerUnavailableError) -> None:
        self.trouble = error
        self._sparing.say("down", logging.WARNING, f"{error}; trying on")
        self._on_down()

    def _ended(self) -> None:
        # Called while the connection goes down, so that nobody waits on one that is dead
        if self.connection is not None and not self.connection.is_open:
            reason = self.connection.ended.result()
            self.trouble = BrokerUnavailableError(f"redis at {self.address} is lost: {reason}")
            self.connection = None
            self._up.clear()
            self._on_down()

    async def _watch(self, connection: RespConnection) -> None:
        """Return when the connection has ended; end one that gives no sign of life."""
        seen = connection.received
        while True:
            await asyncio.wait({connection.ended}, timeout=CHECK_EVERY_S)
            if connection.ended.done():
                return
            # A paused one is not read, so it cannot answer
            if connection.received == seen and not connection.is_paused:
                await self._check(connection)
            seen = connection.received

    async def _check(self, connection: RespConnection) -> None:
        seen = connection.received
        answer = connection.ask("PING")
        answer.add_done_callback(forget)
        await asyncio.wait({answer, connection.ended}, timeout=self._silent_s)
        # A refusal is a sign of life, and so is whatever else comes
        if not answer.done() and connection.received == seen and not connection.is_paused:
            connection.end(TimeoutError(f"no sign of life for {self._silent_s:g} s"))
