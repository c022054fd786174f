"""What `mesh status` and `mesh up` say of a mesh that is not as it should be."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import click
import pytest

from mesh.cli.exits import code_of
from mesh.cli.facts import MeshFacts, ProgramFacts
from mesh.cli.kept import KeptFacts
from mesh.cli.starting import left_running
from mesh.cli.status import closing, show
from mesh.config import MessageBusConfig
from mesh.rundir import RunDir
from mesh.supervision.boot import BootError
from mesh.supervision.last_words import last_warning
from mesh.supervision.supervisord import ProcessInfo

if TYPE_CHECKING:
    from pathlib import Path


def facts(*, lost: int = 0, disagreements: dict[str, str] | None = None) -> MeshFacts:
    return MeshFacts(
        directory="",
        supervisor_pid=1,
        programs=[],
        links={},
        lost=lost,
        in_flight=0,
        groups={},
        downgraded=[],
        disagreements=disagreements or {},
    )


@pytest.mark.parametrize(
    ("lost", "kept", "words", "colour"),
    [
        (0, KeptFacts(), "all is well", "green"),
        (0, KeptFacts(dead_letters=0), "all is well", "green"),
        (903, KeptFacts(), "all agents are well; 903 events were lost", "yellow"),
        (
            1,
            KeptFacts(dead_letters=12),
            "all agents are well; 1 event was lost; 12 dead letters wait",
            "yellow",
        ),
        (0, KeptFacts(dead_letters=1), "all agents are well; 1 dead letter waits", "yellow"),
        (
            0,
            KeptFacts(trouble="x"),
            "all agents are well; what the journal keeps is not known",
            "yellow",
        ),
    ],
)
def test_all_is_well_only_when_nothing_was_lost_and_nothing_waits(
    lost: int, kept: KeptFacts, words: str, colour: str
) -> None:
    assert closing(facts(lost=lost), kept) == (words, colour)


def test_all_is_not_well_when_some_take_for_durable_what_others_take_for_live() -> None:
    words, colour = closing(facts(disagreements={"coffee.billed": "..."}), KeptFacts())

    assert (words, colour) == (
        "all agents are well; 1 type without one delivery class",
        "yellow",
    )


def test_a_mesh_that_waits_for_redis_is_said_to_run_on(rundir: Path) -> None:
    config = MessageBusConfig(broker_type="redis", redis_port=1)

    late = asyncio.run(left_running(RunDir(rundir), config, BootError("not READY: risk")))

    assert code_of(late) == 69
    first, why, last = str(late).splitlines()
    assert first == "not READY: risk"
    assert "redis at localhost:1 cannot be reached" in why
    assert last == "the mesh keeps running and waits for it; `mesh down` ends that"


def test_a_mesh_that_is_late_for_another_reason_is_said_to_run_on(rundir: Path) -> None:
    late = asyncio.run(left_running(RunDir(rundir), MessageBusConfig(), BootError("not READY")))

    assert code_of(late) == 1
    assert "the mesh keeps running; `mesh status` tells more" in str(late)


@pytest.mark.parametrize(
    ("second", "words"),
    [("09", ""), ("10", "redis is away; trying on"), ("11", "redis is away; trying on")],
)
def test_only_warnings_since_its_start_explain_a_program(
    rundir: Path, second: str, words: str
) -> None:
    home = RunDir(rundir).ensure()
    home.log("risk").write_text(
        f"2026-01-01T00:00:{second}.000Z WARNING agent=risk mesh.redis: redis is away; trying on"
        " (27 more like this)\n"
        "2026-01-01T00:00:59.000Z INFO agent=risk mesh.runtime: a word\n"
    )
    program = ProcessInfo("risk", "RUNNING", 1, 0, "", 1767225610, 0)

    assert last_warning(home, program) == words


def test_a_program_without_a_log_has_no_explanation(rundir: Path) -> None:
    program = ProcessInfo("risk", "RUNNING", 1, 0, "", 0, 0)

    assert last_warning(RunDir(rundir), program) == ""


def program(name: str, **changes: object) -> ProgramFacts:
    made = ProgramFacts(
        name=name,
        group=name,
        state="starting",
        supervisor_state="STARTING",
        pid=2_345_678,
        uptime_s=0.4,
        ready=False,
        phase=None,
        restarts=0,
        beat_age_s=None,
        handled=0,
        failed=0,
        lost=0,
        dropped={},
        queue=0,
        lag_ms=0.0,
        sources="none",
        latency_us={"p50": None, "p99": None},
        last_words=None,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("columns", ["40", "60", "80", "160"])
def test_a_narrow_terminal_breaks_no_name_and_no_state(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", columns)
    busy = {"restarts": 12, "handled": 1_234_567, "lag_ms": 1234.5, "dropped": {"overflow": 1234}}

    show(
        replace(facts(), programs=[program("market_data", **busy), program("execution")]),
        KeptFacts(),
    )

    shown = click.unstyle(capsys.readouterr().out).splitlines()
    head, _, *rows = (line.split() for line in shown[1:6] if line.strip())
    assert head[:2] == ["program", "state"]
    assert [row[:2] for row in rows] == [["market_data", "starting"], ["execution", "starting"]]
    assert ("lag" in head) == (columns == "160")
