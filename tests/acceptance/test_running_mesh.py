"""A whole mesh as a user runs it: real supervisord, real processes, real kills."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from mesh.cli.facts import look
from mesh.rundir import RunDir
from tests.plumbing.processes import (
    is_alive,
    run_mesh,
    run_program,
    run_python,
    wait_until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

AGENTS = ("market_data", "features", "signals", "risk", "execution", "portfolio")


@pytest.fixture
def bars(tmp_path: Path) -> Path:
    """Three thousand bars that trade now and then, two of them broken."""
    code = """
import sys
from datetime import timedelta
from agents.market_data import synthetic
print("timestamp,open,high,low,close,volume")
for row in synthetic(11, 3000):
    if row.line in (100, 200):
        print(f"{row.time.isoformat()},1,2,nan,x,1")
    price = (row.bid + row.ask) / 2
    moment = (row.time + timedelta(minutes=row.line)).isoformat()
    print(f"{moment},{price},{price+1},{price-1},{price},5")
"""
    path = tmp_path / "bars.csv"
    path.write_text(run_python(code).out)
    return path


@contextlib.contextmanager
def mesh_up(project: Path, *options: str) -> Iterator[None]:
    started = run_mesh("up", "-d", *options, cwd=project)
    assert started.code == 0, started
    try:
        yield
    finally:
        stopped = run_mesh("down", cwd=project)
        assert stopped.code == 0, stopped


def status() -> dict[str, Any]:
    """Give what `mesh status --json` would; a process for each look would starve what is tested."""
    return asyncio.run(look(RunDir.from_env())).to_dict()


def programs() -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in status()["programs"]}


def pids() -> dict[str, int]:
    return {name: row["pid"] for name, row in programs().items()}


def ready_again(name: str, old_pid: int, within_s: float) -> None:
    """Wait for a successor that is READY."""

    def is_back() -> bool:
        row = programs()[name]
        return bool(row["state"] == "ready" and row["pid"] != old_pid)

    wait_until(is_back, within_s=within_s)


def test_one_process_and_many_give_the_same_fills(project: Path, bars: Path) -> None:
    """Every good bar arrives, nothing is lost, and the fills are the same byte for byte."""
    options = ("--csv", str(bars), "--speed", "max", "--json")

    many = run_mesh("run", *options, cwd=project)
    again = run_mesh("run", *options, cwd=project)
    one = run_mesh("run", *options, "--memory", cwd=project)

    assert (many.code, again.code, one.code) == (0, 0, 0), (many, again, one)
    reports = [json.loads(each.out) for each in (many, again, one)]
    for report in reports:
        assert report["market_events"] == 3000
        assert report["bad_rows"] == 2
        assert (report["lost"], report["lost_by_link"]) == (0, {})
        assert report["fills"] > 0
        assert report["latency_us"]["p50"] > 0
    assert len({report["fills_digest"] for report in reports}) == 1


def test_two_meshes_run_side_by_side(project: Path, bars: Path, own_mesh_dir: Path) -> None:
    with mesh_up(project):
        other = run_mesh(
            "--dir",
            f"{own_mesh_dir}/b",
            "run",
            "--csv",
            bars,
            "--json",
            cwd=project,
        )

        assert other.code == 0, other
        assert json.loads(other.out)["lost"] == 0
        assert all(row["state"] == "ready" for row in programs().values())


def test_a_second_mesh_in_the_same_directory_is_refused(project: Path) -> None:
    with mesh_up(project):
        before = pids()

        second = run_mesh("up", "-d", cwd=project)

        assert second.code == 75
        assert "already held by process" in second.err
        assert pids() == before


@pytest.mark.fault
def test_a_killed_process_is_back_and_nobody_else_restarts(project: Path) -> None:
    with mesh_up(project):
        for victim in ("features", "monitor", "forwarder"):
            before = pids()

            os.kill(before[victim], signal.SIGKILL)
            ready_again(victim, before[victim], within_s=10)

            after = pids()
            assert [name for name in before if after[name] != before[name]] == [victim]


@pytest.mark.fault
def test_what_a_killed_agent_missed_is_counted_to_the_event(project: Path) -> None:
    """Once the source has ended, whatever it said is handled or counted as lost."""
    with mesh_up(project, "--param", "speed=1000", "--param", "bars=8000"):
        victim = pids()["features"]
        wait_until(lambda: programs()["features"]["handled"] > 500)

        os.kill(victim, signal.SIGKILL)
        ready_again("features", victim, within_s=10)
        wait_until(lambda: programs()["market_data"]["sources"] == "done", within_s=60)
        wait_until(lambda: status()["in_flight"] == 0)

        row = programs()["features"]
        assert row["lost"] > 0
        assert row["handled"] + row["lost"] == 8_000


@pytest.mark.fault
def test_no_orphan_survives_a_killed_supervisord(project: Path, own_mesh_dir: Path) -> None:
    assert run_mesh("up", "-d", cwd=project).code == 0
    all_pids = pids()
    supervisord = int((own_mesh_dir / "run" / "supervisord.pid").read_text())

    os.kill(supervisord, signal.SIGKILL)

    wait_until(lambda: not any(is_alive(pid) for pid in all_pids.values()), within_s=12)
    with mesh_up(project):
        assert set(pids()) == set(all_pids)


HANGING = """
from mesh import Agent, Event, on, run


