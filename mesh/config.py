"""
Settings of the message bus: read once, checked whole, then handed down.

`MessageBusConfig.from_env` names every variable that cannot be used, all at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mesh.env import environment
from mesh.errors import ConfigurationError
from mesh.inbox import OVERFLOWS
from mesh.topics import is_topic

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mesh.redis_link.access import Url

BROKER_TYPES = ("memory", "zmq", "redis")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
WIRE_FORMATS = ("msgpack", "json")
TRACING = ("auto", "on", "off")
SYNCHRONOUS = ("NORMAL", "FULL")
_YES = ("1", "true", "yes", "on")
_NO = ("0", "false", "no", "off")
MASK = "***"
_MESH_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)


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
            f"{name}={_shown(name, getattr(self, name))}: {wanted}"
            for name, (check, wanted) in _RULES.items()
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
                value = _PARSERS[name](text.strip())
                check, wanted = _RULES.get(name, (_anything, ""))
                if not check(value):
                    raise ValueError(wanted)
                values[name] = value
            except ValueError as error:
                problems.append(f"{variable}={_shown(name, text)!s}: {error}")
        defaults = {field.name: field.default for field in fields(cls)}
        problems += _contradictions(defaults | values, VARIABLES)
        problems += _unknown(source)
        if problems:
            raise ConfigurationError(problems)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Give the settings as plain data; secrets are masked."""
        return {
            field.name: _masked(field.name, getattr(self, field.name)) for field in fields(self)
        }

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
_SECRETS = frozenset({"redis_password", "redis_sentinel_password"})
#: Who empties these means no limit: what the default would throw away is gone for good.
_EMPTY_IS_FOR_EVER = frozenset({"journal_max_age_s", "journal_max_bytes"})
_OURS = ("LEGION_",)
#: Read elsewhere: by the tests, and by issue-specific tools.
_ELSEWHERE = ("LEGION_TEST_",)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError("must be a number") from None
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError("must be a finite number")
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("must be a whole number") from None


def _flag(text: str) -> bool:
    lowered = text.lower()
    if lowered in _YES:
        return True
    if lowered in _NO:
        return False
    raise ValueError("must be true or false")


def _hosts(text: str) -> tuple[tuple[str, int], ...]:
    pairs = []
    for word in filter(None, (each.strip() for each in text.split(","))):
        host, colon, port = word.rpartition(":")
        if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError("must be host:port,host:port")
        pairs.append((host.strip("[]"), int(port)))
    return tuple(pairs)


def _words(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (each.strip() for each in text.split(","))))


_PARSERS: dict[str, Callable[[str], Any]] = {
    "broker_type": str.lower,
    "redis_host": str,
    "redis_port": _whole,
    "redis_username": str,
    "redis_password": str,
    "redis_url": str,
    "redis_socket": str,
    "redis_db": _whole,
    "redis_tls": _flag,
    "redis_tls_ca": str,
    "redis_tls_cert": str,
    "redis_tls_key": str,
    "redis_cluster": _flag,
    "redis_sentinels": _hosts,
    "redis_sentinel_service": str,
    "redis_sentinel_password": str,
    "mesh_name": str,
    "consumer_buffer_size": _whole,
    "consumer_max_retries": _whole,
    "consumer_retry_delay_ms": _number,
    "consumer_overflow": str.lower,
    "publish_timeout_s": _number,
    "handler_timeout_s": _number,
    "drain_timeout_s": _number,
    "durable_events": _words,
    "allow_downgrade": _words,
    "max_deliveries": _whole,
    "max_hops": _whole,
    "journal_synchronous": str.upper,
    "journal_max_age_s": _number,
    "journal_max_bytes": _whole,
    "redis_allow_volatile": _flag,
    "log_level": str.upper,
    "log_events": _flag,
    "wire_format": str.lower,
    "tracing": str.lower,
}


def _anything(value: Any) -> bool:
    return True


def _one_of(values: tuple[str, ...]) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: value in values), f"must be one of {', '.join(values)}"


