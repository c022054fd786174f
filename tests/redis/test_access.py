"""How the Redis fabric is let in: password, ACL user, TLS, socket, URL; and what it says if not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from mesh import (
    AccessDeniedError,
    BrokerUnavailableError,
    ConfigurationError,
    MessageBusConfig,
    RedisMessageBroker,
)
from mesh.factory import make_broker
from mesh.redis_link.access import Access, Address, unavailable
from mesh.redis_link.resp import ReplyError
from tests.plumbing.processes import eventually
from tests.plumbing.redis_server import RedisServer
from tests.redis.tools import Ear, certificates, command, free_ports

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.redis

SECRET = "hunter2-canary"
RIGHTS = (
    "resetchannels", "&legion:*", "-@all", "+publish", "+subscribe", "+unsubscribe", "+ping",
    "+client|setname",
)  # fmt: skip


@pytest.fixture
def serve() -> Iterator[Callable[[dict[str, str]], RedisServer]]:
    """Give a function that starts servers; they end with the test."""
    made: list[RedisServer] = []

    def start(settings: dict[str, str]) -> RedisServer:
        server = RedisServer(settings=settings).start()
        made.append(server)
        return server

    yield start
    for server in made:
        server.close()


async def carries(broker: RedisMessageBroker) -> None:
    """Send a frame to ourselves."""
    async with broker:
        ear = Ear()
        await broker.attach(["t"], ear)
        await broker.send("t", b"{}")
        await eventually(lambda: ear.frames == [b"{}"])


async def test_a_password(serve: Callable[[dict[str, str]], RedisServer]) -> None:
    server = serve({"requirepass": SECRET})

    await carries(RedisMessageBroker(unix_socket_path=server.socket, password=SECRET))
    await carries(RedisMessageBroker(url=f"unix://:{SECRET}@{server.socket}"))
    with pytest.raises(AccessDeniedError, match="asks for a password; set REDIS_PASSWORD"):
        await RedisMessageBroker(unix_socket_path=server.socket).connect()
    with pytest.raises(AccessDeniedError, match="wrong user or password") as refused:
        await RedisMessageBroker(unix_socket_path=server.socket, password=SECRET + "x").connect()
    assert SECRET not in str(refused.value)
    assert str(server.socket) in str(refused.value)


async def test_an_acl_user_needs_few_rights(
    serve: Callable[[dict[str, str]], RedisServer],
) -> None:
    server = serve({})
    await command(server.url, "ACL", "SETUSER", "ann", "on", f">{SECRET}", *RIGHTS)
    ann: dict[str, Any] = {
        "unix_socket_path": server.socket, "username": "ann", "password": SECRET
    }  # fmt: skip

    await carries(RedisMessageBroker(**ann))
    for right in ("publish", "subscribe"):
        await command(server.url, "ACL", "SETUSER", "ann", f"-{right}")
        with pytest.raises(AccessDeniedError, match=f"lacks a right.*{right}"):
            await RedisMessageBroker(**ann).connect()
        await command(server.url, "ACL", "SETUSER", "ann", f"+{right}")


async def test_a_host_a_port_and_a_database(
    serve: Callable[[dict[str, str]], RedisServer],
) -> None:
    (port,) = free_ports(1)
    serve({"port": str(port), "bind": "127.0.0.1"})

    await carries(RedisMessageBroker(host="127.0.0.1", port=port))
    await carries(RedisMessageBroker(url=f"redis://127.0.0.1:{port}/3"))
    with pytest.raises(AccessDeniedError, match="no such database"):
        await RedisMessageBroker(host="127.0.0.1", port=port, db=99).connect()


async def test_tls(serve: Callable[[dict[str, str]], RedisServer], tmp_path: Path) -> None:
    certificates(tmp_path)
    (port,) = free_ports(1)
    serve({
        "tls-port": str(port), "bind": "127.0.0.1", "tls-auth-clients": "optional",
        "tls-cert-file": f"{tmp_path}/server.pem", "tls-key-file": f"{tmp_path}/server.key",
        "tls-ca-cert-file": f"{tmp_path}/ca.pem",
    })  # fmt: skip
    where: dict[str, Any] = {"host": "127.0.0.1", "port": port}

    await carries(RedisMessageBroker(**where, tls=True, tls_ca=tmp_path / "ca.pem"))
    await carries(RedisMessageBroker(url=f"rediss://127.0.0.1:{port}", tls_ca=tmp_path / "ca.pem"))
    with pytest.raises(AccessDeniedError, match=r"not trusted.*set REDIS_TLS_CA"):
        await RedisMessageBroker(**where, tls=True).connect()
    with pytest.raises(BrokerUnavailableError, match="does it want TLS"):
        await RedisMessageBroker(**where, connect_timeout_s=0.5).connect()
    with pytest.raises(ConfigurationError, match=r"TLS files .*missing.pem"):
        RedisMessageBroker(**where, tls=True, tls_ca=tmp_path / "missing.pem")


async def test_two_meshes_share_a_server(redis_url: str) -> None:
    async with (
        RedisMessageBroker(url=redis_url, mesh="one") as one,
        RedisMessageBroker(url=redis_url, mesh="two") as two,
    ):
        first, second = Ear(), Ear()
        await one.attach(["t"], first)
        await two.attach(["t"], second)
        await one.send("t", b"{1}")
        await two.send("t", b"{2}")
        await eventually(lambda: first.frames and second.frames)

    assert (first.frames, second.frames) == ([b"{1}"], [b"{2}"])


async def test_nobody_answers() -> None:
    (port,) = free_ports(1)

    with pytest.raises(BrokerUnavailableError, match=rf"redis at localhost:{port} cannot be"):
        await RedisMessageBroker(port=port, connect_timeout_s=0.2).connect()


def test_contradictions_are_all_named() -> None:
    with pytest.raises(ConfigurationError) as refused:
        RedisMessageBroker(
            unix_socket_path="/s", cluster=True, sentinels=[("h", 1)], tls=True, mesh="a b"
        )
    assert len(refused.value.problems) == 4


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://h", "must begin redis://"),
        ("redis://h:x", "the port 1 to 65535"),
        ("redis://h/x", "the database must be a number"),
        ("redis://h?ssl=1", "no such option: ssl"),
        ("unix://", "names no socket"),
    ],
)
def test_a_bad_url_is_told_without_its_password(url: str, told: str) -> None:
    scheme, rest = url.split("://")

    with pytest.raises(ConfigurationError, match=told) as refused:
        RedisMessageBroker(url=f"{scheme}://ann:{SECRET}@{rest}")

    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "told", "denied"),
    [
        ("LOADING Redis is loading the dataset in memory", "loading its data", False),
        ("READONLY You can't write against a read only replica.", "read-only replica", False),
        ("OOM command not allowed when used memory > 'maxmemory'.", "out of memory", False),
        ("MISCONF Errors writing to the AOF file", "cannot write to its disk", False),
        ("NOPERM this user has no permissions", "lacks a right", True),
        (f"ERR unknown command 'AUTH', with args beginning with: '{SECRET}'", "[*]{3}", False),
    ],
)
def test_refusals_are_said_in_our_words(words: str, told: str, denied: bool) -> None:
    error = unavailable(Address("h", 1), ReplyError(words), Access(password=SECRET))

    assert isinstance(error, AccessDeniedError) == denied
    with pytest.raises(BrokerUnavailableError, match=rf"redis at h:1.*{told}"):
        raise error
    assert SECRET not in str(error)


def test_the_settings_name_all_mistakes_and_no_secret() -> None:
    with pytest.raises(ConfigurationError) as refused:
        MessageBusConfig.from_env({
            "REDIS_URL": f"http://ann:{SECRET}@h", "REDIS_PORT": "0", "REDIS_TLS": "perhaps",
            "LEGION_REDIS_SENTINELS": "h", "LEGION_MESH_NAME": "a b", "REDIS_DB": "-1",
        })  # fmt: skip
    assert len(refused.value.problems) == 6
    assert SECRET not in str(refused.value)

    with pytest.raises(
        ConfigurationError, match="REDIS_URL=redis://h and REDIS_SOCKET=/s: each says where"
    ):
        MessageBusConfig.from_env({"REDIS_URL": "redis://h", "REDIS_SOCKET": "/s"})

    config = MessageBusConfig.from_env({
        "REDIS_URL": f"redis://ann:{SECRET}@h:1", "REDIS_PASSWORD": SECRET,
        "REDIS_SENTINEL_PASSWORD": SECRET,
    })  # fmt: skip
    assert config.to_dict()["redis_url"] == "redis://ann:***@h:1"
    assert SECRET not in repr(config) + str(config.to_dict())
    assert SECRET not in repr(vars(make_broker(MessageBusConfig(
        broker_type="redis", redis_password=SECRET, redis_url=f"redis://:{SECRET}@h"
    ))))  # fmt: skip
