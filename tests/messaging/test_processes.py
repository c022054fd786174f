"""Plain scripts on ZeroMQ: without a mesh the first brings the forwarder up, others join."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING

import pytest

from mesh.rundir import RunDir
from tests.plumbing.processes import environment, run_mesh, running, wait_until

if TYPE_CHECKING:
    from pathlib import Path

HEARING = """
import asyncio
from mesh import EventHandlerRegistry, ConsumerConfig, EventConsumer, MessageBusFactory
from mesh.events import EventType

async def main():
    broker, registry = await MessageBusFactory.create_message_bus(broker_type="zmq")
    done = asyncio.Event()

    async def hear(event):
        print(event.data["price"], event.source_agent, event.correlation_id, flush=True)
        done.set()

    await registry.register(EventType.MODEL_PREDICTION_MADE, hear, "ear", "hear")
    ear = EventConsumer(ConsumerConfig(agent_name="ear", broker=broker, handler_registry=registry,
                                       subscribed_events=[EventType.MODEL_PREDICTION_MADE]))
    await ear.initialize()
    await ear.start()
    print("ready", flush=True)
    await done.wait()
    await ear.stop()
    await broker.close()

asyncio.run(main())
"""

SAYING = """
import asyncio
from mesh import EventPublisher, EventType, MessageBusFactory, PublisherConfig

async def main():
    broker, _ = await MessageBusFactory.create_message_bus(broker_type="zmq")
    mouth = EventPublisher(PublisherConfig(agent_name="mouth", broker=broker))
    count = await mouth.publish_batch([])
    assert count == 0
    assert await mouth.publish_with_retry(
        event_type=EventType.MODEL_PREDICTION_MADE, data={"price": 1.5}, max_retries=3,
        retry_delay_ms=100, correlation_id="c-1")
    await mouth.close()
    await broker.close()

asyncio.run(main())
"""


async def say_and_hear() -> None:
    env = environment()
    async with running(sys.executable, "-c", HEARING, env=env) as ear:
        assert ear.stdout is not None
        assert ear.stderr is not None
        assert await asyncio.wait_for(ear.stdout.readline(), 20) == b"ready\n"
        async with running(sys.executable, "-c", SAYING, env=env) as mouth:
            assert mouth.stderr is not None
            assert await asyncio.wait_for(mouth.wait(), 20) == 0, await mouth.stderr.read()
        assert await asyncio.wait_for(ear.stdout.readline(), 20) == b"1.5 mouth c-1\n"
        assert await asyncio.wait_for(ear.wait(), 20) == 0, await ear.stderr.read()


async def test_without_a_mesh_the_first_brings_the_forwarder(own_mesh_dir: Path) -> None:
    await say_and_hear()

    rundir = RunDir(own_mesh_dir)
    await asyncio.to_thread(
        wait_until,
        lambda: rundir.holder(rundir.lock("forwarder")) is None,
        what="the forwarder to leave with its last peer",
    )


@pytest.mark.timeout(120)
async def test_scripts_join_a_mesh_that_runs(project: Path, own_mesh_dir: Path) -> None:
    """Agents of the mesh and scripts that nobody supervises hear each other."""

    async def mesh(*words: str) -> str:
        done = await asyncio.to_thread(run_mesh, *words, cwd=project)
        assert done.code == 0, done
        return done.out

    await mesh("up", "-d")
    try:
        before = json.loads(await mesh("status", "--json"))
        await say_and_hear()
        after = json.loads(await mesh("status", "--json"))
    finally:
        await mesh("down")

    assert [each["pid"] for each in before["programs"]] == [
        each["pid"] for each in after["programs"]
    ]
