"""Puts a bus together: the only place, besides the runtime, that chooses members."""

from __future__ import annotations

import importlib
import math
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mesh.config import MessageBusConfig
from mesh.config_values import BROKER_TYPES
from mesh.env import agent_name, is_supervised
from mesh.errors import ConfigurationError
from mesh.events import set_delivery
from mesh.handlers import EventHandlerRegistry

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from mesh.broker import MessageBroker

#: Members load when they are chosen: a ZeroMQ agent never imports redis.
_MEMBERS = {
    "memory": ("mesh.brokers.memory", "InMemoryMessageBroker"),
    "redis": ("mesh.brokers.redis", "RedisMessageBroker"),
    "zmq": ("mesh.brokers.zeromq", "ZeroMQMessageBroker"),
}


def make_broker(
    config: MessageBusConfig, directory: str | Path | None = None, *, journal: str | None = None
) -> MessageBroker:
    """
    Make the broker that the settings choose; it is not connected yet.

    What the settings say of the delivery of types is in force in this process from here on.

    Args:
        config: The settings.
        directory: The mesh's run directory, for fabrics that live in one.
        journal: Another journal than the environment's, by name.

    Raises:
        ConfigurationError: A file that the settings name cannot be used.
    """
    set_delivery(config.durable_events, config.allow_downgrade)
    module, name = _MEMBERS[config.broker_type]
    member: Any = getattr(importlib.import_module(module), name)
    if config.broker_type == "zmq":
        made: MessageBroker = member(
            directory,
            synchronous=config.journal_synchronous,
            journal=journal,
            publish_timeout_s=config.publish_timeout_s,
        )
    elif config.broker_type == "redis":
        made = member(
            **_redis_options(config),
            allow_volatile=config.redis_allow_volatile,
            journal=journal,
            publish_timeout_s=config.publish_timeout_s,
        )
    else:
        made = member()
    return made


def _redis_options(config: MessageBusConfig) -> dict[str, Any]:
    options: dict[str, Any] = {
        "host": config.redis_host,
        "port": config.redis_port,
        "url": config.redis_url,
        "username": config.redis_username,
        "password": config.redis_password,
        "db": config.redis_db,
        "unix_socket_path": config.redis_socket,
        "tls": config.redis_tls,
        "tls_ca": config.redis_tls_ca,
        "tls_cert": config.redis_tls_cert,
        "tls_key": config.redis_tls_key,
        "cluster": config.redis_cluster,
        "sentinels": config.redis_sentinels,
        "sentinel_service": config.redis_sentinel_service,
        "sentinel_password": config.redis_sentinel_password,
        "mesh": config.mesh_name,
        "client_name": f"legion:{config.mesh_name}:{agent_name() or os.getpid()}",
    }
    if is_supervised():
        # A server that is not there yet is no reason to end and be started anew, over and over
        options["connect_timeout_s"] = math.inf
    return options


@dataclass(frozen=True, slots=True)
class MessageBus:
    """A connected broker and a registry; unpacks as ``broker, registry``; closes as a context."""

    broker: MessageBroker
    registry: EventHandlerRegistry

    def __iter__(self) -> Any:
        """Unpack as ``broker, registry``."""
        return iter((self.broker, self.registry))

    async def __aenter__(self) -> MessageBus:
        """Give the bus, which is connected already."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the broker."""
        await self.broker.close()


class MessageBusFactory:
    """Makes connected buses."""

    @staticmethod
    async def create_message_bus(
        broker_type: str | None = None,
        config: MessageBusConfig | None = None,
        **settings: Any,
    ) -> MessageBus:
        """
        Make a bus and connect it.

        Args:
            broker_type: ``memory``, ``zmq`` or ``redis``; default: the settings' choice.
            config: The settings; default: the environment's.
            settings: Single settings, such as ``redis_port=6380``.

        Returns:
            The bus; ``broker, registry = await MessageBusFactory.create_message_bus("memory")``.

        Raises:
            ConfigurationError: A setting cannot be used.
            BrokerUnavailableError: The fabric does not answer.
        """
        chosen = _with(config or MessageBusConfig.from_env(), broker_type, settings)
        broker = make_broker(chosen)
        await broker.connect()
        return MessageBus(broker, EventHandlerRegistry())


def _with(
    config: MessageBusConfig, broker_type: str | None, settings: dict[str, Any]
) -> MessageBusConfig:
    if broker_type is not None:
        if broker_type not in BROKER_TYPES:
            raise ConfigurationError(
                f"broker_type={broker_type!r}: must be one of {', '.join(BROKER_TYPES)}"
            )
        settings = {**settings, "broker_type": broker_type}
    unknown = settings.keys() - config.to_dict().keys()
    if unknown:
        raise ConfigurationError(
            [f"{name}={settings[name]!r}: no such setting" for name in sorted(unknown)]
        )
    return replace(config, **settings) if settings else config