def _between(low: float, high: float) -> tuple[Callable[[Any], bool], str]:
    def check(value: Any) -> bool:
        return isinstance(value, (int, float)) and low <= value <= high

    return check, f"must be {low:g} to {high:g}"


def _is_mesh_name(value: Any) -> bool:
    return isinstance(value, str) and _MESH_NAME.fullmatch(value) is not None


def _are_topics(value: Any) -> bool:
    return all(is_topic(str(each).encode()) for each in value)


def _are_patterns(value: Any) -> bool:
    return _are_topics([each.removesuffix(".*") for each in value if each != "*"])


def _is_age(value: Any) -> bool:
    return isinstance(value, (int, float)) and (value == 0 or 60 <= value <= 3e9)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and (value == 0 or 2**20 <= value <= 2**60)


def _is_redis_url(value: Any) -> bool:
    # Port 0 would pass for one that is left out
    return value is None or (_said_by(value) is not None and urlsplit(str(value)).port != 0)


def _said_by(url: Any) -> Url | None:
    """Give what a Redis URL says; None when there is none, or it cannot be read."""
    if url is None:
        return None
    # Not above: a mesh without Redis need not load what talks to it
    from mesh.redis_link.access import parse_url

    try:
        return parse_url(str(url))
    except ConfigurationError:
        return None


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "broker_type": _one_of(BROKER_TYPES),
    "redis_host": (bool, "must not be empty"),
    "redis_port": _between(1, 65535),
    "redis_url": (_is_redis_url, "must be redis://HOST:PORT/DB, rediss://... or unix:///PATH"),
    "redis_db": _between(0, 10_000),
    "redis_sentinel_service": (bool, "must not be empty"),
    "mesh_name": (_is_mesh_name, "must be 1 to 64 characters of A-Z a-z 0-9 _ . -"),
    "consumer_buffer_size": _between(1, 10_000_000),
    "consumer_max_retries": _between(0, 1000),
    "consumer_retry_delay_ms": _between(0, 3_600_000),
    "consumer_overflow": _one_of(OVERFLOWS),
    "publish_timeout_s": _between(0.1, 3600),
    "handler_timeout_s": _between(0.001, 86_400),
    "drain_timeout_s": _between(0, 3600),
    "durable_events": (_are_patterns, "must be topics, order.* or *, separated by commas"),
    "allow_downgrade": (_are_topics, "must be topics, separated by commas"),
    "max_deliveries": _between(1, 1000),
    "max_hops": _between(1, 1000),
    "journal_synchronous": _one_of(SYNCHRONOUS),
    "journal_max_age_s": (_is_age, "must be 0 (keep for ever), or 60 to 3e+09 seconds"),
    "journal_max_bytes": (_is_size, "must be 0 (no limit), or at least 1048576"),
    "log_level": _one_of(LOG_LEVELS),
    "wire_format": _one_of(WIRE_FORMATS),
    "tracing": _one_of(TRACING),
}


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
        return " and ".join(f"{named[name]}={_shown(name, values[name])}" for name in names)

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
    said = _said_by(values["redis_url"])
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
        if mine and values[name] and mine != values[name]
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


def _masked(name: str, value: Any) -> Any:
    if name == "redis_url" and value is not None:
        return _url_without_secret(str(value))
    return MASK if name in _SECRETS and value is not None else value


def _shown(name: str, value: Any) -> Any:
    if name == "redis_url":
        return _url_without_secret(str(value))
    if name in _SECRETS:
        return MASK
    if isinstance(value, str) and "@" in value:
        # Somebody may have taken it for a URL
        return f"{MASK}@{value.rpartition('@')[2]}"
    return value


def _url_without_secret(url: str) -> str:
    head, at, place = url.rpartition("@")
    if not at:
        return url
    scheme, mark, credentials = head.rpartition("://")
    user = credentials.partition(":")[0]
    return f"{scheme}{mark}{user}:{MASK}@{place}"
