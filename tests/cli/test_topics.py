"""A type that one agent takes for durable and another for live is told, whoever says it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from mesh.card import Card, write_card
from mesh.cli.agents import topics_of
from mesh.cli.main import cli
from mesh.ledger import OUT_EPOCH, OUT_SEQUENCE, Ledger
from mesh.rundir import RunDir

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def home(rundir: Path) -> RunDir:
    return RunDir(rundir).ensure()


def hears(home: RunDir, name: str, topic: str, *, durable: bool) -> None:
    write_card(
        home,
        Card(
            name=name,
            pid=1,
            script="",
            hears=(topic,),
            says=(),
            started_at_s=0.0,
            state="ready",
            durable=(topic,) if durable else (),
        ),
    )


def says(home: RunDir, name: str, topic: str, *, durable: bool) -> None:
    ledger = Ledger.open(home.ledger(name))
    at = ledger.out(topic)
    ledger.cells[at + OUT_SEQUENCE] = 3
    ledger.cells[at + OUT_EPOCH] = 0 if durable else 5
    ledger.close()


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("heard", [True, False])
def test_both_sides_are_compared(home: RunDir, said: bool, heard: bool) -> None:
    says(home, "till", "shop.order", durable=said)
    hears(home, "clerk", "shop.order", durable=heard)

    topic = topics_of(home)["shop.order"]

    assert (topic.disagreement is None) == (said == heard)
    told = json.loads(CliRunner().invoke(cli, ["agents", "--json"]).stdout)
    assert told["topics"]["shop.order"]["disagreement"] == topic.disagreement
    doctor = CliRunner().invoke(cli, ["doctor", "--json"])
    rows = [row for row in json.loads(doctor.stdout)["rows"] if row["check"] == "topic"]
    assert [row["verdict"] for row in rows] == ([] if said == heard else ["fail"])
    assert doctor.exit_code == (0 if said == heard else 1)


def test_two_who_hear_are_compared_too(home: RunDir) -> None:
    hears(home, "clerk", "shop.order", durable=True)
    hears(home, "clerk@2", "shop.order", durable=False)

    assert topics_of(home)["shop.order"].disagreement == "durable for clerk, live for clerk@2"


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
