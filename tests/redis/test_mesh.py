"""The whole mesh on Redis, as a user runs it."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.plumbing.processes import environment, processes_in, run_mesh, wait_until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.acceptance, pytest.mark.redis, pytest.mark.timeout(120)]


def programs(project: Path) -> dict[str, dict[str, Any]]:
    told = json.loads(run_mesh("status", "--json", cwd=project).out)
    return {row["name"]: row for row in told["programs"]}


def test_redis_gives_the_same_fills_as_memory(project: Path, redis_url: str) -> None:
    settings = environment(
        LEGION_BROKER_TYPE="redis", REDIS_URL=redis_url, LEGION_MESH_NAME=project.name
    )
    options = ("--bars", "3000", "--speed", "max", "--json")

    over_redis = run_mesh("run", *options, cwd=project, env=settings)
    in_memory = run_mesh("run", *options, "--memory", cwd=project)

    assert (over_redis.code, in_memory.code) == (0, 0), (over_redis, in_memory)
    ours, theirs = json.loads(over_redis.out), json.loads(in_memory.out)
    assert ours["fills"] > 0
    assert ours["fills_digest"] == theirs["fills_digest"]
    assert (ours["lost"], set(ours["agents"])) == (0, set(theirs["agents"]))


def test_a_redis_of_its_own_is_kept_like_an_agent(project: Path, own_mesh_dir: Path) -> None:
    """Killed, it is back; no agent restarts for it, and events flow again."""
    started = run_mesh("up", "-d", "--with-redis", "--param", "speed=40", cwd=project)
    try:
        assert started.code == 0, started
        before = programs(project)
        assert "forwarder" not in before
        (server,) = (one for one in processes_in(own_mesh_dir) if "redis-server " in one.command)

        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda: programs(project)["redis"]["pid"] != before["redis"]["pid"])
        heard = run_mesh("tail", "market.data.received", "--json", "-n", "3", cwd=project)

        assert heard.code == 0, heard
        assert len(heard.out.splitlines()) == 3
        rows = json.loads(run_mesh("doctor", "--json", cwd=project).out)["rows"]
        found = {row["check"]: row["found"] for row in rows}
        assert found["settings"].startswith("fabric redis, the mesh's own server")
        assert found["fabric"] == "redis: answers"
        assert found["journal"] == "redis: keeps durable events"
        after = programs(project)
        agents = before.keys() - {"redis"}
        assert {name: after[name]["pid"] for name in agents} == {
            name: before[name]["pid"] for name in agents
        }
    finally:
        stopped = run_mesh("down", cwd=project)
    assert stopped.code == 0, stopped


def test_what_a_redis_of_its_own_keeps_is_missed_in_words(
    project: Path, own_mesh_dir: Path
) -> None:
    """It is down with the mesh, and a start without it does not see what it keeps."""
    run_mesh("up", "-d", "--with-redis", "--agents", "portfolio", cwd=project)
    run_mesh("down", cwd=project)

    for words in (("dlq", "ls"), ("journal", "ls"), ("dlq", "replay", "--all")):
        refused = run_mesh(*words, cwd=project)
        assert refused.code == 69, refused
        assert "its own redis-server, which is down: `mesh up --with-redis` first" in refused.err
    assert run_mesh("publish", "a.b", "{}", cwd=project).code == 3
    started = run_mesh("up", "-d", "--agents", "portfolio", cwd=project)
    run_mesh("down", cwd=project)

    assert started.code == 0, started
    assert f"{own_mesh_dir / 'redis'} (durable events, dead letters) is not seen" in started.err


def test_a_wrong_password_is_a_mistake_in_the_settings(project: Path, redis_url: str) -> None:
    """It does not become right by trying again, and is shown nowhere."""
    settings = environment(
        LEGION_BROKER_TYPE="redis", REDIS_URL=redis_url, REDIS_PASSWORD="hunter2-secret"
    )

    ended = run_mesh("run", "--bars", "10", "--speed", "max", cwd=project, env=settings)

    assert ended.code != 0
    assert "the server has none; unset REDIS_PASSWORD" in ended.err
    assert "hunter2" not in ended.out + ended.err