class Hanging(Agent):
    @on("please.hang")
    async def on_request(self, event: Event) -> None:
        while True:
            pass


if __name__ == "__main__":
    run(Hanging)
"""


@pytest.mark.fault
@pytest.mark.timeout(120)
def test_a_blocked_loop_is_replaced_and_its_stack_is_kept(
    project: Path, own_mesh_dir: Path
) -> None:
    run_mesh("new", "hanging", cwd=project)
    (project / "agents" / "hanging.py").write_text(HANGING)
    with mesh_up(project, "--agents", "hanging,portfolio"):
        before = pids()

        said = run_mesh("publish", "please.hang", "{}", cwd=project)
        assert said.code == 0, said
        # 12 s on a quiet machine; mesh/supervision/liveness.py says what is promised on others
        ready_again("hanging", before["hanging"], within_s=60)

        stacks = (own_mesh_dir / "stacks" / f"hanging.{before['hanging']}.txt").read_text()
        assert "in on_request" in stacks
        assert pids()["portfolio"] == before["portfolio"]
        # What it held was published by a command that has ended, and is lost all the same
        told = status()
        assert programs()["hanging"]["lost"] == told["lost"] == 1
        assert list(told["lost_by_link"].values()) == [1]
        assert "all agents are well; 1 event was lost" in run_mesh("status", cwd=project).out


@pytest.mark.fault
@pytest.mark.timeout(120)
def test_a_stopped_agent_is_replaced(project: Path, own_mesh_dir: Path) -> None:
    with mesh_up(project):
        before = pids()

        os.kill(before["risk"], signal.SIGSTOP)
        ready_again("risk", before["risk"], within_s=60)

        (entry,) = (own_mesh_dir / "log" / "restarts.jsonl").read_text().splitlines()
        assert "the process is stopped (T)" in json.loads(entry)["reason"]


@pytest.mark.fault
@pytest.mark.timeout(120)
def test_a_stopped_monitor_is_replaced_by_the_agents(project: Path) -> None:
    with mesh_up(project, "--agents", "portfolio,risk"):
        before = pids()

        os.kill(before["monitor"], signal.SIGSTOP)
        ready_again("monitor", before["monitor"], within_s=60)

        assert {**pids(), "monitor": before["monitor"]} == before


def test_a_stopped_supervisord_is_not_said_to_be_gone(project: Path) -> None:
    with mesh_up(project, "--agents", "portfolio"):
        pid = status()["supervisor_pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            told = {words: run_mesh(words, cwd=project) for words in ("status", "down", "doctor")}
        finally:
            os.kill(pid, signal.SIGCONT)

    assert (told["status"].code, told["down"].code, told["doctor"].code) == (69, 69, 1)
    for each in told.values():
        assert f"kill -9 {pid}" in each.out + each.err


def test_a_new_agent_joins_a_running_mesh(project: Path) -> None:
    with mesh_up(project):
        before = pids()

        made = run_mesh("new", "hello", cwd=project)
        loaded = run_mesh("reload", cwd=project)

        assert (made.code, loaded.code) == (0, 0), (made, loaded)
        rows = programs()
        assert rows["hello"]["state"] == "ready"
        assert {name: rows[name]["pid"] for name in before} == before


def test_a_reload_tells_of_scripts_that_nobody_starts_and_that_were_edited(project: Path) -> None:
    script = "from mesh import Agent, run\nclass Mine(Agent): ...\n"
    (project / "agents" / "mine.py").write_text(f"{script}if __name__ == '__main__': run(Mine)\n")
    with mesh_up(project):
        told = run_mesh("reload", cwd=project)
        run_mesh("new", "mine", cwd=project)
        later_s = time.time() + 60  # the mesh may be younger than a file's clock can tell
        os.utime(project / "agents" / "risk.py", (later_s, later_s))
        loaded = run_mesh("reload", cwd=project)

        assert "agents/mine.py is no program: `mesh new mine` adds" in told.err
        assert "mine is READY" in loaded.out
        assert "is no program" not in loaded.err
        assert (loaded.code, "edited" in told.err) == (0, False), (told, loaded)
        assert "edited since its start: `mesh restart risk` takes that up" in loaded.err


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--hears", "signal.generated", "--says", "order.executed"),
        ("--hears", "shop.opened", "--says", "order.requested"),
    ],
    ids=" ".join,
)
def test_the_test_of_a_new_agent_passes(project: Path, options: tuple[str, ...]) -> None:
    # What it says fits the schema that others hold it against, or its `expect` would wait in vain
    run_mesh("new", "hello", *options, cwd=project)

    ended = run_program(
        sys.executable,
        *("-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *("-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function"),
        "tests/test_hello.py",
        cwd=project,
    )

    assert ended.code == 0, ended
    assert "1 passed" in ended.out


FAILING_SETUP = """
from mesh import Agent, run


