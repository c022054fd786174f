"""Replicas of an agent in a running mesh: more, fewer, and killed in the middle of their work."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from mesh import EventPublisher, PublisherConfig, event_type
from mesh.brokers.redis import RedisMessageBroker
from mesh.brokers.zeromq import ZeroMQMessageBroker
from mesh.ledger_views import read_ledgers
from tests.plumbing.processes import MESH, ROOT, Finished, eventually, run_mesh, running
from tests.plumbing.projects import copy_example

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from mesh.journal import Journal

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

TYPES = """
from mesh import event_type

ORDER = event_type("desk.order", durable=True)
"""
DESK = """
import asyncio
import os
import shutil
import time
from pathlib import Path

from agents.desk_types import ORDER
from mesh import Agent, Event, on, run

HOME = Path(os.environ["MESH_DIR"])
while (HOME / f"hold.{os.environ['MESH_AGENT']}").exists():
    time.sleep(0.01)


class Desk(Agent):
    async def setup(self) -> None:
        (HOME / f"began.{self.name}").write_text(str(os.getpid()))

    @on(ORDER)
    async def on_order(self, event: Event) -> None:
        state, number = self.ctx.state, event.data["n"]
        if number < 0 and self.ctx.deliveries == 1:
            (HOME / "in-work").write_text(self.name)
            await asyncio.Event().wait()
        done = state.get(event.key, [])
        if done and done[-1] >= number >= 0:
            state[f"wrong.{event.key}"] = [done[-1], number]
        state[event.key] = [*done[-1:], number][-1:] if number >= 0 else [self.name]
        state[f"count.{event.key}"] = state.get(f"count.{event.key}", 0) + 1


if __name__ == "__main__":
    run(Desk)
"""
IDLE = """
from mesh import Agent, Event, on, run


class Idle(Agent):
    @on("nothing.said")
    async def on_nothing(self, event: Event) -> None:
        pass


if __name__ == "__main__":
    run(Idle)
"""
ORDER = event_type("desk.order", durable=True)
KEYS = [f"book-{number}" for number in range(30)]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of two agents: a desk that takes orders, and one that does nothing."""
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "__init__.py").touch()
    text = (ROOT / "supervisord.conf").read_text()
    head = text[: text.index("[program:portfolio]")]
    section = text[text.index("[program:risk]") : text.index("[program:signals]")]
    for name, script in (("desk", DESK), ("idle", IDLE)):
        (tmp_path / "agents" / f"{name}.py").write_text(script)
        head += section.replace("risk", name)
    (tmp_path / "agents" / "desk_types.py").write_text(TYPES)
    (tmp_path / "supervisord.conf").write_text(head)
    return tmp_path


async def mesh(project: Path, *words: str) -> Finished:
    ended = await asyncio.to_thread(run_mesh, *words, cwd=project, timeout_s=60)
    assert ended.code == 0, ended
    return ended


@contextlib.asynccontextmanager
async def mesh_up(project: Path) -> AsyncIterator[None]:
    await mesh(project, "up", "-d")
    try:
        yield
    finally:
        await mesh(project, "down")


async def programs(project: Path) -> dict[str, dict[str, Any]]:
    told = await asyncio.to_thread(run_mesh, "status", "--json", cwd=project)
    return {row["name"]: row for row in json.loads(told.out)["programs"]}


async def pids(project: Path) -> dict[str, int]:
    return {name: row["pid"] for name, row in (await programs(project)).items()}


@contextlib.asynccontextmanager
async def joined(home: Path) -> AsyncIterator[tuple[EventPublisher, Journal]]:
    url = os.environ.get("REDIS_URL")
    made = ZeroMQMessageBroker(home) if url is None else RedisMessageBroker(url=url)
    async with made as broker:
        publisher = EventPublisher(PublisherConfig(agent_name="till", broker=broker))
        yield publisher, await broker.open_journal()
        await publisher.close()


