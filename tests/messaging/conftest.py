"""A bus on each fabric."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mesh import MessageBusFactory
from tests.plumbing.processes import end_forwarder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from mesh import EventHandlerRegistry, MessageBroker


@pytest.fixture(params=["memory", "zmq", pytest.param("redis", marks=pytest.mark.redis)])
async def bus(
    request: pytest.FixtureRequest, own_mesh_dir: Path
) -> AsyncIterator[tuple[MessageBroker, EventHandlerRegistry]]:
    """Give what `create_message_bus` gives; closed afterwards."""
    settings = {}
    if request.param == "redis":
        settings["redis_url"] = request.getfixturevalue("redis_url")
    broker, registry = await MessageBusFactory.create_message_bus(request.param, **settings)
    yield broker, registry
    await broker.close()
    end_forwarder(own_mesh_dir)
