"""`mesh journal` where no mesh runs: a journal that is there, or is not."""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner, Result

from mesh.card import Card, write_card
from mesh.cli.main import JOURNAL_COMMANDS, cli
from mesh.journal import Step
from mesh.journals.sqlite import SQLiteJournal
from mesh.rundir import RunDir
from tests.plumbing.journals import drain, numbered

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def kept(own_mesh_dir: Path) -> Path:
    """Twenty orders: `audit` has settled all of them, `risk` six."""

    async def write() -> None:
        async with SQLiteJournal(RunDir(own_mesh_dir).ensure().journal()) as journal:
            for group in ("audit", "risk"):
                await journal.declare(group, ["order"])
            await journal.append(numbered(20))
            await drain(journal, "audit", "audit")
            held = await journal.read("risk", "risk", limit=6)
            await journal.commit("risk", "risk", [Step(acks=held, state={"seen": b"6"})])

    asyncio.run(write())
    return own_mesh_dir


def call(*words: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, ["journal", *words], input=stdin)


def told(*words: str) -> Any:
    return json.loads(call(*words, "--json").stdout)


@pytest.mark.parametrize("name", JOURNAL_COMMANDS)
def test_every_command_teaches_with_an_example(name: str) -> None:
    shown = call(name, "--help")

    assert shown.exit_code == 0
    assert f"mesh journal {name}" in shown.output


def test_without_a_journal_there_is_nothing_and_none_is_made(own_mesh_dir: Path) -> None:
    assert "no groups" in call("ls").output
    assert told("trim", "--max-age", "1d") == {"forgotten": 0}
    assert call("forget", "risk", "--yes").exit_code == 1
    assert not RunDir(own_mesh_dir).journal().exists()


def test_groups_are_listed_with_what_they_owe(kept: Path, tmp_path: Path) -> None:
    (tmp_path / "supervisord.conf").write_text("[program:audit]\ncommand=python audit.py\n")
    rows = {row["group"]: row for row in told("ls")["groups"]}
    words = call("ls")

    assert (rows["audit"]["pending"], rows["risk"]["pending"]) == (0, 14)
    assert words.exit_code == 0
    assert "mesh journal forget risk" in words.stderr
    assert "forget audit" not in words.stderr


def test_trimming_forgets_only_what_all_have_settled(kept: Path) -> None:
    assert 0 < told("trim", "--max-age", "0s")["forgotten"] <= 6
    assert {row["group"]: row["pending"] for row in told("ls")["groups"]}["risk"] == 14


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("trim",), "--max-age, --max-bytes, or both"),
        (("trim", "--max-age", "soon"), "write it like 90m or 7d"),
        (("trim", "--max-bytes", "2 elephants"), "write it like 500M or 2G"),
        (("forget", "risk"), "say --yes to mean it"),
    ],
)
def test_what_is_not_meant_so_is_refused(kept: Path, words: tuple[str, ...], what: str) -> None:
    refused = call(*words)

    assert refused.exit_code == 2
    assert what in refused.stderr


def test_a_group_is_forgotten_and_what_it_owed_can_be_trimmed(kept: Path) -> None:
    assert told("forget", "risk", "--yes") == {
        "group": "risk",
        "topic": None,
        "forgotten": True,
        "pending": 14,
    }
    assert [row["group"] for row in told("ls")["groups"]] == ["audit"]
    assert call("forget", "risk", "--yes").exit_code == 1
    told("trim", "--max-bytes", "1k")
    assert told("trim", "--max-age", "0s")["forgotten"] == 0


def test_an_agent_of_this_project_is_forgotten_by_force_only(kept: Path, tmp_path: Path) -> None:
    (tmp_path / "supervisord.conf").write_text("[program:risk]\ncommand=python risk.py\n")
    refused = call("forget", "risk", "--yes")

    assert refused.exit_code == 2
    assert "stands in" in refused.stderr
    assert told("forget", "risk", "--yes", "--force")["forgotten"] is True


def test_what_is_kept_in_all_is_told(kept: Path, own_mesh_dir: Path) -> None:
    assert "kept: 20 events, " in call("ls").stdout
    shown = told("ls")
    assert shown["events"] == 20
    assert shown["bytes"] > 1000


def test_one_topic_of_a_group_is_forgotten(kept: Path, tmp_path: Path) -> None:
    """Of an agent that stands in supervisord.conf, too: it has ceased to hear it."""
    (tmp_path / "supervisord.conf").write_text("[program:risk]\ncommand=python risk.py\n")
    words = "forget", "risk", "--topic", "order"

    assert call("forget", "risk", "--topic", "fill", "--yes").exit_code == 1
    asked = call(*words)
    assert asked.exit_code == 2
    assert "14 events that risk has not settled of order would be forgotten" in asked.stderr
    assert told(*words, "--yes")["pending"] == 14
    assert [row["group"] for row in told("ls")["groups"]] == ["audit"]


def test_a_topic_that_an_agent_heard_when_it_last_ran_is_forgotten_by_force_only(
    kept: Path,
) -> None:
    write_card_of(kept, durable=("order",))
    words = "forget", "risk", "--topic", "order", "--yes"

    refused = call(*words)
    assert refused.exit_code == 2
    assert "risk heard order when it last ran" in refused.stderr
    assert told(*words, "--force")["forgotten"] is True


def test_without_a_project_around_the_conf_of_the_last_start_counts(kept: Path) -> None:
    (kept / "conf" / "supervisord.conf").write_text("[program:risk]\ncommand=python risk.py\n")

    refused = call("forget", "risk", "--yes")

    assert refused.exit_code == 2
    assert f"risk stands in {kept / 'conf' / 'supervisord.conf'}" in refused.stderr
    assert call("forget", "audit", "--yes").exit_code == 0


def test_an_agent_that_runs_is_not_forgotten_even_by_force(kept: Path) -> None:
    """A source has no consumer that the journal could know of; its lock tells."""
    write_card_of(kept, name="worker", group="risk")
    home = RunDir(kept)
    with home.acquire(home.lock("worker")):
        refused = call("forget", "risk", "--yes", "--force")

    assert refused.exit_code == 78
    assert f"cannot be forgotten while it lives: pid {os.getpid()}" in refused.stderr
    assert told("forget", "risk", "--yes", "--force")["forgotten"] is True


def test_a_terminal_is_asked_before_anything_is_forgotten(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.cli.say.is_terminal", lambda *_: True)

    refused = call("forget", "audit", stdin="n\n")
    assert refused.exit_code == 1
    assert "Forget 0 events that audit has not settled, for good?" in refused.output
    assert call("forget", "risk", stdin="y\n").exit_code == 0
    assert [row["group"] for row in told("ls")["groups"]] == ["audit"]


def write_card_of(
    kept: Path, name: str = "risk", group: str = "risk", durable: tuple[str, ...] = ()
) -> None:
    card = Card(
        name=name,
        pid=1,
        script="",
        hears=durable,
        says=(),
        started_at_s=0.0,
        state="stopped",
        group=group,
        durable=durable,
    )
    write_card(RunDir(kept), card)


def test_a_group_that_lives_is_not_forgotten(kept: Path) -> None:
    async def hold() -> Result:
        async with SQLiteJournal(RunDir(kept).journal()) as journal:
            await journal.read("risk", "risk", limit=1)
            return await asyncio.to_thread(call, "forget", "risk", "--yes")

    refused = asyncio.run(hold())

    assert refused.exit_code == 78
    assert "cannot be forgotten while it lives: risk" in refused.stderr