async def state_of(journal: Journal) -> dict[str, Any]:
    state = await journal.load_state("desk")
    return {name: msgspec.msgpack.decode(raw) for name, raw in state.items()}


async def test_scaling_under_load_loses_nothing_and_disturbs_nobody(
    project: Path, own_mesh_dir: Path
) -> None:
    async with mesh_up(project), joined(own_mesh_dir) as (publisher, journal):
        before = await pids(project)
        stop = asyncio.Event()
        said = 0

        async def speak() -> None:
            nonlocal said
            while not stop.is_set():
                for key in KEYS:
                    await publisher.publish(ORDER, {"n": said}, key=key)
                said += 1
                await asyncio.sleep(0.02)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(speak())
            told = await mesh(project, "scale", "desk", "3")
            assert "desk: 3 replicas" in told.out
            three = await programs(project)
            await eventually(lambda: (own_mesh_dir / "began.desk@3").exists())
            await mesh(project, "scale", "desk", "2")
            two = await pids(project)
            await mesh(project, "reload")
            reloaded = await pids(project)
            await mesh(project, "scale", "desk", "1")
            stop.set()
        after = await pids(project)

        async def all_done() -> bool:
            counts = [n for name, n in (await state_of(journal)).items() if "count." in name]
            return sum(map(int, counts)) == said * 30

        await eventually(all_done, within_s=30)
        state = await state_of(journal)
        assert {name: n for name, n in state.items() if name.startswith("wrong.")} == {}
        assert {key: state[f"count.{key}"] for key in KEYS} == dict.fromkeys(KEYS, said)
        assert {"desk@2", "desk@3"} <= three.keys()
        assert {name: three[name]["pid"] for name in before} == before
        assert two == reloaded == {n: row["pid"] for n, row in three.items() if n != "desk@3"}
        assert after == before


async def test_a_publish_names_an_agent_and_not_each_replica(project: Path) -> None:
    async with mesh_up(project):
        await mesh(project, "scale", "idle", "2")

        said = await mesh(project, "publish", "nothing.said", "{}")

        assert "heard by idle (2 replicas)\n" in said.out


async def test_the_number_of_replicas_outlives_the_mesh(project: Path) -> None:
    async with mesh_up(project):
        await mesh(project, "scale", "idle", "2")
        text = (project / "supervisord.conf").read_text()
    async with mesh_up(project):
        assert "idle@2" in await pids(project)
        await mesh(project, "scale", "idle", "1")

        assert "idle@2" not in await pids(project)
    assert "idle@2" not in text


