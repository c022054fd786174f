"""A short seed of what `scripts/chaos` does at any length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mesh.rundir import RunDir
from tests.chaos.chaos import chaos

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.fault
@pytest.mark.acceptance
@pytest.mark.timeout(180)
async def test_no_kill_loses_an_order_or_makes_an_effect_twice(
    own_mesh_dir: Path, tmp_path: Path
) -> None:
    report = await chaos(
        "zmq", seed=2, minutes=0.2, events=2000, folder=tmp_path, rundir=RunDir(own_mesh_dir)
    )

    assert report.problems == [], report.table()
    # A source that is killed before it has published leaves that order out: tried, never accepted
    assert report.figures["orders accepted"] >= 1900
    assert report.figures["effects"] >= 5 * report.figures["orders accepted"]
