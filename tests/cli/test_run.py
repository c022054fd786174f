"""`mesh run`: how it ends, and what it says then."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.project import write_project
from tests.plumbing.processes import run_mesh

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
