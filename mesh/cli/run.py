"""`mesh run`: the pipeline from its input to a report, over processes or in memory."""

from __future__ import annotations

import asyncio
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mesh.cli import say
from mesh.cli.exits import EXIT_WRONG
from mesh.cli.place import (
    Place,
    agents_option,
    checked_settings,
    directory_option,
    json_option,
    param_option,
)
from mesh.cli.report import show_report
from mesh.config import MessageBusConfig
from mesh.errors import EXIT_BUG, ConfigurationError
from mesh.supervision.conf import programs_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@click.command()
@click.option("--csv", metavar="FILE", help="Ticks or bars.  [default: an invented market]")
@click.option(
    "--speed", metavar="X",
    help="1: real time; N: N times as fast; max: no waiting.  [default: max with --csv or --bars,"
    " else 1]",
)  # fmt: skip
@click.option("--bars", type=click.IntRange(min=1), help="End the invented market after N quotes.")
@click.option("--memory", is_flag=True, help="All agents in this process, on the memory fabric.")
@agents_option
@param_option
@json_option
@directory_option
@click.option("--fallback", hidden=True, type=click.Path(path_type=Path))
def run(
    csv: str | None,
    speed: str | None,
    bars: int | None,
    memory: bool,
    agents: Sequence[str] | None,
    params: Mapping[str, str],
    json_form: bool,
    directory: str | None,
    fallback: Path | None,
) -> None:
    """
    Run the pipeline on a CSV file or an invented market; print the report.

    Starts the agents of supervisord.conf, waits until the input has ended and everything that
    followed from it is handled, asks the portfolio for its account and takes everything down.
    Ctrl-C ends it early, with the report so far. What could not be handled is kept in a journal of
    the run's own: `MESH_JOURNAL=run mesh dlq ls` lists it until the next run begins.

    Exit code 0 when every agent was fine, nothing was lost and nothing put aside as a dead letter,
    1 when something was (an event that a handler failed with is), 70 when an agent failed: it did
    not start, its source raised, or it was given up.

    \b
    Example:
      mesh run --csv bars.csv --speed max
      mesh run --csv usdjpy.csv --param symbol=USDJPY     [default: BTCUSD]
      mesh run --bars 5000 --memory --json
    """  # noqa: D301
    # scripts/run brings its own project along, for where there is none around
    place = Place.find(directory, fallback=fallback)
    programs_of(place.project)
    problems, options = _pipeline_params(csv, speed, bars)
    try:
        # Memory needs no run directory
        config = MessageBusConfig.from_env() if memory else checked_settings(place.rundir)
    except ConfigurationError as error:
        raise ConfigurationError([*problems, *error.problems]) from None
    if problems:
        raise ConfigurationError(problems)
    # So many quotes are wanted, not the time that they would take
    implied = {} if bars is None else {"speed": "max"}
    given = {**implied, **params, **options}
    if memory:
        from mesh.cli.run_memory import run_memory

        report = asyncio.run(run_memory(place, config, agents, given))
    else:
        from mesh.cli.run_processes import run_processes

        report = asyncio.run(run_processes(place, config, agents, given))
    said = params.keys() | options.keys()
    report["params_unread"] = [name for name in report["params_unread"] if name in said]
    if json_form:
        say.as_json(report)
    else:
        show_report(report)
    for name in report["params_unread"]:
        if name in options:
            say.note(f"--{name}: none of the agents that ran here reads it", "yellow")
        else:
            say.note(f"param {name}: no agent has asked for it; is it misspelt?", "yellow")
    if report["dead_letters"]:
        _tell_dead_letters(sum(report["dead_letters"].values()), directory, memory=memory)
    sys.exit(_code_of(report))


def _code_of(report: Mapping[str, Any]) -> int:
    if report["failed_agents"]:
        return EXIT_BUG
    # An event that a handler failed with is a dead letter, whatever became of that since
    unhandled = any(each["failed"] for each in report["agents"].values())
    return EXIT_WRONG if report["lost"] or report["dead_letters"] != {} or unhandled else 0


def _tell_dead_letters(count: int, directory: str | None, *, memory: bool) -> None:
    """Say how to read them."""
    where = f" --dir {shlex.quote(directory)}" if directory else ""
    how = f"`MESH_JOURNAL=run mesh dlq ls{where}` lists them"
    if memory:
        how = f"they are gone with this process; after a run without --memory {how}"
    else:
        how = f"{how} until the next run"
    say.note(f"{say.counted(count, 'dead letter')}: {how}", "red")


def _pipeline_params(
    csv: str | None, speed: str | None, bars: int | None
) -> tuple[list[str], dict[str, str]]:
    """Check what can be checked before anything starts; give the mistakes and the parameters."""
    problems: list[str] = []
    params: dict[str, str] = {}
    if csv is not None:
        path = Path(csv).expanduser().absolute()
        problem = _problem_of(path)
        if problem:
            problems.append(f"{path}: {problem}")
        params["csv"] = str(path)
    if csv is not None and bars is not None:
        problems.append("--bars is for the invented market; leave it out with --csv")
    if bars is not None:
        params["bars"] = str(bars)
    if speed is not None:
        if not _is_speed(speed):
            problems.append(f"--speed {speed}: must be max, or a number above 0")
        params["speed"] = speed
    return problems, params


def _problem_of(path: Path) -> str | None:
    """Say why a file cannot be read; None when it can."""
    try:
        if path.is_dir():
            return "is a directory; name a CSV file"
        if path.exists() and not path.is_file():
            return "is no regular file, and a pipe can be read only once; write it to one first"
        with path.open("rb") as file:
            return None if file.read(1) else "the file is empty"
    except OSError as error:
        return f"{error.strerror}; name a CSV file of ticks or bars"


def _is_speed(text: str) -> bool:
    if text == "max":
        return True
    try:
        value = float(text)
    except ValueError:
        return False
    return math.isfinite(value) and value > 0
