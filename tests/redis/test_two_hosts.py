"""Two supervisords, as on two hosts, are one mesh over Redis."""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.plumbing.processes import environment, processes_in, run_mesh, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.acceptance, pytest.mark.redis, pytest.mark.timeout(120)]


@pytest.fixture
def second_host() -> Iterator[Path]:
    """Give another run directory; it shares nothing with the first but the Redis."""
    folder = Path(min(tempfile.gettempdir(), "/tmp", key=len), f"lg-{secrets.token_hex(4)}")
    yield folder
    left = processes_in(folder)
    shutil.rmtree(folder, ignore_errors=True)
    assert not left, left


def _told(project: Path, settings: dict[str, str]) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(run_mesh("status", "--json", cwd=project, env=settings).out)
    return told


def test_agents_on_two_hosts_trade_with_each_other(
    project: Path, own_mesh_dir: Path, second_host: Path, redis_url: str
) -> None:
    """Market data, features and signals here; the money path there."""
    shared = {"LEGION_BROKER_TYPE": "redis", "REDIS_URL": redis_url, "LEGION_MESH_NAME": "both"}
    here = environment(**shared)
    there = environment(**shared, MESH_DIR=str(second_host))
    up = ("up", "-d", "--agents")
    try:
        money = run_mesh(*up, "risk,execution,portfolio", cwd=project, env=there)
        market = run_mesh(
            *(*up, "signals,features,market_data", "--param", "bars=3000", "--param", "speed=max"),
            cwd=project,
            env=here,
        )
        assert (money.code, market.code) == (0, 0), (money, market)

        def fills() -> int:
            programs = {row["name"]: row for row in _told(project, there)["programs"]}
            return int(programs["portfolio"]["handled"])

        wait_until(fills, within_s=30)
        other = _told(project, here)["elsewhere"]

        assert {row["name"] for row in other} == {"risk", "execution", "portfolio"}
        assert {row["directory"] for row in other} == {str(second_host)}
        assert {row["state"] for row in other} == {"ready"}
    finally:
        stopped = [run_mesh("down", cwd=project, env=each) for each in (here, there)]
    assert [each.code for each in stopped] == [0, 0], stopped