@pytest.mark.fault
@pytest.mark.parametrize(
    ("fabric", "restarts"),
    [
        ("zmq", True),
        ("zmq", False),
        pytest.param("redis", False, marks=pytest.mark.redis),
    ],
)
async def test_an_event_in_the_hands_of_a_killed_replica_is_done_in_a_moment(
    project: Path,
    own_mesh_dir: Path,
    fabric: str,
    restarts: bool,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By its successor, or - while that one cannot start - by another; no lease is waited for."""
    if fabric == "redis":
        monkeypatch.setenv("LEGION_BROKER_TYPE", "redis")
        monkeypatch.setenv("REDIS_URL", request.getfixturevalue("redis_url"))
    async with mesh_up(project), joined(own_mesh_dir) as (publisher, journal):
        await mesh(project, "scale", "desk", "2")
        await publisher.publish(ORDER, {"n": -1}, key="book")
        await eventually(lambda: (own_mesh_dir / "in-work").exists())
        victim = (own_mesh_dir / "in-work").read_text()
        before = await pids(project)
        hold = own_mesh_dir / f"hold.{victim}"
        if not restarts:
            hold.touch()
        os.kill(before[victim], signal.SIGKILL)

        async def is_done() -> Any:
            return (await state_of(journal)).get("book")

        (by,) = await eventually(is_done, within_s=10)
        hold.unlink(missing_ok=True)
        if not restarts:
            assert by != victim

        async def is_back() -> bool:
            row = (await programs(project))[victim]
            return bool(row["state"] == "ready" and row["pid"] != before[victim])

        await eventually(is_back, within_s=20)
        after = await pids(project)
        assert {name for name in after if after[name] != before[name]} == {victim}
        assert (await state_of(journal))["count.book"] == 1


async def test_the_command_line_says_and_shows_what_agents_hear_durably(
    project: Path, own_mesh_dir: Path
) -> None:
    """The type's declaration is not known there: the agents' cards tell."""
    async with mesh_up(project), joined(own_mesh_dir) as (_, journal):
        words = (MESH, "tail", "desk.order", "--json", "-n", "2")
        async with running(*words, cwd=project) as tailing:
            assert tailing.stderr is not None
            await tailing.stderr.readuntil(b"Ctrl-C ends\n")
            for number in (1, 2):
                told = await mesh(
                    project, "publish", "desk.order", f'{{"n": {number}}}', "--key", "book"
                )
            out, _err = await tailing.communicate()
        agents = json.loads((await mesh(project, "agents", "--json")).out)

        assert "heard by desk" in told.out
        shown = [json.loads(line)["data"]["n"] for line in out.splitlines()]
        assert shown == [1, 2]
        assert {view.group for view in await journal.groups()} == {"desk"}
        assert agents["agents"]["desk"]["durable"] == ["desk.order"]
        assert agents["topics"]["desk.order"]["durable"]
        assert agents["topics"]["desk.order"]["disagreement"] is None


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """The example's agents, whose quotes travel live."""
    return copy_example(tmp_path / "pipeline")


@pytest.mark.fault
async def test_live_events_are_shared_and_the_account_closes(
    pipeline: Path, own_mesh_dir: Path
) -> None:
    """Each quote is handled by one replica, or counted as lost, whoever comes, goes or dies."""
    quotes = 12_000
    await mesh(pipeline, "up", "-d", "--param", "speed=900", "--param", f"bars={quotes}")
    try:
        before = await pids(pipeline)
        refused = await asyncio.to_thread(run_mesh, "scale", "market_data", "2", cwd=pipeline)
        await mesh(pipeline, "scale", "features", "3")
        three = await programs(pipeline)
        os.kill(three["features@2"]["pid"], signal.SIGKILL)
        await mesh(pipeline, "scale", "features", "2")

        async def is_over() -> Any:
            told = await asyncio.to_thread(run_mesh, "status", "--json", cwd=pipeline)
            facts = json.loads(told.out)
            rows = {row["name"]: row for row in facts["programs"]}
            return rows["market_data"]["sources"] == "done" and not facts["in_flight"] and facts

        facts = await eventually(is_over, within_s=60)
        link = facts["links"]["market_data>market.data.received>features"]
        assert link["published"] == quotes
        assert link["received"] + link["lost"] == quotes
        views = read_ledgers(own_mesh_dir / "ledger").values()
        answers = sum(
            view.out["features.computed"].sequence
            for view in views
            if "features.computed" in view.out
        )
        # Who is killed between saying the answer and noting so has its quote counted as lost
        assert answers - link["received"] in {0, 1}
        assert facts["groups"]["features"]["replicas"] == 2
        assert facts["groups"]["features"]["lost"] == link["lost"]
        assert {
            name: pid for name, pid in (await pids(pipeline)).items() if name in before
        } == before
        assert refused.code == 2
        assert "has a source" in refused.err
        for words in (("risk", "2"), ("features@2", "3"), ("monitor", "2"), ("nobody", "2")):
            told = await asyncio.to_thread(run_mesh, "scale", *words, cwd=pipeline)
            assert told.code == 2, told
        shown = (await asyncio.to_thread(run_mesh, "status", cwd=pipeline)).out
        assert "features: 2 of 2 replicas READY" in shown
    finally:
        await mesh(pipeline, "down")
