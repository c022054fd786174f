"""
Tests of agents in no time: a harness, a clock that stands still, a mesh in memory.

::

    async def test_it_echoes(agent_harness):
        async with agent_harness(Echo) as h:
            await h.say(EventType.MARKET_DATA_RECEIVED, {"price": 3.5})
            signal = await h.expect(EventType.SIGNAL_GENERATED)
            assert signal.data["price"] == 3.5

The fixtures come by themselves: the package is a pytest plugin (`mesh.testing.plugin`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mesh.testing.clock import FakeClock
    from mesh.testing.harness import AgentHarness

__all__ = ["AgentHarness", "FakeClock"]

_HOMES = {"AgentHarness": "mesh.testing.harness", "FakeClock": "mesh.testing.clock"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
