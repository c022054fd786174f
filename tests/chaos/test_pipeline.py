"""The fills of the pipeline do not depend on who was killed; `scripts/chaos --pipeline`."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from agents.market_data import synthetic
from mesh.rundir import RunDir
from tests.chaos.pipeline import ON_ZEROMQ, storm, storm_over_supervisord

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.acceptance, pytest.mark.fault, pytest.mark.timeout(240)]

on_a_cluster = [pytest.mark.redis, pytest.mark.redis_cluster]

_ROWS = 3000
#: Bars of a minute in 15 seconds: time enough to be killed again and again.
_SPEED = str(_ROWS * 60 // 15)


@pytest.fixture
def bars(tmp_path: Path) -> Path:
    lines = ["timestamp,open,high,low,close,volume"]
    for row in synthetic(11, _ROWS):
        price = (row.bid + row.ask) / 2
        moment = (row.time + timedelta(minutes=row.line)).isoformat()
        lines.append(f"{moment},{price},{price + 1},{price - 1},{price},5")
    path = tmp_path / "bars.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("fabric", "everything"),
    [
        pytest.param("zmq", False, id="zmq, signals durable"),
        pytest.param("zmq", True, id="zmq, all durable"),
        pytest.param("cluster", False, id="cluster, signals durable", marks=on_a_cluster),
    ],
)
async def test_kills_do_not_change_the_fills(
    request: pytest.FixtureRequest,
    project: Path,
    own_mesh_dir: Path,
    bars: Path,
    fabric: str,
    everything: bool,
) -> None:
    """Where all is durable anybody is killed, else those behind the signals."""
    settings = ON_ZEROMQ
    if fabric == "cluster":
        port = request.getfixturevalue("redis_cluster").ports[0]
        settings = {
            "LEGION_BROKER_TYPE": "redis",
            "REDIS_URL": f"redis://127.0.0.1:{port}",
            "LEGION_REDIS_CLUSTER": "true",
        }
    outcome = await storm(
        project,
        RunDir(own_mesh_dir),
        bars,
        settings,
        seed=5,
        times=20,
        speed=_SPEED,
        everything=everything,
    )

    assert outcome.problems == [], outcome.table()
    assert outcome.calm["fills"] > 50
    assert len(outcome.kills) == 20


async def test_a_killed_supervisord_does_not_change_the_fills(
    project: Path, own_mesh_dir: Path, bars: Path
) -> None:
    outcome = await storm_over_supervisord(project, RunDir(own_mesh_dir), bars, seed=5, times=2)

    assert outcome.problems == [], outcome.table()
