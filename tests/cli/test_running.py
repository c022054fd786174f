"""The command line on a running mesh of real processes."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mesh.rundir import RunDir
from tests.plumbing.processes import (
    MESH,
    environment,
    eventually,
    run_mesh,
    run_mesh_unread,
    run_mesh_without_room,
    run_program,
    running,
    wait_until,
)
from tests.plumbing.projects import copy_example, foreign_variables, fresh_mesh_dir

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def running_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Run a mesh for those who only look, saying 40 times more quotes than real time."""
    project = copy_example(tmp_path_factory.mktemp("project"))
    folder = fresh_mesh_dir()
    env = {**environment(**dict.fromkeys(foreign_variables())), "MESH_DIR": str(folder)}
    try:
        started = run_mesh("up", "-d", "--param", "speed=40", cwd=project, env=env)
        assert started.code == 0, started
        yield project, folder
    finally:
        stopped = run_mesh("down", cwd=project, env=env)
        shutil.rmtree(folder, ignore_errors=True)
    assert stopped.code == 0, stopped


@pytest.fixture
def mesh(running_mesh: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a project whose mesh runs."""
    project, folder = running_mesh
    monkeypatch.setenv("MESH_DIR", str(folder))
    return project


def test_status_is_well(mesh: Path) -> None:
    told = run_mesh("status", cwd=mesh)

    assert told.code == 0, told
    assert "all is well" in told.out


def test_status_tells_what_travels_live_against_its_declaration(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEGION_ALLOW_DOWNGRADE", "order.executed,market.data.received")
    run_mesh("up", "-d", "--param", "speed=40", cwd=project)
    monkeypatch.delenv("LEGION_ALLOW_DOWNGRADE")
    told = run_mesh("status", cwd=project)
    facts = json.loads(run_mesh("status", "--json", cwd=project).out)
    run_mesh("down", cwd=project)

    assert "live by LEGION_ALLOW_DOWNGRADE (can be lost): order.executed" in told.out
    # A live type is no downgraded one
    assert facts["downgraded"] == ["order.executed"]


def test_tail_ends_after_the_count(mesh: Path) -> None:
    heard = run_mesh("tail", "market.data.received", "--json", "-n", "3", cwd=mesh)

    assert heard.code == 0, heard
    assert "listening to 1 type in" in heard.err
    events: list[dict[str, Any]] = [json.loads(line) for line in heard.out.splitlines()]
    assert [event["type"] for event in events] == ["market.data.received"] * 3


@pytest.mark.parametrize("words", ["status", "tail", "logs -f"])
def test_whoever_closes_the_pipe_early_ends_the_command(mesh: Path, words: str) -> None:
    told = run_mesh_unread(*words.split(), cwd=mesh)

    assert told.code == 141, told
    assert "Traceback" not in told.err


async def test_tail_leaves_heartbeats_out_and_ends_well_on_ctrl_c(mesh: Path) -> None:
    heartbeats = run_mesh("tail", "agent.heartbeat", "--json", "-n", "1", cwd=mesh)
    async with running(MESH, "tail", "--json", cwd=mesh) as process:
        assert process.stdout is not None
        seen = [json.loads(await process.stdout.readline())["type"]]
        ends = time.monotonic() + 2.5  # every agent beats twice
        while time.monotonic() < ends:
            seen.append(json.loads(await process.stdout.readline())["type"])
        process.send_signal(signal.SIGINT)
        await process.communicate()

    assert json.loads(heartbeats.out)["type"] == "agent.heartbeat"
    assert "market.data.received" in seen
    assert "agent.heartbeat" not in seen
    assert process.returncode == 0


async def test_following_logs_ends_well_on_ctrl_c(
    mesh: Path, running_mesh: tuple[Path, Path]
) -> None:
    printed = running_mesh[1] / "log" / "printer.out"
    async with running(MESH, "logs", "-f", cwd=mesh) as process:
        assert process.stdout is not None
        await process.stdout.readline()
        printed.write_text("it follows\n")
        async for line in process.stdout:
            if line == b"printer: it follows\n":
                break
        process.send_signal(signal.SIGINT)
        await process.communicate()

    assert process.returncode == 0


def test_publish_says_who_hears(mesh: Path) -> None:
    unheard = run_mesh("publish", "nobody.cares", '{"a": 1}', cwd=mesh)
    wrong = run_mesh("publish", "order.executed", '{"a": 1}', cwd=mesh)

    assert unheard.code == 0
    assert "no agent of this mesh hears nobody.cares" in unheard.err
    assert wrong.code == 65
    assert "does not fit Fill" in wrong.err


def test_agents_and_doctor_know_the_topics(mesh: Path) -> None:
    def known() -> dict[str, Any]:
        topics: dict[str, Any] = json.loads(run_mesh("agents", "--json", cwd=mesh).out)["topics"]
        return topics

    # Sources speak a moment after all are READY
    wait_until(lambda: known()["market.data.received"]["said_by"])
    topic = known()["market.data.received"]
    doctor = run_mesh("doctor", "--json", cwd=mesh)

    assert (topic["said_by"], topic["heard_by"]) == (["market_data"], ["features"])
    assert doctor.code == 0, doctor
    rows = {row["check"]: row for row in json.loads(doctor.out)["rows"]}
    assert rows["fabric"]["verdict"] == rows["supervisord"]["verdict"] == "ok"


def test_restart_knows_the_names(mesh: Path) -> None:
    restarted = run_mesh("restart", "risk", cwd=mesh)
    refused = run_mesh("restart", "nobody", cwd=mesh)

    assert "risk is READY" in restarted.out
    assert refused.code == 2
    assert "no such program: nobody" in refused.err


@pytest.mark.parametrize("words", ["scale features 2", "reload"])
def test_what_cannot_be_written_is_named_and_nothing_is_changed(mesh: Path, words: str) -> None:
    conf = RunDir.from_env().path / "conf"
    before = {path.name: path.read_text() for path in conf.iterdir()}

    refused = run_mesh_without_room(*words.split(), cwd=mesh)

    assert refused.code == 74, refused
    assert refused.err.splitlines()[-1].startswith(
        f"{conf / 'supervisord.conf'}: File too large; raise the limit"
    )
    assert "Traceback" not in refused.err
    assert {path.name: path.read_text() for path in conf.iterdir()} == before
    assert run_mesh("status", cwd=mesh).code == 0


@pytest.mark.parametrize("words", ["scale features 2", "reload"])
def test_a_file_that_supervisord_cannot_read_changes_nothing(mesh: Path, words: str) -> None:
    rendered = RunDir.from_env().path / "conf"
    before = {path.name: path.read_text() for path in rendered.iterdir()}
    conf = mesh / "supervisord.conf"
    text = conf.read_text()
    conf.write_text(f"{text}\n[program:foo]\n")
    try:
        refused = run_mesh(*words.split(), cwd=mesh)
    finally:
        conf.write_text(text)

    assert refused.code == 78, refused
    assert refused.err.startswith(f"{conf}: [program:foo]: ")
    assert {path.name: path.read_text() for path in rendered.iterdir()} == before
    assert run_mesh("status", cwd=mesh).code == 0


def test_a_run_is_refused_while_a_mesh_runs(mesh: Path) -> None:
    refused = run_mesh("run", "--bars", "10", cwd=mesh)

    assert refused.code == 75
    assert "already held by process" in refused.err
    assert run_mesh("status", cwd=mesh).code == 0


def test_a_project_from_nothing_runs(tmp_path: Path) -> None:
    """Its `agents` is its own, although the mesh's example has a package of that name, too."""
    shop = tmp_path / "shop"
    run_mesh("init", str(shop), cwd=tmp_path)
    (shop / "agents" / "payloads.py").write_text(
        "import msgspec\nfrom mesh import event_type\n\n\n"
        "class Customer(msgspec.Struct):\n    name: str\n\n\n"
        'CAME = event_type("customer.came", schema=Customer)\n'
    )
    run_mesh("new", "till", "--hears", "customer.came", cwd=shop)
    script = shop / "agents" / "till.py"
    shared = "from agents.payloads import CAME"
    script.write_text(script.read_text().replace("import agents.payloads", shared))
    tested = run_program(
        Path(sys.executable).with_name("pytest"), "-q", "-W", "error", "-p", "no:cacheprovider",
        cwd=shop,
    )  # fmt: skip
    alone = run_program(
        sys.executable, "-c", "import agents.till; print(agents.till.CAME)", cwd=shop
    )
    started = run_mesh("up", "-d", cwd=shop)
    said = run_mesh("publish", "customer.came", '{"name": "Ada"}', cwd=shop)
    stopped = run_mesh("down", cwd=shop)

    assert tested.code == 0, tested
    assert "warning" not in tested.out
    assert alone.out == "customer.came\n", alone
    assert started.code == 0, started
    assert "till" in said.out + said.err
    assert stopped.code == 0, stopped


def test_an_agent_that_was_taken_out_is_forgotten(tmp_path: Path, own_mesh_dir: Path) -> None:
    shop = tmp_path / "shop"
    run_mesh("init", str(shop), cwd=tmp_path)
    conf = shop / "supervisord.conf"
    run_mesh("new", "till", "--hears", "customer.came", cwd=shop)
    without = conf.read_text()
    run_mesh("new", "crier", "--hears", "till.said", cwd=shop)
    run_mesh("up", "-d", cwd=shop)
    conf.write_text(without)
    reloaded = run_mesh("reload", cwd=shop)
    said = run_mesh("publish", "customer.came", "{}", cwd=shop)

    def topics() -> dict[str, Any]:
        told: dict[str, Any] = json.loads(run_mesh("agents", "--json", cwd=shop).out)
        assert list(told["agents"]) == ["till"]
        found: dict[str, Any] = told["topics"]
        return found

    wait_until(lambda: topics()["customer.came"]["said_by"] == ["mesh-publish"])
    known = topics()
    run_mesh("down", cwd=shop)

    assert "removed: crier" in reloaded.out
    assert said.code == 0
    assert known["till.said"]["heard_by"] == []
    assert not (own_mesh_dir / "agents" / "crier.json").exists()


def test_a_run_says_what_was_put_aside_and_what_nobody_read(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEGION_MAX_HOPS", "2")

    given = ("--param", "fee_bps=2", "--param", "fee_bsp=2")
    ended = run_mesh("run", "--bars", "2000", "--speed", "max", *given, cwd=project)
    monkeypatch.setenv("MESH_JOURNAL", "run")
    told = json.loads(run_mesh("dlq", "ls", "--json", cwd=project).out)

    row = next(line for line in ended.out.splitlines() if line.startswith("dead letters"))
    assert row.split() == ["dead", "letters", str(told["total"]), "hops"]
    assert ended.code == 1
    assert "`MESH_JOURNAL=run mesh dlq ls` lists them" in ended.err
    assert told["total"] > 0
    assert [line for line in ended.err.splitlines() if "no agent has asked" in line] == [
        "param fee_bsp: no agent has asked for it; is it misspelt?"
    ]


async def test_ctrl_c_ends_a_run_with_its_report(project: Path, own_mesh_dir: Path) -> None:
    async with running(MESH, "run", "--speed", "100", "--json", cwd=project) as process:
        ledger = own_mesh_dir / "ledger" / "portfolio"
        await eventually(ledger.exists)
        await eventually(lambda: run_mesh("status", cwd=project).code == 0, within_s=20)
        process.send_signal(signal.SIGINT)
        out, err = await process.communicate()

    assert process.returncode == 0, err
    report = json.loads(out)
    assert (report["lost"], report["interrupted"]) == (0, True)
    assert run_mesh("status", cwd=project).code == 3


async def test_status_says_why_sources_are_silent(project: Path) -> None:
    script = project / "agents" / "signals.py"
    hanging = "    async def setup(self) -> None:\n        await asyncio.Event().wait()\n"
    script.write_text(
        f"import asyncio\nfrom mesh import Agent, run\n\n\nclass Signals(Agent):\n{hanging}"
        "\n\nif __name__ == '__main__':\n    run(Signals)\n"
    )

    def says_why() -> bool:
        told = run_mesh("status", cwd=project).out
        return "sources begin when all agents are READY: market_data" in told

    async with running(MESH, "up", cwd=project) as process:
        await eventually(says_why, within_s=20)
        process.send_signal(signal.SIGTERM)
        await process.communicate()


def test_a_source_that_failed_is_not_said_to_wait(project: Path) -> None:
    started = run_mesh("up", "-d", "--param", "csv=/nosuch.csv", cwd=project)
    told = run_mesh("status", cwd=project)
    run_mesh("down", cwd=project)

    assert (started.code, told.code) == (70, 1)
    # Which of them depends on whether it has lived as long as supervisord's `startsecs`
    assert re.search("market_data: is (EXITED|FATAL)", told.out), told
    assert "sources begin when" not in told.out


async def test_status_says_what_agents_wait_for(project: Path) -> None:
    away = environment(LEGION_BROKER_TYPE="redis", REDIS_PORT="1")

    def says_why() -> bool:
        told = run_mesh("status", cwd=project).out
        return "risk: is not READY: redis at localhost:1 cannot be reached" in told

    async with running(MESH, "up", "--agents", "risk", cwd=project, env=away) as process:
        await eventually(says_why, within_s=20)
        process.send_signal(signal.SIGTERM)
        await process.communicate()


async def test_up_in_the_foreground_takes_all_down(project: Path) -> None:
    options = ("--param", "speed=10", "--param", "spede=10")
    async with running(MESH, "up", *options, cwd=project) as process:
        assert process.stdout is not None
        async for line in process.stdout:
            if b"programs READY in" in line:
                break
        assert run_mesh("status", cwd=project).code == 0
        process.send_signal(signal.SIGTERM)
        _, err = await process.communicate()

    assert process.returncode == 0
    assert b"param spede: no agent has asked for it so far; is it misspelt?" in err
    assert b"param speed:" not in err
    assert run_mesh("status", cwd=project).code == 3
