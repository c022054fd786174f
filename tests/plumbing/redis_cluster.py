"""A Redis Cluster of our own."""

from __future__ import annotations

from tests.plumbing.processes import eventually
from tests.plumbing.redis_server import RedisServer
from tests.redis.tools import command, free_ports


class Cluster:
    """
    Three masters on loopback, the slots shared out among them.

    Args:
        append_only: Keep every write on disk.
        replicas: Give each master one; they are `servers` 3 to 5, in the same order.
    """

    def __init__(self, *, append_only: bool = False, replicas: bool = False) -> None:
        self.ports = free_ports(6 if replicas else 3)
        self._owner: dict[int, int] = {}
        self.servers = [
            RedisServer(
                append_only=append_only,
                settings={
                    "port": str(port),
                    "bind": "127.0.0.1",
                    "cluster-enabled": "yes",
                    "cluster-node-timeout": "1000",
                    "cluster-require-full-coverage": "no",
                    "repl-diskless-sync-delay": "0",
                },
            )
            for port in self.ports
        ]

    def start(self) -> None:
        for server in self.servers:
            server.start()

    def close(self) -> None:
        for server in self.servers:
            server.close()

    async def join(self) -> None:
        bounds = [0, 5461, 10923, 16384]
        for number, server in enumerate(self.servers[:3]):
            first, last = bounds[number], bounds[number + 1] - 1
            await command(server.url, "CLUSTER", "ADDSLOTSRANGE", first, last)
            await command(server.url, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for port in self.ports[1:]:
            await command(self.servers[0].url, "CLUSTER", "MEET", "127.0.0.1", port)
        for server in self.servers:
            await eventually(lambda server=server: self._agrees(server))  # type: ignore[misc]
        for number in range(3, len(self.servers)):
            await self._follow(number, number - 3)

    async def _follow(self, number: int, master: int) -> None:
        url = self.servers[number].url
        await command(url, "CLUSTER", "REPLICATE", await self.identity(master))

        async def is_synced() -> bool:
            facts = await command(url, "INFO", "replication")
            return bool(facts.get("master_link_status") == "up")

        await eventually(is_synced)

    async def _agrees(self, server: RedisServer) -> bool:
        info = await command(server.url, "CLUSTER", "INFO")
        slots = await command(server.url, "CLUSTER", "SLOTS")
        return b"cluster_state:ok" in info and len(slots) == 3

    async def identity(self, number: int) -> str:
        said = await command(self.servers[number].url, "CLUSTER", "MYID")
        return said.decode() if isinstance(said, bytes) else str(said)

    async def move(self, slot: int, target: int) -> None:
        """Give a slot without keys to another node, as `redis-cli --cluster reshard` does."""
        source = self._owner.get(slot, slot * 3 // 16384)
        ids = [await self.identity(number) for number in (source, target)]
        for number, *words in (
            # Without it the target claims the slot under its old epoch, and the others doubt it
            (target, "IMPORTING", ids[0]),
            (source, "MIGRATING", ids[1]),
            *((each, "NODE", ids[1]) for each in (target, source, 3 - source - target)),
        ):
            await command(self.servers[number].url, "CLUSTER", "SETSLOT", slot, *words)
        self._owner[slot] = target
