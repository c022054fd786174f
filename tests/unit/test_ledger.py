"""The loss ledger: what outlives a process, and what does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mesh import ledger as ledger_module
from mesh.ledger import OUT_EPOCH, OUT_SEQUENCE, SOURCES, STATES, Ledger
from mesh.ledger_views import read_ledger

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


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


def test_numbers_begin_anew_when_the_machine_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut may take the last numbers with it, and none is used twice in one epoch."""
    path = tmp_path / "mouth"
    one = Ledger.open(path)
    at = one.out("t.x")
    one.cells[at + OUT_EPOCH], one.cells[at + OUT_SEQUENCE] = 7, 5
    one.close()
    same = Ledger.open(path)
    assert (same.cells[at + OUT_EPOCH], same.cells[at + OUT_SEQUENCE]) == (7, 5)
    same.close()

    monkeypatch.setattr(ledger_module, "boot_id", lambda: 99)
    other = Ledger.open(path)
    assert (other.cells[at + OUT_EPOCH], other.cells[at + OUT_SEQUENCE]) == (0, 0)
    other.close()
