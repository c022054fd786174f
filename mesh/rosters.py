"""The file in which the monitor keeps who shares live events, for its successors and for agents."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec

from mesh.replicas import Roster

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mesh.rundir import RunDir


def read_rosters(rundir: RunDir) -> dict[str, Roster]:
    """Give the rosters by group; none without a file."""
    try:
        return msgspec.json.decode(_path(rundir).read_bytes(), type=dict[str, Roster])
    except (OSError, msgspec.MsgspecError):
        return {}


def write_rosters(rundir: RunDir, rosters: Mapping[str, Roster]) -> None:
    """Replace the file in one step."""
    path = _path(rundir)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(msgspec.json.encode(rosters))
    draft.replace(path)


def _path(rundir: RunDir) -> Path:
    return rundir.path / "run" / "rosters.json"
