"""How an agent's process ends when it is told to."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import TYPE_CHECKING

import pytest

from mesh import EventPublisher, EventType, PublisherConfig, ZeroMQMessageBroker
from mesh.errors import EXIT_BUG
from mesh.ledger_views import read_ledgers
from mesh.rundir import RunDir
from tests.plumbing.processes import end_forwarder, environment, eventually, running

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(60)]

SLOW = """
import asyncio
from mesh import Agent, Event, EventType, on, run

class Slow(Agent):
    @on(EventType.MARKET_DATA_RECEIVED)
    async def hear(self, event: Event) -> None:
        print("in hand", flush=True)
        await asyncio.Event().wait()

if __name__ == "__main__":
    run(Slow)
"""

EARLY = """
from mesh import Agent, every, run

class Early(Agent):
    async def setup(self) -> None:
        {}["no such price"]

    @every(1.0)
    async def look(self) -> None:
        pass

if __name__ == "__main__":
    run(Early)
"""


async def test_who_is_told_twice_ends_at_once_and_says_so(
    own_mesh_dir: Path, tmp_path: Path
) -> None:
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    rundir = RunDir(own_mesh_dir)
    log = rundir.log("slow")
    async with running(sys.executable, script, env=environment(), stop_within_s=30) as agent:
        assert agent.stdout is not None
        await eventually(lambda: log.exists() and "READY" in log.read_text(), within_s=30)
        async with ZeroMQMessageBroker(own_mesh_dir) as broker:
            publisher = EventPublisher(PublisherConfig(agent_name="tester", broker=broker))
            await publisher.publish(EventType.MARKET_DATA_RECEIVED, {"n": 1})
            assert await asyncio.wait_for(agent.stdout.readline(), 10) == b"in hand\n"
            agent.send_signal(signal.SIGTERM)
            await eventually(lambda: read_ledgers(rundir.ledgers)["slow"].state == "draining")

            agent.send_signal(signal.SIGTERM)
            code = await asyncio.wait_for(agent.wait(), 10)

        assert code == -signal.SIGTERM, "no exit code of an error"
        assert "told to end a second time (SIGTERM)" in log.read_text()
    await asyncio.to_thread(end_forwarder, own_mesh_dir)


async def test_an_error_in_setup_is_in_the_log_and_in_the_exit_code(
    own_mesh_dir: Path, tmp_path: Path
) -> None:
    script = tmp_path / "early.py"
    script.write_text(EARLY)
    async with running(sys.executable, script, env=environment(), stop_within_s=30) as agent:
        _, err = await asyncio.wait_for(agent.communicate(), 30)

        assert agent.returncode == EXIT_BUG
        assert b"KeyError: 'no such price'" in err
    log = RunDir(own_mesh_dir).log("early").read_text()
    assert "early ends by an error" in log
    assert "KeyError: 'no such price'" in log
    await asyncio.to_thread(end_forwarder, own_mesh_dir)
