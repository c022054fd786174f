"""Calls to Redis on behalf of the journal: to the right server, again when that helps, bounded."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from typing import TYPE_CHECKING, Any

import msgspec

from mesh.errors import BackpressureError, BrokerUnavailableError, ClosedError, ConfigurationError
from mesh.logs import Sparing
from mesh.redis_link.access import unavailable
from mesh.redis_link.node import Terms
from mesh.redis_link.resp import LostError, ReplyError
from mesh.retry import RetryPolicy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Sequence

    from mesh.journals.redis_lua import Script
    from mesh.redis_link.node import Node
    from mesh.redis_link.nodes import Nodes
    from mesh.redis_link.place import Place
    from mesh.redis_link.resp import RespConnection

#: First words of refusals that pass by themselves, or with some help.
_PASSING = frozenset(
    {"ASK", "BUSY", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "MISCONF", "MOVED", "NOREPLICAS", "OOM"}
    | {"READONLY", "TRYAGAIN"}
)
#: Sent to another node because a slot has moved.
_ELSEWHERE = frozenset({"ASK", "MOVED"})
_BACK_OFF = RetryPolicy(first_delay_s=0.02, max_delay_s=1.0, jitter=0.5)
_MIN_VERSION = (7, 0)

_encode = msgspec.msgpack.Encoder().encode


class RenewedError(Exception):
    """The connection was made anew, and what was to be sent may not fit any more."""


class Store:
    """
    The servers, as the journal sees them.

    Args:
        place: Where they are.
        probe: A channel to try our rights on.
        deliver: Gets the channel of each wake-up.
        on_change: Called when a connection is up again.
        retry_s: How long a call is tried again before its error is raised.
        max_queued_bytes: Frames that may be on their way before others wait.
        silent_s: After so long without a sign of life a connection counts as lost.
    """

    def __init__(
        self,
        place: Place,
        probe: bytes,
        deliver: Callable[[bytes], None],
        on_change: Callable[[], None],
        *,
        retry_s: float,
        max_queued_bytes: int,
        silent_s: float,
    ) -> None:
        """Connect nothing."""
        self.place = place
        self._retry_s = retry_s
        self._max_queued_bytes = max_queued_bytes
        self._queued_bytes = 0
        self._queue_for_room: deque[asyncio.Event] = deque()

        def hear(channel: bytes, _: bytes) -> bool:
            deliver(channel)
            return True

        self._terms = Terms(
            place.access,
            probe,
            hear,
            on_change,
            Sparing(logging.getLogger("mesh.redis")),
            sharded=place.cluster,
            must_lead=place.must_lead,
            silent_s=silent_s,
        )
        self._nodes: Nodes | None = None
        self._owners: dict[bytes, Node] = {}

    # -- life ----------------------------------------------------------------------------------

    async def connect(self, limit_s: float, *, allow_volatile: bool) -> None:
        """
        Connect, and see whether Redis can keep what it is given.

        Raises:
            ConfigurationError: It cannot, and what to set.
            AccessDeniedError: It refuses us.
            BrokerUnavailableError: It does not answer.
        """
        nodes = self._nodes = self.place.nodes(self._terms, lambda _: True, self._owners.clear)
        nodes.start()
        try:
            async with asyncio.timeout(limit_s):
                await nodes.wait_up()
                for node in nodes.all():
                    await self._check_settings(node, allow_volatile=allow_volatile)
        except TimeoutError:
            words = self._trouble() or f"redis at {self.place.address} does not answer"
            await self.close()
            raise BrokerUnavailableError(f"{words} (waited {limit_s:g} s)") from None
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End all connections; what was sent still leaves."""
        if self._nodes is not None:
            nodes, self._nodes = self._nodes, None
            self._owners.clear()
            await nodes.close()

    async def hear(self, channels: Collection[bytes]) -> None:
        """Subscribe to wake-ups; whoever cannot in time looks once a second all the same."""
        assert self._nodes is not None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._retry_s):
                await self._nodes.hear(channels)

    async def erase(self, prefix: bytes) -> None:
        """Remove all keys that begin so, on all servers."""
        assert self._nodes is not None
        for node in self._nodes.all():
            cursor: Any = b"0"
            while True:
                cursor, keys = await self._ask(
                    node, "SCAN", cursor, "MATCH", prefix + b"*", "COUNT", 1000
                )
                # One by one: on a cluster they lie in different slots
                for key in keys:
                    await self._ask(node, "UNLINK", key)
                if cursor == b"0":
                    break

    # -- calls ---------------------------------------------------------------------------------

    async def run(
        self,
        script: Script,
        keys: Sequence[bytes],
        plan: dict[str, Any],
        blobs: Sequence[bytes] = (),
        *,
        is_renewed: Callable[[], bool] | None = None,
    ) -> Any:
        """
        Run a script; on a cluster all keys lie in one slot.

        Args:
            script: Which.
            keys: Its keys.
            plan: What it is to do.
            blobs: Bytes of which the plan speaks.
            is_renewed: Asked before it is sent, each time; True: not any more.

        Raises:
            RenewedError: `is_renewed` said so.
        """
        words: tuple[bytes | str | int, ...]
        words = ("EVALSHA", script.sha, len(keys), *keys, _encode(plan), *blobs)
        return await self._persist(keys[0], words, script, is_renewed)

    async def call(self, key: bytes, *words: bytes | str | int) -> Any:
        """Run a command, which can be run twice without harm, where a key lies."""
        return await self._persist(key, words, None)

    @contextlib.asynccontextmanager
    async def room(self, weight_bytes: int) -> AsyncIterator[None]:
        """
        Wait in line until so much more may be on its way; whatever its size, one may.

        Raises:
            BackpressureError: Redis took nothing for `retry_s`.
        """
        # What only settles waits behind nobody: it is what makes room
        if weight_bytes and (self._queue_for_room or not self._has_room(weight_bytes)):
            await self._wait_for_room(weight_bytes)
        self._queued_bytes += weight_bytes
        try:
            yield
        finally:
            self._queued_bytes -= weight_bytes
            if self._queue_for_room:
                self._queue_for_room[0].set()

    async def _persist(
        self,
        key: bytes,
        words: tuple[bytes | str | int, ...],
        script: Script | None,
        is_renewed: Callable[[], bool] | None = None,
    ) -> Any:
        trouble: BrokerUnavailableError | None = None
        tries = 0
        try:
            async with asyncio.timeout(self._retry_s):
                while True:
                    try:
                        return await self._try(key, words, script, is_renewed)
                    except LostError as error:
                        trouble = BrokerUnavailableError(str(error))
                    except ReplyError as error:
                        trouble = self._weigh(key, error)
                    tries += 1
                    await asyncio.sleep(_BACK_OFF.delay_s(tries))
        except TimeoutError:
            raise self._give_up(trouble) from None

    async def _ask(self, node: Node, *words: bytes | str | int) -> Any:
        """Ask one server what can be asked twice without harm, over reconnects if need be."""
        trouble: BrokerUnavailableError | None = None
        try:
            async with asyncio.timeout(self._retry_s):
                while True:
                    connection = await node.publisher.wait_up()
                    try:
                        return await connection.call(*words)
                    except LostError as error:
                        trouble = BrokerUnavailableError(str(error))
                    await asyncio.sleep(_BACK_OFF.delay_s(1))
        except TimeoutError:
            raise self._give_up(trouble) from None

    async def _try(
        self,
        key: bytes,
        words: tuple[bytes | str | int, ...],
        script: Script | None,
        is_renewed: Callable[[], bool] | None,
    ) -> Any:
        node = self._owner(key)
        connection = node.publisher.connection or await node.publisher.wait_up()
        if is_renewed is not None and is_renewed():
            raise RenewedError
        try:
            return await connection.ask(*words)
        except ReplyError as error:
            if str(error).startswith("NOSCRIPT") and script is not None:
                await connection.call("SCRIPT", "LOAD", script.source)
                return await connection.ask(*words)
            if str(error).startswith("ASK ") and (other := self._asked(str(error))):
                other.ask("ASKING").add_done_callback(_forget)
                if script is not None:
                    # Both in one go: the permission holds for one command
                    words = ("EVAL", script.source, *words[2:])
                return await other.ask(*words)
            raise

    def _owner(self, key: bytes) -> Node:
        node = self._owners.get(key)
        if node is None:
            if self._nodes is None:
                raise ClosedError("this RedisJournal is closed; make a new one")
            node = self._nodes.owner(key)
            if node is None:
                raise LostError("nobody in the cluster serves this slot")
            self._owners[key] = node
        return node

    def _asked(self, words: str) -> RespConnection | None:
        """Give the connection to the node that `ASK slot host:port` names."""
        assert self._nodes is not None
        where = words.split(" ")[2]
        for node in self._nodes.all():
            if str(node.publisher.address) == where:
                return node.publisher.connection
        return None

    def _weigh(self, key: bytes, error: ReplyError) -> BrokerUnavailableError:
        """Give the error of a refusal that passes; raise that of another."""
        word = str(error).split(" ", 1)[0]
        where = self._owner(key).publisher.address
        trouble = unavailable(where, error, self.place.access)
        if word not in _PASSING:
            raise trouble from None
        if word in _ELSEWHERE:
            self._owners.pop(key, None)
            if self._terms.on_stale is not None:
                self._terms.on_stale()
        if word == "OOM":
            return BackpressureError(
                f"redis at {where} is out of memory: let its groups catch up, forget old events"
                f" (`journal.trim`), or raise its `maxmemory` ({error})"
            )
        return trouble

    def _give_up(self, trouble: BrokerUnavailableError | None) -> BrokerUnavailableError:
        kind = type(trouble) if isinstance(trouble, BackpressureError) else BrokerUnavailableError
        words = str(trouble) if isinstance(trouble, BackpressureError) else self._trouble()
        words = words or str(trouble or f"redis at {self.place.address} does not answer")
        return kind(f"{words} (tried for {self._retry_s:g} s)")

    def _trouble(self) -> str:
        nodes = self._nodes.all() if self._nodes is not None else ()
        return "; ".join(sorted({str(node.trouble) for node in nodes if node.trouble is not None}))

    # -- settings ------------------------------------------------------------------------------

    async def _check_settings(self, node: Node, *, allow_volatile: bool) -> None:
        try:
            # CONFIG is often forbidden; what it would tell stands in INFO as well
            info = _facts(await self._ask(node, "INFO"))
        except ReplyError as error:
            raise unavailable(node.publisher.address, error, self.place.access) from None
        where = node.publisher.address
        problems = []
        version = info.get("redis_version", "0")
        if tuple(int(part) for part in version.split(".")[:2]) < _MIN_VERSION:
            problems.append(f"redis at {where} is {version}; a journal needs 7.0 or newer")
        if not allow_volatile:
            policy = info.get("maxmemory_policy", "noeviction")
            if policy != "noeviction":
                problems.append(
                    f"redis at {where} has maxmemory-policy={policy!r}: it would throw events away;"
                    " set `maxmemory-policy noeviction`, or allow it:"
                    " LEGION_REDIS_ALLOW_VOLATILE=true (allow_volatile=True)"
                )
            if info.get("aof_enabled", "1") != "1":
                problems.append(
                    f"redis at {where} has appendonly='no': a restart would lose what was accepted;"
                    " set `appendonly yes`, or allow it:"
                    " LEGION_REDIS_ALLOW_VOLATILE=true (allow_volatile=True)"
                )
        if problems:
            raise ConfigurationError(problems)

    # -- room ----------------------------------------------------------------------------------

    async def _wait_for_room(self, weight_bytes: int) -> None:
        turn = asyncio.Event()
        self._queue_for_room.append(turn)
        try:
            async with asyncio.timeout(self._retry_s):
                while self._queue_for_room[0] is not turn or not self._has_room(weight_bytes):
                    turn.clear()
                    await turn.wait()
        except TimeoutError:
            raise BackpressureError(
                f"redis at {self.place.address} took nothing for {self._retry_s:g} s:"
                f" {self._queued_bytes} bytes are on their way"
            ) from None
        finally:
            self._queue_for_room.remove(turn)
            if self._queue_for_room:
                self._queue_for_room[0].set()

    def _has_room(self, weight_bytes: int) -> bool:
        return not self._queued_bytes or self._queued_bytes + weight_bytes <= self._max_queued_bytes


log = logging.getLogger("mesh.journals.redis")


def _facts(info: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in info.decode().splitlines())
    return {name: value for name, mark, value in lines if mark}


def _forget(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
