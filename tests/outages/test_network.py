"""The network between a mesh and its Redis fails, in both ways that nobody is told of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.outages.pair import launched
from tests.plumbing.redis_server import RedisServer
from tests.redis.tools import Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.fault, pytest.mark.redis]


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A server of this test's own, which keeps every write."""
    made = RedisServer(append_only=True).start()
    yield made
    made.close()


@pytest.mark.parametrize("how", ["partitioned", "half open"])
async def test_a_line_that_carries_nothing_is_given_up_and_made_anew(
    server: RedisServer, own_mesh_dir: Path, how: str
) -> None:
    """Both sides keep the connection; what is on its way waits in the network, or vanishes."""
    async with Proxy(server.socket) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}"

        async def begin() -> None:
            if how == "partitioned":
                proxy.freeze()
            else:
                proxy.swallow()

        async def end() -> None:
            proxy.thaw()

        async with launched(own_mesh_dir, broker_type="redis", redis_url=url) as pair:
            await pair.weathers(begin, end, "BrokerUnavailableError", "redis at")
            # Long enough for both sides to find out that the line is dead
            await pair.weathers(begin, end, "no sign of life")
