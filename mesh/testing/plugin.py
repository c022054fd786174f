"""
The pytest plugin of the mesh: fixtures for tests of agents.

Nothing of the mesh is loaded before a test asks for it, so that other tests do not pay for it.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mesh.inprocess import InProcessMesh
    from mesh.testing.clock import FakeClock
    from mesh.testing.harness import AgentHarness


@pytest.fixture
def agent_harness() -> type[AgentHarness[Any]]:
    """Give the class of harnesses; put an agent's class into it."""
    from mesh.testing.harness import AgentHarness

    return AgentHarness


@pytest.fixture
def fake_clock() -> FakeClock:
    """Give a clock that moves by ``await fake_clock.advance(seconds)`` only."""
    from mesh.testing.clock import FakeClock

    return FakeClock()


@pytest.fixture
def memory_mesh() -> type[InProcessMesh]:
    """Give the class of meshes in memory; put agents into it."""
    from mesh.inprocess import InProcessMesh

    return InProcessMesh


@pytest.fixture
def mesh_rundir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give a private run directory of this test's own, as MESH_DIR too; removed afterwards."""
    # Sockets lie in it, and their paths end at 107 bytes: `tmp_path` is too long
    parent = min(tempfile.gettempdir(), "/tmp", key=len)  # noqa: S108 - mkdtemp makes it private
    folder = Path(tempfile.mkdtemp(prefix="lg-", dir=parent))
    monkeypatch.setenv("MESH_DIR", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
