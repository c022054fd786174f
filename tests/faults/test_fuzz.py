"""Garbage stops nobody, and all of it is counted; `scripts/fuzz` is the same at any size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mesh.rundir import RunDir
from tests.faults.fuzz import Target, fuzz

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.fault
@pytest.mark.timeout(120)
async def test_garbage_stops_nobody_and_is_all_counted(own_mesh_dir: Path, tmp_path: Path) -> None:
    async with Target(RunDir(own_mesh_dir), tmp_path) as target:
        account = await fuzz(20_000, seed=20_000, target=target)

    assert account.problems == [], account.table()
