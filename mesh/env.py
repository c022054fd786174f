"""The only reader of the process environment: everything else is handed what it needs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

PARAM_PREFIX = "MESH_PARAM_"
DEFAULT_JOURNAL = "journal"


def environment() -> Mapping[str, str]:
    """Give the environment of this process, read-only by convention."""
    return os.environ


def mesh_dir() -> str:
    """Give the run directory: MESH_DIR, or `.mesh` in the current directory."""
    return os.environ.get("MESH_DIR") or ".mesh"


def journal_name() -> str:
    """Give the name of the journal in the run directory: MESH_JOURNAL, or ``journal``."""
    return os.environ.get("MESH_JOURNAL") or DEFAULT_JOURNAL


def agent_name() -> str | None:
    """Give the name this process was started under, when a supervisor named it."""
    return os.environ.get("MESH_AGENT") or None


def is_supervised() -> bool:
    """Say whether supervisord started this process."""
    return os.environ.get("MESH_SUPERVISED") == "1"


def agent_params(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Collect the agents' parameters: ``MESH_PARAM_SPEED=max`` becomes ``{"speed": "max"}``."""
    source = os.environ if environ is None else environ
    return {
        name[len(PARAM_PREFIX) :].lower(): value
        for name, value in source.items()
        if name.startswith(PARAM_PREFIX)
    }
