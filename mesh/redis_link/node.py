"""One Redis server as the fabric uses it: a connection that publishes and one that hears."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

from mesh.redis_link.access import unavailable
from mesh.redis_link.kept import SILENT_S, KeptConnection
from mesh.redis_link.resp import LostError, ReplyError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterator

    from mesh.errors import BrokerUnavailableError
    from mesh.logs import Sparing
    from mesh.redis_link.access import Access, Address
    from mesh.redis_link.resp import RespConnection

#: A server that refuses events is left alone for a moment.
_REFUSED_S = 0.25


class MovedError(Exception):
    """In a cluster: the channel's slot is with another node."""


class Terms:
    """
    What all nodes of one fabric share.

    Args:
        access: Credentials and limits.
        sharded: Use SSUBSCRIBE and SPUBLISH, as in a cluster.
        probe: A channel nobody listens to, to try our rights on.
        must_lead: Refuse a replica.
        deliver: Gets channel and payload; False stops the reading of that node.
        on_change: Called when `try_send` may have become worth another try.
        on_moved: Called with the token of a send that a cluster sent elsewhere.
        on_stale: Called when the layout of a cluster may be another.
        sparing: Where to say what happens.
        silent_s: After so long without a sign of life a server counts as gone.
    """

    def __init__(
        self,
        access: Access,
        probe: bytes,
        deliver: Callable[[bytes, bytes], bool],
        on_change: Callable[[], None],
        sparing: Sparing,
        *,
        sharded: bool = False,
        must_lead: bool = False,
        on_moved: Callable[[Any], None] | None = None,
        on_stale: Callable[[], None] | None = None,
        silent_s: float = SILENT_S,
    ) -> None:
        """Keep them."""
        self.access = access
        self.probe = probe
        self.deliver = deliver
        self.on_change = on_change
        self.sparing = sparing
        self.sharded = sharded
        self.must_lead = must_lead
        self.on_moved = on_moved
        self.on_stale = on_stale
        self.silent_s = silent_s
        mark = "S" if sharded else ""
        self.publish, self.subscribe = f"{mark}PUBLISH", f"{mark}SUBSCRIBE"
        self.unsubscribe = f"{mark}UNSUBSCRIBE"


