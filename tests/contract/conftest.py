"""A connected broker of each fabric."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mesh.brokers.memory import InMemoryMessageBroker
from mesh.brokers.redis import RedisMessageBroker
from mesh.brokers.zeromq import ZeroMQMessageBroker
from tests.plumbing.processes import end_forwarder

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from mesh.broker import MessageBroker


@pytest.fixture(
    params=[
        "memory",
        "zmq",
        pytest.param("redis", marks=pytest.mark.redis),
        pytest.param("redis cluster", marks=[pytest.mark.redis, pytest.mark.redis_cluster]),
    ]
)
async def broker(
    request: pytest.FixtureRequest, own_mesh_dir: Path
) -> AsyncIterator[MessageBroker]:
    made: MessageBroker
    if request.param == "memory":
        made = InMemoryMessageBroker()
    elif request.param == "redis":
        made = RedisMessageBroker(url=request.getfixturevalue("redis_url"))
    elif request.param == "redis cluster":
        port = request.getfixturevalue("redis_cluster").ports[0]
        made = RedisMessageBroker(port=port, cluster=True)
    else:
        made = ZeroMQMessageBroker(own_mesh_dir)
    async with made:
        yield made
    if request.param == "zmq":
        end_forwarder(own_mesh_dir)
