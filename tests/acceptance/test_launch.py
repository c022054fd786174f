"""Processes without supervisord: `mesh.launch` and offloaded work."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mesh import Agent, AgentContext, InMemoryMessageBroker
from mesh.workers import OffloadError, OffloadTimeoutError, WorkerPool
from tests.plumbing.processes import environment, eventually, processes_in, running, wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

PARENT = """
import asyncio, sys
from mesh import launch

async def main():
    async with launch(["agents/features.py", "agents/signals.py"], directory=sys.argv[1]) as mesh:
        print("up", flush=True)
        await asyncio.Event().wait()

if __name__ == "__main__":
    asyncio.run(main())
"""


async def test_nothing_survives_a_killed_parent(own_mesh_dir: Path, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    async with running(sys.executable, script, str(own_mesh_dir), env=environment()) as parent:
        assert parent.stdout is not None
        line = await asyncio.wait_for(parent.stdout.readline(), 30)
        assert line == b"up\n"
        assert len(processes_in(own_mesh_dir)) >= 4, "the parent, two agents and the forwarder"

        parent.kill()
        await parent.wait()

        await asyncio.to_thread(
            wait_until, lambda: not processes_in(own_mesh_dir), within_s=15, what="all to be gone"
        )


def double(number: int) -> int:
    return 2 * number


def raise_it(words: str) -> None:
    raise ValueError(words)


def die() -> None:
    os._exit(1)


def never_end() -> None:
    time.sleep(3600)


def give_a_function() -> object:
    return lambda: 1


class Unwelcome:
    """Pickles, and cannot be made of that again."""

    def __reduce__(self) -> tuple[type[int], tuple[str]]:
        return int, ("no number",)


def give_what_is_unwelcome() -> Unwelcome:
    return Unwelcome()


def leave() -> None:
    sys.exit(3)


async def not_plain() -> None:
    pass


def last_until(begun: str, end: str) -> str:
    Path(begun).touch()
    wait_until(Path(end).exists, within_s=3600)
    return "came to its end"


class Worker(Agent):
    """Offloads."""


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    async with InMemoryMessageBroker() as broker:
        agent = Worker(AgentContext(name="worker", broker=broker))
        await agent.open()
        yield agent
        await agent.close()


async def test_offloaded_work_comes_back_while_the_loop_turns(worker: Worker) -> None:
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0.001)

    turning = asyncio.create_task(turn())
    assert await worker.offload(double, 21) == 42
    turning.cancel()

    assert turns > 5


async def test_what_offloaded_work_raises_is_told(worker: Worker) -> None:
    with pytest.raises(OffloadError, match="ValueError: no such luck") as caught:
        await worker.offload(raise_it, "no such luck")

    assert "raise_it" in caught.value.remote_traceback


async def test_what_cannot_travel_is_refused_at_once(worker: Worker) -> None:
    with pytest.raises(OffloadError, match="pass a module-level function and plain data"):
        await worker.offload(lambda: 1)


@pytest.mark.parametrize(
    ("deed", "words"),
    [
        (give_a_function, "what it returned, a function, cannot travel back: Can't"),
        (give_what_is_unwelcome, "cannot travel back: invalid literal for int"),
        (leave, "SystemExit: 3"),
        (not_plain, "is a coroutine function; pass a plain one"),
    ],
)
async def test_what_cannot_come_back_is_told_at_once(
    worker: Worker, deed: Callable[..., object], words: str
) -> None:
    with pytest.raises(OffloadError, match=words):
        await worker.offload(deed, timeout_s=20)


@pytest.mark.parametrize("limit_s", [0, -1, float("nan"), float("inf")])
async def test_a_limit_that_makes_no_sense_is_refused(worker: Worker, limit_s: float) -> None:
    with pytest.raises(ValueError, match="must be seconds above 0"):
        await worker.offload(double, 1, timeout_s=limit_s)


async def test_work_that_does_not_come_back_ends_no_other_work(tmp_path: Path) -> None:
    pool = WorkerPool(2)
    begun, end = tmp_path / "begun", tmp_path / "end"
    neighbour = asyncio.create_task(pool.call(last_until, str(begun), str(end), timeout_s=30))
    await eventually(begun.exists, within_s=20)

    with pytest.raises(OffloadTimeoutError):
        await pool.call(never_end, timeout_s=1)
    # Neither does who waits for a worker wait for one that is lost
    assert await pool.call(double, 4, timeout_s=20) == 8
    end.touch()

    assert await neighbour == "came to its end"
    await pool.close()


async def test_work_under_way_at_the_end_is_not_waited_for(tmp_path: Path) -> None:
    pool = WorkerPool(1)
    begun = tmp_path / "begun"
    working = asyncio.create_task(pool.call(last_until, str(begun), "never", timeout_s=600))
    await eventually(begun.exists, within_s=20)
    waiting = asyncio.create_task(pool.call(double, 1, timeout_s=600))
    await asyncio.sleep(0)

    await pool.close()

    for call in (working, waiting):
        with pytest.raises(OffloadError, match="its worker was ended before it came back"):
            await call
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("lost", [die, never_end])
async def test_work_that_does_not_come_back_has_a_limit(worker: Worker, lost: object) -> None:
    with pytest.raises(OffloadTimeoutError, match=r"did not come back within 2 s"):
        await worker.offload(lost, timeout_s=2)  # type: ignore[arg-type]

    assert await worker.offload(double, 4) == 8