class Node:
    """
    One server.

    Args:
        find: Gives its address; asked before each attempt to connect.
        terms: What it shares with other nodes.
    """

    def __init__(self, find: Callable[[], Awaitable[Address]], terms: Terms) -> None:
        """Begin unconnected."""
        self._find = find
        self._terms = terms
        self._cooling: asyncio.TimerHandle | None = None
        self._confirmed: set[bytes] = set()
        #: The channels that are to be heard here.
        self.wanted: set[bytes] = set()
        #: True for a moment after the server has refused an event.
        self.is_refusing = False
        self.publisher = self._keep(
            self._prepare_publisher,
            {"on_refused": self._refused, "on_free": terms.on_change},
        )
        self.hearer = self._keep(
            self._prepare_hearer,
            {"on_message": terms.deliver, "on_unsubscribed": self._taken_away},
        )

    def start(self) -> None:
        """Begin to connect."""
        self.publisher.start()
        self.hearer.start()

    async def wait_up(self) -> None:
        """
        Return when both connections are up.

        Raises:
            AccessDeniedError: The server refuses us.
        """
        await self.publisher.wait_up()
        await self.hearer.wait_up()

    async def close(self) -> None:
        """End both connections; what was sent still leaves."""
        if self._cooling is not None:
            self._cooling.cancel()
        await self.publisher.close()
        await self.hearer.close()

    @property
    def trouble(self) -> BrokerUnavailableError | None:
        """Say why it does not work, when it does not."""
        return self.publisher.trouble or self.hearer.trouble

    async def hear(self, channels: Collection[bytes]) -> None:
        """
        Subscribe; returns when the server has confirmed it, over reconnects if need be.

        Raises:
            AccessDeniedError: The user may not.
            MovedError: A slot is with another node.
        """
        self.wanted.update(channels)
        while missing := (self.wanted & set(channels)) - self._confirmed:
            connection = await self.hearer.wait_up()
            try:
                await self._subscribe(connection, missing)
            except LostError:
                continue
            except ReplyError as error:
                self.wanted.difference_update(missing)
                raise unavailable(await self._find(), error, self._terms.access) from None

    def unhear(self, channels: Collection[bytes]) -> None:
        """Unsubscribe."""
        held = self.wanted.intersection(channels)
        self.wanted -= held
        self._confirmed -= held
        if self.hearer.connection is not None:
            for group in self._groups(held):
                self.hearer.connection.unsubscribe(self._terms.unsubscribe, group)

    def resume(self) -> None:
        """Read on after `deliver` said stop."""
        if self.hearer.connection is not None:
            self.hearer.connection.resume()

    def _keep(
        self,
        prepare: Callable[[RespConnection], Awaitable[None]],
        callbacks: dict[str, Any],
    ) -> KeptConnection:
        return KeptConnection(
            self._find,
            self._terms.access,
            prepare,
            callbacks,
            self._terms.sparing,
            on_up=self._terms.on_change,
            on_down=self._went_down,
            silent_s=self._terms.silent_s,
        )

    def _went_down(self) -> None:
        if self._terms.on_stale is not None:
            self._terms.on_stale()

    # -- before a connection counts as up ------------------------------------------------------

    async def _prepare_publisher(self, connection: RespConnection) -> None:
        await self._check_role(connection)
        # A missing right shows now, not with the first event
        with _moved_is_fine():
            await connection.call(self._terms.publish, self._terms.probe, b"")

    async def _prepare_hearer(self, connection: RespConnection) -> None:
        await self._check_role(connection)
        self._confirmed.clear()
        with _moved_is_fine():
            await connection.subscribe(self._terms.subscribe, [self._terms.probe])
            connection.unsubscribe(self._terms.unsubscribe, [self._terms.probe])
        # Somebody may want more while we wait for the confirmation
        while missing := self.wanted - self._confirmed:
            try:
                await self._subscribe(connection, missing)
            except MovedError:
                self._went_down()
                return

    async def _check_role(self, connection: RespConnection) -> None:
        if not self._terms.must_lead:
            return
        role = (await connection.call("ROLE"))[0]
        if role != b"master":
            raise ReplyError("READONLY the sentinels' answer is not the master any more")

    async def _subscribe(self, connection: RespConnection, channels: set[bytes]) -> None:
        # Channels of one command must lie in one slot
        groups = (
            [[each] for each in sorted(channels)] if self._terms.sharded else [sorted(channels)]
        )
        outcomes = await asyncio.gather(
            *(connection.subscribe(self._terms.subscribe, group) for group in groups),
            return_exceptions=True,
        )
        failed = []
        for group, outcome in zip(groups, outcomes, strict=True):
            if outcome is None:
                self._confirmed.update(self.wanted.intersection(group))
            elif isinstance(outcome, ReplyError) and str(outcome).startswith("MOVED"):
                failed.append(MovedError(str(outcome)))
            else:
                raise outcome
        if failed:
            raise failed[0]

    def _groups(self, channels: set[bytes]) -> list[list[bytes]]:
        """Give the channels of each command: in a cluster those of one must lie in one slot."""
        ordered = sorted(channels)
        return [[each] for each in ordered] if self._terms.sharded else [ordered]

    # -- what connections tell -----------------------------------------------------------------

    def _taken_away(self, channel: bytes) -> None:
        self._confirmed.discard(channel)
        if channel in self.wanted and self._terms.on_stale is not None:
            self._terms.on_stale()

    def _refused(self, words: str, token: Any) -> None:
        if words.startswith("MOVED") and self._terms.on_moved is not None:
            self._terms.on_moved(token)
            return
        error = unavailable(self.publisher.address, ReplyError(words), self._terms.access)
        self.publisher.trouble = error
        self._terms.sparing.say("refused", logging.ERROR, f"an event was refused: {error}")
        self.is_refusing = True
        if self._cooling is None:
            loop = asyncio.get_running_loop()
            self._cooling = loop.call_later(_REFUSED_S, self._try_again)

    def _try_again(self) -> None:
        self._cooling = None
        self.is_refusing = False
        self.publisher.trouble = None
        self._terms.on_change()


@contextlib.contextmanager
def _moved_is_fine() -> Iterator[None]:
    """Let MOVED pass: rights are checked before slots, so who is sent elsewhere has them."""
    try:
        yield
    except ReplyError as error:
        if not str(error).startswith("MOVED"):
            raise
