"""Projects and run directories for tests."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from pathlib import Path

from tests.plumbing.processes import ROOT

# What a developer's shell may hold and a test must not see
_FOREIGN = ("MESH_", "LEGION_", "REDIS_")


def copy_example(folder: Path) -> Path:
    """Make a project of the example: its agents and their supervisord.conf."""
    folder.mkdir(exist_ok=True)
    shutil.copytree(ROOT / "agents", folder / "agents", ignore=shutil.ignore_patterns("__py*"))
    shutil.copy(ROOT / "supervisord.conf", folder)
    return folder


def fresh_mesh_dir() -> Path:
    """Give a path for a run directory that nobody has yet."""
    # Sockets lie in it, and their paths end at 107 bytes
    return Path(min(tempfile.gettempdir(), "/tmp", key=len), f"lg-{secrets.token_hex(4)}")


def foreign_variables() -> list[str]:
    """Name what a developer's shell has set for meshes of its own."""
    return [
        name
        for name in os.environ
        if name.startswith(_FOREIGN) and not name.startswith("LEGION_TEST_")
    ]
