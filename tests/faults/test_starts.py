"""No first event is lost, however early a source speaks; `scripts/starts` does it 100 times."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.starts import start_many

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.fault
@pytest.mark.timeout(120)
def test_the_first_event_of_every_fresh_mesh_is_delivered(rundir: Path) -> None:
    account = start_many(3, rundir)

    assert account.problems == [], account.table()
