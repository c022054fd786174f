"""How a setting is read from its text, what it may be, and how it is shown."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mesh.errors import ConfigurationError
from mesh.inbox import OVERFLOWS
from mesh.topics import is_topic

if TYPE_CHECKING:
    from collections.abc import Callable

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
_SECRETS = frozenset({"redis_password", "redis_sentinel_password"})


def read_value(name: str, text: str) -> Any:
    """
    Read a setting from its text.

    Raises:
        ValueError: Says what it may be.
    """
    value = _PARSERS[name](text.strip())
    if name in RULES:
        check, wanted = RULES[name]
        if not check(value):
            raise ValueError(wanted)
    return value


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
    return value is None or (said_by(value) is not None and urlsplit(str(value)).port != 0)


def said_by(url: Any) -> Url | None:
    """Give what a Redis URL says; None when there is none, or it cannot be read."""
    if url is None:
        return None
    # Not above: a mesh without Redis need not load what talks to it
    from mesh.redis_link.access import parse_url

    try:
        return parse_url(str(url))
    except ConfigurationError:
        return None


RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
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


def masked(name: str, value: Any) -> Any:
    """Give a setting's value; of a secret, that there is one."""
    if name == "redis_url" and value is not None:
        return _masked_url(str(value))
    return MASK if name in _SECRETS and value is not None else value


def shown(name: str, value: Any) -> Any:
    """Give a value, which may be a mistake, for an error."""
    if name == "redis_url":
        return _masked_url(str(value))
    if name in _SECRETS:
        return MASK
    if isinstance(value, str) and "@" in value:
        # Somebody may have taken it for a URL
        return f"{MASK}@{value.rpartition('@')[2]}"
    return value


def _masked_url(url: str) -> str:
    # Not above: see `said_by`
    from mesh.redis_link.access import masked_url

    return masked_url(url)
