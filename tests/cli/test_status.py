"""What `mesh status` says at the end, and of programs that do not run."""

from __future__ import annotations

import pytest

from mesh.cli.facts import MeshFacts
from mesh.cli.kept import KeptFacts
from mesh.cli.status import closing


def facts(*, lost: int = 0) -> MeshFacts:
    return MeshFacts(
        directory="",
        supervisor_pid=1,
        programs=[],
        links={},
        lost=lost,
        in_flight=0,
        groups={},
        downgraded=[],
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
