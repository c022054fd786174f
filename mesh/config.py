"""
Settings of the message bus: read once, checked whole, then handed down.

`MessageBusConfig.from_env` names every variable that cannot be used, all at once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from mesh.config_values import RULES, masked, read_value, said_by, shown
from mesh.env import environment
from mesh.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mesh.redis_link.access import Url


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageBusConfig:
    """
    How a process joins the mesh.

    Raises:
        ConfigurationError: One or more values cannot be used; all are named.
    """

    broker_type: str = "zmq"
    redis_host: str = "localhost"
    redis_port: int = 6379
    redis_username: str | None = None
    redis_password: str | None = None
    #: ``redis://``, ``rediss://`` or ``unix://``; instead of host, port and socket.
    redis_url: str | None = None
    #: Path of a Unix socket; instead of host and port.
    redis_socket: str | None = None
    redis_db: int = 0
    redis_tls: bool = False
    redis_tls_ca: str | None = None
    redis_tls_cert: str | None = None
    redis_tls_key: str | None = None
    redis_cluster: bool = False
    #: Pairs of host and port; in the environment ``host:port,host:port``.
    redis_sentinels: tuple[tuple[str, int], ...] = ()
    redis_sentinel_service: str = "mymaster"
    redis_sentinel_password: str | None = None
    #: Meshes of different names can share one Redis.
    mesh_name: str = "default"
    consumer_buffer_size: int = 1000
    consumer_max_retries: int = 3
    consumer_retry_delay_ms: float = 100.0
    consumer_overflow: str = "block"
    #: How long publishing waits for a fabric or journal that takes nothing.
    publish_timeout_s: float = 10.0
    handler_timeout_s: float = 30.0
    drain_timeout_s: float = 8.0
    #: Types that are delivered durably whatever they are declared; ``order.*`` and ``*`` are known.
    durable_events: tuple[str, ...] = ()
    #: Types declared durable that may travel live all the same: the only way around a promise.
    allow_downgrade: tuple[str, ...] = ()
    #: A durable event whose handling has killed its agent so often is put aside.
    max_deliveries: int = 5
    #: An event with so many handlers behind it goes in circles, and is put aside.
    max_hops: int = 32
    #: ``NORMAL`` survives the death of any process, ``FULL`` a power cut as well (SQLite).
    journal_synchronous: str = "NORMAL"
    #: Events that every group has settled are forgotten when they are older; 0: never.
    journal_max_age_s: float = 7 * 86_400.0
    #: The oldest of them are forgotten while the journal is larger; 0: no limit.
    journal_max_bytes: int = 0
    #: Keep durable events in a Redis without persistence, which forgets them when it restarts.
    redis_allow_volatile: bool = False
    log_level: str = "INFO"
    log_events: bool = True
    wire_format: str = "msgpack"
    tracing: str = "auto"

    def __post_init__(self) -> None:
        """Check every field."""
        problems = [
            f"{name}={shown(name, getattr(self, name))}: {wanted}"
            for name, (check, wanted) in RULES.items()
            if not check(getattr(self, name))
        ]
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        problems += _contradictions(values, {name: name for name in values})
        if problems:
            raise ConfigurationError(problems)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> MessageBusConfig:
        """
        Read the settings from the environment.

        Args:
            environ: Default: this process's.

        Raises:
            ConfigurationError: Names each variable, its value and what is allowed.
        """
        source = environment() if environ is None else environ
        values: dict[str, Any] = {}
        problems: list[str] = []
        for name, variable in VARIABLES.items():
            text = source.get(variable)
            if text is None or text == "":
                if text is not None and name in _EMPTY_IS_FOR_EVER:
                    values[name] = 0
                continue
            try:
                values[name] = read_value(name, text)
            except ValueError as error:
                problems.append(f"{variable}={shown(name, text)!s}: {error}")
        defaults = {field.name: field.default for field in fields(cls)}
        problems += _contradictions(defaults | values, VARIABLES)
        problems += _unknown(source)
        if problems:
            raise ConfigurationError(problems)
        return cls(**values)

    def fabric(self) -> str:
        """Say in words what joins the mesh, and where it is; without secrets."""
        if self.broker_type != "redis":
            return self.broker_type
        # Agents on other fabrics never load it
        from mesh.redis_link.access import Address, parse_url

        said = None if self.redis_url is None else parse_url(self.redis_url)
        if self.redis_sentinels:
            nodes = ",".join(f"{host}:{port}" for host, port in sorted(self.redis_sentinels))
            where = f"{self.redis_sentinel_service} by the sentinels {nodes}"
        elif said is not None:
            where = str(said.address)
        else:
            where = str(Address(self.redis_host, self.redis_port, self.redis_socket))
        where = where.replace("localhost", "127.0.0.1")
        db = self.redis_db if said is None or said.db is None else said.db
        kind = "redis cluster" if self.redis_cluster else "redis"
        return f"{kind} at {where}, database {db}, mesh {self.mesh_name!r}"

    def to_dict(self) -> dict[str, Any]:
        """Give the settings as plain data; secrets are masked."""
        return {field.name: masked(field.name, getattr(self, field.name)) for field in fields(self)}

    def __repr__(self) -> str:
        """Show the settings; secrets are masked."""
        inside = ", ".join(f"{name}={value!r}" for name, value in self.to_dict().items())
        return f"{type(self).__name__}({inside})"


#: Field by environment variable.
VARIABLES = {
    "broker_type": "LEGION_BROKER_TYPE",
    "redis_host": "REDIS_HOST",
    "redis_port": "REDIS_PORT",
    "redis_username": "REDIS_USERNAME",
    "redis_password": "REDIS_PASSWORD",
    "redis_url": "REDIS_URL",
    "redis_socket": "REDIS_SOCKET",
    "redis_db": "REDIS_DB",
    "redis_tls": "REDIS_TLS",
    "redis_tls_ca": "REDIS_TLS_CA",
    "redis_tls_cert": "REDIS_TLS_CERT",
    "redis_tls_key": "REDIS_TLS_KEY",
    "redis_cluster": "LEGION_REDIS_CLUSTER",
    "redis_sentinels": "LEGION_REDIS_SENTINELS",
    "redis_sentinel_service": "LEGION_REDIS_SENTINEL_SERVICE",
    "redis_sentinel_password": "REDIS_SENTINEL_PASSWORD",
    "mesh_name": "LEGION_MESH_NAME",
    "consumer_buffer_size": "LEGION_CONSUMER_BUFFER_SIZE",
    "consumer_max_retries": "LEGION_CONSUMER_MAX_RETRIES",
    "consumer_retry_delay_ms": "LEGION_CONSUMER_RETRY_DELAY_MS",
    "consumer_overflow": "LEGION_CONSUMER_OVERFLOW",
    "publish_timeout_s": "LEGION_PUBLISH_TIMEOUT_S",
    "handler_timeout_s": "LEGION_HANDLER_TIMEOUT_S",
    "drain_timeout_s": "LEGION_DRAIN_TIMEOUT_S",
    "durable_events": "LEGION_DURABLE_EVENTS",
    "allow_downgrade": "LEGION_ALLOW_DOWNGRADE",
    "max_deliveries": "LEGION_MAX_DELIVERIES",
    "max_hops": "LEGION_MAX_HOPS",
    "journal_synchronous": "LEGION_JOURNAL_SYNCHRONOUS",
    "journal_max_age_s": "LEGION_JOURNAL_MAX_AGE_S",
    "journal_max_bytes": "LEGION_JOURNAL_MAX_BYTES",
    "redis_allow_volatile": "LEGION_REDIS_ALLOW_VOLATILE",
    "log_level": "LEGION_LOG_LEVEL",
    "log_events": "LEGION_LOG_EVENTS",
    "wire_format": "LEGION_WIRE_FORMAT",
    "tracing": "LEGION_TRACING",
}
#: Who empties these means no limit: what the default would throw away is gone for good.
_EMPTY_IS_FOR_EVER = frozenset({"journal_max_age_s", "journal_max_bytes"})
_OURS = ("LEGION_",)
#: Read by the tests.
_ELSEWHERE = ("LEGION_TEST_",)


def _unknown(source: Mapping[str, str]) -> list[str]:
    """Name variables that look like ours and are not: a typing error would be silent otherwise."""
    import difflib

    known = set(VARIABLES.values())
    problems = []
    for name in sorted(source):
        if not name.startswith(_OURS) or name in known or name.startswith(_ELSEWHERE):
            continue
        close = difflib.get_close_matches(name, known, 1, cutoff=0.75)
        hint = f"; did you mean {close[0]}?" if close else ""
        # Without its value: a misspelt name may be that of a password
        problems.append(f"{name}: no such setting{hint}")
    return problems


def _contradictions(values: Mapping[str, Any], named: Mapping[str, str]) -> list[str]:
    """Name settings that cannot hold together: which one would win is nothing to guess."""

    def say(*names: str) -> str:
        return " and ".join(f"{named[name]}={shown(name, values[name])}" for name in names)

    place = [
        name
        for name, absent in (("redis_host", "localhost"), ("redis_port", 6379))
        if values[name] != absent
    ]
    others = [name for name in ("redis_url", "redis_socket", "redis_sentinels") if values[name]]
    problems = []
    if len(others) + bool(place) > 1:
        problems.append(f"{say(*others, *place)}: each says where Redis is; set one of them")
    if values["redis_cluster"] and (values["redis_sentinels"] or values["redis_socket"]):
        problems.append(
            f"{say('redis_cluster')}: a cluster is reached by {named['redis_host']} and"
            f" {named['redis_port']}, or {named['redis_url']}"
        )
    if values["redis_tls"] and values["redis_socket"]:
        problems.append(
            f"{say('redis_tls', 'redis_socket')}: a Unix socket needs no TLS; unset one of them"
        )
    if values["redis_cluster"] and values["redis_db"]:
        problems.append(f"{say('redis_cluster', 'redis_db')}: {_CLUSTER_DB}")
    said = said_by(values["redis_url"])
    return problems if said is None else problems + _against_url(said, values, say)


_CLUSTER_DB = "a cluster has no database but 0; unset one of them"


def _against_url(said: Url, values: Mapping[str, Any], say: Callable[..., str]) -> list[str]:
    """Name settings that say something else than the Redis URL."""
    problems = [
        f"{say('redis_url', name)}: each says another {what}; set one of them"
        for name, mine, what in (
            ("redis_db", said.db, "database"),
            ("redis_username", said.username, "user"),
            ("redis_password", said.password, "password"),
        )
        if mine is not None and values[name] and mine != values[name]
    ]
    is_socket = said.address.path is not None
    if values["redis_tls"] and not said.tls:
        todo = "a Unix socket needs no TLS; unset one of them" if is_socket else "write rediss://"
        problems.append(f"{say('redis_url', 'redis_tls')}: {todo}")
    if values["redis_cluster"] and is_socket:
        problems.append(f"{say('redis_cluster', 'redis_url')}: a Unix socket leads to one server")
    if values["redis_cluster"] and said.db:
        problems.append(f"{say('redis_cluster', 'redis_url')}: {_CLUSTER_DB}")
    return problems
