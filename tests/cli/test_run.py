"""`mesh run`: how it ends, and what it says then."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.faults.project import write_project
from tests.plumbing.processes import ROOT, run_mesh, run_program

if TYPE_CHECKING:
    from pathlib import Path

#: An agent that does not start.
REFUSES = """
import asyncio
from mesh import Agent, PayloadError, run

async def no_way():
    raise ValueError("no way")

async def in_a_group():
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(no_way())

class Broken(Agent):
    async def setup(self):
        {}

if __name__ == "__main__":
    run(Broken)
"""

#: A source, and a handler that cannot handle what it says.
STALL = """
from mesh import Agent, Event, Reject, on, run, source

class Stall(Agent):
    @on("stall.order", max_retries=0)
    async def fill(self, event: Event) -> None:
        {}

    @source
    async def speak(self) -> None:
        await self.publish("stall.order", {{}})
        {}

if __name__ == "__main__":
    run(Stall)
"""

MOMENT = "2024-01-01T00:00:00Z"
TICKS = f"timestamp,bid,ask\n{MOMENT},1,2\n"
IN_VAIN = "--bars: none of the agents that ran here reads it"


def write(project: Path, **scripts: str) -> None:
    """Write a project of these agents."""
    folder = project / "written"
    folder.mkdir()
    for name, text in scripts.items():
        (folder / f"{name}.py").write_text(text)
    write_project(project, *scripts, folder=folder)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (None, "broken: "),
        (REFUSES.format("raise RuntimeError('no way')"), "broken: RuntimeError: no way (agents/"),
        (REFUSES.format("raise PayloadError('no way')"), "broken: no way"),
        (
            REFUSES.format("await in_a_group()"),
            "broken: ValueError: no way (agents/broken.py, line",
        ),
        (
            REFUSES.replace("async def setup(self)", "def __init__(self)").format("pass"),
            "TypeError",
        ),
    ],
    ids=["missing", "raises", "of the mesh", "in a group", "not made"],
)
def test_an_agent_that_cannot_start_ends_a_run_in_memory_by_a_line(
    tmp_path: Path, script: str | None, words: str
) -> None:
    """As it ends a run over processes."""
    write(tmp_path, broken=script or "")
    if script is None:
        (tmp_path / "agents" / "broken.py").unlink()

    refused = run_mesh("run", "--memory", cwd=tmp_path)

    assert refused.code == 70, refused
    assert refused.out == ""
    told, given_up = refused.err.splitlines()
    assert words in told
    assert given_up == "the run was given up: not all agents started"


@pytest.mark.parametrize(
    ("handler", "source", "code", "failed"),
    [
        ("pass", "pass", 0, []),
        ("raise ValueError", "pass", 1, []),
        ("raise Reject('no stock')", "pass", 1, []),
        ("pass", "raise ValueError", 70, ["stall"]),
        ("raise ValueError", "raise ValueError", 70, ["stall"]),
    ],
)
def test_what_was_put_aside_is_no_failure_of_its_agent(
    tmp_path: Path, handler: str, source: str, code: int, failed: list[str]
) -> None:
    write(tmp_path, stall=STALL.format(handler, source))

    ended = run_mesh("run", "--memory", "--json", cwd=tmp_path)

    report = json.loads(ended.out)
    assert (ended.code, report["failed_agents"]) == (code, failed), ended
    assert report["interrupted"] is False
    if code == 1:
        assert sum(report["dead_letters"].values()) == 1
        assert report["agents"]["stall"]["problem"] == "1 event could not be handled"


@pytest.mark.acceptance
def test_what_was_put_aside_is_no_failure_of_a_process(tmp_path: Path) -> None:
    write(tmp_path, stall=STALL.format("raise ValueError", "pass"))

    ended = run_mesh("run", cwd=tmp_path)

    assert ended.code == 1, ended
    assert "stall: 1 event could not be handled" in ended.out


@pytest.mark.parametrize(
    ("words", "unread", "told"),
    [
        ("--bars 9", ["bars"], [IN_VAIN]),
        ("--bars 9 --param speed=2", ["bars"], [IN_VAIN]),
        ("--speed 2 --param x=1", ["x"], ["param x: no agent has asked for it; is it misspelt?"]),
    ],
)
def test_only_what_was_given_can_be_given_in_vain(
    tmp_path: Path, words: str, unread: list[str], told: list[str]
) -> None:
    reads = "assert self.params['speed'] == '2'" if "speed" in words else "pass"
    write(tmp_path, stall=STALL.format("pass", reads))

    ended = run_mesh("run", "--memory", "--json", *words.split(), cwd=tmp_path)

    assert ended.code == 0, ended
    assert json.loads(ended.out)["params_unread"] == unread
    assert ended.err.splitlines() == told


def test_the_script_runs_the_example_from_anywhere(tmp_path: Path) -> None:
    if not (ROOT / ".venv" / ".set-up").exists():
        pytest.skip("this environment was made by hand")
    (tmp_path / "ticks.csv").write_text(TICKS)

    ended = run_program(ROOT / "scripts" / "run", "--csv", "ticks.csv", "--memory", cwd=tmp_path)

    assert ended.code == 0, ended
    assert "market.data.received  1" in ended.out
    assert [path.name for path in tmp_path.iterdir()] == ["ticks.csv"]


@pytest.mark.acceptance
@pytest.mark.parametrize("where", [(), ("--memory",)], ids=["processes", "memory"])
def test_what_a_source_raised_is_told(tmp_path: Path, where: tuple[str, ...]) -> None:
    write(tmp_path, stall=STALL.format("pass", "raise RuntimeError('no stock')"))

    ended = run_mesh("run", *where, cwd=tmp_path)

    assert ended.code == 70, ended
    assert ended.out.splitlines()[-1] == "stall: its source failed: RuntimeError: no stock"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "{}: the file is empty"),
        (b"\x1f\x8b", "market_data: {}: is compressed by gzip"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_alike_by_run_and_agent(
    project: Path, content: bytes, words: str
) -> None:
    path = project / "ticks.csv"
    path.write_bytes(content)

    refused = run_mesh("run", "--memory", "--csv", "ticks.csv", cwd=project)

    assert refused.code == 78, refused
    (told,) = refused.err.splitlines()
    assert told.startswith(words.format(path))


@pytest.mark.acceptance
def test_bad_rows_are_told_with_their_lines(project: Path) -> None:
    """Over processes as well, where the agent says so in its log; of earlier runs nothing."""
    path = project / "ticks.csv"
    options = ("--csv", path, "--agents", "market_data", "--json")
    path.write_text(TICKS + "yesterday,1,2\n")
    run_mesh("run", *options, cwd=project)
    path.write_text(TICKS + "\n" + f"{MOMENT},nan,2\n" * 30)

    many = run_mesh("run", *options, cwd=project)
    one = run_mesh("run", "--memory", *options, cwd=project)

    assert json.loads(many.out)["bad_rows"] == 30
    for ended in (many, one):
        told = [line.partition(": skipped ")[2] for line in ended.err.splitlines()]
        assert [each for each in told if each] == [
            *(f"line {number}: bid nan is no price" for number in range(4, 24)), "30 of 31 rows"
        ]  # fmt: skip
