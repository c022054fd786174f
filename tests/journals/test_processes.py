"""Real processes on one journal: whoever is killed, nothing accepted is lost or done twice."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.plumbing.journal_worker import open_journal
from tests.plumbing.journals import drain, ids, records
from tests.plumbing.processes import ROOT, environment, eventually, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mesh.journal import Journal

Start = Callable[..., "Worker"]


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.redis)])
def where(request: pytest.FixtureRequest, rundir: Path) -> str:
    """Give the place of a journal that several processes can open."""
    if request.param == "redis":
        return str(request.getfixturevalue("redis_url"))
    return str(rundir / "journal.db")


class Worker:
    """A process of tests/plumbing/journal_worker.py."""

    def __init__(self, role: str, where: str, account: Path, *rest: str) -> None:
        self.account = account
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.plumbing.journal_worker", role, where, account, *rest],
            cwd=ROOT,
            env=environment(PYTHONPATH=str(ROOT)),
        )

    def facts(self, word: str) -> list[list[str]]:
        if not self.account.exists():
            return []
        lines = [line.split() for line in self.account.read_text().splitlines()]
        return [rest for first, *rest in lines if first == word]

    def has(self, word: str, count: int) -> bool:
        return len(self.facts(word)) >= count

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def wait(self) -> int:
        return self._process.wait(timeout=30)


@pytest.fixture
def start(where: str, rundir: Path) -> Iterator[Start]:
    """Start workers that end with the test: a role, the name of its account, its arguments."""
    started: list[Worker] = []

    def start_one(role: str, name: str, *rest: str) -> Worker:
        started.append(Worker(role, where, rundir / f"{role}-{name}.txt", *rest))
        return started[-1]

    yield start_one
    for worker in started:
        worker.kill()


# -- processes -----------------------------------------------------------------------------------


@pytest.mark.fault
async def test_what_was_accepted_survives_the_death_of_its_appender(
    where: str, start: Start
) -> None:
    async with open_journal(where) as journal:
        await journal.declare("risk", ["order"])
        accepted: set[str] = set()
        for life in range(4):
            worker = start("append", str(life), f"w{life}", "1000000")
            wait_until(partial(worker.has, "accepted", 40))
            worker.kill()
            accepted |= {name for batch in worker.facts("accepted") for name in batch}
        kept = ids(await drain(journal, "risk", "risk"))

    assert accepted <= set(kept)
    assert len(kept) == len(set(kept))
    for life in range(4):
        mine = [int(name.partition("-")[2]) for name in kept if name.startswith(f"w{life}-")]
        assert mine == list(range(len(mine)))


@pytest.mark.fault
async def test_killed_consumers_lose_nothing_and_do_nothing_twice(where: str, start: Start) -> None:
    """The oracle: each accepted order has exactly one fill, in its key's order, whoever died."""
    total = 5000
    async with open_journal(where) as journal:
        await journal.declare("risk", ["order"])
        await journal.declare("audit", ["fill"])
        appender = start("append", "w", "w", str(total))
        # A dead one is followed by one of its own name, or is said to be dead
        names = ["c0", "c0", "c1", "c1", "c0", "c1"]
        for life, name in enumerate(names):
            if life and names[life - 1] != name:
                await journal.free("risk", names[life - 1])
            worker = start("handle", str(life), name)
            wait_until(partial(worker.has, "handled", 60), within_s=20)
            worker.kill()
        assert appender.wait() == 0
        await journal.free("risk", "c0")
        await journal.free("risk", "c1")
        last = start("handle", "last", "c0")
        await eventually(lambda: _is_settled(journal), within_s=30)
        last.kill()
        fills = [each.frame.decode() for each in await drain(journal, "audit", "audit")]
        state = await journal.load_state("risk")

    expected = [f"w-{number}" for number in range(total)]
    assert Counter(fills) == Counter(expected)
    for key in range(7):
        order = [int(fill.partition("-")[2]) for fill in fills]
        mine = [number for number in order if number % 7 == key]
        assert mine == sorted(mine)
    assert sum(int(value) for value in state.values()) == total


async def _is_settled(journal: Journal) -> bool:
    views = await journal.groups()
    return next(view.pending for view in views if view.group == "risk") == 0


@pytest.mark.fault
async def test_an_event_that_kills_its_process_is_counted(where: str, start: Start) -> None:
    async with open_journal(where) as journal:
        await journal.declare("risk", ["order"])
        await journal.append(records("a", "poison", "c", key="k"))
    codes = []
    for _ in range(5):
        worker = start("die-of", "all", "risk", "poison")
        codes.append(worker.wait())

    assert codes == [-9, -9, -9, -9, 0]
    assert [tuple(fact) for fact in worker.facts("handled")] == [
        ("a", "1"),
        ("poison", "1"),
        ("poison", "2"),
        ("poison", "3"),
        ("poison", "4"),
        ("poison", "5"),
        ("c", "2"),
    ]


async def test_two_processes_write_at_once(where: str, start: Start) -> None:
    async with open_journal(where) as journal:
        await journal.declare("risk", ["order"])
        workers = [start("append", name, name, "800") for name in ("x", "y", "z")]
        for number in range(100):
            await journal.append(records(f"here-{number}", key="here"))
        assert [worker.wait() for worker in workers] == [0, 0, 0]
        kept = ids(await drain(journal, "risk", "risk"))

    for name, count in [("x", 800), ("y", 800), ("z", 800), ("here", 100)]:
        mine = [each for each in kept if each.startswith(f"{name}-")]
        assert mine == [f"{name}-{number}" for number in range(count)]
