"""Durable events over every kind of Redis there is, while its master dies."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

import pytest

from tests.outages.pair import Pair, launched
from tests.plumbing.processes import ROOT, eventually
from tests.plumbing.redis_cluster import Cluster
from tests.plumbing.redis_server import RedisServer
from tests.redis.tools import certificates, command, free_ports

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = [pytest.mark.fault, pytest.mark.redis]

SECRET = "hunter2-canary"
LOOPBACK = {"bind": "127.0.0.1", "repl-diskless-sync-delay": "0"}


@pytest.fixture
def serve() -> Iterator[Callable[..., RedisServer]]:
    """Give a function that starts servers; they end with the test."""
    made: list[RedisServer] = []

    def start(settings: dict[str, str], *, sentinel: bool = False) -> RedisServer:
        server = RedisServer(append_only=True, settings=settings, sentinel=sentinel).start()
        made.append(server)
        return server

    yield start
    for server in made:
        server.close()


def rights() -> str:
    """Give what docs/redis.md says an ACL user of the journal needs."""
    text = (ROOT / "docs" / "redis.md").read_text()
    words = re.findall(r"ACL SETUSER legion on >\.\.\. ([^`]*)```", text)[-1]
    return " ".join(words.split())


async def note_what_is_safe(pair: Pair, master: RedisServer) -> None:
    """Note the last order of which a replica surely knows; later ones may die with the master."""
    pair.safe = pair.kept()[-1]
    said = (await command(master.url, "INFO", "replication"))["master_repl_offset"]

    async def is_known() -> bool:
        facts = await command(master.url, "INFO", "replication")
        return bool(facts["slave0"]["offset"] >= said)

    await eventually(is_known)


async def test_by_tls_as_an_acl_user_with_a_password(
    serve: Callable[..., RedisServer], tmp_path: Path, own_mesh_dir: Path
) -> None:
    """With no more rights than the documentation lists, also after a restart of the server."""
    certificates(tmp_path)
    (port,) = free_ports(1)
    server = serve({
        "tls-port": str(port), "bind": "127.0.0.1", "tls-auth-clients": "optional",
        "tls-cert-file": f"{tmp_path}/server.pem", "tls-key-file": f"{tmp_path}/server.key",
        "tls-ca-cert-file": f"{tmp_path}/ca.pem",
        "user legion": f"on >{SECRET} {rights()}", "requirepass": "another",
    })  # fmt: skip

    async def kill() -> None:
        await asyncio.to_thread(server.kill)

    async def start() -> None:
        await asyncio.to_thread(server.start)

    async with launched(
        own_mesh_dir,
        broker_type="redis",
        redis_url=f"rediss://127.0.0.1:{port}",
        redis_username="legion",
        redis_password=SECRET,
        redis_tls_ca=f"{tmp_path}/ca.pem",
    ) as pair:
        await pair.weathers(kill, start, "BrokerUnavailableError", "redis at 127.0.0.1")
        assert SECRET not in "".join(line for name in pair.agents for line in pair.log(name))


async def test_a_failover_by_sentinel(
    serve: Callable[..., RedisServer], own_mesh_dir: Path
) -> None:
    first, second, guard = free_ports(3)
    master = serve({"port": str(first), **LOOPBACK})
    serve({"port": str(second), "replicaof": f"127.0.0.1 {first}", **LOOPBACK})
    sentinel = f"redis://127.0.0.1:{guard}"
    serve(
        {
            "port": str(guard),
            "sentinel monitor": f"legion 127.0.0.1 {first} 1",
            "sentinel down-after-milliseconds": "legion 500",
            "sentinel failover-timeout": "legion 2000",
            "bind": "127.0.0.1",
        },
        sentinel=True,
    )

    async def knows_the_replica() -> bool:
        return bool(await command(sentinel, "SENTINEL", "REPLICAS", "legion"))

    await eventually(knows_the_replica, within_s=20)
    async with launched(
        own_mesh_dir,
        broker_type="redis",
        redis_sentinels=(("127.0.0.1", guard),),
        redis_sentinel_service="legion",
    ) as pair:

        async def kill() -> None:
            await note_what_is_safe(pair, master)
            await asyncio.to_thread(master.kill)

        async def is_promoted() -> bool:
            said = await command(sentinel, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", "legion")
            return str(second) in str(said)

        async def promotion() -> None:
            await eventually(is_promoted, within_s=20)

        await pair.weathers(kill, promotion, "BrokerUnavailableError")


@pytest.fixture
def servers() -> Iterator[Cluster]:
    """Three masters, each with a replica."""
    made = Cluster(append_only=True, replicas=True)
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.mark.timeout(120)
async def test_a_failover_of_a_cluster(servers: Cluster, own_mesh_dir: Path) -> None:
    await servers.join()
    async with launched(
        own_mesh_dir,
        broker_type="redis",
        redis_host="127.0.0.1",
        redis_port=servers.ports[0],
        redis_cluster=True,
    ) as pair:
        victim, heir = servers.servers[1], servers.servers[4]

        async def kill() -> None:
            await note_what_is_safe(pair, victim)
            await asyncio.to_thread(victim.kill)

        async def is_promoted() -> bool:
            return bool((await command(heir.url, "ROLE"))[0] in ("master", b"master"))

        async def promotion() -> None:
            await eventually(is_promoted, within_s=20)

        await pair.weathers(kill, promotion, "BrokerUnavailableError")
