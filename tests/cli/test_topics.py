"""A type that one agent takes for durable and another for live is told, whoever says it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from mesh.card import Card, write_card
from mesh.cli.agents import topics_in
from mesh.cli.main import cli
from mesh.cli.place import Place
from mesh.ledger import IN_RECEIVED, IN_SETTLED, JOURNAL, OUT_EPOCH, OUT_SEQUENCE, Ledger
from mesh.rundir import RunDir
from mesh.supervision.agreement import Agreement
from mesh.topic_map import disagreements
from tests.plumbing.processes import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from mesh.topic_map import Topic


@pytest.fixture
def home(rundir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.chdir(tmp_path)
    return RunDir(rundir).ensure()


def hears(home: RunDir, name: str, *topics: str, durable: bool) -> None:
    write_card(
        home,
        Card(
            name=name,
            pid=1,
            script="",
            hears=topics,
            says=(),
            started_at_s=0.0,
            state="ready",
            durable=topics if durable else (),
        ),
    )


def says(home: RunDir, name: str, topic: str, *, durable: bool) -> None:
    ledger = Ledger.open(home.ledger(name))
    at = ledger.out(topic)
    ledger.cells[at + OUT_SEQUENCE] = 3
    ledger.cells[at + OUT_EPOCH] = 0 if durable else 5
    ledger.close()


def heard(home: RunDir, name: str, publisher: str, topic: str, *, count: int) -> None:
    ledger = Ledger.open(home.ledger(name))
    at = ledger.link(publisher, topic)
    ledger.cells[at + IN_RECEIVED] = ledger.cells[at + IN_SETTLED] = count
    ledger.close()


def topics() -> dict[str, Topic]:
    return topics_in(Place.find(None))


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("listens", [True, False])
def test_both_sides_are_compared(home: RunDir, said: bool, listens: bool) -> None:
    says(home, "till", "shop.order", durable=said)
    hears(home, "clerk", "shop.order", durable=listens)

    topic = topics()["shop.order"]

    assert (topic.disagreement is None) == (said == listens)
    told = json.loads(CliRunner().invoke(cli, ["agents", "--json"]).stdout)
    assert told["topics"]["shop.order"]["disagreement"] == topic.disagreement
    doctor = CliRunner().invoke(cli, ["doctor", "--json"])
    rows = [row for row in json.loads(doctor.stdout)["rows"] if row["check"] == "topic"]
    assert [row["verdict"] for row in rows] == ([] if said == listens else ["fail"])
    assert doctor.exit_code == (0 if said == listens else 1)


def test_two_who_hear_are_compared_too(home: RunDir) -> None:
    hears(home, "clerk", "shop.order", durable=True)
    hears(home, "clerk@2", "shop.order", durable=False)

    assert topics()["shop.order"].disagreement == "durable for clerk, live for clerk@2"


def test_only_a_type_that_nobody_has_declared_may_be_misspelt(home: RunDir) -> None:
    says(home, "book", "portfolio.updated", durable=False)
    says(home, "book", "portfolio.updatted", durable=False)
    hears(home, "clerk", "order.executd", durable=False)

    doctor = CliRunner().invoke(cli, ["doctor", "--json"])

    rows = [row for row in json.loads(doctor.stdout)["rows"] if row["check"] == "topic"]
    assert {row["found"]: row["verdict"] for row in rows} == {
        "portfolio.updated (book): said, but heard by nobody": "ok",
        "portfolio.updatted (book): said, but heard by nobody": "warn",
        "order.executd (clerk): heard, but said by nobody yet": "warn",
    }


def test_whoever_was_heard_has_said_it(home: RunDir) -> None:
    hears(home, "clerk", "shop.order", "shop.bill", durable=True)
    hears(home, "porter", "shop.bell", "shop.door", durable=False)
    heard(home, "porter", "mesh-publish", "shop.bell", count=3)
    heard(home, "clerk", JOURNAL, "shop.order", count=2)
    heard(home, "porter", "mesh-publish", "shop.door", count=0)
    # Whose ledger tells it needs no journal
    says(home, "till", "shop.bill", durable=True)
    heard(home, "clerk", JOURNAL, "shop.bill", count=3)

    told = {name: (each.said_by, each.published) for name, each in topics().items()}

    assert told == {
        "shop.bell": (["mesh-publish"], 3),
        "shop.bill": (["till"], 3),
        "shop.door": ([], 0),
        "shop.order": (["(journal)"], 2),
    }
    doctor = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).stdout)
    found = [row["found"] for row in doctor["rows"] if row["check"] == "topic"]
    assert found == ["shop.door (porter): heard, but said by nobody yet"]


@pytest.mark.parametrize("runs", [True, False])
def test_only_agents_of_this_project_or_those_that_run_are_shown(
    home: RunDir, tmp_path: Path, runs: bool
) -> None:
    (tmp_path / "supervisord.conf").write_text("[program:clerk]\ncommand=x\n")
    for name in ("clerk", "clerk@2", "till"):
        hears(home, name, "shop.order", durable=False)
    says(home, "till", "shop.bill", durable=False)

    with home.acquire(home.lock("till")) if runs else contextlib.nullcontext():
        shown = json.loads(CliRunner().invoke(cli, ["agents", "--json"]).stdout)

    till = ["till"] if runs else []
    assert list(shown["agents"]) == ["clerk", "clerk@2", *till]
    assert shown["topics"]["shop.order"]["heard_by"] == ["clerk", "clerk@2", *till]
    assert ("shop.bill" in shown["topics"]) == runs


async def test_the_monitor_tells_it_once_of_agents_that_live(
    home: RunDir, caplog: pytest.LogCaptureFixture
) -> None:
    hears(home, "till", "shop.bill", durable=True)
    hears(home, "clerk", "shop.bill", durable=False)
    hears(home, "ghost", "shop.order", durable=False)
    says(home, "till", "shop.order", durable=True)
    with home.acquire(home.lock("till")), home.acquire(home.lock("clerk")):
        assert disagreements(home) == {"shop.bill": "durable for till, live for clerk"}
        comparing = asyncio.create_task(Agreement(home, every_s=0.01).run())
        await eventually(lambda: "shop.bill" in caplog.text)
        hears(home, "till", "shop.bell", durable=True)
        hears(home, "clerk", "shop.bell", durable=False)
        await eventually(lambda: "shop.bell" in caplog.text)
        comparing.cancel()
        await asyncio.gather(comparing, return_exceptions=True)

    assert caplog.messages == [
        f"{topic} is durable for till, live for clerk: what the ones say the others never hear;"
        " import one declaration"
        for topic in ("shop.bill", "shop.bell")
    ]
    assert disagreements(home) == {}, "none of them lives any more"
