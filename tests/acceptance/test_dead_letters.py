"""Dead letters of a real mesh: found, corrected, sent back to the one handler that failed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.plumbing.processes import run_mesh, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

#: Writes what its handlers do to files; the second handler fails until the printer is there.
AGENT = """
from pathlib import Path

from mesh import Agent, Event, on, run

HERE = Path(__file__).parent


def write(name: str, event: Event) -> None:
    with (HERE / name).open("a") as file:
        print(event.data["n"], file=file)


class Stall(Agent):
    @on("stall.order")
    async def counts(self, event: Event) -> None:
        write("counted", event)

    @on("stall.order", max_retries=0)
    async def prints(self, event: Event) -> None:
        if not (HERE / "printer").exists():
            raise RuntimeError("no printer")
        write("printed", event)


if __name__ == "__main__":
    run(Stall)
"""


@pytest.fixture(
    params=[
        "live",
        "durable",
        pytest.param("live over redis", marks=pytest.mark.redis),
        pytest.param("durable over redis", marks=pytest.mark.redis),
    ]
)
def stall(
    request: pytest.FixtureRequest, project: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Give a project whose one agent runs, and whose orders travel live or durably."""
    if "redis" in request.param:
        monkeypatch.setenv("LEGION_BROKER_TYPE", "redis")
        monkeypatch.setenv("REDIS_URL", request.getfixturevalue("redis_url"))
    if "durable" in request.param:
        monkeypatch.setenv("LEGION_DURABLE_EVENTS", "stall.order")
    run_mesh("new", "stall", cwd=project)
    (project / "agents" / "stall.py").write_text(AGENT)
    started = run_mesh("up", "-d", "--agents", "stall", cwd=project)
    assert started.code == 0, started
    yield project
    stopped = run_mesh("down", cwd=project)
    assert stopped.code == 0, stopped


def lines(project: Path, name: str) -> list[str]:
    path = project / "agents" / name
    return path.read_text().split() if path.exists() else []


def told(project: Path, *words: str) -> Any:
    return json.loads(run_mesh(*words, "--json", cwd=project).out)


def fail(project: Path, *numbers: int) -> list[str]:
    """Say orders that cannot be printed; gives the ids of their letters, the oldest first."""
    for number in numbers:
        said = run_mesh("publish", "stall.order", json.dumps({"n": number}), cwd=project)
        assert said.code == 0, said

    def letters() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = told(project, "dlq", "ls", "--letters")["letters"]
        return found

    wait_until(lambda: len(letters()) == len(numbers))
    return [each["id"] for each in reversed(letters())]


def test_a_letter_is_found_corrected_and_sent_back(stall: Path) -> None:
    first, second, third = fail(stall, 1, 2, 3)
    (group,) = told(stall, "dlq", "ls")["groups"]
    assert (group["agent"], group["handler"], group["count"]) == ("stall", "prints", 3)
    assert group["error"] == "RuntimeError: no printer"
    assert "3 dead letters; `mesh dlq ls` shows them" in run_mesh("status", cwd=stall).out
    assert told(stall, "status")["dead_letters"] == 3

    # Still broken: it comes back, and knows what was before
    assert run_mesh("dlq", "replay", "--id", first, cwd=stall).code == 0
    wait_until(lambda: told(stall, "dlq", "ls")["total"] == 3)
    again = told(stall, "dlq", "show", first)
    assert again["attempts"] == 2
    assert [each["error"] for each in again["history"]] == ["RuntimeError: no printer"]

    (stall / "agents" / "printer").touch()
    assert run_mesh("dlq", "edit", second, '{"n": 22}', cwd=stall).code == 0
    assert run_mesh("dlq", "purge", "--id", third, "--yes", cwd=stall).code == 0
    replayed = run_mesh("dlq", "replay", "--agent", "stall", "--handler", "prints", cwd=stall)

    assert replayed.out == "2 went to stall.prints\n"
    wait_until(lambda: len(lines(stall, "printed")) == 2)
    # The keyless orders may change places; the other handler has heard each once, and as it was
    assert sorted(lines(stall, "printed")) == ["1", "22"]
    assert lines(stall, "counted") == ["1", "2", "3"]
    assert told(stall, "status")["dead_letters"] == 0
    assert run_mesh("dlq", "replay", "--all", cwd=stall).code == 1


def test_a_replay_while_the_mesh_is_down_is_heard_when_it_is_up_again(stall: Path) -> None:
    fail(stall, 1)
    assert run_mesh("down", cwd=stall).code == 0
    (stall / "agents" / "printer").touch()

    replayed = run_mesh("dlq", "replay", "--all", cwd=stall)

    assert replayed.code == 0, replayed
    assert "stall is not running here; it gets them when it starts" in replayed.err
    assert run_mesh("up", "-d", "--agents", "stall", cwd=stall).code == 0
    wait_until(lambda: lines(stall, "printed") == ["1"])
    assert lines(stall, "counted") == ["1"]
