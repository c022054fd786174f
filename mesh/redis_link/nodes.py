"""Which server carries which channel: one server, the master that Sentinel names, or a cluster."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Protocol

from mesh.errors import AccessDeniedError, BrokerUnavailableError
from mesh.redis_link.access import Address, open_connection, unavailable
from mesh.redis_link.kept import end
from mesh.redis_link.node import MovedError, Node
from mesh.redis_link.resp import ReplyError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence

    from mesh.redis_link.access import Access
    from mesh.redis_link.node import Terms

#: A cluster's layout is asked for at most so often.
_REFRESH_EVERY_S = 0.2


class Nodes(Protocol):
    """The servers of a fabric."""

    def start(self) -> None:
        """Begin to connect."""
        ...

    async def wait_up(self) -> None:
        """Return when every server is connected."""
        ...

    def owner(self, channel: bytes) -> Node | None:
        """Give the server that carries a channel; None while nobody does."""
        ...

    async def hear(self, channels: Collection[bytes]) -> None:
        """Subscribe; returns when it is confirmed."""
        ...

    def unhear(self, channels: Collection[bytes]) -> None:
        """Unsubscribe."""
        ...

    def all(self) -> Iterable[Node]:
        """Give the servers that are known."""
        ...

    async def close(self) -> None:
        """End all connections."""
        ...


class OneServer:
    """
    One server carries everything.

    Args:
        find: Gives its address.
        terms: How to treat it.
    """

    def __init__(self, find: Callable[[], Awaitable[Address]], terms: Terms) -> None:
        """Begin unconnected."""
        self._node = Node(find, terms)

    def start(self) -> None:
        """Begin to connect."""
        self._node.start()

    async def wait_up(self) -> None:
        """Return when it is connected."""
        await self._node.wait_up()

    def owner(self, channel: bytes) -> Node | None:
        """Give the one."""
        return self._node

    async def hear(self, channels: Collection[bytes]) -> None:
        """Subscribe there."""
        await self._node.hear(channels)

    def unhear(self, channels: Collection[bytes]) -> None:
        """Unsubscribe there."""
        self._node.unhear(channels)

    def all(self) -> Iterable[Node]:
        """Give the one."""
        return (self._node,)

    async def close(self) -> None:
        """End its connections."""
        await self._node.close()


def always(address: Address) -> Callable[[], Awaitable[Address]]:
    """Find a server at the same address every time."""

    async def find() -> Address:
        return address

    return find


def by_sentinel(
    sentinels: Sequence[tuple[str, int]], service: str, access: Access
) -> Callable[[], Awaitable[Address]]:
    """
    Find the master that Sentinel names.

    Args:
        sentinels: Where they are.
        service: The name under which they watch it.
        access: How the sentinels let us in.
    """
    order = [Address(host, port) for host, port in sentinels]

    async def find() -> Address:
        answers = []
        for sentinel in list(order):
            try:
                master = await _ask_sentinel(sentinel, service, access)
            except BrokerUnavailableError as error:
                answers.append(str(error))
                continue
            if master is not None:
                # The others may be gone, and each that does not answer costs time
                order.remove(sentinel)
                order.insert(0, sentinel)
                return master
            answers.append(f"{sentinel} knows no such name")
        named = ", ".join(f"{host}:{port}" for host, port in sentinels)
        raise BrokerUnavailableError(
            f"the sentinels at {named} name no master for {service!r}: {'; '.join(answers)}"
        )

    return find


async def _ask_sentinel(sentinel: Address, service: str, access: Access) -> Address | None:
    connection = await open_connection(sentinel, access)
    try:
        async with asyncio.timeout(access.timeout_s):
            found = await connection.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)
    except (ReplyError, OSError, TimeoutError) as error:
        raise unavailable(sentinel, error, access) from None
    finally:
        connection.abort()
    return None if found is None else Address(found[0].decode(), int(found[1]))


class ClusterNodes:
    """
    A Redis Cluster: each channel lives in a slot, each slot with a node.

    Args:
        seeds: Where to ask for the layout first.
        terms: How to treat its nodes; sharded.
        resend: Sends an event anew that came back because its slot has moved.
        on_layout: Called when the layout is another.
    """

    def __init__(
        self,
        seeds: Sequence[Address],
        terms: Terms,
        resend: Callable[[Any], bool],
        on_layout: Callable[[], None],
    ) -> None:
        """Know nothing of the cluster yet."""
        self._seeds = tuple(seeds)
        self._terms = terms
        self._resend = resend
        self._on_layout = on_layout
        self._nodes: dict[Address, Node] = {}
        self._slots: list[Address | None] = []
        self._heard: set[bytes] = set()
        self._returned: list[Any] = []
        self._stale = asyncio.Event()
        self._laid_out = asyncio.Event()
        self._fatal: BaseException | None = None
        self._task: asyncio.Task[None] | None = None
        terms.on_stale = self._stale.set
        terms.on_moved = self._take_back

    @property
    def is_moving(self) -> bool:
        """Say whether events wait to be sent anew; others must not overtake them."""
        return bool(self._returned)

    def start(self) -> None:
        """Begin to ask for the layout."""
        self._stale.set()
        self._task = asyncio.get_running_loop().create_task(self._follow(), name="redis-layout")
        self._task.add_done_callback(self._ended_following)

    async def wait_up(self) -> None:
        """
        Return when the layout is known and every node is connected.

        Raises:
            AccessDeniedError: A node refuses us.
            BrokerUnavailableError: The server is no cluster.
        """
        await self._layout_known()
        for node in list(self._nodes.values()):
            await node.wait_up()

    def owner(self, channel: bytes) -> Node | None:
        """Give the node of the channel's slot."""
        address = self._slots[_slot(channel)] if self._slots else None
        return None if address is None else self._nodes.get(address)

    async def hear(self, channels: Collection[bytes]) -> None:
        """Subscribe, each channel at its node; returns when all are confirmed."""
        self._heard.update(channels)
        left = set(channels)
        while left:
            for channel in sorted(left):
                node = self.owner(channel)
                try:
                    if node is not None:
                        await node.hear([channel])
                        left.discard(channel)
                except MovedError:
                    node = None
                if node is None:
                    self._laid_out.clear()
                    self._stale.set()
                    await self._layout_known()

    def unhear(self, channels: Collection[bytes]) -> None:
        """Unsubscribe, wherever it was."""
        self._heard.difference_update(channels)
        for node in self._nodes.values():
            node.unhear(channels)

    def all(self) -> Iterable[Node]:
        """Give the nodes that are known."""
        return tuple(self._nodes.values())

    async def close(self) -> None:
        """End all connections."""
        if self._task is not None:
            await end(self._task)
        for node in self._nodes.values():
            await node.close()
        self._nodes.clear()

    def _take_back(self, token: Any) -> None:
        self._returned.append(token)
        self._stale.set()

    async def _layout_known(self) -> None:
        await self._laid_out.wait()
        if self._fatal is not None:
            raise self._fatal

    def _ended_following(self, task: asyncio.Task[None]) -> None:
        """Let nobody wait for a layout that nobody asks for any more."""
        if not task.cancelled():
            self._fatal = task.exception()
            self._laid_out.set()

    async def _follow(self) -> None:
        """Keep up with the layout, when there is a sign that it has changed."""
        await asyncio.to_thread(_load)
        while True:
            await self._stale.wait()
            self._stale.clear()
            try:
                await self._take_up(await self._ask_layout())
                await self._send_returned()
            except AccessDeniedError as error:
                self._terms.sparing.say("layout", logging.ERROR, str(error))
                if not self._slots:
                    raise
                self._stale.set()
            except BrokerUnavailableError as error:
                self._terms.sparing.say("layout", logging.WARNING, f"{error}; trying on")
                self._stale.set()
            else:
                self._laid_out.set()
            await asyncio.sleep(_REFRESH_EVERY_S)

    async def _ask_layout(self) -> list[Address | None]:
        known = [address for address in self._nodes if address not in self._seeds]
        failure: BrokerUnavailableError | None = None
        for address in (*known, *self._seeds):
            try:
                connection = await open_connection(address, self._terms.access)
            except BrokerUnavailableError as error:
                failure = error
                continue
            try:
                async with asyncio.timeout(self._terms.access.timeout_s):
                    reply = await connection.call("CLUSTER", "SLOTS")
            except (ReplyError, OSError, TimeoutError) as error:
                failure = BrokerUnavailableError(f"redis at {address} tells no layout: {error}")
                if "cluster support disabled" in str(error):
                    failure = AccessDeniedError(
                        f"redis at {address} is no cluster; unset LEGION_REDIS_CLUSTER"
                    )
                continue
            finally:
                connection.close()
            slots = layout_of(reply, address)
            if any(slots):
                return slots
            failure = BrokerUnavailableError(f"the cluster at {address} has no slots yet")
        assert failure is not None
        raise failure

    async def _take_up(self, slots: list[Address | None]) -> None:
        addresses = {each for each in slots if each is not None}
        for address in addresses - self._nodes.keys():
            node = self._nodes[address] = Node(always(address), self._terms)
            node.start()
        gone = [self._nodes.pop(address) for address in self._nodes.keys() - addresses]
        changed = slots != self._slots
        self._slots = slots
        for channel in sorted(self._heard):
            owner = self.owner(channel)
            for node in self._nodes.values():
                if node is not owner and channel in node.wanted:
                    node.unhear([channel])
        for node in gone:
            await node.close()
        for channel in sorted(self._heard):
            owner = self.owner(channel)
            if owner is None or owner.hearer.connection is None:
                if owner is not None:
                    owner.wanted.add(channel)
                continue
            try:
                await owner.hear([channel])
            except MovedError:
                self._stale.set()
        if changed:
            self._on_layout()

    async def _send_returned(self) -> None:
        """Send anew what came back, in order, once all of it has come back."""
        if not self._returned:
            return
        for node in self._nodes.values():
            connection = node.publisher.connection
            if connection is not None:
                try:
                    async with asyncio.timeout(self._terms.access.timeout_s):
                        await connection.call("PING")
                except (ReplyError, OSError, TimeoutError):
                    continue
        returned, self._returned = self._returned, []
        for number, token in enumerate(returned):
            if not self._resend(token):
                self._returned = returned[number:] + self._returned
                self._stale.set()
                return
        self._terms.on_change()


def layout_of(reply: Any, asked: Address) -> list[Address | None]:
    """
    Read the reply to CLUSTER SLOTS.

    Args:
        reply: A list of ``[first, last, [host, port, ...], replicas...]``.
        asked: The node that gave it; one without a host of its own means that one.

    Returns:
        The master of each of the 16,384 slots.
    """
    slots: list[Address | None] = [None] * 16384
    for first, last, master, *_ in reply:
        host = (master[0] or b"").decode() or asked.host
        slots[first : last + 1] = [Address(host, master[1])] * (last + 1 - first)
    return slots


def _slot(channel: bytes) -> int:
    from redis.crc import key_slot

    return key_slot(channel)


def _load() -> None:
    """Load redis-py, which takes its time."""
    import redis.crc  # noqa: F401
