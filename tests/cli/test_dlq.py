"""`mesh dlq` where no mesh runs: a journal that is there, or is not."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner, Result

from mesh import MessageBusConfig
from mesh.cli.dlq_views import show_groups, show_letters
from mesh.cli.main import DLQ_COMMANDS, cli
from mesh.dead_letter_queue import DeadGroup
from mesh.events import Event
from mesh.journals.sqlite import SQLiteJournal
from mesh.rundir import RunDir
from tests.plumbing.journals import letter
from tests.plumbing.processes import run_mesh

if TYPE_CHECKING:
    from pathlib import Path

    from mesh.deadletters import DeadLetter


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def call(*words: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, ["dlq", *words], input=stdin)


def told(*words: str) -> Any:
    return json.loads(call(*words, "--json").stdout)


def bury(rundir: Path, *letters: DeadLetter) -> None:
    async def write() -> None:
        async with SQLiteJournal(RunDir(rundir).ensure().journal()) as journal:
            await journal.bury(letters)

    asyncio.run(write())


def failed(name: str, **changes: object) -> DeadLetter:
    event = Event("order", {"n": 1}, "feed", id=name)
    return letter(name, **{"event": event.to_dict(), "attempts": 4, **changes})


@pytest.mark.parametrize("name", DLQ_COMMANDS)
def test_every_command_teaches_with_an_example(name: str) -> None:
    shown = call(name, "--help")

    assert shown.exit_code == 0
    assert f"mesh dlq {name}" in shown.output


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["ls"], 0),
        (["show", "a"], 1),
        (["replay", "--all"], 1),
        (["edit", "a", "{}"], 1),
        (["purge", "--all", "--yes"], 1),
    ],
)
def test_asking_makes_no_journal(own_mesh_dir: Path, words: list[str], code: int) -> None:
    assert call(*words).exit_code == code
    assert not own_mesh_dir.exists()


@pytest.mark.parametrize(
    "words", ["dlq ls", "dlq purge --all --yes", "journal ls", "journal trim --max-age 1d"]
)
def test_a_journal_whose_name_is_misspelt_is_not_taken_for_an_empty_one(
    rundir: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    bury(rundir, failed("a"))
    monkeypatch.setenv("MESH_JOURNAL", "rnu")

    refused = CliRunner().invoke(cli, words.split())

    assert refused.exit_code == 78
    folder = rundir / "journal"
    assert refused.stderr == f"MESH_JOURNAL=rnu: no such journal in {folder}; there are: journal\n"
    assert not (folder / "rnu.sqlite").exists()


def test_ls_puts_together_what_failed_alike(rundir: Path) -> None:
    bury(
        rundir,
        failed("a", at_s=10.0),
        failed("b", at_s=20.0),
        failed("c", handler=None, reason="expired", error="it expired"),
    )

    assert told("ls") == {
        "total": 3,
        "groups": [
            {
                "agent": "risk",
                "handler": "check",
                "reason": "failed",
                "error": "ValueError: no",
                "count": 2,
                "oldest": "1970-01-01T00:00:10.000+00:00",
                "newest": "1970-01-01T00:00:20.000+00:00",
            },
            {
                "agent": "risk",
                "handler": None,
                "reason": "expired",
                "error": "it expired",
                "count": 1,
                "oldest": "1970-01-01T00:00:05.000+00:00",
                "newest": "1970-01-01T00:00:05.000+00:00",
            },
        ],
    }
    plain = call("ls")
    assert plain.stdout.splitlines()[0].split() == [
        *("COUNT", "AGENT", "HANDLER", "REASON", "ERROR", "OLDEST", "NEWEST")
    ]
    assert "3 dead letters in 2 groups" in plain.stdout
    assert [each["id"] for each in told("ls", "--letters")["letters"]] == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("columns", "shown"),
    [("", 500), ("80", 77), ("400", 197), ("2000", 500)],
    ids=["in a pipe", "narrow", "wide", "very wide"],
)
def test_an_error_is_never_cut_without_a_mark(
    columns: str,
    shown: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", columns or "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: bool(columns))
    error = "z" * 500
    group = DeadGroup(
        agent="risk", handler="check", reason="failed", error=error, count=1, oldest_s=0, newest_s=0
    )

    show_letters([failed("a", error=f"{error}\nand more")], 1)
    show_groups([group], 1, 1)

    told = capsys.readouterr().out
    assert told.count("z") == 2 * shown
    assert ("..." in told) == (shown < 500)
    assert "and more" not in told


def test_ten_thousand_letters_are_listed_right(rundir: Path) -> None:
    """Mixed agents, handlers, reasons and errors; each group is counted to the letter."""
    bury(
        rundir,
        *(
            failed(
                f"n{number}",
                agent=f"agent{number % 5}",
                handler=None if number % 5 == 4 else f"handler{number % 2}",
                reason=("failed", "timeout")[number % 2],
                error=f"Error{number % 10}: a\nsecond line {number}",
                at_s=float(number),
            )
            for number in range(10_000)
        ),
    )

    found = told("ls", "--limit", "1000")
    chosen = told("ls", "--agent", "agent3", "--error", "Error3", "--letters", "--limit", "7")

    assert found["total"] == 10_000
    assert [group["count"] for group in found["groups"]] == [1000] * 10
    assert chosen["total"] == 1000
    assert [each["id"] for each in chosen["letters"]] == [f"n{9993 - 10 * n}" for n in range(7)]


def test_show_tells_all_of_a_letter(rundir: Path) -> None:
    bury(rundir, failed("a", traceback_hash="8d170e44346b"))

    shown = call("show", "a")

    assert "agent    risk, handler check" in shown.stdout
    assert "reason   failed after 4 tries" in shown.stdout
    assert "ValueError: no" in shown.stdout
    assert "place    8d170e44346b: the same for all errors of the same lines" in shown.stdout
    assert '"n": 1' in shown.stdout
    assert told("show", "a")["event"]["data"] == {"n": 1}
    assert call("show", "b").exit_code == 1


def test_show_finds_the_letters_of_an_event(rundir: Path) -> None:
    """Its id is what the log line gives."""
    bury(
        rundir,
        failed("e-1/risk/check", at_s=1.0),
        failed("e-1/audit/", agent="audit", handler=None, reason="expired", at_s=2.0),
        failed("e-2/risk/check"),
        failed("e-10/risk/check"),
    )

    both, one = call("show", "e-1"), call("show", "e-2")

    ids = [line.split()[1] for line in both.stdout.splitlines() if line.startswith("letter")]
    assert ids == ["e-1/audit/", "e-1/risk/check"]
    assert [each["id"] for each in told("show", "e-1")] == ids
    assert "letter   e-2/risk/check" in one.stdout
    assert told("show", "e-2")["id"] == "e-2/risk/check"
    assert call("show", "e").exit_code == 1


@pytest.mark.parametrize("rate", ["nan", "inf", "-inf", "-1", "many"])
def test_a_replay_wants_a_rate_that_is_a_number(rundir: Path, rate: str) -> None:
    bury(rundir, failed("a"))

    refused = call("replay", "--all", "--rate", rate)

    assert refused.exit_code == 2
    assert "--rate" in refused.output
    assert told("ls")["total"] == 1


@pytest.mark.parametrize("command", ["replay", "purge"])
def test_forgetting_to_choose_does_not_mean_all(rundir: Path, command: str) -> None:
    bury(rundir, failed("a"))

    refused = call(command)
    both = call(command, "--all", "--agent", "risk")

    assert (refused.exit_code, both.exit_code) == (2, 2)
    assert "either --all, or which letters" in refused.output
    assert told("ls")["total"] == 1


def test_a_shell_with_other_settings_touches_nothing(
    rundir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second terminal that lacks the mesh's variables would empty the journal of another mesh."""
    mesh = RunDir(rundir).ensure()
    mesh.fabric.write_text(MessageBusConfig(broker_type="redis", redis_password="canary").fabric())
    bury(rundir, failed("a"))
    with mesh.acquire(mesh.lock("monitor")):
        refused = run_mesh("dlq", "purge", "--all", "--yes")
        monkeypatch.setenv("LEGION_BROKER_TYPE", "redis")
        monkeypatch.setenv("REDIS_HOST", "127.0.0.1")
        same = run_mesh("dlq", "purge", "--all", "--yes")

    assert refused.code == 78
    assert "was started on redis at 127.0.0.1:6379, database 0" in refused.err
    assert "the settings here say zmq" in refused.err
    assert "was started on" not in same.err
    monkeypatch.delenv("LEGION_BROKER_TYPE")
    monkeypatch.delenv("REDIS_HOST")
    assert told("ls")["total"] == 1


