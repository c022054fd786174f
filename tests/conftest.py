"""What every test gets: a clean environment, a run directory, a check of what it left."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import shutil
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING

import msgspec
import pytest

from mesh.events import EventType, declarations, set_declarations, set_delivery
from tests.plumbing import leaks, processes
from tests.plumbing.projects import copy_example, foreign_variables, fresh_mesh_dir
from tests.plumbing.redis_cluster import Cluster
from tests.plumbing.redis_server import RedisServer, find_redis

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

# A process on its way out is none that was left
_GRACE_S = 2.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a server by the fixtures it asks for, so that nobody has to remember."""
    for item in items:
        if "redis_home" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.redis)


@pytest.fixture(autouse=True)
def own_mesh_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Point MESH_DIR to a short path of this test's own; nothing may still use it afterwards."""
    for name in foreign_variables():
        monkeypatch.delenv(name)
    folder = fresh_mesh_dir()
    monkeypatch.setenv("MESH_DIR", str(folder))
    yield folder
    if not folder.exists():
        return
    left = _after_grace(lambda: processes.processes_in(folder))
    shutil.rmtree(folder)
    assert not left, f"still used {folder}: " + "; ".join(map(str, left))


@pytest.fixture(autouse=True)
def own_schemas(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let built-in types be as they come, whichever agents another test has imported."""
    before = declarations()
    if "agents" not in request.path.parts:
        set_declarations(
            [
                msgspec.structs.replace(each, schema=None, durable=each.member.durable)
                if isinstance(each.member, EventType)
                else each
                for each in before
            ]
        )
    yield
    set_delivery()
    known = {each.topic for each in before}
    set_declarations([*before, *(each for each in declarations() if each.topic not in known)])


@pytest.fixture
def rundir(own_mesh_dir: Path) -> Path:
    """Give this test's MESH_DIR, made already."""
    own_mesh_dir.mkdir(mode=0o700)
    return own_mesh_dir


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Give a project of one's own: the pipeline's agents and their supervisord.conf."""
    return copy_example(tmp_path)


@pytest.fixture(autouse=True)
def redis_before(request: pytest.FixtureRequest) -> None:
    """Start the worker's server before a test's children are counted, also for a parameter."""
    if request.node.get_closest_marker("redis"):
        request.getfixturevalue("redis_home")
    if request.node.get_closest_marker("redis_cluster"):
        request.getfixturevalue("cluster_home")


@pytest.fixture(autouse=True, scope="session")
def _resource_tracker() -> None:
    """Start what multiprocessing keeps for good, before anybody counts open files."""
    resource_tracker.ensure_running()


@pytest.fixture(autouse=True)
def leaves_nothing_open(own_mesh_dir: Path, redis_before: None) -> Iterator[None]:
    """Fail a test that leaves open files, sockets or child processes."""
    files, offspring = leaks.open_files(), {child.pid for child in processes.children()}
    yield
    left = _after_grace(
        lambda: [child for child in processes.children() if child.pid not in offspring]
    )
    assert not left, "children left running: " + "; ".join(map(str, left))
    opened = leaks.new_open_files(files)
    assert not opened, "left open: " + "; ".join(opened)


@pytest.fixture(autouse=True)
def leaves_nothing_running(request: pytest.FixtureRequest, leaves_nothing_open: None) -> None:
    """Fail an async test that leaves tasks; the check above runs when its loop is closed."""
    if inspect.iscoroutinefunction(getattr(request, "function", None)):
        request.getfixturevalue("leaves_no_task")


@pytest.fixture
async def leaves_no_task() -> AsyncIterator[None]:
    """Fail a test whose loop still runs tasks when everything it asked for is closed."""
    before = asyncio.all_tasks()
    yield
    left = await leaks.new_tasks(before)
    assert not left, "tasks left running: " + "; ".join(left)


@pytest.fixture(scope="session")
def redis_home(worker_id: str) -> Iterator[str]:
    """Give this worker's database: on LEGION_TEST_REDIS_URL, or on a redis-server of its own."""
    shared = os.environ.get("LEGION_TEST_REDIS_URL")
    if shared:
        # Each worker takes a database there, by its number
        yield f"{shared.rstrip('/')}/{worker_id.removeprefix('gw').replace('master', '0')}"
        return
    if find_redis() is None:
        missing = "no redis-server on this machine; scripts/test brings one along"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    server = RedisServer(append_only=True)
    try:
        yield server.start().url
    finally:
        server.close()


@pytest.fixture
def redis_url(redis_home: str) -> str:
    """Give the address of an empty database."""
    import redis

    with redis.Redis.from_url(redis_home) as connection:
        connection.flushdb()
    return redis_home


@pytest.fixture(scope="session")
def cluster_home(redis_home: str) -> Iterator[Cluster]:
    """Give this worker's cluster of three."""
    if find_redis() is None:
        pytest.skip("no redis-server on this machine to make a cluster of")
    cluster = Cluster(append_only=True)
    try:
        cluster.start()
        asyncio.run(cluster.join())
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def redis_cluster(cluster_home: Cluster) -> Cluster:
    """Give an empty cluster."""
    import redis

    for server in cluster_home.servers:
        with redis.Redis.from_url(server.url) as connection:
            connection.flushall()
    return cluster_home


def _after_grace(find: Callable[[], list[processes.Process]]) -> list[processes.Process]:
    """Give the processes that do not end by themselves in a moment, after having killed them."""
    with contextlib.suppress(AssertionError):
        processes.wait_until(lambda: not find(), within_s=_GRACE_S, what="they end")
    if left := find():
        processes.kill_all(find)
    return left