class Signals(Agent):
    async def setup(self) -> None:
        raise RuntimeError("no setup today")


if __name__ == "__main__":
    run(Signals)
"""


#: By the agent that is broken so: its script, and what must be said of it.
BROKEN = {
    "features": ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
    "signals": ("def broken(:", "SyntaxError: invalid syntax"),
    "risk": ("x = 1", "no agent class"),
    "execution": (FAILING_SETUP, "RuntimeError: no setup today"),
    # Longer than supervisord's `startsecs`: for it the program has run
    "portfolio": (
        FAILING_SETUP.replace("raise", "await self.clock.sleep(1.5); raise"),
        "no setup today",
    ),
}


def test_broken_scripts_are_told_and_the_others_run(project: Path) -> None:
    for name, (script, _) in BROKEN.items():
        (project / "agents" / f"{name}.py").write_text(script)

    started = run_mesh("up", "-d", cwd=project, timeout_s=90)
    try:
        told = run_mesh("status", cwd=project)
        rows = programs()
    finally:
        assert run_mesh("down", cwd=project).code == 0

    assert started.code == 70
    assert told.code == 1
    for name, (_, words) in BROKEN.items():
        assert re.search(f"{name}.*{words}", started.err), started.err
        assert re.search(f"{name}.*{words}", told.out), told.out
    assert {name for name, row in rows.items() if row["state"] != "ready"} == set(BROKEN)


def test_all_configuration_mistakes_are_told_at_once(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEGION_BROKER_TYPE", "carrier-pigeon")
    monkeypatch.setenv("LEGION_CONSUMER_BUFFER_SIZE", "many")

    ended = run_mesh("up", "-d", cwd=project)

    assert ended.code == 78
    assert "LEGION_BROKER_TYPE=carrier-pigeon" in ended.err
    assert "LEGION_CONSUMER_BUFFER_SIZE=many" in ended.err


@pytest.mark.parametrize("content", [None, "", "a,b,c\n1,2,3\n", "timestamp,bid,ask\nx,y,z\n"])
def test_a_csv_that_cannot_be_used_is_told(
    project: Path, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "input.csv"
    if content is not None:
        path.write_text(content)

    ended = run_mesh("run", "--csv", path, "--json", cwd=project, timeout_s=60)

    # Before anything starts, or by the agent that reads it: then all are taken down again
    assert ended.code == 78, ended
    assert str(path) in ended.err
    assert ended.out == ""
    assert run_mesh("status", cwd=project).code == 3


def test_a_run_directory_open_to_others_is_refused(project: Path, rundir: Path) -> None:
    rundir.chmod(0o755)

    ended = run_mesh("up", "-d", cwd=project)

    assert ended.code == 78
    assert f"chmod 700 {rundir}" in ended.err


def test_a_path_too_long_for_sockets_is_refused(project: Path, own_mesh_dir: Path) -> None:
    ended = run_mesh("--dir", own_mesh_dir / ("x" * 100), "up", "-d", cwd=project)

    assert ended.code == 78
    assert "too many for Unix sockets" in ended.err
