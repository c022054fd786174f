"""
Kill, hang and end the processes of a running mesh, and hold it to what it promises.

``scripts/chaos --fabric zmq --seed 7 --minutes 3 --events 100000``; tests/chaos/test_chaos.py is a
short one. Sources say orders, a chain of three durable agents and a second group handle them, and
all write down what they did where no death can take it back. At the end every order that was
accepted must have had its effect once, everywhere, and every lost live event must be counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh.rundir import RunDir
from tests.chaos.nemesis import Nemesis
from tests.chaos.oracle import judge, read_evidence, read_journal, read_state
from tests.chaos.pipeline import speed_for, storm, storm_over_supervisord
from tests.chaos.stage import Fabric, Stage
from tests.plumbing.projects import copy_example

if TYPE_CHECKING:
    from collections.abc import Sequence

FABRICS = ("zmq", "redis", "cluster")
_RATE = 400.0
#: Nothing moved for so long after healing: it never will. Longer than a lease.
_STILL_S = 45.0
#: How long the pipeline's source speaks: time enough to be killed twenty times.
_PIPELINE_S = 40.0


@dataclass(slots=True)
class Report:
    """The account of one run."""

    fabric: str
    seed: int
    seconds: float = 0.0
    figures: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    def table(self) -> str:
        """Give the account for people."""
        rows = [(name, f"{amount:,}") for name, amount in self.figures.items()]
        rows += [(f"fault: {name}", f"{amount:,}") for name, amount in self.faults.items()]
        rows += [("seconds", f"{self.seconds:.0f}")]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name.ljust(width)}  {value:>12}" for name, value in rows]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"BROKEN: {problem}" for problem in self.problems]
        if self.problems:
            lines.append(
                f"again: scripts/chaos --fabric {self.fabric} --seed {self.seed}, with the same"
                " --minutes and --events"
            )
        else:
            lines.append("every promise was kept")
        return "\n".join(lines) + "\n"


async def chaos(
    fabric: str, seed: int, *, minutes: float, events: int | None, folder: Path, rundir: RunDir
) -> Report:
    """
    Run one seed.

    Args:
        fabric: One of `FABRICS`.
        seed: Decides what is done, to whom, and when.
        minutes: How long the sources would speak if nothing happened to them.
        events: How many orders they say.
        folder: For the project.
        rundir: For the mesh.
    """
    begun_s = time.monotonic()
    count = events or int(minutes * 60 * _RATE)
    params = {"orders": str(count // 2), "rate": str(count / 2 / (minutes * 60))}
    give_up_s = begun_s + minutes * 60 * 5 + 60
    report = Report(fabric, seed)
    async with Stage(rundir, folder, Fabric(fabric), params) as stage:
        nemesis = Nemesis(stage, seed)
        try:
            await nemesis.torment(lambda: stage.sources_are_done() or time.monotonic() > give_up_s)
        finally:
            await nemesis.heal()
        report.faults = dict(sorted(Counter(f"{f.what} {f.whom}" for f in nemesis.faults).items()))
        healed_s = time.monotonic()
        backlog = await stage.pending()
        if not await stage.drained(_STILL_S):
            report.problems.append(await _stuck(stage))
        report.notes.append(
            f"healed after {healed_s - begun_s:.0f} s; {backlog:,} deliveries were left, and done"
            f" in {time.monotonic() - healed_s:.1f} s, at most {stage.longest_still_s:.1f} s apart"
        )
        report.problems += stage.problems
        report.problems += [
            f"given up by supervisord: {each.name} ({each.state})"
            for each in await stage.programs()
            if each.has_given_up
        ]
        held, state = await read_journal(stage.journal), await read_state(stage.journal)
        parked = Counter(
            f"{letter.agent}/{letter.reason}: {letter.error}"
            for letter in await stage.journal.dead()
        )
        told = read_evidence(rundir.path / "notes", held, state, stage.lives(), parked)
        verdict = judge(told)
        report.figures, report.seconds = verdict.figures, time.monotonic() - begun_s
        report.problems += verdict.problems
        # Nobody may end because of what is done to others
        report.problems += [f"ended by itself: {each}" for each in _summed(stage.own_ends())]
        report.notes += [f"replaced: {each}" for each in stage.replaced()]
    return report


async def _stuck(stage: Stage) -> str:
    left = [
        f"{view.group} has {view.pending} {view.topic}"
        for view in await stage.journal.groups()
        if view.pending
    ]
    views = stage.views()
    tills = [f"{name}: {view.sources}" for name, view in views.items() if view.sources != "none"]
    return f"not quiet {_STILL_S:g} s after the last movement: {', '.join(left + tills)}"


def _summed(lines: Sequence[str]) -> list[str]:
    return [f"{amount} times {line}" for line, amount in Counter(lines).items()]


async def _main(options: argparse.Namespace, folder: Path) -> int:
    rundir = RunDir(folder / "m")
    os.environ["MESH_DIR"] = str(rundir.path)
    if options.pipeline is not None:
        return await _pipeline(options, folder)
    report = await chaos(
        options.fabric,
        options.seed,
        minutes=options.minutes,
        events=options.events,
        folder=folder,
        rundir=rundir,
    )
    if options.json:
        sys.stdout.write(json.dumps(report.to_dict(), indent=2) + "\n")
    else:
        sys.stdout.write(f"{options.fabric}, seed {options.seed}\n{report.table()}")
    return 1 if report.problems else 0


async def _pipeline(options: argparse.Namespace, folder: Path) -> int:
    copy_example(folder)
    csv, seed = options.pipeline.absolute(), options.seed
    speed = speed_for(csv, _PIPELINE_S)
    fabric = Fabric(options.fabric)
    try:
        settings = await fabric.start()

        def run(name: str) -> tuple[Path, RunDir, Path, dict[str, str]]:
            return folder, RunDir(folder / name), csv, {**settings, "LEGION_MESH_NAME": name}

        outcomes = {
            "signals durable, risk, execution and portfolio killed": await storm(
                *run("a"), seed=seed, times=20, speed=speed
            ),
            "all durable, anybody killed": await storm(
                *run("b"), seed=seed, times=20, speed=speed, everything=True
            ),
            "all durable, supervisord killed as well": await storm_over_supervisord(
                *run("c"), seed=seed, times=3
            ),
        }
    finally:
        fabric.close()
    if options.json:
        told = {name: outcome.to_dict() for name, outcome in outcomes.items()}
        sys.stdout.write(json.dumps(told, indent=2) + "\n")
    else:
        for name, outcome in outcomes.items():
            sys.stdout.write(f"{name}\n{outcome.table()}")
    return 1 if any(outcome.problems for outcome in outcomes.values()) else 0


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument("--fabric", choices=FABRICS, default="zmq")
    parser.add_argument("--seed", type=int, default=1, help="the same seed does the same")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long sources speak")
    parser.add_argument("--events", type=int, help="how many orders (default: 400 a second)")
    parser.add_argument(
        "--pipeline", type=Path, metavar="CSV", help="kill the example pipeline instead"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--keep", action="store_true", help="leave the run directory of a failure")
    options = parser.parse_args()
    # Sockets lie in it, and their paths end at 107 bytes
    folder = Path(tempfile.mkdtemp(prefix="lg-", dir="/tmp"))
    code = 1
    try:
        code = asyncio.run(_main(options, folder))
    finally:
        if code and options.keep:
            sys.stderr.write(f"kept: {folder}\n")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
