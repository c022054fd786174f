"""
Start fresh meshes, each with a source that speaks at once, and count the first events that arrive.

``scripts/starts --count 100`` is the full size; tests/faults/test_starts.py a small one. Each start
is `mesh up -d` in a run directory that did not exist, and each end `mesh down`; in between nothing
waits but for the source to have spoken. The figures are the consumer's own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from mesh.ledger_views import LedgerView, read_ledger
from mesh.rundir import RunDir
from tests.faults.account import Account
from tests.faults.mouth import SAID
from tests.faults.project import write_project
from tests.plumbing.processes import environment, run_mesh, wait_until

_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Start:
    """What one mesh came to, by its agents' own counters."""

    took_s: float
    #: As the source counted them.
    said: int = 0
    #: As the handler counted them.
    first: int = 0
    later: int = 0
    lost: int = 0
    problem: str = ""


def start_many(count: int, folder: Path) -> Account:
    """
    Start so many meshes one after the other.

    Args:
        count: How many.
        folder: Empty; its path is short, because sockets lie in it.

    Returns:
        The account; its `problems` are empty when every first event was delivered.
    """
    project = folder / "project"
    project.mkdir()
    write_project(project, "ear", "mouth")
    starts = [_start(project, folder / f"m{number}") for number in range(count)]
    account = Account(all_well=f"{count} of {count} first events were delivered")
    account.close("fresh starts", count, first_event_delivered=sum(each.first for each in starts))
    account.close(
        "events said",
        count * SAID,
        handled=sum(each.first + each.later for each in starts),
        lost=sum(each.lost for each in starts),
    )
    took_s = sorted(each.took_s for each in starts)
    account.notes["seconds from nothing to READY"] = (
        f"median {statistics.median(took_s):.2f}, longest {took_s[-1]:.2f}"
    )
    for number, each in enumerate(starts):
        if each.problem or (each.said, each.first, each.later, each.lost) != (SAID, 1, SAID - 1, 0):
            account.problems.append(f"start {number}: {each}")
    return account


def _start(project: Path, mesh_dir: Path) -> Start:
    env = environment(MESH_DIR=str(mesh_dir))
    rundir = RunDir(mesh_dir)

    def has_spoken() -> bool:
        mouth = read_ledger(rundir.ledger("mouth"))
        return mouth is not None and mouth.sources == "done"

    began_s = time.monotonic()
    started = run_mesh("up", "-d", env=env, cwd=project, timeout_s=_PATIENCE_S)
    took_s = time.monotonic() - began_s
    try:
        if started.code != 0:
            return Start(took_s, problem=f"`mesh up -d` failed: {started}")
        wait_until(has_spoken, within_s=_PATIENCE_S, what="the source has spoken")
    except AssertionError as error:
        return Start(took_s, problem=str(error))
    finally:
        # What is under way is handled before the consumer ends
        stopped = run_mesh("down", env=env, cwd=project, timeout_s=_PATIENCE_S)
    if stopped.code != 0:
        return Start(took_s, problem=f"`mesh down` failed: {stopped}")
    mouth, ear = _view(rundir, "mouth"), _view(rundir, "ear")
    return Start(
        took_s,
        said=mouth.out["starts.said"].sequence,
        first=ear.dropped.get("first", 0),
        later=ear.dropped.get("later", 0),
        lost=sum(link.lost for (_, topic), link in ear.in_.items() if topic == "starts.said"),
    )


def _view(rundir: RunDir, name: str) -> LedgerView:
    view = read_ledger(rundir.ledger(name))
    assert view is not None
    return view


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/starts", description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="how many (default 100)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lg-", dir="/tmp") as folder:
        account = start_many(options.count, Path(folder))
    sys.stdout.write(account.table())
    return 1 if account.problems else 0


if __name__ == "__main__":
    sys.exit(main())