def test_a_purge_asks_and_in_a_pipe_wants_a_yes(rundir: Path) -> None:
    bury(rundir, failed("a"), failed("b", reason="expired"))

    assert call("purge", "--reason", "expired").exit_code == 2
    assert call("purge", "--reason", "expired", "--dry-run").stdout == (
        "would throw 1 dead letter away\n"
    )
    assert told("ls")["total"] == 2
    assert told("purge", "--reason", "expired", "--yes") == {"dry_run": False, "purged": 1}
    assert call("purge", "--reason", "expired", "--yes").exit_code == 1
    assert told("ls")["total"] == 1


def test_an_edit_keeps_the_rest_of_the_letter(rundir: Path) -> None:
    bury(rundir, failed("a"))

    edited = call("edit", "a", "-", stdin='{"n": 2}')
    letter_now = told("show", "a")

    assert edited.exit_code == 0
    assert letter_now["event"]["data"] == {"n": 2}
    assert letter_now["attempts"] == 4
    assert letter_now["history"][0]["error"] == 'edited; it was {"n": 1}'
    assert call("edit", "a", "no json").exit_code == 65
    assert call("edit", "a", '{"n": 1e999}').exit_code == 65
    assert call("edit", "a").exit_code == 2
    assert call("edit", "b", "{}").exit_code == 1


