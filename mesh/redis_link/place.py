"""Where a mesh's Redis is and how it is entered: what the constructors of its fabric take."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from mesh.errors import ConfigurationError
from mesh.redis_link.access import PORT, Access, Address, parse_url, tls_context
from mesh.redis_link.nodes import ClusterNodes, OneServer, always, by_sentinel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path
    from typing import Any

    from mesh.redis_link.node import Terms
    from mesh.redis_link.nodes import Nodes

#: How long one of several sentinels is waited for.
_SENTINEL_S = 1.0
_MESH = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Place:
    """A server, a master that Sentinel names, or a cluster; and one mesh on it."""

    address: Address
    access: Access
    cluster: bool
    #: Gives the address of the one server; asked before each attempt to connect.
    find: Callable[[], Awaitable[Address]]
    #: Refuse a replica.
    must_lead: bool

    def nodes(
        self, terms: Terms, resend: Callable[[Any], bool], on_layout: Callable[[], None]
    ) -> Nodes:
        """Give the servers, not connected."""
        if self.cluster:
            return ClusterNodes([self.address], terms, resend, on_layout)
        return OneServer(self.find, terms)


class Where(TypedDict, total=False):
    """What leads to a Redis, besides host, port, cluster and mesh; `place_of` has the defaults."""

    url: str | None
    username: str | None
    password: str | None
    db: int
    unix_socket_path: str | Path | None
    tls: bool
    tls_ca: str | Path | None
    tls_cert: str | Path | None
    tls_key: str | Path | None
    sentinels: Sequence[tuple[str, int]]
    sentinel_service: str
    sentinel_password: str | None
    client_name: str


def place_of(
    host: str = "localhost",
    port: int = PORT,
    *,
    url: str | None = None,
    username: str | None = None,
    password: str | None = None,
    db: int = 0,
    unix_socket_path: str | Path | None = None,
    tls: bool = False,
    tls_ca: str | Path | None = None,
    tls_cert: str | Path | None = None,
    tls_key: str | Path | None = None,
    cluster: bool = False,
    sentinels: Sequence[tuple[str, int]] = (),
    sentinel_service: str = "mymaster",
    sentinel_password: str | None = None,
    mesh: str = "default",
    client_name: str = "legion",
) -> Place:
    """
    Understand what a constructor was given; `RedisMessageBroker` says what each argument is.

    Raises:
        ConfigurationError: The arguments contradict each other, or a file cannot be used.
    """
    address = Address(host, port, str(unix_socket_path) if unix_socket_path else None)
    if url is not None:
        said = parse_url(url)
        address, tls = said.address, tls or said.tls
        username, password = username or said.username, password or said.password
        db = db or said.db or 0
    _check(address, mesh, cluster=cluster, sentinels=sentinels, tls=tls)
    access = Access(
        username=username,
        password=password,
        db=0 if cluster else db,
        tls=tls_context(tls_ca, tls_cert, tls_key) if tls else None,
        client_name=client_name,
    )
    find = always(address)
    if sentinels:
        to_sentinels = Access(
            password=sentinel_password,
            tls=access.tls,
            client_name=client_name,
            timeout_s=_SENTINEL_S,
        )
        find = by_sentinel(sentinels, sentinel_service, to_sentinels)
    return Place(address, access, cluster, find, bool(sentinels))


def _check(
    address: Address, mesh: str, *, cluster: bool, sentinels: Sequence[tuple[str, int]], tls: bool
) -> None:
    problems = []
    if not _MESH.fullmatch(mesh):
        problems.append(f"mesh={mesh!r}: must be 1 to 64 characters of A-Z a-z 0-9 _ . -")
    if cluster and sentinels:
        problems.append("cluster and sentinels: a cluster elects its masters itself; choose one")
    if address.path is not None and (cluster or sentinels):
        problems.append(f"{address}: a Unix socket leads to one server; no cluster, no sentinels")
    if address.path is not None and tls:
        problems.append(f"{address}: a Unix socket needs no TLS")
    if problems:
        raise ConfigurationError(problems)
