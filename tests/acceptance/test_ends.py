"""How an agent's process ends when it is told to."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING

import pytest

from mesh import EventPublisher, EventType, PublisherConfig, ZeroMQMessageBroker
from mesh.account import account
from mesh.errors import EXIT_BUG
from mesh.ledger import Ledger
from mesh.ledger_views import read_ledgers
from mesh.rundir import RunDir
from tests.plumbing.processes import (
    end_forwarder,
    environment,
    eventually,
    is_alive,
    running,
)

if TYPE_CHECKING:
    from pathlib import Path

    from mesh.account import LinkAccount

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

EAR = """
from mesh import Agent, Event, EventType, on, run

class Ear(Agent):
    @on(EventType.MARKET_DATA_RECEIVED)
    async def hear(self, event: Event) -> None:
        pass

if __name__ == "__main__":
    run(Ear)
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
    # What held the error says nothing about the agent
    assert "ExceptionGroup" not in log
    assert b"ExceptionGroup" not in err
    await asyncio.to_thread(end_forwarder, own_mesh_dir)


async def test_who_ends_as_told_and_is_started_by_nobody_misses_nothing_from_then_on(
    own_mesh_dir: Path, tmp_path: Path
) -> None:
    script = tmp_path / "ear.py"
    script.write_text(EAR)
    rundir = RunDir(own_mesh_dir)

    def link() -> LinkAccount | None:
        hears = {"ear": frozenset({EventType.MARKET_DATA_RECEIVED.value})}
        return account(read_ledgers(rundir.ledgers), hears).links.get(
            "tester>market.data.received>ear"
        )

    async with ZeroMQMessageBroker(own_mesh_dir) as broker:
        ledger = Ledger.open(rundir.ledger("tester"))
        publisher = EventPublisher(
            PublisherConfig(agent_name="tester", broker=broker, ledger=ledger)
        )

        async def say(count: int) -> None:
            for _ in range(count):
                await publisher.publish(EventType.MARKET_DATA_RECEIVED, {})
            await publisher.flush()

        async def heard(total: int) -> None:
            await eventually(lambda: (found := link()) and found.received == total)

        for said, total in ((3, 3), (5, 8)):
            async with running(sys.executable, script, env=environment()) as agent:
                assert agent.stderr is not None
                words = (await asyncio.wait_for(agent.stderr.readline(), 30)).decode()
                assert words == f"ear is READY in {own_mesh_dir}, its log is {rundir.log('ear')}\n"
                await broker.synchronize()
                await say(said)
                await heard(total)
                agent.send_signal(signal.SIGINT)
                assert await asyncio.wait_for(agent.wait(), 10) == 0
            # Nobody is there to hear it
            await say(4)
            ended = link()
            assert ended is not None
            assert (ended.received, ended.lost, ended.in_flight) == (total, 0, 0)
        await publisher.close()
        ledger.close()
    await asyncio.to_thread(end_forwarder, own_mesh_dir)


#: Starts an agent as supervisord does, and says its pid.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-m", "mesh.runtime", sys.argv[1]])
print(child.pid, flush=True)
time.sleep(3600)
"""


@pytest.mark.parametrize("end", ["its parent is killed", "it is aborted"])
async def test_a_script_that_never_loads_is_no_orphan_and_its_stack_is_kept(
    own_mesh_dir: Path, tmp_path: Path, end: str
) -> None:
    script = tmp_path / "loop.py"
    script.write_text("print('loading', flush=True)\nwhile True:\n    pass\n")
    env = environment(MESH_SUPERVISED="1")
    async with running(sys.executable, "-c", PARENT, script, env=env) as parent:
        assert parent.stdout is not None
        # The child writes on the same pipe
        lines = [await asyncio.wait_for(parent.stdout.readline(), 30) for _ in range(2)]
        assert b"loading\n" in lines
        child = next(int(line) for line in lines if line != b"loading\n")

        if end == "it is aborted":
            os.kill(child, signal.SIGABRT)
            stack = RunDir(own_mesh_dir).stack("loop", child)
            await eventually(lambda: not is_alive(child))
            assert f'File "{script}", line ' in stack.read_text()
        else:
            parent.kill()
            await eventually(lambda: not is_alive(child))
