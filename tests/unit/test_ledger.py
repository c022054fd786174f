"""The loss ledger: what outlives a process, and what does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh.ledger import SOURCES, STATES, Ledger
from mesh.ledger_views import read_ledger

if TYPE_CHECKING:
    from pathlib import Path


def test_a_successor_is_not_ready_before_it_says_so(tmp_path: Path) -> None:
    """Otherwise a killed agent's READY would stand under its successor's pid."""
    first = Ledger.open(tmp_path / "risk")
    first.set("state", STATES.index("ready"))
    first.set("sources", SOURCES.index("done"))
    first.set("beat_mono_ms", 5000)
    first.count("odd")
    first.close()

    Ledger.open(tmp_path / "risk").close()

    view = read_ledger(tmp_path / "risk")
    assert view is not None
    assert (view.state, view.sources, view.beat_mono_s) == ("absent", "none", 0.0)
    assert (view.incarnation, view.dropped) == (2, {"odd": 1}), "what was counted stays"
