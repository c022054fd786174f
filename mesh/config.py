"""
Settings of the message bus: read once, checked whole, then handed down.

`MessageBusConfig.from_env` names every variable that cannot be used, all at once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from mesh.env import environment
from mesh.errors import ConfigurationError
from mesh.inbox import OVERFLOWS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

BROKER_TYPES = ("memory", "zmq", "redis")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
WIRE_FORMATS = ("msgpack", "json")
TRACING = ("auto", "on", "off")
_YES = ("1", "true", "yes", "on")
_NO = ("0", "false", "no", "off")
MASK = "***"


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
    redis_password: str | None = None
    consumer_buffer_size: int = 1000
    consumer_max_retries: int = 3
    consumer_retry_delay_ms: float = 100.0
    consumer_overflow: str = "block"
    handler_timeout_s: float = 30.0
    drain_timeout_s: float = 8.0
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
                continue
            try:
                values[name] = _PARSERS[name](text.strip())
                check, wanted = _RULES.get(name, (_anything, ""))
                if not check(values[name]):
                    raise ValueError(wanted)
            except ValueError as error:
                problems.append(f"{variable}={_shown(name, text)!s}: {error}")
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
    "redis_password": "REDIS_PASSWORD",
    "consumer_buffer_size": "LEGION_CONSUMER_BUFFER_SIZE",
    "consumer_max_retries": "LEGION_CONSUMER_MAX_RETRIES",
    "consumer_retry_delay_ms": "LEGION_CONSUMER_RETRY_DELAY_MS",
    "consumer_overflow": "LEGION_CONSUMER_OVERFLOW",
    "handler_timeout_s": "LEGION_HANDLER_TIMEOUT_S",
    "drain_timeout_s": "LEGION_DRAIN_TIMEOUT_S",
    "log_level": "LEGION_LOG_LEVEL",
    "log_events": "LEGION_LOG_EVENTS",
    "wire_format": "LEGION_WIRE_FORMAT",
    "tracing": "LEGION_TRACING",
}
_SECRETS = frozenset({"redis_password"})
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


_PARSERS: dict[str, Callable[[str], Any]] = {
    "broker_type": str.lower,
    "redis_host": str,
    "redis_port": _whole,
    "redis_password": str,
    "consumer_buffer_size": _whole,
    "consumer_max_retries": _whole,
    "consumer_retry_delay_ms": _number,
    "consumer_overflow": str.lower,
    "handler_timeout_s": _number,
    "drain_timeout_s": _number,
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


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "broker_type": _one_of(BROKER_TYPES),
    "redis_host": (bool, "must not be empty"),
    "redis_port": _between(1, 65535),
    "consumer_buffer_size": _between(1, 10_000_000),
    "consumer_max_retries": _between(0, 1000),
    "consumer_retry_delay_ms": _between(0, 3_600_000),
    "consumer_overflow": _one_of(OVERFLOWS),
    "handler_timeout_s": _between(0.001, 86_400),
    "drain_timeout_s": _between(0, 3600),
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
        close = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        problems.append(f"{name}={source[name]}: no such setting{hint}")
    return problems


def _masked(name: str, value: Any) -> Any:
    return MASK if name in _SECRETS and value is not None else value


def _shown(name: str, value: Any) -> Any:
    return MASK if name in _SECRETS else value