def write_down(folder: Path, *agents: str) -> None:
    """Write a supervisord.conf with these agents."""
    lines = [f"[program:{name}]\ncommand=python {name}.py\n" for name in agents]
    (folder / "supervisord.conf").write_text("\n".join(lines))


def test_a_replay_to_an_agent_that_is_gone_is_refused(rundir: Path, tmp_path: Path) -> None:
    """It would wait for ever, and nobody would know."""
    write_down(tmp_path, "audit", "monitor")
    bury(rundir, failed("a"), failed("b", agent="audit"))

    dry = told("replay", "--all", "--dry-run")
    refused = call("replay", "--all")

    assert dry["sent"] == [{"agent": "audit", "handler": "check", "count": 1}]
    assert refused.exit_code == 1
    assert "1 went to audit.check" in refused.stdout
    assert "refused a: no agent and no group is called 'risk'" in refused.stdout
    assert call("replay", "--all").exit_code == 1
    forced = call("replay", "--all", "--force")
    assert forced.exit_code == 0
    assert "1 went to risk.check" in forced.stdout
    assert f"risk is not running here and stands not in {tmp_path}" in forced.stderr


def test_a_group_of_the_journal_gets_its_letters(rundir: Path, tmp_path: Path) -> None:
    """Its agent may run elsewhere: on another host, or as a script of somebody's."""
    write_down(tmp_path, "audit")
    bury(rundir, failed("a"))

    async def declare() -> None:
        async with SQLiteJournal(RunDir(rundir).journal()) as journal:
            await journal.declare("risk", ["order"])

    asyncio.run(declare())
    assert call("replay", "--all").exit_code == 0


def test_a_replay_says_why_it_refuses(rundir: Path, tmp_path: Path) -> None:
    write_down(tmp_path, "risk")
    bury(
        rundir,
        failed("a"),
        letter("b", frame=b"\xff junk", handler=None, reason="undecodable"),
        failed("c", reason="unpublished", handler=None),
    )

    dry = told("replay", "--all", "--dry-run")
    done = call("replay", "--all")

    assert dry["sent"] == [{"agent": "risk", "handler": "check", "count": 1}]
    assert {each["id"] for each in dry["refused"]} == {"b", "c"}
    assert done.exit_code == 1
    assert "1 went to risk.check" in done.stdout
    assert "refused b: what came is no event (undecodable); edit it into one" in done.stdout
    assert "refused c: its type is live" in done.stdout
    assert "risk is not running here; it gets them when it starts" in done.stderr
    assert [each["id"] for each in told("ls", "--letters")["letters"]] == ["c", "b"]


def test_the_directory_can_stand_before_the_command(rundir: Path, tmp_path: Path) -> None:
    bury(tmp_path / "m", failed("a"))

    shown = CliRunner().invoke(cli, ["--dir", str(tmp_path / "m"), "dlq", "ls"])

    assert "1 dead letter in 1 group\n" in shown.stdout
