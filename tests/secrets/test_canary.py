"""A secret given to the mesh shows up nowhere: no output, log, file, argument or error."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mesh import BrokerUnavailableError, MessageBusConfig, RedisMessageBroker
from mesh.cli.main import COMMANDS
from mesh.errors import MeshError
from tests.plumbing.processes import environment, processes_in, run_mesh, wait_until
from tests.plumbing.redis_server import RedisServer

if TYPE_CHECKING:
    from collections.abc import Iterator

CANARY = "canary-5e8d1f"
#: The secrets that a setting can hold.
SECRETS = {
    "REDIS_PASSWORD": CANARY,
    "REDIS_SENTINEL_PASSWORD": CANARY,
    "REDIS_URL": f"redis://user:{CANARY}@nowhere.invalid:1/0",
}

pytestmark = [pytest.mark.acceptance, pytest.mark.redis, pytest.mark.timeout(120)]


@pytest.fixture
def locked(redis_home: str) -> Iterator[RedisServer]:
    """A server that asks for the canary."""
    server = RedisServer(append_only=True, settings={"requirepass": CANARY}).start()
    yield server
    server.close()


def _with(server: RedisServer, **more: str) -> dict[str, str]:
    return environment(
        LEGION_BROKER_TYPE="redis",
        REDIS_SOCKET=str(server.socket),
        REDIS_PASSWORD=CANARY,
        LEGION_LOG_LEVEL="DEBUG",
        **more,
    )


def _leaks_in(folder: Path) -> list[str]:
    return [
        str(path)
        for path in folder.rglob("*")
        if path.is_file() and CANARY.encode() in path.read_bytes()
    ]


def _arguments_with_it() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if CANARY.encode() in path.read_bytes():
                found.append(str(path))
        except OSError:
            continue  # ended meanwhile
    return found


#: Every command, and some that fail.
WORKING = (
    ("status",),
    ("status", "--json"),
    ("agents", "--json"),
    ("doctor",),
    ("logs",),
    ("tail", "market.data.received", "-n", "1", "--json"),
    ("publish", "hello.asked", '{"name": "Ada"}'),
    ("publish", "hello.asked", "no json"),
    ("dlq", "ls"),
    ("dlq", "replay", "--all"),
    ("journal", "ls"),
    ("journal", "forget", "nobody", "--yes"),
    ("init", "shop"),
    ("new", "hello"),
    ("restart", "features"),
    ("scale", "features", "2"),
    ("reload",),
    ("nonsense",),
)


def test_every_command_is_tried() -> None:
    tried = {command[0] for command in WORKING} | {"up", "down", "run"}

    assert tried >= set(COMMANDS)


def test_no_command_and_no_file_of_a_running_mesh_shows_it(
    project: Path, own_mesh_dir: Path, locked: RedisServer
) -> None:
    settings = _with(locked)
    said = []
    started = run_mesh("up", "-d", "--param", "speed=40", cwd=project, env=settings)
    said.append(started)
    try:
        assert started.code == 0, started
        for command in WORKING:
            said.append(run_mesh(*command, cwd=project, env=settings))
        # A death with its traces, and an outage, with everybody at DEBUG
        victim = next(one for one in processes_in(own_mesh_dir) if "agents/risk.py" in one.command)
        os.kill(victim.pid, signal.SIGABRT)
        wait_until(lambda: any((own_mesh_dir / "stacks").iterdir()))
        locked.kill()
        said.append(run_mesh("publish", "hello.asked", "{}", cwd=project, env=settings))
        said.append(run_mesh("status", cwd=project, env=settings))
        locked.start()
        assert _arguments_with_it() == []
    finally:
        said.append(run_mesh("down", cwd=project, env=settings))

    assert [each for each in said if CANARY in each.out + each.err] == []
    assert _leaks_in(own_mesh_dir) == []
    assert _leaks_in(project) == []


def test_a_refused_password_is_not_repeated(
    project: Path, own_mesh_dir: Path, redis_url: str
) -> None:
    settings = environment(LEGION_BROKER_TYPE="redis", REDIS_URL=redis_url, REDIS_PASSWORD=CANARY)
    ended = [
        run_mesh(*command, cwd=project, env=settings)
        for command in (
            ("run", "--bars", "10", "--speed", "max"),
            ("publish", "hello.asked", "{}"),
            ("doctor",),
        )
    ]

    assert [each for each in ended if CANARY in each.out + each.err] == []
    assert _leaks_in(own_mesh_dir) == []


@pytest.mark.parametrize(("variable", "value"), SECRETS.items())
def test_no_message_about_settings_repeats_it(variable: str, value: str) -> None:
    settings = {variable: value, "LEGION_BROKER_TYPE": "redis"}
    config = MessageBusConfig.from_env(settings)
    broken = {**settings, "REDIS_PORT": "none", "LEGION_LOG_LEVEL": "LOUD"}

    with pytest.raises(MeshError) as caught:
        MessageBusConfig.from_env(broken)

    shown = [str(caught.value), repr(caught.value), repr(config), str(config.to_dict())]
    assert [text for text in shown if CANARY in text] == []


async def test_no_error_of_the_fabric_repeats_it() -> None:
    broker = RedisMessageBroker(url=SECRETS["REDIS_URL"], connect_timeout_s=0.1)
    journal = broker.make_journal()

    with pytest.raises(BrokerUnavailableError) as caught:
        await broker.connect()
    with pytest.raises(BrokerUnavailableError) as journals:
        await journal.connect()
    await broker.close()
    await journal.close()

    shown = [repr(broker), repr(journal), str(caught.value), str(journals.value)]
    assert [text for text in shown if CANARY in text] == []
